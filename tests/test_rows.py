"""Rows of the fault list that the soak found not met, and those on what users bring along: C6, I4, J3, J6 to J9."""

import argparse
import ctypes
import errno
import importlib
import json
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import re
import resource
import signal
import struct
import tarfile
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import (
    NANO,
    ROOT,
    SCRIPTS,
    SMALL,
    TINY,
    WITHOUT_MIXING,
    load,
    log_of,
    same_training,
    wait_until,
    write_folder,
    write_tar,
)
from test_cli import refused
from test_run import at_steps, child, free_port, ranks, start_ranks, status_of

import deit3
from common import checkpoint, sources, transfer
from common.data import make_loader, to_device
from common.errors import RunError, UserError
from common.models import on_meta
from common.sources import open_data


def test_A8_a_teacher_of_other_classes_is_refused_before_the_data_are_listed(here, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "d", train=4, val=1)  # which no other test has listed
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=7).state_dict(), tmp_path / "teacher.pth")
    monkeypatch.setattr(sources, "scan_folder", lambda path: pytest.fail("listed"))
    flags = ["--data", data, "--out", tmp_path / "o", "--distillation", "hard", "--teacher", "shufflenet_v2_x0_5"]
    result = here("deit", "--model", NANO["deit"], *SMALL, *flags, "--teacher-weights", tmp_path / "teacher.pth")
    refused(result, "7 classes, the data 4")


@pytest.mark.parametrize("world", [3, 4])
def test_E2_more_than_two_ranks_resume_bit_identically(folder, tmp_path, world):
    """A sum of three depends on its order, and DDP moves gradients within their bucket after a process' first step."""
    flags = [*TINY, "--batch-size", 12, "--mix-group", 1, "--epochs", 3, "--data", folder]
    stop = at_steps(lambda: os.kill(os.getpid(), signal.SIGTERM), [2])
    assert ranks(world, [*flags, "--out", tmp_path / "whole"], tmp_path) == [0] * world
    assert ranks(world, [*flags, "--out", tmp_path / "torn"], tmp_path, patch=stop) == [143] * world
    assert ranks(world, [*flags, "--out", tmp_path / "torn", "--resume"], tmp_path) == [0] * world
    assert same_training(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.parametrize("world, workers, pause", [(1, 1, 1), (1, 2, 1), (1, 2, 0), (2, 1, 1), (2, 2, 0)])
def test_B24_a_worker_killed_as_by_the_memory_killer_is_told_in_one_line(folder, tmp_path, world, workers, pause):
    """torch says so from a signal handler, wherever the run is, or where the run waits for it. Nothing stays."""

    def kill():
        if os.environ["RANK"] == "0":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(pause)

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", workers, "--timeout", 30, "--epochs", 9]
    pids = start_ranks(world, flags, tmp_path, free_port(), at_steps(kill, [1]))
    assert [status_of(pid, 30) for pid in pids] == [1] * world
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.killpg(pid, 0)
                time.sleep(0.05)
    said = (tmp_path / "rank0.log").read_text()
    assert "Traceback" not in said and said.count("error") == 1, said
    assert "error: a data loading worker died" in said and "memory" in said, said
    assert world == 1 or "lost contact" in (tmp_path / "rank1.log").read_text()


class Dies:
    """Samples that are there, then kill the worker as soon as a file is."""

    def __init__(self, file):
        self.file = file

    def __getitems__(self, keys):
        if keys[0] > 0:
            wait_until(self.file.exists)
            os.kill(os.getpid(), signal.SIGKILL)
        return (torch.zeros(1),) * 4


def test_B24_a_dead_worker_is_seen_without_torchs_signal_handler(tmp_path):
    """It raises wherever the run is: Python drops what is raised within a destructor, saving took it for its own."""
    loader = make_loader(Dies(tmp_path / "now"), [[0], [1]], 1, torch.device("cpu"))
    stream = to_device(loader, torch.device("cpu"))
    next(stream)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    (tmp_path / "now").touch()
    begin = time.time()
    with pytest.raises(RunError, match="a data loading worker died or hung .* exited unexpectedly"):
        next(stream)
    with pytest.raises(RunError, match="a data loading worker died or hung .between epochs"):
        next(to_device(loader, torch.device("cpu")))
    assert time.time() < begin + 30


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError(), OSError("none")])
def test_B24_a_worker_that_dies_while_a_batch_is_fetched_from_it(error):
    def loader():
        yield torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)
        raise error

    with pytest.raises(RunError, match="a data loading worker died or hung"):
        list(to_device(loader(), torch.device("cpu")))


def test_J1_loader_workers_leave_no_temporary_folder(folder, tmp_path):
    with tempfile.TemporaryDirectory() as short:  # sockets in it have at most 107 bytes of path

        def patch():
            tempfile.tempdir = short

        flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", 2]
        assert status_of(child(flags, patch=patch, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()
        assert not os.listdir(short)


ODD = {  # in the place of a weight, or of a checkpoint's entry
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "complex": lambda t: t * 1j,
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "dictionary": lambda t: {"w": t},
    "number": lambda t: 3,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on such tensors
@pytest.mark.parametrize("key", ["weight", "format", "data", ("a", 1), 7])
@pytest.mark.parametrize("kind", ODD)
def test_D1_a_checkpoint_with_odd_content_is_loaded_or_refused_in_one_line(tmp_path, kind, key):
    model, odd = torch.nn.Linear(4, 4), ODD[kind](torch.eye(4))
    state = model.state_dict()
    inside = key not in ("format", "data")
    torch.save({"model": state | {key: odd}} if inside else {"model": state, key: odd}, tmp_path / "x.pt")
    try:
        content = checkpoint.load(tmp_path / "x.pt", "--weights")
        checkpoint.classes_of(content)
        checkpoint.fit(model, content, "--weights x.pt", lambda text: None)
    except UserError as error:
        assert "\n" not in str(error) and "x.pt" in str(error)
    else:
        assert key != "weight" and torch.equal(model.weight, state["weight"])


def test_C6_when_rank_0_cannot_save_all_ranks_stop_and_nothing_half_written_stays(folder, tmp_path):
    def full():
        if os.environ["RANK"] == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--timeout", 30]
    assert ranks(2, flags, tmp_path, patch=at_steps(full, [2])) == [1, 1]
    assert "cannot write" in (tmp_path / "rank0.log").read_text() and "rror" not in (tmp_path / "rank1.log").read_text()
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["batch.png", "log.jsonl"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_I4_torch_hub_has_every_model(script, monkeypatch):
    """Offline, here without memory for their weights; pretrained ones are the official files."""
    module = importlib.import_module(script)
    for name in module.MODELS:
        model = on_meta(lambda: torch.hub.load(ROOT, script, name, source="local", pretrained=False))
        assert isinstance(model, torch.nn.Module)
    model = torch.hub.load(ROOT, script, NANO[script], source="local", num_classes=3, img_size=32)
    own = module.build_model(NANO[script], num_classes=3, img_size=32)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}
    monkeypatch.setattr(module, "load_model", lambda source: (source, [], None))
    assert torch.hub.load(ROOT, script, NANO[script], source="local", pretrained=True) == f"official:{NANO[script]}"


def test_I4_torch_hub_needs_what_the_package_needs():
    import hubconf

    entries = [n for n in dir(hubconf) if callable(getattr(hubconf, n)) and not n.startswith("_")]  # torch.hub.list's
    assert entries == sorted(SCRIPTS)
    required = re.search(r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert hubconf.dependencies == re.findall(r'"([a-z]+)', required)


def test_J3_of_two_jobs_on_two_hosts_the_second_is_refused(folder, tmp_path):
    """As over a network's file system without locks, on which a requeued job finds its first copy still running."""
    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--epochs", 3, "--save-steps", 1, "--resume", "auto"]

    def without_locks(host: str):
        def patch():
            import fcntl

            names = os.uname()
            os.uname = lambda: os.uname_result((names.sysname, host, *names[2:]))
            fcntl.lockf = fcntl.flock = lambda *args: None
            at_steps(lambda: time.sleep(0.3), range(12))()

        return patch

    first = child(flags, patch=without_locks("node1"), log=tmp_path / "first")
    wait_until(lambda: (tmp_path / "o/last.pt").exists())
    second = child(flags, patch=without_locks("node2"), log=tmp_path / "second")
    assert status_of(second) == 2 and "node1" in (tmp_path / "second").read_text()
    assert status_of(first) == 0
    assert [r["epoch"] for r in log_of(tmp_path / "o") if "train_loss" in r] == [0, 1, 2]
    assert [r.get("status") for r in log_of(tmp_path / "o")].count("started") == 1


def test_J6_a_small_data_set_of_ones_own_needs_no_flag_but_weights(tmp_path):
    write_folder(tmp_path / "d", train=20, val=3, classes=("ant", "bee", "cat"))
    torch.save(deit3.build_model("vit_nano", 1000, 32).state_dict(), tmp_path / "w.pth")
    quick = ["--model", "vit_nano", "--img-size", 32, "--device", "cpu", "--workers", 0]
    flags = ["--data", tmp_path / "d", "--weights", tmp_path / "w.pth", "--out", tmp_path / "o", *quick]
    stop = at_steps(lambda: os.kill(os.getpid(), signal.SIGTERM), [8])  # however many there are
    for more in ([], ["--epochs", 4]):  # fewer than the paper's warm-up
        log, out = tmp_path / f"log{len(more)}", tmp_path / f"o{len(more)}"
        assert status_of(child([*flags, "--out", out, *more], patch=stop, log=log)) == 143, log.read_text()
        said = [line for line in log.read_text().splitlines() if not line.startswith("recipe ")]
        assert "--recipe own" in said[0] and not re.search("warmup|must be|warning", "".join(said))


@pytest.mark.parametrize("images", [60, 200])  # the recipe own, the paper's
def test_a_warm_up_longer_than_the_run_is_refused_once_the_images_are_counted(images, here, tmp_path):
    write_folder(tmp_path / "d", train=images // 2, val=2, classes=("ant", "bee"))
    torch.save(deit3.build_model("vit_nano", 1000, 32).state_dict(), tmp_path / "w.pth")
    flags = ["--model", "vit_nano", "--img-size", 32, "--batch-size", 16, "--mix-group", 4, "--epochs", 2]
    flags += ["--warmup-epochs", 2, "--data", tmp_path / "d", "--weights", tmp_path / "w.pth", "--workers", 0]
    result = here("deit3", *flags, "--out", tmp_path / "o")
    assert result.status == 2 and "--warmup-epochs 2: must be less than --epochs 2" in result.err, result
    assert ("--recipe own" in result.out) == (images < 160)


def foreign(form: str, state: dict):
    """A state dict as other projects store it."""
    body = {k: v for k, v in state.items() if not k.startswith("head.")}
    return {
        "mae": {"model": body | {"decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 3)}},
        "mae, fine-tuned": {"model": state, "optimizer": {}, "epoch": 1, "args": argparse.Namespace(lr=1)},
        "dino": {"student": {f"module.backbone.{k}": v for k, v in body.items()},
                 "teacher": {f"backbone.{k}": v for k, v in body.items()} | {"head.mlp.0.weight": torch.zeros(3, 3)}},
        "dino, several ranks": {"student": {}, "teacher": {f"module.backbone.{k}": v for k, v in body.items()}},
        "dino, teacher": {f"backbone.{k}": v for k, v in body.items()},
        "encoder": {f"encoder.{k}": v for k, v in body.items()},
        "without a head": body,
    }[form]


FOREIGN = ["mae", "mae, fine-tuned", "dino", "dino, several ranks", "dino, teacher", "encoder", "without a head"]


@pytest.mark.parametrize("form", FOREIGN)
def test_J7_weights_of_other_projects_are_taken_as_far_as_they_fit_and_that_is_said(deit3_here, tmp_path, folder, form):
    state, said = deit3.build_model("vit_nano", 1000, 32, layer_scale=1.0).state_dict(), []
    torch.save(foreign(form, state), tmp_path / "w.pth")
    flags = ["--data", folder, "--weights", tmp_path / "w.pth", "--out", tmp_path / "o", "--epochs", 1]
    result = deit3_here(*TINY, *flags, "--warmup-epochs", 0)
    assert result.status == 0 and "new head: the checkpoint has " in result.out, result
    assert ("2 keys not used: decoder_embed.weight, mask_token" in result.out) == (form == "mae")
    model, content = deit3.build_model("vit_nano", 4, 32), checkpoint.load(tmp_path / "w.pth", "--weights")
    checkpoint.fit(model, content, "w.pth", said.append, new_head=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if not k.startswith("head."))


def test_J7_features_need_no_head_but_all_else(launched, tmp_path, folder):
    flags = ["--device", "cpu", "--workers", 0, "--img-size", 32, "--seeds", 1, "--model", "deit3/vit_nano"]
    flags = ["features", *flags, "--sets", folder, "--out", tmp_path / "r.json", "--weights", tmp_path / "w.pth"]
    state = deit3.build_model("vit_nano", 1000, 32).state_dict()
    figures = []
    for form in ("dino", "mae, fine-tuned"):
        torch.save(foreign(form, state), tmp_path / "w.pth")
        assert launched(transfer.main, ["transfer", *flags]).status == 0
        figures.append(json.loads((tmp_path / "r.json").read_text())["sets"])
    assert figures[0] == figures[1]
    torch.save({k: v for k, v in state.items() if k[:5] not in ("head.", "norm.")}, tmp_path / "w.pth")
    refused(launched(transfer.main, ["transfer", *flags]), "w.pth: does not fit the model: 2 keys missing, e.g. norm.b")


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_J8_loaders_work_whatever_starts_their_workers(folder, tmp_path, method):
    """Training, its validation and the features at Grafit's end, whose workers are sent all they need."""

    def patch():
        multiprocessing.forkserver._forkserver.__init__()  # another test's server is not this process' child
        multiprocessing.resource_tracker._resource_tracker.__init__()
        multiprocessing.set_start_method(method, force=True)
        multiprocessing.set_forkserver_preload(["torchvision"])

    flags = [*WITHOUT_MIXING, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--workers", 1]
    flags = ["--model", NANO["grafit"], *flags, "--out", tmp_path / "o"]
    pid = child(flags, script="grafit", patch=patch, log=tmp_path / "log")
    assert status_of(pid, 180) == 0, (tmp_path / "log").read_text()
    assert log_of(tmp_path / "o")[-1]["status"] == "completed"
    with pytest.raises(ProcessLookupError):  # what looks after semaphores, too
        for _ in range(200):
            os.killpg(pid, 0)
            time.sleep(0.05)
    assert "leaked" not in (tmp_path / "log").read_text()


def without_rights():
    """Patch: file permissions hold for root, too, from here on."""
    header = struct.pack("Ii", 0x20080522, 0)  # the system call's third version, for this process
    assert ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) == 0


@pytest.mark.parametrize("closed, status", [
    *((path, 2) for path in ("d", "d/train", "d/train/bee", "d.tar", "w.pt", "d/val/bee")),
    ("d/train/bee/bee_001.jpg", 1),
])
def test_J9_what_may_not_be_read_is_named(tmp_path, closed, status):
    data = write_folder(tmp_path / "d", train=4, val=1)
    files = {str(p.relative_to(data)): p.read_bytes() for p in sorted(data.rglob("*.jpg"))}
    write_tar(tmp_path / "d.tar", files)
    torch.save(deit3.build_model("vit_nano", 4, 32).state_dict(), tmp_path / "w.pt")
    flags = [*TINY, "--data", tmp_path / closed.split("/")[0], "--out", tmp_path / "o"]
    if closed == "w.pt":
        flags = [*TINY, "--data", data, "--out", tmp_path / "o", "--weights", tmp_path / "w.pt"]
    if closed == "d/val/bee":  # images are not left out without a word
        torch.save({"model": deit3.build_model("vit_nano", 4, 32).state_dict()}, tmp_path / "w.pt")
        flags = ["--model", "vit_nano", "--img-size", 32, "--weights", tmp_path / "w.pt", "--predict", data / "val"]
    (tmp_path / closed).chmod(0)
    try:
        assert status_of(child(flags, patch=without_rights, log=tmp_path / "log")) == status
    finally:
        (tmp_path / closed).chmod(0o755)
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and f"{tmp_path / closed}" in said and "ermission denied" in said, said


def test_J9_names_of_255_bytes_work(tmp_path, deit3_here):
    long = {"ant": "a" * 255, "bee": "\u00fc" * 127}
    write_folder(tmp_path / "d", train=8, val=1, classes=list(long))
    for path in sorted((tmp_path / "d").rglob("*_000.jpg")):
        path.rename(path.with_name("x" * 251 + ".jpg"))
    for path in sorted((tmp_path / "d").glob("*/*")):
        path.rename(path.with_name(long[path.name]))
    flags = ["--data", tmp_path / "d", "--out", tmp_path / "o", "--epochs", 1, "--warmup-epochs", 0]
    result = deit3_here(*TINY, *flags)
    assert result.status == 0 and log_of(tmp_path / "o")[-1]["status"] == "completed", result
    assert load(tmp_path / "o/last.pt")["data"]["classes"] == list(long.values())


@pytest.mark.parametrize("line", [
    "--weights W --predict LONG", "--weights W --export LONG", "--weights W --eval --data D --out LONG",
    "--weights W --eval --data D --real-labels LONG", "--weights W --eval --eval-data LONG", "--weights LONG --eval",
    "--data LONG", "--data D --val-data LONG", "--data D --coarse-labels LONG",
    "--out LONG --data shapes", "--resume LONG --data shapes", "--show-batch LONG.png --data shapes --img-size 32",
    "transfer features --weights W --sets LONG --out r.json", "transfer features --weights W --sets D --out LONG",
    "transfer features --weights W --sets cifar10 --root LONG --out r.json", "transfer compare LONG D D --out r",
    "transfer finetuned a=LONG --out r.json",
])  # fmt: skip
def test_J9_a_name_longer_than_the_system_allows_is_told_in_one_line(line, here, launched, tmp_path, folder):
    """Whatever flag it comes by; it used to be a traceback for three of them."""
    network = deit3.build_model(NANO["deit3"], 4, (32, 32))
    content = {"method": "deit3", "model_name": NANO["deit3"], "model": network.state_dict()}
    recipe = vars(deit3.RECIPES["shapes"]) | {"img_size": (32, 32)}
    classes = {"classes": open_data(str(folder))["train"].classes}
    checkpoint.save(content | {"recipe": recipe, "data": classes}, tmp_path / "w.pt")
    name = f"{tmp_path}/{300 * 'n'}"
    words = [{"LONG": name, "W": tmp_path / "w.pt", "D": folder, "a=LONG": f"a={name}"}.get(w, w) for w in line.split()]
    words = [name + ".png" if w == "LONG.png" else tmp_path / w if w in ("r", "r.json") else w for w in words]
    if words[0] == "transfer":
        result = launched(transfer.main, [*words, "--workers", 0][: None if words[1] == "features" else -2])
    else:
        result = here("deit3", "--model", NANO["deit3"], "--recipe", "shapes", "--workers", 0, *words)
    refused(result, 300 * "n")


def test_J9_a_hundred_thousand_classes(tmp_path):
    """As an archive whose every member is empty: images are not read here."""
    member = tarfile.TarInfo("train/c000000/0.jpg").tobuf(tarfile.USTAR_FORMAT)
    path, checksum = tmp_path / "many.tar", int(member[148:154], 8) - 6 * ord("0")
    with open(path, "wb") as file:
        for name in (b"%06d" % number for number in range(100_000)):
            file.write(member[:7] + name + member[13:148] + b"%06o" % (checksum + sum(name)) + member[154:])
        file.write(tarfile.TarInfo("val/c000007/0.jpg").tobuf() + bytes(1024))
    source = open_data(str(path), splits=("train",))["train"]
    assert len(source.classes) == len(source) == 100_000 and source.labels[-1] == 99_999
    with pytest.raises(UserError, match="only in train: c000000, c000001") as error:
        open_data(str(path))
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("size", [(32, 64), (16, 64)])  # the second has as many patches as a square
@pytest.mark.parametrize("script", ["deit", "deit3", "cait", "resmlp"])
def test_D7_weights_alone_of_images_that_are_no_squares_are_those_they_were_or_refused(script, size):
    """A state dict does not say of which sides it is."""
    module, said = importlib.import_module(script), []

    def fit(sides, state, content=None):
        model = module.build_model(NANO[script], 5, sides)
        checkpoint.fit(model, content or dict(state), "--weights w.pt", said.append, adapt=module.fit_resolution)
        return model.state_dict()

    held = module.build_model(NANO[script], 5, size).state_dict()
    assert all(torch.equal(v, held[k]) for k, v in fit(size, held).items()) and not said
    if size == (32, 64):
        with pytest.raises(UserError, match="w.pt: does not fit the model: .*shapes differ"):
            fit((64, 64), held)
    square = module.build_model(NANO[script], 5, (32, 32)).state_dict()
    assert fit((64, 32), square).keys() == square.keys() and "4 patches" in said[-1]
    fit(size[::-1], held, {"model": held, "recipe": {"img_size": size}})  # one that says so is turned
    assert len(said) == 2


@pytest.mark.parametrize("script", ["deit", "deit3", "cait", "resmlp"])
def test_A7_a_model_answers_images_of_its_own_size_alone(script):
    model = importlib.import_module(script).build_model(NANO[script], 5, (32, 64)).eval()
    assert model(torch.zeros(2, 3, 32, 64)).shape == (2, 5)
    for shape in ((2, 3, 64, 32), (2, 3, 8, 8), (2, 1, 32, 64), (2, 3, 36, 64), (3, 32, 64)):
        for answer in (model, model.forward_features):
            with pytest.raises(AssertionError, match=r"this model takes \(B, 3, 32, 64\)"):
                answer(torch.zeros(shape))


@pytest.mark.parametrize("limit", [100, 600])  # bytes of a file: neither arrays nor the index fit, or only the former
def test_H6_a_full_disk_leaves_nothing_temporary_in_the_cache(tmp_path, monkeypatch, limit):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, said = write_folder(tmp_path / "d", train=2, val=1), []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        found = open_data(str(data), say=said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(found["train"]) == 8 and all("nothing can be kept" in line for line in said) and said
    left = list((tmp_path / "cache").rglob("*.*"))
    assert not [p for p in left if p.suffix == ".tmp"] and bool(left) == (limit == 600)


def test_the_cache_stays_within_its_limit_and_forgets_what_was_not_used_for_longest(tmp_path, monkeypatch):
    """Lists of files, which runs have mapped, only after 30 days."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "CACHE_BYTES", 2500)
    cache, day = sources.cache_folder(), 24 * 3600
    days = {"features/a.npy": 3, "features/b.npy": 2, "features/c.npy": 1, "old.npy": 31, "new.npy": 29}
    for name, age in days.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(bytes(1000))
        os.utime(cache / name, (time.time() - age * day,) * 2)
    assert sources.keep(cache / "features/d.npy", lambda out: out.write(bytes(1000))) is None
    assert sorted(str(p.relative_to(cache)) for p in cache.rglob("*.npy")) == [
        "features/c.npy", "features/d.npy", "new.npy"
    ]  # fmt: skip
    os.utime(cache / "features/d.npy", (time.time() - 99,) * 2)
    os.utime(cache / "features/c.npy", (time.time() - 9, 0))  # read since
    assert sources.keep(cache / "features/e.npy", lambda out: out.write(bytes(1000))) is None
    assert sorted(p.stem for p in (cache / "features").iterdir()) == ["c", "e"]
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda folder: SimpleNamespace(total=10_000))  # a tenth of it
    assert sources.keep(cache / "features/f.npy", lambda out: out.write(bytes(900))) is None
    assert sorted(p.name for p in (cache / "features").iterdir()) == ["f.npy"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])  # NFS and Lustre without locks
def test_A10_J3_a_file_system_without_locks_has_one_writer_per_folder_too(folder, tmp_path, number):
    def without_locks():
        import fcntl

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        fcntl.lockf = refuse

    def slowly():
        without_locks()
        at_steps(lambda: time.sleep(60), [5])()

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--resume", "auto"]
    first = child(flags, patch=slowly, log=tmp_path / "first")
    wait_until(lambda: (tmp_path / "o/last.pt").exists())
    assert status_of(child(flags, patch=without_locks, log=tmp_path / "second")) == 2
    assert f"in use by process {first} on {os.uname().nodename}" in (tmp_path / "second").read_text()
    os.kill(first, signal.SIGKILL)
    assert status_of(first) == -signal.SIGKILL
    third = child(flags, patch=without_locks, log=tmp_path / "third")  # at once: that process is gone
    assert status_of(third) == 0 and log_of(tmp_path / "o")[-1]["status"] == "completed"
    assert not (tmp_path / "o/lock").exists()
