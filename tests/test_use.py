"""A trained network in use: what the head is given, export, loading, prediction."""

import hashlib
import http.server
import importlib
import io
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import NANO, ROOT, SCRIPTS, SMALL, WITHOUT_MIXING, reference, write_folder
from PIL import Image
from test_cli import refused
from torchvision.models.feature_extraction import create_feature_extractor

import deit3
from common import checkpoint, models
from common.data import split_batch
from common.errors import UserError
from common.images import eval_transform, from_pil
from common.script import fit_own

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(script: str, name: str | None = None, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {} if script in ("grafit", "trex") else {"img_size": 32}
    return importlib.import_module(script).build_model(name or NANO[script], 4, **size, **options).eval()


HEADS = [  # script, model, options, shape of one image's features, logits of features
    ("deit", "deit_nano", {}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("deit", "deit_nano_distilled", {}, (18, 96), lambda m, x: (m.head(x[:, 0]) + m.head_dist(x[:, 1])) / 2),
    ("deit3", "vit_nano", {}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("cait", "cait_nano", {}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("cait", "cait_nano_distilled", {}, (18, 96), lambda m, x: (m.head(x[:, 0]) + m.head_dist(x[:, 1])) / 2),
    ("resmlp", "resmlp_nano", {}, (16, 96), lambda m, x: m.head(x.mean(1))),
    ("resmlp", "resmlp_nano", {"pooling": "class-mlp"}, (17, 96), lambda m, x: m.head(x[:, 0])),
    (
        "patchconvnet", "patchconvnet_nano", {"pooling": "average"}, (4, 4, 64),
        lambda m, x: m.head(m.norm(x.mean((1, 2)))),
    ),
]


@pytest.mark.parametrize("script, name, options, shape, head", HEADS)
@torch.no_grad()
def test_forward_features_are_what_the_head_is_given(script, name, options, shape, head):
    model = build(script, name, **options)
    features = model.forward_features(IMAGES)
    assert features.shape == (5, *shape)
    torch.testing.assert_close(head(model, features), model(IMAGES))


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_exported_programs_take_any_batch(script):
    model = build(script)
    old = torch.__version__.startswith("2.6")  # it needs an upper bound and no tracing of Python
    options, batch = ({"strict": False}, {"max": 4096}) if old else ({}, {})
    shapes = ({0: torch.export.Dim("b", **batch)},)
    program = torch.export.export(model, (IMAGES[:2],), dynamic_shapes=shapes, **options).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(program(IMAGES[:count]), model(IMAGES[:count]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """trained(SCRIPT): best.pt of one epoch on `folder`."""
    made = {}

    def make(script, here):
        if script not in made:
            small = WITHOUT_MIXING if script in ("trex", "grafit") else SMALL
            out = tmp_path_factory.mktemp(script)
            flags = ["--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--out", out]
            result = here(script, "--model", NANO[script], *small, *flags)
            assert result.status == 0, result
            made[script] = out / "best.pt"
        return made[script]

    return make


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_trained_model_is_loaded_with_its_classes_and_transform(script, trained, here, folder):
    """transform takes pictures and paths; the model gives what the script's own evaluation computes."""
    module, weights = importlib.import_module(script), trained(script, here)
    model, classes, transform = module.load_model(str(weights))
    assert classes == ["ant", "bee", "cat", "dog"] and not model.training
    file = folder / "val/bee/bee_000.jpg"
    image = transform(file)
    assert torch.equal(image, transform(str(file))) and image.shape == (3, 32, 32) and image.dtype == torch.float32
    picture = Image.open(file)
    pixels = eval_transform(from_pil(picture), (32, 32), checkpoint.load(weights, "")["recipe"]["eval_crop_ratio"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(transform(picture), (pixels / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    outputs = model(image[None]).detach()
    assert outputs.shape == (1, 4) if script != "grafit" else outputs.norm().item() == pytest.approx(1, rel=1e-5)


def predicted(out: str) -> dict[str, list[str]]:
    """{file: class, probability, class, probability, ...} of the lines on standard output that name a picture."""
    lines = [line.split("  ") for line in out.splitlines() if ".jpg" in line]
    return {name: [word for pair in pairs for word in pair.rsplit(" ", 1)] for name, *pairs in lines}


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "grafit"])
def test_predictions_are_the_loaded_models(script, trained, here, folder, tmp_path):
    """Of a folder and of single files; a file that is no image is named, the others are answered, the status is 1."""
    weights = trained(script, here)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    paths = ["--predict", folder / "val/ant", tmp_path / "broken.jpg", folder / "val/dog/dog_001.jpg"]
    flags = ["--model", NANO[script], "--weights", weights, "--workers", 0, "--device", "cpu", "--top", 3]
    result = here(script, *flags, *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "broken.jpg: not an image of a known format\n" in result.err, result
    assert "1 of 7 images" in result.err
    found = predicted(result.out)
    assert list(found) == [str(folder / f"val/ant/ant_{i:03d}.jpg") for i in range(5)] + [str(paths[-1])]
    records = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    model, classes, transform = importlib.import_module(script).load_model(str(weights))
    for (file, answers), record in zip(found.items(), records):
        with torch.no_grad():
            shares, best = model(transform(file)[None]).softmax(1)[0].topk(3)
        assert answers[::2] == [classes[i] for i in best] == list(record["classes"]) and record["file"] == file
        assert [float(share) for share in answers[1::2]] == pytest.approx(shares.tolist(), abs=1e-4)
    assert here(script, *flags, "--predict", folder / "val/ant").status == 0


def test_grafit_predicts_by_its_neighbours(trained, here, folder, tmp_path):
    """Among the training images, whose nearest one is an image of them itself."""
    flags = ["--model", NANO["grafit"], "--weights", trained("grafit", here), "--workers", 0, "--device", "cpu"]
    result = here("grafit", *flags, "--data", folder, "--predict", folder / "train/cat", "--top", 1)
    answers = predicted(result.out)
    assert result.status == 0 and len(answers) == 16, result
    assert sum(a[0] == "cat" for a in answers.values()) > 8  # a vote of 20: chance is 4


def test_what_cannot_be_predicted_is_refused(trained, here, tmp_path):
    flags = ["--model", NANO["deit3"], "--weights", trained("deit3", here), "--workers", 0]
    for path, said in ((tmp_path / "none", "no such file or folder"), (tmp_path, "holds no images")):
        result = here("deit3", *flags, "--predict", path)
        assert result.status == 2 and said in result.err and str(path) in result.err
    result = here("deit3", *flags, "--predict", tmp_path, "--top", 0)
    assert result.status == 2 and "--top 0: must be 1 or more" in result.err


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_exported_answers_as_the_network_for_any_batch(script, kind, trained, here, tmp_path):
    """Also at a resolution that it was not trained at, where that is not in its weights."""
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        if torch.__version__ < "2.7" and script in ("grafit", "resmlp", "trex"):
            pytest.skip("torch 2.6 has no ONNX for BatchNorm, nor for addcmul in a batch of any size")
    weights, size = trained(script, here), 32 if script == "resmlp" else 48
    flags = ["--model", NANO[script], "--weights", weights, "--img-size", size, "--device", "cpu"]
    file = tmp_path / "new" / f"net.{kind}"
    result = here(script, *flags, "--export", file)
    assert result.status == 0 and f"wrote {file}: images (batch, 3, {size}, {size})" in result.out, result
    model = importlib.import_module(script).load_model(str(weights))[0]
    if script not in ("grafit", "trex", "patchconvnet", "resmlp"):  # a position embedding is resized
        content = checkpoint.load(weights, "")
        model = models.from_checkpoint(content, "", (size, size), lambda line: None).eval()
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    if kind == "pt2":
        answer = torch.export.load(file).module()
    else:
        session = onnxruntime.InferenceSession(file)
        name = session.get_inputs()[0].name
        answer = lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])  # noqa: E731
    for count in (1, 2, 5):
        with torch.no_grad():
            torch.testing.assert_close(answer(images[:count]), model(images[:count]), atol=1e-4, rtol=1e-3)


def test_what_cannot_be_exported_is_told_in_one_line(trained, here, tmp_path, monkeypatch):
    weights = trained("deit3", here)
    flags = ["--model", NANO["deit3"], "--weights", weights, "--device", "cpu", "--export"]

    def without_packages(*args, **options):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(torch.onnx, "export", without_packages)
    for file, said in (
        (tmp_path / "a.tflite", "must end in .onnx or .pt2"), (tmp_path / "a.onnx", "pip install onnx onnxscript"),
        ("/proc/none/a.pt2", "cannot be written"),
    ):
        result = here("deit3", *flags, file)
        assert result.status == 2 and f"--export {file}: " in result.err and said in result.err, result
        assert len(result.err.strip().splitlines()) == 1

    def unable(*args, **options):
        raise RuntimeError("Failed. This is \x1b[96mstep 3/3\x1b[0m") from ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", unable)
    result = here("deit3", *flags, tmp_path / "a.onnx")
    assert "cannot be written (no such operator)" in result.err and "\x1b" not in result.err, result


# ---- Images of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, world, flags, batch, epochs, warmup", [
    (60, 1, [], 16, 266, 13), (10, 1, [], 8, 300, 15), (300, 1, [], 32, 106, 5), (300, 8, [], 32, 106, 5),
    (2048, 1, [], 256, 125, 6), (60_000, 1, [], 256, 30, 1), (60_000, 3, [], 192, 30, 1), (60, 8, [], 16, 266, 13),
    (60, 1, ["--batch-size", "30", "--epochs", "2"], 30, 2, 0), (60_000, 1, ["--epochs", "100"], 256, 100, 5),
])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_recipe_for_own_images_fits_their_number(script, images, world, flags, batch, epochs, warmup, monkeypatch):
    monkeypatch.setattr("common.script.open_data", lambda *args, **options: {"train": range(images)})
    args, recipe, paper = importlib.import_module(script).parse_args(["--recipe", "own", "--data", "x", *flags])
    run = SimpleNamespace(args=args, recipe=recipe, paper=paper, world=world, first=lambda f: f())
    fit_own(run)
    assert (run.recipe.batch_size, run.recipe.epochs, run.recipe.warmup_epochs) == (batch, epochs, warmup)
    micro, accumulation = split_batch(batch, world, None, min(getattr(run.recipe, "mix_group", 1), batch))
    assert micro * accumulation * world == batch <= images and micro > 1
    if not flags:
        own = importlib.import_module(script).RECIPES["own"]  # its rate: at 256 images
        steps = 30 * 60_000 / batch if images == 60_000 and own.optimizer in ("sgd", "nesterov") else 1000
        rate = own.lr * (batch / 256 * steps / 1000) ** 0.5
        assert run.recipe.lr == pytest.approx(rate) and run.recipe == run.paper


@pytest.mark.parametrize("script", ["deit", "deit3", "cait", "patchconvnet"])  # ResMLP's norm asks for a device's type
def test_torchvision_extracts_features(script):
    """By torch.fx, which follows no branch that depends on an image; with stochastic depth, in both modes."""
    model = build(script, drop_path=0.5)
    extract, logits = create_feature_extractor(model, ["head"]), model(IMAGES)
    assert torch.equal(extract.eval()(IMAGES)["head"], logits)
    assert extract.train()(IMAGES)["head"].shape == logits.shape


def test_images_of_ones_own_go_through_a_network_in_whatever_pieces_fit(monkeypatch):
    """The recipe own mixes nothing: its groups, by which a micro-batch is counted, follow the micro-batch."""
    monkeypatch.setattr("common.script.open_data", lambda *args, **options: {"train": range(60_000)})
    for micro, world in ((32, 1), (6, 1), (8, 4)):
        args, recipe, paper = deit3.parse_args(["--recipe", "own", "--data", "x", "--micro-batch", str(micro)])
        run = SimpleNamespace(args=args, recipe=recipe, paper=paper, world=world, first=lambda f: f())
        if micro == 6:
            args.batch_size = 96
        fit_own(run)
        assert split_batch(run.recipe.batch_size, world, micro, run.recipe.mix_group)[0] == micro


def test_one_learns_of_the_recipe_own_where_the_papers_does_not_fit(here, tmp_path):
    write_folder(tmp_path, train=15, val=1)
    flags = ["--model", NANO["deit3"], "--data", tmp_path, "--img-size", 32, "--out", tmp_path / "o", "--workers", 0]
    refused(here("deit3", *flags), "more than the 60 images to train on; for few: --weights FILE --recipe own")
    refused(here("deit3", *flags, "--epochs", 2), "or --recipe own")


def test_readme_says_what_every_official_file_should_score():
    readme = (ROOT / "README.md").read_text()
    found = re.findall(r"^\| `(\w+)\.py (--model .* official:\S+.*)` \| (\S.*) \|$", readme, re.M)
    said = []
    for script, line, top1 in found:
        importlib.import_module(script).parse_args([*line.split(), "--data", "x"])
        said.append((script, line, None if top1 == "not printed" else float(top1)))
    known = []
    for script, files in checkpoint.OFFICIAL.items():
        for file, (model, size, top1, *options) in files.items():
            flags = ({"img_size": size} if size != 224 else {}) | (options[0] if options else {})
            more = "".join(f" --{name.replace('_', '-')} {value}" for name, value in flags.items())
            known.append((script, f"--model {model} --eval --weights official:{file}{more}", top1))
    assert said == known and len(known) == 58


def test_official_weights_answer_by_imagenets_names(here, folder, tmp_path):
    """They only number their 1000 classes."""
    torch.save({"model": deit3.build_model(NANO["deit3"], 1000, (32, 32)).state_dict()}, tmp_path / "w.pth")
    image = next((folder / "val").rglob("*.*"))
    flags = ["--model", NANO["deit3"], "--img-size", 32, "--weights", tmp_path / "w.pth", "--workers", 0]
    result = here("deit3", *flags, "--predict", image, "--top", 1000, "--recipe", "shapes")
    assert result.status == 0 and "  tench 0." in result.out and "  goldfish 0." in result.out, result


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_few_images_of_ones_own_are_learned_from_trained_weights(script, trained, here, folder, tmp_path):
    """Without a word about batch and warm-up."""
    flags = ["--model", NANO[script], "--data", folder, "--img-size", 32, "--recipe", "own", "--workers", 0]
    result = here(script, *flags, "--out", tmp_path / "o")
    assert result.status == 2 and "--recipe own: starts from a trained network; give --weights FILE" in result.err
    flags += ["--epochs", 2, "--weights", trained(script, here), "--device", "cpu"]
    result = here(script, *flags, "--out", tmp_path / "o")
    assert result.status == 0 and "batch    16 = " in result.out and "steps    2 epochs x 4" in result.out, result
    assert "none of the paper's" in result.out and (tmp_path / "o/best.pt").exists()
    result = here(script, *flags, "--out", tmp_path / "o", "--resume")
    assert result.status == 0 and "it is complete" in result.out, result


# ---- Official files --------------------------------------------------------------------------------------------------


def test_the_official_files_are_the_references():
    """Every file, address, model, size and printed accuracy."""
    for script in SCRIPTS:
        files = checkpoint.OFFICIAL.get(script, {})
        mine = {f"{checkpoint.OFFICIAL_FILES}/{name}.pth": row for name, row in files.items()}
        theirs = [f for f in reference("official_weights")["files"] if f["script"] == script]
        expected = {f["url"]: [f["model"], f["img_size"], f["top1"], *filter(None, [f.get("options")])] for f in theirs}
        assert mine == expected


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that stands for the official address, and what was asked of it; downloads are kept below tmp_path."""
    asked, root = [], tmp_path / "served"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=root)

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(checkpoint, "OFFICIAL_FILES", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    yield root, asked
    server.shutdown()
    server.server_close()


def saved(model: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    return buffer.getvalue()


def test_official_weights_come_by_name_are_checked_and_kept(served, here, monkeypatch):
    import deit

    root, asked = served
    model, address = deit.build_model("deit_nano", img_size=32), checkpoint.OFFICIAL_FILES
    digest = hashlib.sha256(saved(model)).hexdigest()[:8]
    name = f"tiny_patch8-{digest}"
    files = {name: ["deit_nano", 32, 50.0], "tiny_64": ["deit_nano", 64, None]}
    monkeypatch.setitem(checkpoint.OFFICIAL, "deit", files)
    (root / f"{name}.pth").write_bytes(saved(model))
    for source in ("official:deit_nano", f"official:{name}", f"{address}/{name}.pth"):
        loaded, classes, transform = deit.load_model(source)
        assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))
        assert transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
        assert len(classes) == 1000 and classes[0] == "tench"
    assert len(asked) == 1  # then it is kept
    flags = ["--model", "deit_nano", "--workers", 0, "--device", "cpu", "--img-size"]
    result = here("deit", *flags, 32, "--weights", "official", "--benchmark")
    result = here("deit", *flags, 48, "--weights", "official", "--eval", "--data", "shapes")
    assert result.status == 2 and "no official file of deit_nano at 48" in result.err and "tiny_64" in result.err
    result = here("deit", *flags, 64, "--weights", "official", "--eval", "--data", "shapes")
    assert result.status == 2 and "tiny_64.pth: cannot be downloaded" in result.err and "404" in result.err
    kept = Path(torch.hub.get_dir(), "checkpoints", f"{name}.pth")
    at = kept.read_bytes().index(model.head.weight.detach().numpy().tobytes()[:64])
    for damage in (lambda data: data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :], lambda data: data[:999]):
        kept.write_bytes(damage(saved(model)))
        with pytest.raises(UserError, match=f"damaged checkpoint {kept}; remove it and it is fetched anew"):
            deit.load_model(f"official:{name}")
    (root / "wrong-00000000.pth").write_bytes(saved(model))
    with pytest.raises(UserError, match="invalid hash"):
        deit.load_model(f"{address}/wrong-00000000.pth")
    with pytest.raises(UserError, match="does not say which model"):
        (root / "other.pth").write_bytes(saved(model))
        deit.load_model(f"{address}/other.pth")
    with pytest.raises(UserError, match="no official file of resnet50; all: none"):
        importlib.import_module("grafit").load_model("official:resnet50")
