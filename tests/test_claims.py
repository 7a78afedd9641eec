"""tests/claims.py: its commands are ones that the scripts take; verdicts; data sets; runs that are stopped."""

import importlib
import io
import json
import os
import signal
import tarfile
import threading
import time
from pathlib import Path

import claims
import pytest


def test_every_command_is_taken_by_its_script():
    """With no flag given twice, and every file it reads made by another run."""
    for run in claims.COMMANDS:
        words = claims.command_line(run, 1, Path("/data"), Path("/runs"), workers=1)
        module, argv = (words[1], words[2:]) if words[0] == "-m" else (Path(words[0]).stem, words[1:])
        importlib.import_module(module).parse_args(argv)
        flags = [word for word in words if word.startswith("--")]
        assert len(flags) == len(set(flags)), run


def test_every_row_can_be_read_and_every_run_belongs_to_one():
    used = set()
    for row in claims.ROWS.values():
        assert row.metric in claims.METRICS
        for _, _, *sides in row.parsed():
            assert len(sides) == 2
            own = [term.split(":")[1] for side in sides for term in side.split(" - ") if ":" in term]
            assert set(own) <= set(claims.METRICS)
        used |= {run for run, _ in claims.runs_of(row, 3)}
    assert used == set(claims.COMMANDS)


def test_what_a_run_reads_is_made_before_it():
    order = claims.runs_of(claims.ROWS["distillation"], 2)
    assert order.index(("convnet", 0)) < order.index(("deit_token", 1))
    assert order.index(("deit", 0)) < order.index(("deit_of_deit", 0))
    assert len(order) == len(set(order))


@pytest.mark.parametrize(
    "differences, expected",
    [
        ([], "0 seeds yet"),
        ([1.0], "1 seed yet"),
        ([1.0, 1.2, 0.8], "order holds"),
        ([-1.0, -1.2, -0.8], "does not hold"),
        ([1.0, 1.0, 1.0], "order holds"),
        ([0.0, 0.0, 0.0], "not separable; would take more than 1000 seeds"),
        ([0.2, 1.1, 1.7], "not separable; would take 4 seeds"),  # 2.92 * 0.75 / sqrt(3) > 1.0 > 2.35 * 0.75 / 2
        ([-2.0, 2.0, 0.3], "not separable; would take more than 1000 seeds"),
    ],
)
def test_verdict(differences, expected):
    assert claims.verdict(differences) == expected


def test_data_sets_for_tuning_hold_no_test_image(tmp_path):
    for name, classes in (("cifar10", 3), ("cifar100", 12)):
        with tarfile.open(tmp_path / f"{name}_subset.tar", "w") as tar:
            coarse = {f"c{i:02d}": f"super{i // 2}" for i in range(classes)}
            files = {"coarse.json": json.dumps(coarse).encode()}
            numbered = [f"train{i}" for i in range(10)] + [f"val{i}" for i in range(2)]
            files |= {f"{name.rstrip('0123456789')}/{c}/{name}.png": b"x" for c in coarse for name in numbered}
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for tune in (False, True, True):
        data = claims.prepare_data(tmp_path, tmp_path / "work", tune)
        assert len(list((data / "five/train").iterdir())) == 10  # classes of five superclasses
        images = [file.name for file in data.rglob("*.png")]
        assert any(name.startswith("val") for name in images) is not tune
        assert len(list((data / "cifar10").rglob("*.png"))) == 3 * (10 if tune else 12)
        seen, held = ({f.name for f in (data / "five" / s / "c00").iterdir()} for s in ("train", "val"))
        assert not seen & held
        halves = [{f.name for f in (data / "five_halves" / s / "c00").iterdir()} for s in ("train", "val")]
        assert halves[0] | halves[1] == seen and not halves[0] & halves[1]


def test_a_stopped_run_goes_on(tmp_path):
    """Stopped by a signal: begun, and begun again by the same command only; then its figure is read."""
    folder, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(
        "import json, pathlib, sys, time\nhere = pathlib.Path(sys.argv[1])\nif not (here / 'saved').exists():\n"
        "    (here / 'saved').touch(); time.sleep(60)\n"
        "(here / 'log.jsonl').write_text(json.dumps({'val_top1': 12.5}) + '\\n' + json.dumps({'status': 'done'}))\n"
    )

    def interrupt():
        while not (folder / "saved").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        claims.execute(folder, [str(program), str(folder)])
    thread.join()
    assert claims.noted(folder)["state"] == "begun" and not claims.known_runs(tmp_path / "no", tmp_path)
    with pytest.raises(SystemExit, match="another command"):
        claims.execute(folder, [str(program)])
    assert claims.execute(folder, [str(program), str(folder)]) == "completed"
    assert claims.figures(folder) == {"top1": 12.5}
    assert claims.execute(tmp_path / "other", [str(program)]) == "failed"


def test_runs_whose_figures_are_kept_are_not_made_again(tmp_path):
    """Known from the results file alone; but made again if another run reads the checkpoint, or by another command."""
    row, runs, out = claims.ROWS["distillation"], tmp_path / "runs", tmp_path / "claims.json"
    everything = claims.runs_of(row, 2)
    folder = runs / "deit" / "0"
    folder.mkdir(parents=True)
    (folder / "claim.json").write_text(json.dumps({"command": [], "state": "completed", "seconds": 90}))
    (folder / "log.jsonl").write_text(json.dumps({"val_top1": 40.0}) + "\n" + json.dumps({"val_top1": 50.0}))
    claims.write(out, claims.known_runs(out, runs), seeds=2)
    elsewhere = tmp_path / "another machine"
    known = claims.known_runs(out, elsewhere)
    assert known == {"deit/0": {"command": claims.COMMANDS["deit"], "minutes": 1.5, "figures": {"top1": 50.0}}}
    assert claims.side("deit", "top1", known, 0) == 50 and claims.side("deit", "top1", known, 1) is None
    assert set(claims.runs_of(row, 2, known)) == set(everything)  # the teacher of deit_of_deit
    reads = ("deit_of_deit/0", "deit_of_deit/1")
    known |= {name: {"command": claims.COMMANDS["deit_of_deit"], "figures": {"top1": 1.0}} for name in reads}
    assert ("deit", 0) not in claims.runs_of(row, 2, known) and ("deit", 1) in claims.runs_of(row, 2, known)
    known["deit/0"]["command"] = "another"
    assert ("deit", 0) in claims.runs_of(row, 2, known)
