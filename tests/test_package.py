"""What is installed, copied out and documented: rows I of the fault list, README's commands, house rules."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile

import pytest
from conftest import NANO, ROOT, SCRIPTS, SMALL, WITHOUT_MIXING, encoded, fewer_shapes, picture, write_folder

README = (ROOT / "README.md").read_text()


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "-q", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    foreign = shutil.ignore_patterns(".git", "runs", ".venv", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "src", ignore=foreign)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "src")
    return next(folder.glob("*.whl"))


def test_I1_the_wheel_holds_every_script_and_common_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = [f"common/{p.name}" for p in (ROOT / "common").glob("*.py")]
    for wanted in [f"{s}.py" for s in SCRIPTS] + modules + ["common/py.typed", "common/official.json"]:
        assert wanted in names, wanted
    assert not [n for n in names if n.startswith("tests")]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Where the wheel alone is installed."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    return site


@pytest.mark.parametrize("script", SCRIPTS)
def test_I1_what_the_wheel_installs_lists_its_models_and_trains(fresh, installed, tmp_path, script):
    """`python -m SCRIPT` in a folder of the user's, where no source lies."""
    code = (
        "import importlib.util, runpy, sys;"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        f"sys.path.insert(1, {str(installed)!r}); sys.argv[0] = {script!r};"
        f"print(importlib.util.find_spec({script!r}).origin);"
        f"runpy.run_module({script!r}, run_name='__main__', alter_sys=True)"
    )
    result = fresh("-c", code, "--list-models", cwd=tmp_path)
    assert result.status == 0 and NANO[script] in result.out and not result.err, result
    assert result.out.startswith(str(installed / f"{script}.py")) and not list(tmp_path.iterdir())
    data = write_folder(tmp_path / "d", train=8, val=1)
    small = WITHOUT_MIXING if script in ("trex", "grafit") else SMALL
    result = fresh("-c", code, "--model", NANO[script], *small, "--data", data, "--out", "o", cwd=tmp_path)
    assert result.status == 0 and (tmp_path / "o/best.pt").exists(), result


@pytest.mark.parametrize("script", SCRIPTS)
def test_I2_a_script_and_common_copied_out_train(fresh, tmp_path, script):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    data = write_folder(tmp_path / "d", train=8, val=1)
    small = WITHOUT_MIXING if script in ("trex", "grafit") else SMALL
    flags = ["--model", NANO[script], *small, "--data", data, "--epochs", 1, "--warmup-epochs", 0, "--out", "o"]
    result = fresh(f"{script}.py", *flags, cwd=tmp_path)
    assert result.status == 0 and (tmp_path / "o/last.pt").exists(), result


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing_and_needs_only_torch_and_torchvision(fresh, tmp_path, script):
    """Models, augmentation and losses of a script work where common does not exist."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    model = f"{script}.build_model('{NANO[script]}', 3, 32)"
    code = f"import {script}, torch; print({model}.eval()(torch.zeros(1, 3, 32, 32)).shape)"
    result = fresh("-c", code, cwd=tmp_path)
    width = 256 if script == "grafit" else 3  # Grafit's network embeds
    assert result.status == 0 and result.out.strip() == f"torch.Size([1, {width}])" and not result.err, result


def test_I3_a_foreign_common_package_fails_with_a_clear_line(fresh, tmp_path):
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "deit3.py", tmp_path)
    # An editable install puts its own finder in front, which finds ours: take it away to see what happens without.
    code = (
        "import sys, runpy; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        "sys.argv = ['deit3.py', '--help']; runpy.run_path('deit3.py', run_name='__main__')"
    )
    for file in ("common/__init__.py", "common/run.py"):  # the second: it has modules of our names, too
        (tmp_path / file).write_text("")
        result = fresh("-c", code, cwd=tmp_path)
        assert result.status == 2 and len(result.err.strip().splitlines()) == 1, result
        assert f"tqdm, our common/ (got <module 'common' from '{tmp_path}/common" in result.err, result
    shutil.rmtree(tmp_path / "common")
    (tmp_path / "common.py").write_text("")
    result = fresh("-c", code, cwd=tmp_path)
    assert result.status == 2 and len(result.err.strip().splitlines()) == 1, result
    assert f"our common/ (got <module 'common' from '{tmp_path}/common.py'>)" in result.err, result
    (tmp_path / "common.py").write_text("these are notes")
    result = fresh("-c", code, cwd=tmp_path)
    assert result.status == 2 and "common.py, line 1" in result.err and "Traceback" not in result.err, result


def test_I5_an_older_torch_is_named(fresh, tmp_path):
    code = (
        "import torch.nn.utils, sys, runpy; del torch.nn.utils.get_total_norm;"  # new in 2.6
        f"sys.argv = ['deit3.py', '--help']; runpy.run_path('{ROOT}/deit3.py', run_name='__main__')"
    )
    result = fresh("-c", code, cwd=tmp_path, PYTHONPATH=ROOT)
    assert result.status == 2 and len(result.err.strip().splitlines()) == 1, result
    assert "get_total_norm" in result.err and "needs torch 2.6" in result.err, result


def test_results_stay_out_of_the_repository_but_the_claims():
    assert {"results/*", "!results/claims.json", "runs/"} <= set((ROOT / ".gitignore").read_text().split())


def commands() -> list[tuple[str, str]]:
    """(script, arguments) of every command line in README, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [(re.search(rf".*\b({'|'.join(SCRIPTS)})\.py (.*)", line), line) for line in lines]
    return [(m[1], m[2].split("#")[0].split("&&")[0]) for m, line in found if m and "--help" not in line]


@pytest.mark.parametrize("script, line", commands())
def test_readmes_commands_are_accepted(script, line):
    args, recipe, _ = importlib.import_module(script).parse_args(shlex.split(line))
    assert args.list_models or recipe.epochs


def test_readmes_trainings_have_batches_that_their_gpus_can_share():
    from common.data import split_batch

    found = re.findall(rf"--nproc_per_node (\d+) .*\b({'|'.join(SCRIPTS)})\.py (.*)", README)
    assert len(found) > 100
    for ranks, script, line in found:
        args, recipe, _ = importlib.import_module(script).parse_args(shlex.split(re.split("#|&&|`", line)[0]))
        if not (args.eval or args.benchmark):
            group = min(getattr(recipe, "mix_group", 1), recipe.batch_size)
            split_batch(recipe.batch_size, int(ranks), args.micro_batch, group)


def test_readmes_micro_batches_are_taken_on_8_gpus():
    from common.data import split_batch

    models = {"deit_b": "deit", "cait_s36": "cait", "resmlp_s24": "resmlp", "patchconvnet_s60": "patchconvnet"}
    rows = re.findall(r"^\| (trex )?(\w+), \d+.* \| (.*) \| \d+ \| [\d.]+, [\d.]+ \| .* \|$", README, re.M)
    assert len(rows) == 9
    for trex, model, cells in rows:
        script = "trex" if trex else models.get(model, "deit3")
        _, recipe, _ = importlib.import_module(script).parse_args(["--model", model, "--data", "x"])
        for cell in cells.split(", "):
            micro, *group = map(int, re.findall(r"\d+", cell))
            group = group[0] if group else getattr(recipe, "mix_group", 1)
            assert split_batch(recipe.batch_size, 8, micro, group)[0] == micro, (model, micro)


def test_readmes_commands_of_the_transfer_suite_are_accepted():
    from common import transfer

    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)).splitlines()
    lines = [shlex.split(line)[3:] for line in blocks if line.startswith("python -m common.transfer")]
    assert {line[0] for line in lines} == {"features", "finetuned", "compare"}
    for line in lines:
        assert transfer.parse_args(line).out
    for name, metric in transfer.SETS.items():  # the table says the metric of each
        row = next(
            r for r in README.splitlines() if f"`{name}`" in r or (name.startswith("cog") and "`cog1` to `cog5`" in r)
        )
        assert ("mean per class" in row) == (metric == "per-class"), name


def test_readme_can_be_read_before_anything_is_unfolded():
    """At most 250 lines are seen, with one picture that the repository makes."""
    seen = re.sub(r"<details>.*?</details>\n", "", README, flags=re.S).splitlines()
    assert len(seen) <= 250
    pictures = re.findall(r"!\[.*\]\((.*)\)", README)
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size < 100_000
    assert f"--show-batch {pictures[0]}`" in README


def test_readmes_map_from_sections_to_functions_is_true():
    """Every name stands in its script, every script in the map."""
    rows = re.findall(r"^\| [^|`]*`(\w+)\.py` \| (.*) \|$", README, re.M)
    rows = [(script, text) for script, text in rows if re.search(r"\d\.\d(\.\d)*[^:]*: `|the page: `", text)]
    assert sorted(script for script, _ in rows) == sorted(SCRIPTS)
    for script, text in rows:
        names = re.findall(r"`(\w+)`", text)
        assert len(names) >= 6 and not [n for n in names if not hasattr(importlib.import_module(script), n)], script


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_renamed_as_readme_says_trains_and_its_weights_load(fresh, tmp_path, script):
    """Copying out: common/ without the suite and dense prediction, the name changed in the three calls."""
    assert "the name in its three calls (`make_parser`,\n`load`, `run_script`)" in README
    calls = rf'(make_parser\(|load\(|run_script\(\s*)"{script}"'
    (tmp_path / "mine.py").write_text(re.sub(calls, r'\1"mine"', (ROOT / f"{script}.py").read_text()))
    left = shutil.ignore_patterns("__pycache__", "transfer.py", "dense.py")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=left)
    small = WITHOUT_MIXING if script in ("trex", "grafit") else SMALL
    data = write_folder(tmp_path / "d", train=8, val=1)
    flags = ["--model", NANO[script], *small, "--data", data, "--epochs", 1, "--warmup-epochs", 0, "--out", "o"]
    assert fresh("mine.py", *flags, cwd=tmp_path).status == 0
    code = "import sys, mine; sys.path.insert(0, '.'); print(mine.load_model('o/best.pt')[1])"
    result = fresh("-c", code, cwd=tmp_path)
    assert result.status == 0 and "['ant', 'bee', 'cat', 'dog']" in result.out, result


TINY_COMMANDS = [(s, line) for s, line in commands() if "shapes" in line and "DATA" not in line and "--recipe" in line]


@pytest.mark.parametrize("script, line", TINY_COMMANDS)
def test_readmes_commands_on_the_built_in_data_run(here, tmp_path, monkeypatch, script, line):
    """With less of it, and but an epoch; weights that an earlier command leaves are made."""
    monkeypatch.chdir(tmp_path)
    line = line.replace("runs/shapes_teacher/last.pt", "runs/first/last.pt")
    short = ["--epochs", 1, "--warmup-epochs", 0, "--batch-size", 32, "--workers", 0, "--device", "cpu"]
    with fewer_shapes(64, 12):
        if "--teacher-weights" in line:
            teacher = ["--model", "vit_nano", "--recipe", "shapes", *short, "--out", "runs/first"]
            assert here("deit3", *teacher).status == 0
        result = here(script, *shlex.split(line), *short)
    assert result.status == 0, result


def test_readmes_python_runs(here, tmp_path, monkeypatch):
    """What is done with a trained model, and its lines of the command line, after the first command of all."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("cat.jpg", "photos/a.jpg"):
        (tmp_path / name).write_bytes(encoded(picture(0, 1)))
    with fewer_shapes(64, 12):
        first = ["--model", "vit_nano", "--recipe", "shapes", "--epochs", 1, "--warmup-epochs", 0, "--workers", 0]
        assert here("deit3", *first, "--out", "runs/demo").status == 0
    exec(re.search(r"```python\n(import torch.*?)```", README, re.S)[1], found := {})
    assert found["logits"].shape == (1, 12) and found["tokens"].shape[2] == 96
    lines = [line for script, line in commands() if "runs/demo/best.pt" in line and ".onnx" not in line]
    assert len(lines) == 2
    for line in lines:
        assert here("deit3", *shlex.split(line), "--workers", 0).status == 0, line
    assert (tmp_path / "vit.pt2").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_has_a_command_for_every_recipe(script):
    lines = [line for name, line in commands() if name == script]
    for recipe in importlib.import_module(script).RECIPES:
        default = recipe in ("in1k", "trex", "grafit")
        assert any(f"--recipe {recipe}" in line or ("--recipe" not in line and default) for line in lines), recipe


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_recipe_field_and_flag_is_read(script):
    module = importlib.import_module(script)
    source = (ROOT / f"{script}.py").read_text() + "".join(p.read_text() for p in (ROOT / "common").glob("*.py"))
    for field in module.Recipe.__dataclass_fields__:
        assert re.search(rf"recipe\.{field}\b", source), field
    args, _, _ = module.parse_args([])
    for flag in vars(args):
        read = rf'args\.{flag}\b|"--{flag}" in sys.argv'
        assert re.search(read, source) or flag in module.Recipe.__dataclass_fields__, flag


def test_a_method_script_imports_no_other_and_common_knows_no_method():
    for script in SCRIPTS:
        nodes = ast.walk(ast.parse((ROOT / f"{script}.py").read_text()))
        imported = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not imported & (set(SCRIPTS) - {script})
    for file in (ROOT / "common").glob("*.py"):
        imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in imports for a in n.names} | {getattr(n, "module", "") or "" for n in imports}
        assert not names & {"deit", "cait", "resmlp", "patchconvnet", "grafit", "trex", "deit3"}, file


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_what_is_announced_about_things_we_call_is_an_error_and_no_other_packages_affairs_are(kind):
    """By pyproject.toml's filterwarnings: of our modules, and of torch and torchvision, whose warnings name theirs."""
    code = f"import warnings; warnings.warn('going away', {kind.__name__})"
    ours = [".".join(file.with_suffix("").parts) for file in FILES if file.parts[0] != "tests"]
    for name in (*ours, "conftest", "test_run", "torch.nn", "torchvision.io"):
        with pytest.raises(kind):
            exec(code, {"__name__": name})
    for name in ("numpy", "matplotlib.axes", "google.protobuf", "sklearn.common", "scipy.deit"):
        with warnings.catch_warnings(record=True) as seen:
            exec(code, {"__name__": name})
        assert [w.category for w in seen] == [kind]  # shown in pytest's summary


# ---- Sizes -----------------------------------------------------------------------------------------------------------

LONGEST = {"deit3": 720, "deit": 620, "trex": 450, "cait": 850}  # lines of a script, where not 800


def functions(source: str) -> list[tuple[str, int]]:
    """(name, lines) of every function, methods and inner ones included."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(f.name, f.end_lineno - f.lineno + 1) for f in found]


FILES = [p.relative_to(ROOT) for part in ("", "common/", "tests/") for p in sorted(ROOT.glob(f"{part}*.py"))]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_lines_fit_on_a_screen_and_so_do_functions(file):
    source = (ROOT / file).read_text()
    assert not [number for number, line in enumerate(source.splitlines(), 1) if len(line) > 120]
    if file.parent.name != "tests":
        assert not [f for f in functions(source) if f[1] > (60 if f[0] == "train" else 50)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_method_and_little_else(script):
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    banner = next(number for number, line in enumerate(lines) if line.startswith("# ---- Training"))
    assert len(lines) <= LONGEST.get(script, 800)
    assert len(lines) - banner <= (220 if script == "grafit" else 130)
    imports = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module.split(".")[0] == "common"
    ]
    assert len({alias.name for n in imports for alias in n.names}) <= 12


def test_common_is_thin():
    lines = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "common").glob("*.py")}
    assert lines["transfer.py"] <= 480
    # 2,700 before load_model, --predict, --export, official files, the recipe own, parts of the classes, an index that
    # 14 million images can be opened by, one writer per folder across hosts, rankings shared by the ranks
    assert sum(count for name, count in lines.items() if name not in ("transfer.py", "dense.py")) <= 3234
