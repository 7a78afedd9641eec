"""Command lines: the rows A of the fault list, evaluation, pictures and other things a user asks for."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    NANO,
    ROOT,
    SCRIPTS,
    TINY,
    Result,
    encoded,
    fewer_shapes,
    finish,
    load,
    log_of,
    picture,
    start,
    wait_until,
    write_folder,
)  # fmt: skip
from PIL import Image

import deit
import deit3
from common import cli, run
from common.data import split_batch
from common.errors import UserError
from common.evaluate import normalize
from common.images import eval_transform
from common.run import LEASE
from common.sources import open_images


def refused(result, *parts):
    """Exit status 2 with one line on standard error that holds all parts."""
    assert result.status == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.err, result
    for part in parts:
        assert part in lines[0], result


def test_A1_a_wrong_model_name(deit3_here):
    refused(deit3_here("--model", "vit_bb"), "--model vit_bb", "did you mean vit_b", "vit_h26x2")
    refused(deit3_here("--model", "torchvision/resnet51"), "resnet50")
    refused(deit3_here("--recipe", "in1"), "in1k")


@pytest.mark.parametrize(
    "flag, near",
    [("--batch", "--batch-size"), ("--lrr", "--lr"), ("--batch_size", "--batch-size"), ("--local-rank=0", "torchrun")]
)
def test_A2_F5_a_misspelt_or_abbreviated_flag(deit3_here, flag, near):
    refused(deit3_here(flag, *([] if "=" in flag else ["256"])), flag.split("=")[0], near)


@pytest.mark.parametrize(
    "batch, world, micro, group, near",
    [(100, 8, None, 8, "64 and 128"), (2048, 8, 48, 16, "1920 and 2304"), (4, 8, None, 4, "32")]
)
def test_A3_a_batch_that_does_not_fit(batch, world, micro, group, near):
    with pytest.raises(UserError, match=near):
        split_batch(batch, world, micro, group)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32])
def test_the_global_batch_is_split_without_remainder(world):
    micro, accumulation = split_batch(2048, world, None, 64)
    assert micro * accumulation * world == 2048 and micro % 64 == 0 and micro <= 256


@pytest.mark.parametrize("local, micro", [(1, 1), (7, 7), (250, 250), (257, 257), (514, 257), (1018, 509), (1000, 250)])
def test_without_mixing_any_batch_that_the_ranks_share_equally_does(local, micro):
    """A divisor of 32 to 256 images, for BatchNorm; where there is none, the next larger one."""
    assert split_batch(4 * local, 4, None, 1) == (micro, local // micro)
    with pytest.raises(UserError, match=f"4 ranks x 1 images; the nearest that are: {4 * local} and {4 * local + 4}"):
        split_batch(4 * local + 1, 4, None, 1)


OUT_OF_RANGE = [
    ("batch-size", 0), ("lr", 0), ("lr", -1), ("lr", "nan"), ("epochs", 0), ("drop-path", 1.0), ("smoothing", 1.5),
    ("mixup", -1), ("warmup-epochs", 6), ("img-size", 0), ("eval-crop-ratio", 0), ("mix-group", 0), ("repeats", 0)
]


@pytest.mark.parametrize("flag, value", OUT_OF_RANGE)
def test_A4_values_out_of_range(deit3_here, flag, value):
    refused(deit3_here("--recipe", "shapes", f"--{flag}", value), f"--{flag}", "must be")


def test_A5_a_final_learning_rate_above_the_peak(deit3_here):
    refused(deit3_here("--recipe", "in1k", "--lr", "5e-6"), "--lr 5e-06", "--min-lr 1e-05")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_rate_follows_the_batch_unless_lr_is_given(script):
    module, rates = importlib.import_module(script), ("lr", "min_lr", "warmup_lr")
    for name in module.RECIPES:
        paper = module.parse_args(["--recipe", name])[2]
        half = ["--recipe", name, "--batch-size", str(paper.batch_size // 2)]
        assert [getattr(module.parse_args(half)[1], r) for r in rates] == [getattr(paper, r) / 2 for r in rates], name
        given = module.parse_args([*half, "--lr", str(paper.lr)])[1]
        assert [getattr(given, r) for r in rates] == [getattr(paper, r) for r in rates], name
        assert module.parse_args([*half, "--min-lr", "0"])[1].min_lr == 0


def test_a_constant_rate_stays_constant():
    for given in (["--batch-size", "256"], ["--batch-size", "1024"], ["--lr", "2e-6"], ["--lr", "1e-4"]):
        recipe = deit.parse_args(["--recipe", "finetune", *given])[1]
        assert recipe.lr == recipe.min_lr != 5e-6, given
    assert deit.parse_args(["--recipe", "finetune", "--lr", "1e-4", "--min-lr", "0"])[1].min_lr == 0


def test_none_is_a_value():
    recipe = deit3.parse_args(["--recipe", "in1k", "--layer-scale", "none", "--clip-grad", "none"])[1]
    assert recipe.layer_scale is recipe.clip_grad is None
    assert deit3.parse_args(["--recipe", "in1k", "--eval-crop-ratio", "1.0"])[1].layer_scale == 1e-4


def test_the_banner_says_the_rate_and_why(deit3_here, tmp_path, folder):
    lines = []
    for given in ([], ["--lr", "0.02"]):
        command = [*TINY, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, *given]
        out = deit3_here(*command, "--out", tmp_path / f"o{len(given)}").out.splitlines()
        lines += [line for line in out if line.startswith("rate ")]
    assert lines == [
        "rate     0.0025 at its peak: the recipe's 0.01 at batch 64, in proportion to the batch",
        "rate     0.02 at its peak: given by --lr",
    ]


@pytest.mark.parametrize(
    "flags, amp",
    [
        ([], "bf16"), (["--eval"], "fp32"), (["--eval", "--amp", "bf16"], "bf16"), (["--eval-data", "x"], "fp32"),
        (["--predict", "x"], "fp32"),
    ],
)
def test_evaluation_is_in_fp32_on_a_gpu_too(flags, amp, monkeypatch):
    monkeypatch.setattr(run, "connect", lambda *_: (torch.device("cuda"), 0, 1))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    made = run.Run("deit3", *deit3.parse_args(flags))
    run._CURRENT.remove(made)
    assert made.amp == amp


def test_smoothing_does_not_go_with_binary_cross_entropy(deit3_here):
    refused(deit3_here("--recipe", "in1k", "--smoothing", "0.1"), "--loss ce")


def test_A6_an_odd_batch_with_mixup_works(deit3_here, tmp_path):
    result = deit3_here(
        *TINY, "--batch-size", 5, "--mix-group", 5, "--data", write_folder(tmp_path / "d", train=3, val=1), "--out",
        tmp_path / "o"
    )
    assert result.status == 0, result


@pytest.mark.parametrize("size, near", [("225", "224x224 or 232x232"), ("224x161", "224x160 or 232x168")])
def test_A7_a_size_that_is_no_multiple_of_the_patch(deit3_here, tmp_path, size, near):
    refused(deit3_here(*TINY, "--img-size", size, "--out", tmp_path / "o"), "--img-size", near)
    assert not (tmp_path / "o").exists()


def test_A7_non_square_images_train_evaluate_and_change_size(deit3_here, tmp_path, folder):
    common = [*TINY, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert deit3_here(*common, "--img-size", "32x48", "--out", tmp_path / "a").status == 0
    result = deit3_here(
        *common, "--img-size", "48x32", "--weights", tmp_path / "a" / "last.pt", "--out", tmp_path / "b"
    )
    assert result.status == 0 and "position embedding" not in result.err, result
    result = deit3_here(*common, "--eval", "--img-size", "64x48", "--weights", tmp_path / "a" / "last.pt")
    assert result.status == 0 and "position embedding resized to 8 x 6 patches" in result.out, result


def test_A9_deviations_are_printed_and_logged(deit3_here, tmp_path, folder):
    result = deit3_here(*TINY, "--data", folder, "--optimizer", "adamw", "--out", tmp_path)
    assert result.status == 0 and "differs from the paper:" in result.out
    assert "optimizer adamw (recipe: lamb)" in result.out  # TINY's recipe is not of the paper
    assert "known to diverge" in result.out
    assert "optimizer adamw (paper: lamb)" in log_of(tmp_path)[0]["differs_from_paper"]


@pytest.mark.parametrize("script", ["resmlp", "patchconvnet"])
def test_A9_an_optimizer_that_diverges_at_lambs_rate_is_named(here, script, folder, tmp_path):
    flags = ["--optimizer", "adamw", "--lr", 0.005, "--show-batch", tmp_path / "b.png", "--batch-size", 16]
    result = here(script, "--model", NANO[script], "--data", folder, "--recipe", "in1k", "--img-size", 64, *flags)
    assert result.status == 0 and "adamw at LAMB's rate of 0.005 is known to diverge" in result.out, result


def test_A9_other_epochs_differ_from_the_paper_in_every_recipe():
    for name, recipe in deit3.RECIPES.items():
        _, changed, paper = deit3.parse_args(["--recipe", name, "--epochs", "7"])
        assert (changed.epochs, paper.epochs) == (7, recipe.epochs)
    assert deit3.parse_args(["--recipe", "transfer", "--data", "inat2018:/d", "--epochs", "7"])[2].epochs == 360


def test_A10_an_output_folder_in_use(deit3_here, tmp_path, folder):
    command = [*TINY, "--data", folder, "--out", tmp_path]
    assert deit3_here(*command).status == 0 and not (tmp_path / "lock").exists()
    refused(deit3_here(*command), "holds a run already", "--resume auto")
    file = f"f = open('{tmp_path / 'lock'}', 'a')"
    code = f"import fcntl, time; {file}; fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    holder = start(sys.executable, "-c", code)
    holder.stdout.readline()
    (tmp_path / "lock").write_text(f"process {holder.pid} on {socket.gethostname()}\n")
    refused(deit3_here(*command, "--resume"), f"in use by process {holder.pid} on")
    holder.kill()  # the lock's text stays behind, the kernel has freed the lock
    holder.communicate()
    assert deit3_here(*command, "--resume").status == 0
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "lock").write_text("process 1 on another-host\n")  # which this kernel knows nothing of
    refused(deit3_here(*command, "--resume"), "in use by process 1 on another-host, alive 0 s ago", "after 120 s")
    assert (tmp_path / "lock").exists() and (tmp_path / "last.pt").read_bytes() == before
    os.utime(tmp_path / "lock", (0, time.time() - LEASE - 1))
    assert deit3_here(*command, "--resume").status == 0 and not (tmp_path / "lock").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_A11_no_gpu(deit3_here, tmp_path, folder):
    refused(deit3_here("--device", "cuda", "--data", folder), "--device cuda", "no GPU")
    arguments = [a for a in TINY if a not in ("--device", "cpu")]
    assert "running on the CPU" in deit3_here(*arguments, "--data", folder, "--out", tmp_path).out


def test_A12_help_and_list_need_nothing(fresh, tmp_path):
    shutil.copy(ROOT / "deit3.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    for flag, part in (("--help", "--batch-size"), ("--list-models", "vit_h26x2")):
        result = fresh("deit3.py", flag, cwd=tmp_path, HOME="/proc/nothing", PYTHONDONTWRITEBYTECODE=1)
        assert result.status == 0 and part in result.out, result
    assert sorted(tmp_path.rglob("*")) == before


def test_A13_precision_that_the_device_lacks(deit3_here, folder):
    refused(deit3_here(*TINY, "--amp", "fp16", "--data", folder), "--amp fp16", "--amp fp32")


def test_A14_resuming_with_other_flags(deit3_here, tmp_path, folder):
    command = [*TINY, "--data", folder, "--out", tmp_path]
    assert deit3_here(*command).status == 0
    for change, part in (
        (["--lr", "0.005"], "lr was 0.0025, now 0.005"),
        (["--epochs", "3"], "epochs was 2, now 3"),
        (["--seed", "1"], "seed was 0, now 1"),
    ):
        refused(deit3_here(*command, *change, "--resume"), part, "--allow-changes")
        assert log_of(tmp_path)[-1]["status"] == "completed"  # a refused start leaves the log alone
    result = deit3_here(*command, "--epochs", "3", "--resume", "--allow-changes")
    assert result.status == 0 and "epochs was 2, now 3" in result.out, result
    assert [r["epoch"] for r in log_of(tmp_path) if "train_loss" in r] == [0, 1, 2]
    assert log_of(tmp_path)[-1]["status"] == "completed"
    longer = [*command, "--epochs", "4", "--resume", "--allow-changes"]
    refused(deit3_here(*longer, "--optimizer", "sgd"), "its optimizer state does not fit", "--weights")
    assert deit3_here(*longer, "--weight-decay", "0.5").status == 0  # obeyed, not only said
    decays = [group["weight_decay"] for group in load(tmp_path / "last.pt")["optimizer"]["param_groups"]]
    assert decays == [0, 0.5] and log_of(tmp_path)[-1]["status"] == "completed"


# ---- Data rows that a command answers --------------------------------------------------------------------------------


def test_B8_another_number_of_classes(deit3_here, tmp_path, folder):
    assert deit3_here(*TINY, "--data", folder, "--out", tmp_path / "a").status == 0
    three = write_folder(tmp_path / "three", classes=("ant", "bee", "cat"))
    result = deit3_here(*TINY, "--data", three, "--weights", tmp_path / "a/last.pt", "--out", tmp_path / "b")
    assert result.status == 0 and "new head: the checkpoint has 4 classes, the data 3" in result.out, result
    refused(deit3_here(*TINY, "--data", three, "--eval", "--weights", tmp_path / "a/last.pt"), "classes")
    refused(
        deit3_here(*TINY, "--data", three, "--resume", tmp_path / "a/last.pt", "--out", tmp_path / "c"),
        "classes was 4, now 3"
    )


def test_B9_a_data_set_smaller_than_the_batch(deit3_here, tmp_path):
    few = write_folder(tmp_path / "d", train=10, val=1)
    refused(
        deit3_here(*TINY, "--data", few, "--batch-size", 64, "--out", tmp_path / "o"), "--batch-size 64", "40 images"
    )
    refused(deit3_here(*TINY, "--data", few, "--batch-size", 64, "--repeats", 3, "--out", tmp_path / "o"), "40 images")


def test_B26_data_changed_between_run_and_resume(deit3_here, tmp_path):
    images = write_folder(tmp_path / "d")
    command = [*TINY, "--data", images, "--out", tmp_path / "o"]
    assert deit3_here(*command).status == 0
    time.sleep(0.02)
    (images / "train" / "ant" / "new.jpg").write_bytes(encoded(picture(0, 77)))
    refused(deit3_here(*command, "--resume"), f"data was {images}, now {images} with other files or labels; repeat")
    shutil.copytree(images, tmp_path / "e")
    (images / "train" / "ant" / "new.jpg").unlink()
    changed = [*TINY, "--data", tmp_path / "e", "--out", tmp_path / "o"]
    refused(deit3_here(*changed, "--resume"), f"data was {images}, now {tmp_path / 'e'} with other files or labels")
    images.rename(tmp_path / "moved")  # the same images elsewhere
    moved = [*TINY, "--data", tmp_path / "moved", "--out", tmp_path / "o"]
    assert deit3_here(*moved, "--resume").status == 0
    time.sleep(0.02)
    next((tmp_path / "moved/val/ant").iterdir()).unlink()  # best.pt would be the best on other images
    refused(deit3_here(*moved, "--resume"), "validation images was 20 (", "now 19 (", "--allow-changes")
    refused(deit3_here(*moved, "--val-data", "none", "--resume"), "validation images was 20 (", "now none")


def test_a_finished_run_is_not_evaluated_again(deit3_here, tmp_path, folder, monkeypatch):
    """But where it was stopped between its last checkpoint and its end it is."""
    command = [*TINY, "--data", folder, "--out", tmp_path / "o"]
    assert deit3_here(*command).status == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    result = deit3_here(*command, "--resume")
    assert result.status == 0 and "it is complete: nothing is left to do" in result.out, result
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    records = (tmp_path / "o/log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "o/log.jsonl").write_text("".join(records[:-1]))
    result = deit3_here(*command, "--resume")
    assert result.status == 0 and "val_top1" in result.out and log_of(tmp_path / "o")[-1]["status"] == "completed"


@pytest.mark.parametrize("workers, steps, told", [(1, 30, True), (1, 3, False), (2, 30, False)])
def test_more_workers_are_recommended_only_where_they_can_help(tmp_path, workers, steps, told, monkeypatch):
    """After enough steps, and while there are cores for them."""
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1})
    flags = ["--recipe", "shapes", "--device", "cpu", "--workers", str(workers), "--out", str(tmp_path)]
    made, said = run.Run("deit3", *deit3.parse_args(flags)), []
    run._CURRENT.remove(made)
    model = torch.nn.Linear(1, 1)
    made.parts, made.step, made.say = {"model": model}, steps, said.append
    made.data, made.first_step, made.epoch_start = SimpleNamespace(waited=50.0, steps=steps), 0, time.time() - 60
    monkeypatch.setattr(made, "save", lambda: None)
    made.end_of_training_epoch(0.1)
    assert bool([line for line in said if "raise --workers (now 1)" in line]) == told


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_list_of_models_says_their_parameters(here, script):
    import deit

    lines = here(script, "--list-models").out.splitlines()
    assert [line.split()[0] for line in lines] == list(importlib.import_module(script).MODELS)
    assert all(re.search(r" \d+\.\d\d M parameters  ", line) for line in lines)
    if script == "cait":
        assert re.search("cait_m48 +356.0", "\n".join(lines)) and re.search("deit_s +22.0", "\n".join(lines))
    if script == "deit":
        own = sum(p.numel() for p in deit.build_model("deit_b").parameters()) / 1e6
        assert f"deit_b               {own:7.2f} M parameters  dim 768" in "\n".join(lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_recipes_values(here, script):
    recipe = importlib.import_module(script).Recipe()
    said = " ".join(here(script, "--help").out.split())
    assert "in brackets the default recipe's" in said
    for name, value in vars(recipe).items():
        shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
        assert re.search(rf"--{name.replace('_', '-')} X ((?! --).)*\[{re.escape(str(shown))}\]( --|$)", said), name


def test_evaluation_writes_its_figures_to_out(deit3_here, tmp_path, folder):
    assert deit3_here(*TINY, "--data", folder, "--out", tmp_path / "o").status == 0
    flags = ["--model", "vit_nano", "--device", "cpu", "--workers", 0, "--weights", tmp_path / "o/best.pt", "--eval"]
    result = deit3_here(*flags, "--data", folder, "--eval-data", folder / "val", "--out", tmp_path / "e")
    found = json.loads((tmp_path / "e/eval.json").read_text())
    assert list(found) == [str(folder), str(folder / "val")], result
    for metrics in found.values():
        assert metrics["weights"] == str(tmp_path / "o/best.pt") and metrics["images"] == 20
        assert metrics["img_size"] == [32, 32] and accuracy(result)["top1"] == pytest.approx(metrics["top1"], abs=1e-3)
    for asked in (["--data", folder], ["--predict", folder / "val/ant"]):
        flag = flags[:-1] if asked[0] == "--predict" else flags
        refused(deit3_here(*flag, *asked, "--out", "/proc/none/e"), "/proc/none/e/", "cannot be written")


def test_a_damaged_image_ends_the_run_with_its_path(deit3_here, tmp_path):
    images = write_folder(tmp_path / "d", train=4, val=1)
    (images / "train" / "cat" / "cat_002.jpg").write_bytes(b"")
    result = deit3_here(*TINY, "--data", images, "--out", tmp_path / "o")
    assert result.status == 1 and "train/cat/cat_002.jpg" in result.err, result
    assert len(result.err.strip().splitlines()) == 1, result
    assert log_of(tmp_path / "o")[-1]["status"] == "failed"


# ---- Other uses ------------------------------------------------------------------------------------------------------


def accuracy(result) -> dict:
    words = result.out.strip().splitlines()[-1].split()
    return dict(zip(words[::2], map(float, words[1::2])))


def test_D9_B10_evaluation_repeats_the_logged_numbers_for_any_batch_and_ranks(deit3_here, tmp_path):
    images = write_folder(tmp_path / "d", val=25)
    (images / "val" / "ant" / "one_more.jpg").write_bytes(encoded(picture(0, 1234)))  # 101 images
    assert deit3_here(*TINY, "--data", images, "--ema", 0.9, "--out", tmp_path / "o").status == 0
    logged = [r for r in log_of(tmp_path / "o") if "val_top1" in r][-1]
    command = [*TINY, "--data", images, "--eval", "--weights", tmp_path / "o/last.pt"]
    for extra in ([], ["--micro-batch", "7"]):
        found = accuracy(deit3_here(*command, *extra))
        assert found["top1"] == pytest.approx(logged["val_top1"], abs=1e-3)
        assert found["loss"] == pytest.approx(logged["val_loss"], abs=1e-4)
    averaged = accuracy(deit3_here(*command, "--use-ema"))
    assert averaged["loss"] == pytest.approx(logged["val_ema_loss"], abs=1e-4) and averaged["loss"] != pytest.approx(
        logged["val_loss"], abs=1e-4
    )
    from test_run import ranks

    assert ranks(2, command, tmp_path) == [0, 0]
    two = Result(0, (tmp_path / "rank0.log").read_text(), "")
    assert accuracy(two)["top1"] == pytest.approx(logged["val_top1"], abs=1e-3), two


def test_evaluation_takes_size_and_crop_from_the_checkpoint(deit3_here, tmp_path, folder):
    assert deit3_here(*TINY, "--data", folder, "--layer-scale", "none", "--out", tmp_path / "o").status == 0
    result = deit3_here(
        "--model", "vit_nano", "--device", "cpu", "--workers", 0, "--data", folder, "--eval", "--weights",
        tmp_path / "o/last.pt"
    )
    assert result.status == 0 and "20 images at 32 x 32, crop ratio 1" in result.out, result
    assert "resized" not in result.out, result


def test_A13_compile_without_a_compiler(deit3_here, tmp_path, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(deit3_here(*TINY, "--data", folder, "--compile", "--out", tmp_path / "o"), "--compile", "C++ compiler")


def test_evaluation_on_other_sets_and_on_real_labels(deit3_here, tmp_path):
    names = ("n01", "n02", "n03", "n04")
    images = write_folder(tmp_path / "d", classes=names)
    for n, file in enumerate(sorted((images / "val").rglob("*.jpg"))):
        file.rename(file.with_name(f"ILSVRC2012_val_{n + 1:08d}.JPEG"))
    assert deit3_here(*TINY, "--data", images, "--out", tmp_path / "o").status == 0
    v2 = write_folder(tmp_path / "v2", classes=("0", "1", "2", "3"))
    (tmp_path / "real.json").write_text(json.dumps([[n // 5] for n in range(19)] + [[]]))
    command = [*TINY, "--data", images, "--eval", "--weights", tmp_path / "o/best.pt"]
    found = accuracy(deit3_here(*command, "--real-labels", tmp_path / "real.json"))
    assert abs(found["real"] - found["top1"]) < 6  # the same labels, one image left out
    result = deit3_here(*command, "--eval-data", v2 / "val")
    assert result.status == 0 and "taken as labels 0..3" in result.out, result
    refused(deit3_here(*command, "--real-labels", tmp_path / "none.json"), "--real-labels")


def test_show_batch_writes_what_the_network_is_fed(deit3_here, tmp_path):
    """Twice 16 images in rows of 8; those of 32 pixels are shown three times as large."""
    result = deit3_here(*TINY, "--show-batch", tmp_path / "batch.png")
    assert result.status == 0, result
    assert Image.open(tmp_path / "batch.png").size == (8 * 100 - 4, 2 * (14 + 96 + 4 + 96))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["batch", "batch.xyz", "/proc/none/batch.png"])
def test_a_picture_that_cannot_be_written_is_told_in_one_line(deit3_here, tmp_path, name):
    """No suffix, an unknown one, no such place."""
    refused(deit3_here(*TINY, "--show-batch", tmp_path / name), str(tmp_path / name), "cannot be written")


def test_benchmark_prints_speed(deit3_here, monkeypatch):
    monkeypatch.setattr("common.report.speed.__kwdefaults__", {"seconds": 0.1})
    result = deit3_here(*TINY, "--benchmark")
    assert result.status == 0 and "training" in result.out and "inference" in result.out and "images/s" in result.out


def test_a_run_writes_log_checkpoints_and_curves(deit3_here, tmp_path, folder):
    result = deit3_here(*TINY, "--data", folder, "--out", tmp_path, "--tensorboard")
    assert result.status == 0, result
    assert Image.open(tmp_path / "batch.png").size == (8 * 100 - 4, 2 * (14 + 96 + 4 + 96))
    for part in ("16 = 1 ranks x 16 x 1 accumulation", "GMACs", "2 epochs x 4"):
        assert part in result.out
    assert {"last.pt", "best.pt", "log.jsonl", "curves.png"} <= {p.name for p in tmp_path.iterdir()}
    assert any(p.name.startswith("events") for p in tmp_path.iterdir())
    epochs = [r for r in log_of(tmp_path) if "train_loss" in r]
    assert [e["epoch"] for e in epochs] == [0, 1] and all(e["val_top5"] == 100 for e in epochs)
    assert log_of(tmp_path)[0]["status"] == "started" and log_of(tmp_path)[-1]["status"] == "completed"


@pytest.mark.parametrize("extra", [
    ["--trainable", "attention"], ["--model", "torchvision/resnet18", "--img-size", "64"], ["--grad-checkpoint"],
    ["--amp", "bf16"], ["--layer-scale", "none", "--loss", "bce", "--smoothing", "0"],
    ["--drop-path", "0.5", "--crop", "rrc", "--augment", "rand"], ["--val-data", "none"]
], ids=" ".join)
def test_variants_train(deit3_here, tmp_path, folder, extra):
    result = deit3_here(*TINY, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, *extra, "--out", tmp_path)
    assert result.status == 0, result
    if extra[0] == "--trainable":
        a = deit3.build_model("vit_nano", 4, 32, layer_scale=1.0)
        torch.manual_seed(0)
        fresh = deit3.build_model("vit_nano", 4, 32, layer_scale=1.0).state_dict()
        changed = {k for k, v in load(tmp_path / "last.pt")["model"].items() if not torch.equal(v, fresh[k])}
        assert changed == {
            n for n, _ in a.named_parameters() if ".attn" in n or n.startswith("head.") or n == "pos_embed"
        }


def test_F12_batch_norm_with_one_image(deit3_here, tmp_path, folder):
    command = [
        *TINY, "--model", "torchvision/resnet18", "--mix-group", 1, "--micro-batch", 1, "--data", folder, "--out",
        tmp_path
    ]
    refused(deit3_here(*command), "BatchNorm")


def test_H5_tensorboard_missing(deit3_here, tmp_path, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    refused(deit3_here(*TINY, "--data", folder, "--out", tmp_path, "--tensorboard"), "pip install tensorboard")


def test_signal_handlers_are_put_back():
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_without_data_the_built_in_set_is_trained_on_by_its_own_recipe_or_imagenet_where_it_is_set(
    deit3_here, folder, tmp_path, monkeypatch
):
    """And the first line says which; what is measured without data keeps the paper's recipe."""
    monkeypatch.delenv("IMAGENET", raising=False)
    args, recipe, paper = deit3.parse_args(["--model", "vit_b"])
    assert (args.data, args.recipe) == ("shapes", "shapes") and recipe.img_size == (48, 48) and recipe == paper
    assert deit3.parse_args(["--benchmark"])[1].img_size == (224, 224)
    assert deit3.parse_args(["--recipe", "in1k"])[1].batch_size == 2048
    small = ["--model", "vit_nano", "--epochs", 1, "--warmup-epochs", 0, "--workers", 0, "--img-size", 32]
    with fewer_shapes(64, 12):
        result = deit3_here(*small, "--out", tmp_path / "a")
    first, *_ = result.out.splitlines()
    assert result.status == 0 and "the built-in data set shapes" in first and "--data /imagenet" in first, result
    assert "this recipe is none of the paper's; from the recipe: epochs 1 (recipe: 6); " in result.out
    assert "(paper:" not in result.out
    monkeypatch.setenv("IMAGENET", str(folder))
    result = deit3_here(*small, "--batch-size", 32, "--mix-group", 8, "--out", tmp_path / "b")
    assert result.status == 0 and result.out.startswith("no --data: took $IMAGENET\n"), result
    assert str(folder) in result.out and "recipe   in1k" in result.out
    assert deit3.parse_args(["--recipe", "shapes"])[0].data == "shapes"  # as README starts


@pytest.mark.parametrize("flag", ["workers", "seed", "save-steps", "micro-batch", "timeout", "top"])
def test_A4_run_flags_have_a_range_too(deit3_here, flag):
    refused(deit3_here("--recipe", "shapes", f"--{flag}", "-1"), f"--{flag} -1: must be ")


def test_folders_named_by_numbers_are_labels_to_weights_that_name_no_classes(deit3_here, tmp_path):
    """ImageNet-V2's folders are 0 to 999, which sorted as names are 0, 1, 10, 100, ...; also as --data."""
    names = [str(i) for i in range(12)]
    for label in range(12):
        for split in ("train", "val"):
            (tmp_path / "d" / split / names[label]).mkdir(parents=True)
            for i in range(3):
                file = tmp_path / "d" / split / names[label] / f"{i}.jpg"
                file.write_bytes(encoded(picture(label % 3, 9 * label + i)))
    torch.manual_seed(0)
    model = deit3.build_model("vit_nano", 12, 32).eval()
    source = open_images(str(tmp_path / "d/val"), "", names)
    pixels = torch.stack([eval_transform(source.read(i), (32, 32), 1.0) for i in range(36)])
    with torch.no_grad():  # a head that answers every image's label
        features = model.forward_features(normalize(pixels))[:, 0].double()
        answers = torch.nn.functional.one_hot(torch.tensor(source.labels), 12).double()
        model.head.weight.copy_((torch.linalg.pinv(features - features.mean(0), rtol=1e-6) @ answers).T)
        model.head.bias.copy_(-(model.head.weight.double() @ features.mean(0)))
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    flags = ["--model", "vit_nano", "--weights", tmp_path / "bare.pth", "--img-size", 32, "--workers", 0]
    for where in (["--eval-data", tmp_path / "d/val"], ["--data", tmp_path / "d"]):
        result = deit3_here(*flags, "--eval", *where, "--eval-crop-ratio", 1)
        assert result.status == 0 and "top1 100 " in result.out, result


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_goes_on_from_trained_weights_does_not_start_without_them(here, script, folder, tmp_path):
    """Nor from an empty name of them."""
    recipes = [r for r in importlib.import_module(script).RECIPES if r.startswith(("finetune", "transfer", "in21k_to"))]
    small = ["--data", folder, "--device", "cpu", "--workers", 0, "--out", tmp_path / "o"]
    for recipe in recipes:
        result = here(script, "--recipe", recipe, *small, "--batch-size", 32)
        assert result.status == 2 and "--weights" in result.err and not (tmp_path / "o/last.pt").exists(), result
        refused(here(script, "--recipe", recipe, *small, "--batch-size", 32, "--resume", "auto"), "give --weights FILE")
        refused(here(script, "--recipe", recipe, *small, "--data", tmp_path / "none"), "give --weights FILE")  # at once
        (tmp_path / "o").mkdir(exist_ok=True)
        (tmp_path / "o/pretrained.pt").touch()  # nothing to resume
        refused(here(script, "--recipe", recipe, *small, "--batch-size", 32, "--resume", "auto"), "give --weights FILE")
    refused(here(script, *small, "--weights", ""), "--weights: is empty")
    assert recipes or script == "trex"


@pytest.mark.parametrize("module, command", [("transfer", "features"), ("dense", "segment")])
def test_A4_run_flags_have_the_same_range_in_the_other_commands(launched, tmp_path, module, command):
    main, out = importlib.import_module(f"common.{module}").main, ["--out", tmp_path / "o"]
    refused(launched(main, [module, command, *out, "--workers", "-1"]), "--workers -1: must be 0 or more")
    refused(launched(main, [module, command, *out, "--micro-batch", "0"]), "--micro-batch 0: must be 1 or more")
    refused(launched(main, [module, command, *out, "--weights", ""]), "--weights: is empty")


ABSURD = ["-1", "-8", "nan", "inf", "-inf", "1e400", f"-1{30 * '0'}", f"1{30 * '0'}", "x", "", "0x0", "9" * 5000]


COMMANDS = [*((script, []) for script in SCRIPTS), *(("common.dense", [task]) for task in ("segment", "detect"))]
COMMANDS += [("common.transfer", words) for words in (["features"], ["finetuned", "a=b"], ["compare", "a"])]


@pytest.mark.parametrize("module, words", COMMANDS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_every_flag_of_every_command_has_a_range(launched, tmp_path, module, words, monkeypatch):
    """Absurd values of all flags: one line that names the flag, status 2. Names of files and texts may be anything but
    empty; words are of a list."""
    script, found, known = importlib.import_module(module), [], cli.Parser.parse_known_args
    needed = ["--out", tmp_path / "o"] if module == "common.transfer" else []
    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_known_args", lambda self, *a: found.append(self) or known(self, *a))
        script.parse_args([*words, *map(str, needed)])
    text, count = ("FILE", "FOLDER", "DATA", "PATH", "IMAGE", "TEXT", "NAME", "SCRIPT/MODEL"), 0
    hints = script.Recipe.__annotations__ if hasattr(script, "Recipe") else {}
    for action in found[-1]._actions:
        if action.nargs == 0 or not action.option_strings:
            continue
        flag, kind = action.option_strings[-1], str(hints.get(action.dest))
        values = ["", "nonsense"] if "[str" in kind or action.choices else [""] if action.metavar in text else ABSURD
        for value in values:
            refused(launched(script.main, [module, *words, *needed * (flag != "--out"), f"{flag}={value}"]), flag)
        count += values is ABSURD
    assert count >= 5 or words[:1] in (["finetuned"], ["compare"])


@pytest.mark.parametrize("name, size, why", [
    ("googlenet", 64, "auxiliary outputs, which are not trained"), ("inception_v3", 80, "Output size is too small"),
    ("vit_b_16", 64, "Expected 224 but got 64"), ("alexnet", 48, "Output size is too small"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:The default weight init:FutureWarning")  # torchvision's of itself
def test_torchvisions_models_of_another_kind_are_refused_in_one_line(deit3_here, tmp_path, folder, name, size, why):
    """Auxiliary outputs (GoogLeNet, Inception), an image size of their own (ViT), one too small (AlexNet)."""
    flags = [*TINY, "--data", folder, "--img-size", size, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "o"]
    result = deit3_here(*flags, "--model", f"torchvision/{name}")
    refused(result, f"--model torchvision/{name}", "--img-size", why)


def test_a_part_of_the_classes_is_evaluated_by_name_or_number(deit3_here, tmp_path, folder):
    """ImageNet-A and -R hold 200 of the 1000 classes."""
    assert deit3_here(*TINY, "--data", folder, "--out", tmp_path / "o").status == 0
    flags = ["--model", "vit_nano", "--device", "cpu", "--workers", 0, "--img-size", 32, "--eval", "--weights"]
    both = {}
    for index, name in enumerate(("ant", "bee", "cat", "dog")):
        for part, folders in (("name", ("bee", "dog")), ("number", ("bee", "dog"))):
            if name in folders:
                place = tmp_path / part / (name if part == "name" else str(index))
                shutil.copytree(folder / "val" / name, place)
    torch.save({"model": load(tmp_path / "o/best.pt")["model"]}, tmp_path / "bare.pth")
    for weights in ("o/best.pt", "bare.pth"):
        for part in ("name", "number"):
            known = ["--data", folder] if (weights, part) == ("bare.pth", "name") else []
            result = deit3_here(*flags, tmp_path / weights, *known, "--eval-data", tmp_path / part)
            assert result.status == 0 and "2 of the 4 classes" in result.out, result
            both[weights, part] = accuracy(result)
    assert len({str(found) for found in both.values()}) == 1
    with torch.no_grad():
        model, classes, transform = deit3.load_model(str(tmp_path / "o/best.pt"))
        files = [(classes.index(n), f) for n in ("bee", "dog") for f in sorted((folder / "val" / n).iterdir())]
        right = [model(transform(f)[None]).argmax().item() == label for label, f in files]
    assert both["bare.pth", "number"]["top1"] == pytest.approx(100 * sum(right) / len(right), abs=1e-3)
    refused(deit3_here(*flags, tmp_path / "bare.pth", "--eval-data", tmp_path / "name"), "its 2 classes", "--data")


@pytest.mark.parametrize("script, flag", [("deit3", "--real-labels"), ("deit3", "--coarse-labels"), ("transfer", "")])
def test_json_nested_too_deep_is_a_mistake_like_others(here, launched, folder, tmp_path, script, flag):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    torch.save({"model": deit3.build_model("vit_nano", 4, 32).state_dict()}, tmp_path / "w.pt")
    flags = ["--model", "vit_nano", "--weights", tmp_path / "w.pt", "--img-size", 32, "--workers", 0, "--data", folder]
    if script == "transfer":
        argv = ["transfer", "compare", *3 * [tmp_path / "deep.json"], "--out", tmp_path / "o"]
        return refused(launched(importlib.import_module("common.transfer").main, argv), "deep.json", "recursion")
    refused(here(script, *flags, "--eval", flag, tmp_path / "deep.json"), flag, "recursion")


@pytest.mark.parametrize("script, flags, told", [
    *((script, ["--eval", "--predict", "x.jpg"], "--eval and --predict: ask for one at a time") for script in SCRIPTS),
    ("deit", ["--eval", "--benchmark"], "--eval and --benchmark"),
    ("deit3", ["--predict", "x", "--export", "x.pt2"], "--predict and --export"),
    ("cait", ["--branch-norms", "--predict", "x"], "--predict and --branch-norms"),
    ("patchconvnet", ["--attention-maps", "x", "--benchmark"], "--benchmark and --attention-maps"),
    ("resmlp", ["--filters", "x", "--eval-data", "x"], "--eval-data and --filters"),
    ("grafit", ["--retrieve", "1", "--eval"], "--eval and --retrieve"),
    ("trex", ["--show-batch", "x.png", "--list-models"], "--show-batch and --list-models"),
])  # fmt: skip
def test_two_commands_in_one_are_refused(here, script, flags, told):
    refused(here(script, *flags), told)


def test_a_daemon_without_any_stream_is_stopped_like_others(tmp_path, folder):
    """No file of the run takes a closed stream's place: what is said there would stand in it."""
    flags = " ".join(map(str, [*TINY, "--data", folder, "--out", tmp_path / "o", "--epochs", 2000]))
    process = start("sh", "-c", f"exec {sys.executable} {ROOT}/deit3.py {flags} <&- >&- 2>&-")
    try:
        wait_until(lambda: (tmp_path / "o/log.jsonl").exists() and len(log_of(tmp_path / "o")) > 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert log_of(tmp_path / "o")[-1]["status"] == "preempted" and not (tmp_path / "o/lock").exists()
    assert (tmp_path / "o/last.pt").exists()


def test_a_full_disk_below_standard_output_does_not_end_a_run(tmp_path, folder):
    flags = " ".join(map(str, [*TINY, "--data", folder, "--out", tmp_path / "o", "--epochs", 1, "--warmup-epochs", 0]))
    result = finish(start("sh", "-c", f"{sys.executable} {ROOT}/deit3.py {flags} > /dev/full"))
    assert result.status == 0 and "Traceback" not in result.err and (tmp_path / "o/best.pt").exists(), result


def test_closed_standard_streams_change_nothing(tmp_path, folder):
    flags = " ".join(map(str, [*TINY, "--data", folder, "--out", tmp_path / "o", "--epochs", 1, "--warmup-epochs", 0]))
    result = finish(start("sh", "-c", f"{sys.executable} {ROOT}/deit3.py {flags} >&- 2>&-"))
    assert result.status == 0 and "Traceback" not in result.err and (tmp_path / "o/best.pt").exists(), result
