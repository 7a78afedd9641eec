"""Writing and reading checkpoints: rows C and D of the fault list."""

import argparse
import datetime
import errno
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import NANO, ROOT, SCRIPTS, SMALL, TINY, WITHOUT_MIXING, load, same_training, start, wait_until
from safetensors.torch import save_file
from test_cli import refused

import deit3
from common import checkpoint
from common.errors import RunError, UserError

CONTENT = {"model": {"w": torch.arange(50_000.0)}, "epoch": 3}

SAVE_FOR_EVER = """
import sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from common import checkpoint
for n in range(10**9):
    checkpoint.save(
        {{"model": {{"w": torch.full((100_000,), float(n))}}, "n": n}}, Path({out!r}) / "last.pt",
        keep=Path({out!r}) / "previous.pt"
    )
    Path({out!r}, "done").write_text(str(n))
"""


def test_C1_C5_a_kill_at_any_moment_of_a_write_loses_nothing(tmp_path):
    """50 kills in 5 processes would start torch 50 times; instead the writer is forked, at 40 random moments."""
    for attempt in range(40):
        pid = os.fork()
        if pid == 0:
            try:
                exec(SAVE_FOR_EVER.format(root=str(ROOT), out=str(tmp_path)), {})
            finally:
                os._exit(1)
        wait_until(lambda: (tmp_path / "done").exists())
        random.seed(attempt)
        import time

        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        text = (tmp_path / "done").read_text()
        newest = checkpoint.load(tmp_path / "last.pt", "--resume")
        assert (newest["model"]["w"] == newest["n"]).all()
        if text:
            assert newest["n"] - int(text) in (0, 1)
        (tmp_path / "done").unlink()


def test_C2_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(CONTENT, path)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*last.pt.*needs about \d+ bytes, \d+ are free.*intact"):
            checkpoint.save(CONTENT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_C3_an_output_folder_that_cannot_be_written(deit3_here, tmp_path, folder):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "sub", tmp_path / "file", Path("/proc/nothing")):
        refused(deit3_here(*TINY, "--data", folder, "--out", out), f"--out {out}", "cannot be written")


ENTRIES = (
    "model ema optimizer scaler epoch step best rng recipe data versions seed method model_name world_size loss_sum"
    " loss_count skipped_steps log_bytes"
).split()


def test_C7_the_file_loads_without_our_code(deit3_here, fresh, tmp_path, folder):
    assert deit3_here(*TINY, "--data", folder, "--ema", 0.9, "--out", tmp_path / "o").status == 0
    code = "import sys, torch; print(sorted(torch.load('o/last.pt', weights_only=True)), 'common' in sys.modules)"
    result = fresh("-c", code, cwd=tmp_path)
    assert result.status == 0 and result.out.strip().endswith("False"), result
    for key in (*ENTRIES, "format"):
        assert f"'{key}'" in result.out, key


def test_C8_nothing_may_be_missing(deit3_here, tmp_path, folder):
    command = [*TINY, "--data", folder, "--ema", 0.9, "--out", tmp_path / "o"]
    assert deit3_here(*command).status == 0
    whole = load(tmp_path / "o/last.pt")
    for key in ENTRIES:
        torch.save({k: v for k, v in whole.items() if k != key}, tmp_path / "cut.pt")
        result = deit3_here(*command[:-1], tmp_path / f"r_{key}", "--resume", tmp_path / "cut.pt")
        assert result.status == 2 and "Traceback" not in result.err, (key, result)
        if isinstance(whole[key], dict):  # there, but empty
            torch.save(whole | {key: {}}, tmp_path / "cut.pt")
            refused(deit3_here(*command[:-1], tmp_path / f"e_{key}", "--resume", tmp_path / "cut.pt"), "--resume")


def test_C9_a_slice_is_stored_without_its_parent(tmp_path):
    checkpoint.save({"model": {"row": torch.zeros(1000, 1000)[:1]}}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 20_000


@pytest.mark.parametrize(
    "value", [argparse.Namespace(a=1), Path("x"), torch.nn.Linear(1, 1), object()], ids=lambda v: type(v).__name__
)
def test_C7_other_types_are_refused_when_written(tmp_path, value):
    with pytest.raises(TypeError, match="may not hold"):
        checkpoint.save({"model": {}, "x": value}, tmp_path / "x.pt")


def test_G4_weights_that_are_not_finite_replace_nothing(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(CONTENT, path)
    with pytest.raises(RunError, match="not finite, e.g. w"):
        checkpoint.save({"model": {"w": torch.tensor([1.0, float("nan")])}}, path)
    with pytest.raises(RunError, match="not finite, e.g. w"):
        checkpoint.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.tensor([1.0, float("inf")])}}, path)
    assert load(path)["epoch"] == 3


# ---- Reading ---------------------------------------------------------------------------------------------------------


def cut(n):
    return lambda data: data[: n if n >= 0 else len(data) + n]


def flip(data):
    at = data.index(b"\x00\x00\x80\x3f") + 40_000  # inside the tensor
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [cut(0), cut(10), cut(100_000), cut(-10), lambda d: b"<html>not found</html>", flip],
    ids=["0", "10", "half", "-10", "html", "one bit"],
)
def test_D1_D2_damaged_files_are_recognised(tmp_path, damage):
    checkpoint.save(CONTENT, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(damage((tmp_path / "x.pt").read_bytes()))
    with pytest.raises(UserError, match=f"damaged checkpoint {tmp_path / 'x.pt'}"):
        checkpoint.load(tmp_path / "x.pt", "--resume")


def test_D1_automatic_resume_falls_back_to_the_previous_file(deit3_here, tmp_path, folder):
    command = [*TINY, "--data", folder, "--epochs", 3]
    assert deit3_here(*command, "--out", tmp_path / "a").status == 0
    assert deit3_here(*command, "--out", tmp_path / "b").status == 0
    data = (tmp_path / "b/last.pt").read_bytes()
    (tmp_path / "b/last.pt").unlink()  # best.pt may be a link to it
    (tmp_path / "b/last.pt").write_bytes(data[: len(data) // 2])
    result = deit3_here(*command, "--out", tmp_path / "b", "--resume")
    assert result.status == 0 and "damaged checkpoint" in result.out, result
    assert "resumed from previous.pt at epoch 1" in result.out, result
    assert same_training(tmp_path / "a", tmp_path / "b")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_D3_a_malicious_file_runs_nothing(tmp_path, zipped):
    torch.save({"model": Evil(tmp_path / "pwned")}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused|damaged"):
        checkpoint.load(tmp_path / "x.pt", "--weights")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(UserError, match="refused|damaged"):
        checkpoint.load(tmp_path / "y.pt", "--weights")
    assert not (tmp_path / "pwned").exists()
    assert not subprocess.run(
        ["grep", "-rn", "weights_only=False", "--include=*.py", str(ROOT / "common"), str(ROOT / "deit3.py")],
        capture_output=True
    ).stdout


@pytest.mark.parametrize("value, kind", [
    (np.float64(1), r"numpy\S+scalar"), (Path("/data"), r"pathlib\S*Path"), (np.zeros(2), r"numpy\S+_reconstruct"),
    (argparse.Namespace(lr=np.float32(1)), r"numpy\S+scalar"), (datetime.date(2020, 1, 1), "datetime.date"),
    (Evil("/nowhere"), "posix.system")
])
def test_D3_what_is_refused_is_named(tmp_path, value, kind):
    torch.save({"model": {}, "args": value}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"refused, holds a {kind}, which could run code; .*torch.save"):
        checkpoint.load(tmp_path / "x.pt", "--weights")


def test_D3_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    torch.save({"model": {"x": torch.zeros(10**6)}}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoint.load(tmp_path / "y.pt", "--weights")


@pytest.mark.parametrize("error, said", [
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"), (MemoryError(), "not fit into memory")
])
def test_a_whole_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, error, said):
    checkpoint.save(CONTENT, tmp_path / "x.pt")
    monkeypatch.setattr(zipfile, "is_zipfile", mock.Mock(side_effect=error))  # to root nothing is forbidden
    with pytest.raises(UserError, match=f"--weights .*x.pt: .*{said}"):
        checkpoint.load(tmp_path / "x.pt", "--weights")


@pytest.mark.parametrize("unusual", [
    lambda x: x.to_sparse(), lambda x: x.cfloat(), lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
])
def test_D5_tensors_of_another_kind_are_named(unusual):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="--weights x: .*1 not of plain numbers, e.g. weight"):
        checkpoint.load_weights(model, {**model.state_dict(), "weight": unusual(torch.zeros(2, 2))}, "--weights x")


def test_D4_another_architecture(deit3_here, tmp_path, folder):
    assert deit3_here(*TINY, "--data", folder, "--out", tmp_path / "o").status == 0
    other = [*TINY, "--model", "vit_ti", "--data", folder]
    refused(
        deit3_here(*other, "--resume", tmp_path / "o/last.pt", "--out", tmp_path / "p"),
        "holds deit3 vit_nano, you asked for deit3 vit_ti"
    )
    refused(deit3_here(*other, "--weights", tmp_path / "o/last.pt", "--out", tmp_path / "q"), "vit_nano")


@pytest.mark.parametrize("script", SCRIPTS)
def test_D4_another_method(here, tmp_path, folder, script):
    """Also where it keeps more than the file has, as Grafit its memory."""
    other = "cait" if script != "cait" else "deit"
    small = ["--recipe", "shapes", "--img-size", 32, "--batch-size", 16, "--workers", 0, "--data", folder]
    torch.save({"method": other, "model_name": f"{other}_nano", "model": {}, "optimizer": {}}, tmp_path / "x.pt")
    resumed = here(script, "--model", NANO[script], *small, "--resume", tmp_path / "x.pt", "--out", tmp_path / "o")
    refused(resumed, f"holds {other} {other}_nano, you asked for {script} {NANO[script]}")


@pytest.mark.parametrize("wrap", [
    dict, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    lambda s: {f"model.{k}": v for k, v in s.items()}
])
def test_D5_wrappers_are_taken_off(wrap):
    state = deit3.build_model("vit_nano", 4, 32).state_dict()
    assert checkpoint.weights(wrap(state)).keys() == state.keys()


def test_D5_keys_that_do_not_fit_are_counted():
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(
        UserError, match="8 keys missing, e.g. 0.bias, 0.weight, 1.bias, 1.weight, 2.bias; 1 keys not known, e.g. other"
    ):
        checkpoint.load_weights(model, {"other": torch.zeros(1)}, "--weights x")
    with pytest.raises(UserError, match=r"1 shapes differ, e.g. 0.weight \(3, 3\) for \(2, 2\)"):
        checkpoint.load_weights(model, {**model.state_dict(), "0.weight": torch.zeros(3, 3)}, "--weights x")


def test_D6_D7_D12_an_official_file_in_half_precision_is_loaded_and_resized(deit3_here, tmp_path, folder):
    state = deit3.build_model("vit_nano", 1000, 64, layer_scale=1.0).half().state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=1), "epoch": 1}, tmp_path / "official.pth")
    result = deit3_here(*TINY, "--data", folder, "--weights", tmp_path / "official.pth", "--out", tmp_path / "o")
    assert result.status == 0, result
    assert "weights in float16 loaded into float32" in result.out
    assert "position embedding resized to 4 x 4 patches" in result.out
    assert "new head: the checkpoint has 1000 classes" in result.out
    assert load(tmp_path / "o/last.pt")["model"]["pos_embed"].dtype == torch.float32


def test_D12_safetensors(deit3_here, tmp_path, folder, monkeypatch):
    state = deit3.build_model("vit_nano", 4, 32).state_dict()
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    run = [*TINY, "--data", folder, "--eval", "--weights", file]
    torch.save(state, tmp_path / "model.pt")
    result, expected = deit3_here(*run), deit3_here(*run[:-1], tmp_path / "model.pt")
    assert result.status == expected.status == 0 and result.out == expected.out, result
    file.write_bytes(file.read_bytes()[:-10])
    refused(deit3_here(*run), "damaged checkpoint", "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(deit3_here(*run), "pip install safetensors")


def test_D8_weights_are_no_run_to_resume(deit3_here, tmp_path, folder):
    torch.save({"model": deit3.build_model("vit_nano", 4, 32).state_dict()}, tmp_path / "w.pt")
    refused(
        deit3_here(*TINY, "--data", folder, "--resume", tmp_path / "w.pt", "--out", tmp_path / "o"),
        "holds weights only", "--weights"
    )


@pytest.mark.parametrize("script", ["deit3", "deit", "trex"])  # LAMB, AdamW, SGD
def test_D8_an_optimizers_state_of_another_size_is_no_run_to_resume(here, tmp_path, folder, script):
    small = SMALL if script == "deit3" else [*WITHOUT_MIXING, "--clip-grad", 1] if script == "deit" else WITHOUT_MIXING
    command = ["--model", NANO[script], *small, "--data", folder, "--out"]
    stop = ["--epochs", 2, "--warmup-epochs", 1]
    assert here(script, *command, tmp_path / "o", *stop).status == 0
    whole = load(tmp_path / "o/last.pt")
    state = whole["optimizer"]["state"]
    kept = [key for key in state[0] if key != "step"]
    first = {0: {key: value for key, value in state[0].items() if key == "step"}}
    for name, broken in {
        "smaller": {i: {k: v.flatten()[:1].clone() for k, v in s.items()} for i, s in state.items()},
        "transposed": {i: {k: v.T.contiguous() if v.ndim == 2 else v for k, v in s.items()} for i, s in state.items()},
        "none": {}, "one is missing": {i: s for i, s in state.items() if i}, "its moments are missing": state | first,
        "not tensors": {i: {k: 0.0 for k in s} for i, s in state.items()}, "a list": [0],
    }.items():
        assert kept, name
        torch.save(whole | {"record": None, "optimizer": whole["optimizer"] | {"state": broken}}, tmp_path / "x.pt")
        result = here(script, *command, tmp_path / "p", *stop, "--resume", tmp_path / "x.pt")
        refused(result, "its optimizer state does not fit", "try --weights")
    torch.save(whole | {"record": None}, tmp_path / "x.pt")
    assert here(script, *command, tmp_path / "p", *stop, "--resume", tmp_path / "x.pt").status == 0


def test_D10_a_newer_format_is_refused(tmp_path):
    torch.save({"model": {}, "format": 99}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "x.pt", "--resume")


def test_D11_paths_that_are_no_files(tmp_path):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "none.pt", "no such file")):
        with pytest.raises(UserError, match=message):
            checkpoint.load(path, "--weights")


def test_C5_best_is_not_overwritten_by_a_worse_epoch_after_resume(deit3_here, tmp_path, folder, monkeypatch):
    import common.evaluate

    scores = iter([50.0, 20.0, 20.0, 30.0])  # epoch 1 is evaluated again by the resumed run
    monkeypatch.setattr(common.evaluate, "evaluate", lambda *a, **k: {"top1": next(scores), "top5": 0.0, "loss": 1.0})
    command = [*TINY, "--data", folder, "--out", tmp_path]
    assert deit3_here(*command).status == 0
    best = load(tmp_path / "best.pt")["model"]["head.weight"]
    assert deit3_here(*command, "--epochs", 3, "--resume", "--allow-changes").status == 0
    assert torch.equal(best, load(tmp_path / "best.pt")["model"]["head.weight"])


def test_a_checkpoint_holds_the_record_of_its_own_weights_or_none(deit3_here, tmp_path, folder, monkeypatch):
    import common.evaluate

    # epoch 1 is evaluated again by the run that goes on, epoch 2 after the crash
    scores = iter([50.0, 20.0, 20.0, 70.0, 70.0, 60.0])
    monkeypatch.setattr(common.evaluate, "evaluate", lambda *a, **k: {"top1": next(scores), "top5": 0.0, "loss": 1.0})
    command = [*TINY, "--data", folder, "--out", tmp_path]

    def held(name) -> tuple:
        content = load(tmp_path / name)
        return content["epoch"], content["best"], content["record"] and content["record"]["val_top1"]

    assert deit3_here(*command).status == 0  # the first epoch is the best: its best.pt says so
    assert held("best.pt") == (0, 50.0, 50.0) and held("last.pt") == (1, 50.0, 20.0)
    assert held("previous.pt")[0] == 0  # it is not last.pt's own epoch
    more = [*command, "--epochs", 4, "--resume", "--allow-changes"]
    save = checkpoint.save

    def crash(content, path, **options):
        save(content, path, **options)
        if path.name == "best.pt":
            raise RunError("the power is gone")

    monkeypatch.setattr(checkpoint, "save", crash)
    assert deit3_here(*more).status == 1
    monkeypatch.setattr(checkpoint, "save", save)
    assert held("last.pt") == (2, 50.0, None) and held("best.pt") == (2, 70.0, 70.0)
    assert deit3_here(*more).status == 0
    assert held("best.pt") == (2, 70.0, 70.0) and held("last.pt") == (3, 70.0, 60.0)
    lacks = load(tmp_path / "last.pt").keys() - load(tmp_path / "best.pt").keys()
    assert lacks == {"optimizer", "scaler", "rng"}  # what a network in use does not need


def test_an_archive_is_what_zip_tools_can_verify(tmp_path):
    checkpoint.save(CONTENT, tmp_path / "x.pt")
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    assert start and sys.executable
