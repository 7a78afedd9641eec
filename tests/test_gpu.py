"""CUDA's paths on a make-believe GPU (no waiting in training steps, the CPU's results, resuming, evaluation), and on a
real one where there is one: python -m pytest -n 0 -m gpu tests/test_gpu.py"""

import contextlib
import json
import math
import re
import signal

import pytest
import torch
from conftest import NANO, ROOT, TORCHRUN, load, log_of, python, same_training, write_folder
from fake_cuda import FakeCuda, phases, pretended_ranks, recurring
from torch.utils.benchmark import Timer

from common import evaluate, report, transfer
from common.precision import Precision
from common.run import FLAG_LAG, Run
from common.sources import cache_folder

RUNS = [  # command lines that together take every branch of the training loops; low rates keep rounding small
    ("deit", "--model deit_nano_distilled --augment rand --mixup 0.8 --cutmix 1.0 --drop-path 0.3 --distillation hard"),
    ("cait", "--erasing 0.5 --mixup 0.8 --cutmix 1.0 --drop-path 0.3"),
    ("cait", "--model cait_nano_distilled --distillation hard --grad-checkpoint --drop-path 0.3"),
    ("resmlp", "--erasing 0.5 --mixup 0.8 --cutmix 1.0 --drop-path 0.3 --distillation hard"),
    ("patchconvnet", "--mixup 0.8 --cutmix 1.0 --drop-path 0.3"),
    ("patchconvnet", "--class-tokens per_class --norm batchnorm"),
    ("grafit", "--erasing 0.5 --lr 1e-4"),
    ("grafit", "--method ce_instance --erasing 0.5 --lr 1e-4"),
    ("grafit", "--method ce --cutmix 1.0"),
    ("deit3", "--augment 3-augment --mixup 0.8 --cutmix 1.0 --drop-path 0.3 --ema 0.99"),
    ("deit3", "--optimizer adamw --lr 1e-3 --crop rrc --augment rand"),
    ("trex", "--lr 1e-3"),
]

pretended = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="there is a real GPU, or torch is older than 2.10 and cannot do without its driver",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"), train=8, val=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, pictures):
    """A checkpoint for distillation: an untrained network's."""
    import deit3

    model, path = deit3.build_model("vit_nano", 4, 32), tmp_path_factory.mktemp("teacher") / "vit.pt"
    content = {"model": model.state_dict(), "method": "deit3", "model_name": "vit_nano"}
    torch.save(content | {"recipe": {"img_size": (32, 32)}, "data": {"classes": ["ant", "bee", "cat", "dog"]}}, path)
    return path


@pytest.fixture
def flags(pictures, teacher, tmp_path):
    """flags(SCRIPT, LINE, ...): the arguments of two steps of two micro-batches in each of two epochs."""

    def make(script, line, *, out="out", micro_batch=8, amp="bf16"):
        common = "--recipe shapes --img-size 32 --batch-size 16 --epochs 2 --warmup-epochs 1 --workers 0"
        common += f" --micro-batch {micro_batch} --amp {amp} --data {pictures} --out {tmp_path / out} {line}"
        common += " --mix-group 4" * (script != "trex") + f" --model {NANO[script]}" * ("--model" not in line)
        return common.split() + ["--teacher-weights", teacher] * ("distill" in line)

    return make


@pytest.fixture
def on_gpu(here):
    """on_gpu(SCRIPT, ARGUMENTS): the script on the pretended GPU; what was seen there. world: pretended ranks."""

    def run(script, arguments, world=1, status=0):
        ranks = pretended_ranks(world) if world > 1 else contextlib.nullcontext()
        with FakeCuda(root=ROOT) as gpu, phases(gpu), ranks:
            result = here(script, *arguments)
        assert result.status == status, result
        return gpu

    return run


@pretended
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script, line", RUNS)
def test_no_training_step_waits_for_the_gpu(on_gpu, flags, script, line, ranks, amp):
    """After the first step, which fills caches."""
    gpu = on_gpu(script, flags(script, line, micro_batch=8 // ranks, amp=amp), world=ranks)
    assert gpu.step == 4 and gpu.launches > 1000 and not recurring(gpu)


@pretended
@pytest.mark.parametrize("script, line", RUNS)
def test_a_run_on_the_gpu_ends_as_on_the_cpu(on_gpu, here, flags, tmp_path, script, line):
    gpu = on_gpu(script, flags(script, line, out="gpu", amp="fp32"))
    assert not recurring(gpu)
    result = here(script, *flags(script, line, out="cpu", amp="fp32"), "--device", "cpu")
    assert result.status == 0, result
    one, two = (load(tmp_path / name / "last.pt")["model"] for name in ("cpu", "gpu"))
    rounding = 5e-4 if script in ("grafit", "trex") else 1e-5  # a GPU's channels-last convolutions add in another order
    assert all(torch.allclose(one[k], two[k], rtol=rounding, atol=rounding / 10) for k in one)


@pretended
@pytest.mark.parametrize(
    "script, line, amp",
    [("deit3", "--ema 0.9", "fp16"), ("deit", "--drop-path 0.3", "bf16"), ("grafit", "", "bf16"), ("trex", "", "bf16")],
)  # LAMB, AdamW, SGD with an average of weights, a projector and a memory
def test_a_run_stopped_on_the_gpu_goes_on_exactly(on_gpu, flags, tmp_path, monkeypatch, script, line, amp):
    on_gpu(script, flags(script, line, out="whole", amp=amp))
    stopped = flags(script, line, out="stopped", amp=amp)
    with monkeypatch.context() as patch:
        after = Run.after_step
        patch.setattr(Run, "after_step", lambda self, *args: (signal.raise_signal(signal.SIGTERM), after(self, *args)))
        gpu = on_gpu(script, stopped, status=143)
    assert 1 <= gpu.step <= 1 + FLAG_LAG and (tmp_path / "stopped/last.pt").exists()
    on_gpu(script, [*stopped, "--resume", "auto"])
    assert same_training(tmp_path / "whole", tmp_path / "stopped")


@pretended
def test_evaluation_benchmark_and_features_run_on_the_gpu(
    on_gpu, here, launched, flags, pictures, tmp_path, monkeypatch
):
    """The figures of a checkpoint are the CPU's."""
    monkeypatch.setattr(report, "speed", lambda step, images, device: (float(step() is None), 0.0))
    fit = evaluate.logistic_regression
    monkeypatch.setattr(transfer, "logistic_regression", lambda *problem, max_steps=None: fit(*problem, max_steps=2))
    assert here("deit3", *flags("deit3", "", amp="fp32"), "--device", "cpu").status == 0
    common, figures = ["--weights", tmp_path / "out/last.pt", "--workers", 0, "--amp", "fp32"], []
    suite = ["transfer", "features", *common, "--sets", pictures, "--seeds", 1, "--img-size", 32, "--out"]
    suite.append(tmp_path / "f.json")
    for place in (contextlib.nullcontext(), FakeCuda()):
        with place:
            result = here("deit3", "--eval", "--model", "vit_nano", "--data", pictures, *common)
            assert launched(transfer.main, suite).status == 0
        figures.append((result.out[result.out.index("top1") :], json.loads((tmp_path / "f.json").read_text())["sets"]))
        for file in (cache_folder() / "features").glob("*"):
            file.unlink()
    assert place.launches > 1000 and figures[0] == figures[1]
    on_gpu("deit3", ["--benchmark", "--model", "vit_nano", "--img-size", 32])


# ---- On a real GPU ---------------------------------------------------------------------------------------------------

real_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def strict(monkeypatch):
    """Whatever makes the host wait for the GPU within a training step after the first is an error."""
    step, after = Precision.step, Run.after_step

    def entering(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        torch.cuda.set_sync_debug_mode("default")  # reading an earlier step's flags may wait
        return result

    def leaving(self, *args):
        after(self, *args)
        if self.step < self.data.steps:  # not while an epoch ends
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Precision, "step", entering)
    monkeypatch.setattr(Run, "after_step", leaving)
    yield
    torch.cuda.set_sync_debug_mode("default")


def cases(*marks):
    return [pytest.param(script, line, marks=[*real_gpu, *marks]) for script, line in RUNS]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("script, line", cases())
def test_a_real_gpu_trains_without_waiting_and_resumes(here, flags, strict, tmp_path, script, line, amp):
    arguments = flags(script, line, amp=amp)
    result = here(script, *arguments)
    assert result.status == 0, result
    result = here(script, *arguments, "--epochs", 3, "--resume", "auto", "--allow-changes")
    assert result.status == 0 and "resumed" in result.out, result
    assert all(math.isfinite(record["train_loss"]) for record in log_of(tmp_path / "out") if "train_loss" in record)


@pytest.mark.parametrize("script, line", cases())
def test_a_real_gpu_starts_as_the_cpu(here, flags, tmp_path, script, line):
    """The mean loss of the first epoch, in single precision and without random draws on the device."""
    for device in ("cuda", "cpu"):
        line = line.replace("--drop-path 0.3", "--drop-path 0")
        result = here(script, *flags(script, line, out=device, amp="fp32"), "--device", device)
        assert result.status == 0, result
    one, two = (log_of(tmp_path / device)[1]["train_loss"] for device in ("cuda", "cpu"))
    assert one == pytest.approx(two, rel=2e-3)


@pytest.mark.parametrize("script", [pytest.param(s, marks=real_gpu) for s in NANO])
def test_a_real_gpu_compiles(here, flags, script):
    result = here(script, *flags(script, "--compile"))
    assert result.status == 0, result


@pytest.mark.parametrize(
    "script, line", cases(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"))
)
def test_two_real_gpus_end_as_one(here, flags, tmp_path, script, line):
    line = line.replace("--drop-path 0.3", "--drop-path 0")
    result = here(script, *flags(script, line, out="one", amp="fp32"))
    assert result.status == 0, result
    result = python(
        *TORCHRUN[1:], "--nproc_per_node", 2, ROOT / f"{script}.py", *flags(script, line, out="two", amp="fp32")
    )
    assert result.status == 0, result
    one, two = (log_of(tmp_path / out)[1]["train_loss"] for out in ("one", "two"))
    assert one == pytest.approx(two, rel=2e-3)


FULL = {"deit3": "vit_b", "cait": "cait_s36", "patchconvnet": "patchconvnet_s60", "trex": "resnet50"}


@pytest.mark.parametrize("script, model", [pytest.param(*case, marks=real_gpu) for case in FULL.items()])
def test_a_real_gpu_s_speed_is_printed(here, script, model, capfd):
    """--benchmark in bf16, and what share of the GPU's own speed at a large matrix product it is (MFU)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=1).mean
    peak = 2 * 8192**3 / seconds / 1e12
    result = here(script, "--benchmark", "--model", model, "--micro-batch", 128)
    rates = [float(x) for x in re.findall(r"([\d.]+) TFLOP/s", result.out)]
    with capfd.disabled():
        print(f"\n{result.out}of {peak:.0f} TFLOP/s: " + ", ".join(f"{rate / peak:.0%}" for rate in rates))
    assert result.status == 0 and len(rates) == 2, result
