"""Helpers of the tests: reference numbers, tiny data sets, and runs of a script in this or in other processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import time
import weakref
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # another thread count changes the last bits
os.environ.pop("IMAGENET", None)  # where scripts look without --data
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from common import shapes  # noqa: E402

torch.set_num_threads(1)
# Now, and not after a test has pretended a GPU (fake_cuda, torch.export), autograd counts the devices it needs threads
# for, once and for all: a process with such threads could not fork runs that train.
torch.ones(1, requires_grad=True).sum().backward()

SCRIPTS = [
    "deit",
    "grafit",
    "cait",
    "resmlp",
    "patchconvnet",
    "trex",
    "deit3",
]  # in the order of the papers (Grafit borrows DeiT's augmentation)
NANO = {
    "deit": "deit_nano",
    "grafit": "regnet_nano",
    "cait": "cait_nano",
    "resmlp": "resmlp_nano",
    "patchconvnet": "patchconvnet_nano",
    "trex": "resnet_nano",
    "deit3": "vit_nano",
}  # the model of each that serves tests


def reference(name: str):
    return json.loads((ROOT / "tests" / "reference" / f"{name}.json").read_text())


def noise(name: str, count: int) -> np.ndarray:
    """The reference data's hash noise in [-1, 1): a splitmix64 of (crc32(name), index)."""
    found = np.empty(count)
    for start in range(0, count, 1 << 15):  # pieces that stay in the cache
        index = np.arange(start, min(start + (1 << 15), count), dtype=np.uint64)
        x = ((np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + index) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
        found[start : start + len(x)] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    return found


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights as the reference numbers were computed with: by name, no random generator."""
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        leaf, offset, scale = key.rsplit(".", 1)[-1], 0.0, 0.1
        if leaf.endswith(("token", "embed")):
            scale = 0.02
        elif tensor.ndim >= 2:
            scale = math.sqrt(6 / math.prod(tensor.shape[1:]))
        elif leaf.startswith("gamma"):
            offset = 0.3
        elif leaf == "running_var":
            offset, scale = 1.0, 0.5
        elif leaf in ("weight", "alpha"):
            offset = 1.0
        tensor.copy_(torch.from_numpy((noise(key, tensor.numel()) * scale + offset).reshape(tensor.shape)))


def filled_images(batch: int, size: int) -> torch.Tensor:
    grid = np.arange(size) * 7 // size
    pictures = []
    for b in range(batch):
        coarse = noise(f"image.{b}.{size}.coarse", 147).reshape(3, 7, 7)[:, grid[:, None], grid[None]]
        pictures.append(1.5 * coarse + noise(f"image.{b}.{size}.fine", 3 * size * size).reshape(3, size, size))
    return torch.from_numpy(np.stack(pictures).astype(np.float32))


def check_architecture(model: torch.nn.Module, case: dict) -> None:
    """A model on the meta device has the official state dict, parameters and GMACs."""
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert hashlib.sha256(json.dumps(keys, separators=(",", ":")).encode()).hexdigest() == case["state_dict_sha256"]
    assert sum(p.numel() for p in model.parameters()) == case["n_params"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, case["img_size"], case["img_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(case["gmacs"], rel=1e-5)


def check_logits(logits: torch.Tensor, first_ten: list, norm: float) -> None:
    """Logits (B, K) are the official ones, of which the first ten of each image and the norm of all are kept."""
    rms = logits.pow(2).mean().sqrt()
    assert (logits[:, :10] - torch.tensor(first_ten)).abs().max() <= 3e-5 * rms
    assert logits.norm().item() == pytest.approx(norm, rel=3e-5)


def check_distribution(tensor: torch.Tensor, mean: float, std: float, name: str, slack: float = 1e-9) -> None:
    """A fresh tensor has the official mean and deviation, up to what a sample of its size may differ by."""
    tensor = tensor.double()
    error = 6 * max(std, 1e-12) / math.sqrt(tensor.numel())  # six standard errors of a mean
    assert tensor.mean().item() == pytest.approx(mean, abs=2 * error + slack), name
    assert tensor.std(correction=0).item() == pytest.approx(std, abs=error + 1e-9, rel=0.01), name


def sine(spec: dict, dtype=torch.float64) -> torch.Tensor:
    """Tensor of kind "sin" in the reference data."""
    index = torch.arange(math.prod(spec["shape"]), dtype=torch.float64)
    return (spec["offset"] + spec["scale"] * torch.sin(spec["a"] * index + spec["b"])).reshape(spec["shape"]).to(dtype)


def triangle_image(spec: dict) -> np.ndarray:
    """uint8 (H, W, 3) of kind "tri" in the reference data."""
    y, x, c = np.mgrid[0 : spec["height"], 0 : spec["width"], 0:3]
    wave = spec["cy"] * y + spec["cx"] * x + spec["cc"] * c + spec["cxy"] * x * y + spec["c0"]
    return np.abs(wave % 510 - 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors held at one time in the block, a model's weights not counted; for meta tensors too."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class FixedDraws:
    """A generator whose randint returns the given values."""

    def __init__(self, *values):
        self.values = list(values)

    def randint(self, low, high):
        assert low <= self.values[0] <= high
        return self.values.pop(0)


# ---- Data sets -------------------------------------------------------------------------------------------------------


def picture(label: int, index: int, size: int = 36) -> Image.Image:
    """A picture whose class can be seen: a bright band at a height given by the label."""
    rng = np.random.default_rng(1000 * label + index)
    pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[label * 8 : label * 8 + 8] += 110
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_folder(root: Path, *, train: int = 16, val: int = 5, classes=("ant", "bee", "cat", "dog")) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (root / split / name / f"{name}_{i:03d}.jpg").write_bytes(
                    encoded(picture(label, i + 500 * (split == "val")))
                )
    return root


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """64 training and 20 validation images of 4 classes; not to be changed."""
    return write_folder(tmp_path_factory.mktemp("images"))


@contextlib.contextmanager
def fewer_shapes(train: int, val: int):
    """The built-in data set with so many images, each drawn once: in this process, before it forks others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "TRAIN_IMAGES", train)
        patch.setattr(shapes, "VAL_IMAGES", val)
        patch.setattr(shapes, "draw", drawn)
        for split, count in (("train", train), ("val", val)):
            for index in range(count):
                drawn(split, index)
        yield


@functools.lru_cache(None)
def drawn(split: str, index: int, draw=shapes.draw) -> tuple:
    return draw(split, index)


@pytest.fixture(scope="session")
def shapes_convnet(tmp_path_factory) -> Path:
    """The folder of a PatchConvNet that has learned from a fifth of `shapes`: right in almost half of the cases."""
    from test_run import child, status_of

    out = tmp_path_factory.mktemp("convnet") / "run"
    flags = ["--model", NANO["patchconvnet"], "--recipe", "shapes", "--img-size", 48, "--batch-size", 32, "--epochs", 3]
    with fewer_shapes(2400, 240):
        assert status_of(
            child([*flags, "--workers", 0, "--device", "cpu", "--out", out], script="patchconvnet"), 300
        ) == 0
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# ---- Runs ------------------------------------------------------------------------------------------------------------

# The smallest run that uses every part: LAMB, accumulation, mixing, 3-Augment.
WITHOUT_MIXING = (
    "--recipe shapes --img-size 32 --batch-size 16 --epochs 2 --warmup-epochs 1 --workers 0 --device cpu".split()
)
SMALL = [*WITHOUT_MIXING, *"--mix-group 4 --mixup 0.8 --cutmix 1.0".split()]
TINY = ["--model", NANO["deit3"], *SMALL]


class Result:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err

    def __repr__(self) -> str:
        return f"exit {self.status}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@pytest.fixture
def launched(capfd, monkeypatch):
    """launched(main, ARGV): main() in this process under that command line; returns exit status and what it printed."""
    from common.run import outcome

    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def run(main, argv) -> Result:
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        capfd.readouterr()
        try:
            status = outcome(main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture
def here(launched):
    """here("deit3", ARGUMENTS): `deit3.py ARGUMENTS` in this process."""
    return lambda script, *arguments: launched(importlib.import_module(script).main, [f"{script}.py", *arguments])


@pytest.fixture
def deit3_here(here):
    return functools.partial(here, "deit3")


def environment(**extra) -> dict:
    foreign = ("TORCHELASTIC", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in extra.items()}}


def start(*command, cwd: Path = ROOT, **env) -> subprocess.Popen:
    """Starts a command in a session of its own."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it: torchrun's ranks are in sessions of their own, a group would miss them."""
    children = [int(s.parent.name) for s in Path("/proc").glob("[0-9]*/stat") if _parent(s) == pid]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_tree(child)


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


def finish(process: subprocess.Popen, timeout: float = 120) -> Result:
    """Waits for the end; a run that outlasts the timeout is killed with everything it started, and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s\n{out}\n{err}")
    return Result(process.returncode, out, err)


def python(*arguments, timeout: float = 120, cwd: Path = ROOT, **env) -> Result:
    return finish(start(sys.executable, *arguments, cwd=cwd, **env), timeout)


# Reads commands, one JSON object a line, and answers with their exit statuses. The child that runs a command leaves the
# loop and ends as any interpreter does.
FORKING = """
import gc, json, os, runpy, sys, warnings
import torch, torchvision
for kind in (DeprecationWarning, FutureWarning):  # as pyproject.toml has it for the tests' own process
    ours = "torch|common|__main__|cait|deit|grafit|patchconvnet|resmlp|trex"
    warnings.filterwarnings("error", category=kind, module=ours)
gc.freeze()  # or each child would walk through all of torch when it ends
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
for stream, file in ((1, job["out"]), (2, job["err"])):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
os.chdir(job["cwd"])
os.environ.update(job["env"])
sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in job["env"]
sys.argv = job["argv"]
sys.path[0] = job["cwd"] if sys.argv[0] != "-c" else ""
if sys.argv[0] == "-c":
    exec(sys.argv.pop(1))
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """fresh(ARGUMENTS, cwd=FOLDER): `python ARGUMENTS` there, in a process that has imported torch and torchvision but
    nothing of ours and knows no path to it. All are forked from one interpreter, hence need no seconds to import torch.
    """
    folder = tmp_path_factory.mktemp("fresh")
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING], cwd=folder, env=environment(PYTHONPATH=""), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip

    def run(*arguments, cwd: Path, timeout: float = 120, **env) -> Result:
        out, err = folder / "out", folder / "err"
        env = {k: str(v) for k, v in env.items()}
        job = {"argv": list(map(str, arguments)), "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            kill_tree(server.pid)
            pytest.fail(f"still running after {timeout} s\n{out.read_text()}\n{err.read_text()}")
        status = int(server.stdout.readline())
        said = re.sub(r"nanobind: leaked.*?refleaks.html\n*", "", err.read_text(), flags=re.S)  # triton's, at its end
        return Result(status, out.read_text(), said)

    yield run
    kill_tree(server.pid)
    server.wait()


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def wait_until(condition, timeout: float = 60, every: float = 0.02) -> None:
    end = time.time() + timeout
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(every)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def log_of(out: Path) -> list[dict]:
    return [
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} in the log"))
        for line in (out / "log.jsonl").read_text().splitlines()
    ]


def same(a, b) -> bool:
    """Bit-identical nested values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_training(a: Path, b: Path) -> bool:
    """The two runs' last checkpoints hold the same weights, optimizer and counters, bit for bit."""
    one, two = load(a / "last.pt"), load(b / "last.pt")
    return all(
        same(one[k], two[k]) for k in ("model", "ema", "optimizer", "scaler", "epoch", "step", "best", "loss_sum")
    )
