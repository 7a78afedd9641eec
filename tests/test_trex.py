"""trex.py against the official models' and components' numbers, and as a whole."""

import functools
import hashlib
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import NANO, fill, filled_images, load, log_of, noise, psnr, reference, sine, triangle_image
from PIL import Image, ImageFilter
from test_cli import refused

import trex
from common.images import from_numpy, resize
from common.optim import param_groups
from common.report import count

MODELS = reference("trex")
AUGMENT = reference("augment")
BOTH = ["trex", "plain_3"]


def build(variant: str) -> trex.TReX:
    """A reference model, filled."""
    model = trex.build_model("resnet50", 20, memory_size=MODELS[variant]["memory_size"])
    fill(model)
    if variant == "trex":
        model.memory.labels.copy_(torch.arange(64) % 20)
        model.memory.ptr.zero_()
    return model.eval()


# ---- Architecture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", BOTH)
def test_state_dict_parameters_gmacs_and_decay_are_the_official_ones(variant):
    case = MODELS[variant]
    with torch.device("meta"):
        model = trex.build_model("resnet50", 20, memory_size=case["memory_size"])
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert hashlib.sha256(json.dumps(keys, separators=(",", ":")).encode()).hexdigest() == case["state_dict_sha256"]
    parameters, gmacs = count(lambda: trex.build_model("resnet50", 20, memory_size=case["memory_size"]), (224, 224))
    assert parameters == case["n_params"] and gmacs == pytest.approx(case["gmacs"], rel=1e-4)
    plain, decayed = param_groups(model, 1e-4)
    names = {id(p): n for n, p in model.named_parameters()}
    listed = "\n".join(sorted(names[id(p)] for p in plain["params"]))
    assert hashlib.sha256(listed.encode()).hexdigest() == case["no_decay_sha256"]
    assert not any(names[id(p)].startswith("model_ema") for p in (*plain["params"], *decayed["params"]))


@pytest.mark.parametrize("variant", BOTH)
def test_features_projections_and_logits_equal_the_official_ones(variant):
    case, model = MODELS[variant], build(variant)
    images, crops = filled_images(2, 224), filled_images(4, 96)
    with torch.no_grad():
        for found, name in (
            (model(images), "logits_eval"), (model.model.encoder(images), "encoder_features"),
            (model.model([images]), "projector_output"),
        ):
            rms = found.pow(2).mean().sqrt()
            assert (found[:, : len(case[name][0])] - torch.tensor(case[name])).abs().max() <= 1e-5 * rms, name
            norm = case["logits_norm" if name == "logits_eval" else f"{name}_norm"]
            assert found.norm().item() == pytest.approx(norm, rel=1e-5)
        multi, expected = model([images, crops[:2], crops[2:]]), torch.tensor(case["logits_multicrop"])
        assert multi.shape == (6, 20) and torch.allclose(multi[:, :10], expected, atol=1e-5)
        z = torch.from_numpy(noise("projector_train", 8 * 2048).reshape(8, 2048).astype(np.float32))
        trained = model.model.head.train()(z)
        assert (trained[:2, :10] - torch.tensor(case["projector_train"])).abs().max() <= 2e-5
        assert trained.norm().item() == pytest.approx(case["projector_train_norm"], rel=1e-5)


@pytest.mark.parametrize("variant", BOTH)
def test_a_fresh_model_has_the_official_distribution(variant):
    torch.manual_seed(0)
    state = trex.build_model("resnet50", 20, memory_size=MODELS[variant]["memory_size"]).state_dict()
    for key, (mean, std) in MODELS[variant]["init_stats"].items():
        tensor = state[key].double()
        error = 6 * max(std, 1e-12) / math.sqrt(tensor.numel())  # six standard errors of a mean
        assert tensor.mean().item() == pytest.approx(mean, abs=2 * error + 1e-9), key
        assert tensor.std(correction=0).item() == pytest.approx(std, abs=error + 1e-9, rel=0.01), key
    if variant == "trex":
        pairs = [(state[k], state["model_ema." + k.removeprefix("model.")]) for k in state if k.startswith("model.")]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_two_recipes_of_the_paper():
    r, star = trex.RECIPES["trex"], trex.RECIPES["trex_star"]
    assert (r.hidden_layers, r.global_scale, r.local_scale, r.memory_size) == (3, 0.25, 0.25, 8192)
    assert (star.hidden_layers, star.global_scale, star.local_scale, star.memory_size) == (1, 0.4, 0.4, 8192)
    for one in (r, star):
        assert (one.epochs, one.lr, one.batch_size, one.weight_decay, one.warmup_epochs) == (100, 0.1, 256, 1e-4, 10)
        assert (one.img_size, one.local_size, one.local_crops, one.temperature) == ((224, 224), (96, 96), 8, 0.1)
    assert trex.RECIPES["trex_plain"].memory_size == trex.RECIPES["trex_star_plain"].memory_size == 0
    assert trex.parse_args(["--recipe", "trex", "--batch-size", "1024"])[1].lr == pytest.approx(0.4)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_prototypes_logits_and_gradient_equal_the_official_ones():
    case = MODELS["ocm"]
    memory = trex.MemoryBank(4, 10, 5).double()
    memory.features.copy_(sine(case["memory_features"]))
    memory.labels.copy_(torch.tensor(case["memory_labels"]))
    prototypes = memory.prototypes()
    assert torch.allclose(prototypes, torch.tensor(case["expected"]["prototypes"], dtype=torch.float64), atol=1e-9)
    z = sine(case["student_features"]).requires_grad_()
    logits = F.normalize(z, dim=1) @ prototypes.T / case["tau"]
    assert torch.allclose(logits, torch.tensor(case["expected"]["logits"], dtype=torch.float64), atol=1e-9)
    assert not logits[:, 4].any()  # a class that is not in the memory
    loss = F.cross_entropy(logits, torch.tensor(case["labels"]))
    assert loss.item() == pytest.approx(case["expected"]["ce_mean"], abs=1e-9)
    expected = torch.tensor(case["expected"]["grad_of_mean_wrt_student_features"], dtype=torch.float64)
    assert torch.allclose(torch.autograd.grad(loss, z)[0], expected, atol=1e-9)


def test_the_memory_is_a_ring():
    memory = trex.MemoryBank(2, 5, 3)
    for start in (0, 3, 6):  # 3 + 3 + 3 items into 5 places: the official one would drop an item at the end
        items = torch.arange(start, start + 3)
        memory.update(items[:, None].float().repeat(1, 2), items % 3)
    assert memory.features[:, 0].tolist() == [5, 6, 7, 8, 4] and memory.ptr.item() == 4
    assert memory.labels.tolist() == [2, 0, 1, 2, 1]
    more = torch.arange(100.0, 112.0)[:, None].repeat(1, 2)  # than it holds
    memory.update(more, torch.zeros(12, dtype=torch.long))
    assert sorted(memory.features[:, 0].tolist()) == [107, 108, 109, 110, 111]


def test_updates_that_fit_equal_the_official_memorys():
    case = MODELS["trex"]["memory_case"]
    memory = trex.MemoryBank(4, 10, 3)
    memory.features.copy_(torch.from_numpy(noise("features", 40).reshape(10, 4) * math.sqrt(6 / 4)))
    memory.labels.copy_(torch.arange(10) % 3)
    before = memory.prototypes()
    assert torch.allclose(before, torch.tensor(case["class_weights_before"]), atol=1e-5)
    for s in range(2):  # the third does not fit
        features = torch.from_numpy(noise(f"update.{s}", 16).reshape(4, 4).astype(np.float32))
        memory.update(features, torch.tensor([2, s % 3, 0, 2]))
        assert memory.ptr.item() == case["ptr_after"][s] and memory.labels.tolist() == case["labels_after"][s]


def test_no_gradient_reaches_memory_or_averaged_network():
    torch.manual_seed(0)
    model = trex.build_model("resnet_nano", 4, hidden_layers=1, memory_size=16)
    logits = model([torch.randn(4, 3, 32, 32)] * 2)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]).repeat(2)).backward()
    assert all(p.grad is not None for p in model.model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.model_ema.parameters())
    assert not model.memory.features.requires_grad
    own, averaged = (next(m.parameters()).detach().clone() for m in (model.model, model.model_ema))
    with torch.no_grad():
        next(model.model.parameters()).add_(1)
    model.average(0.9)
    assert torch.allclose(next(model.model_ema.parameters()), 0.9 * averaged + 0.1 * (own + 1))


def test_crops_of_one_size_are_one_pass_and_order_is_crop_by_crop():
    model, passes = trex.build_model("resnet_nano", 4, hidden_layers=1, memory_size=8).eval(), []
    model.model.encoder.register_forward_pre_hook(lambda module, inputs: passes.append(tuple(inputs[0].shape)))
    crops = [torch.randn(2, 3, 48, 48), *(torch.randn(2, 3, 32, 32) for _ in range(3))]
    with torch.no_grad():
        logits = model(crops)
        assert passes == [(2, 3, 48, 48), (6, 3, 32, 32)]
        assert torch.allclose(logits[4:6], model(crops[2]), atol=1e-4)


@pytest.mark.parametrize("memory_size", [0, 16])
def test_the_loss_is_finite_in_16_bit(memory_size):
    torch.manual_seed(0)
    model = trex.build_model("resnet_nano", 4, hidden_layers=1, memory_size=memory_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model([100 * torch.randn(4, 3, 32, 32)] * 2)
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]).repeat(2))
    assert logits.dtype == torch.float32 and logits.abs().max() <= 10.01 and torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---- Augmentation and schedule ---------------------------------------------------------------------------------------

STEPS = {
    "Brightness": trex.adjust.adjust_brightness,
    "Contrast": trex.adjust.adjust_contrast,
    "Saturation": trex.adjust.adjust_saturation,
    "Hue": trex.adjust.adjust_hue,
    "Grayscale3": lambda image, _: image.convert("L").convert("RGB"),
    "GaussianBlur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
    "Solarize128": lambda image, _: trex.adjust.solarize(image, 128),
    "HFlip": lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.mark.parametrize("case", AUGMENT["trex_cases"], ids=lambda c: c["kind"])
def test_the_steps_of_a_crop_equal_the_official_pipelines(case):
    image = from_numpy(triangle_image(AUGMENT["images"][case["image"]]))
    top, left, height, width, *size = case["steps"][0][1]
    crop = resize(image[:, top : top + height, left : left + width], tuple(size))
    out = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
    for step, amount in case["steps"][1:]:
        out = STEPS[step](out, amount)
    assert psnr(np.array(out), np.array(case["final_uint8"])) > 45


@pytest.mark.parametrize("case", AUGMENT["hue_cases"], ids=lambda c: str(c["arg"]))
def test_hue_equals_pils(case):
    image = Image.fromarray(triangle_image(AUGMENT["images"][case["image"]]))
    assert np.array_equal(np.array(STEPS["Hue"](image, case["arg"])), np.array(case["output"]))


def test_colours_draw_the_papers_law(monkeypatch):
    calls = []

    def note(image, amount, name):
        calls.append((name, amount))
        return image

    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(trex.adjust, f"adjust_{name}", functools.partial(note, name=name))
    monkeypatch.setattr(trex.adjust, "solarize", functools.partial(note, name="solarize"))
    image = Image.new("RGB", (2, 2))
    for i in range(3000):
        trex.colours(image, random.Random(i), 0.5, 0.2)
    share = {name: sum(c[0] == name for c in calls) / 3000 for name in ("hue", "solarize")}
    assert share["hue"] == pytest.approx(0.8, abs=0.03) and share["solarize"] == pytest.approx(0.2, abs=0.03)
    laws = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in laws.items():
        amounts = [a for n, a in calls if n == name]
        assert min(amounts) == pytest.approx(low, abs=0.01) and max(amounts) == pytest.approx(high, abs=0.01)
    orders = {tuple(n for n, _ in calls[i : i + 4]) for i, c in enumerate(calls) if c[0] == "brightness"}
    assert len(orders) > 6  # in random order


def test_multi_crop_makes_one_large_and_eight_small_crops_of_the_recipes_areas(monkeypatch):
    asked, original = [], trex.random_resized_crop

    def noted(height, width, rng, scale):
        asked.append(scale)
        return original(height, width, rng, scale)

    monkeypatch.setattr(trex, "random_resized_crop", noted)
    image = from_numpy(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
    transform = trex.TrainTransform(trex.RECIPES["trex"])
    (large, small), parameters = transform(image, random.Random(3))
    assert large.shape == (1, 3, 224, 224) and small.shape == (8, 3, 96, 96) and parameters == ()
    assert asked == [(0.25, 1.0)] + [(0.05, 0.25)] * 8
    again, _ = transform(image, random.Random(3))
    assert torch.equal(again[0], large) and torch.equal(again[1], small)
    areas = [h * w / 9600 for h, w in (original(80, 120, random.Random(i), (0.05, 0.25))[2:] for i in range(500))]
    assert 0.04 < min(areas) and max(areas) < 0.26


@pytest.mark.parametrize("case", MODELS["schedule"], ids=lambda c: c["name"])
def test_the_schedule_is_the_official_one(case):
    total, warmup = case["epochs"] * case["niter_per_epoch"], case["warmup_epochs"] * case["niter_per_epoch"]
    for step, expected in zip(case["iterations"], case["expected"]["lr"]):
        lr = trex.learning_rate(step, total, warmup, case["base_lr"], case["min_lr"])
        assert lr == pytest.approx(expected, rel=1e-9, abs=1e-15)


# ---- Runs ------------------------------------------------------------------------------------------------------------

NANO_HERE = ["--model", NANO["trex"], "--device", "cpu"]
TREX = [*NANO_HERE, *"--recipe shapes --img-size 32 --local-size 32 --batch-size 16 --workers 0".split()]


@pytest.mark.parametrize("memory_size", [32, 0])
def test_a_run_learns_is_evaluated_and_exports_the_encoder(here, folder, tmp_path, memory_size):
    flags = [*TREX, "--data", folder, "--memory-size", memory_size, "--epochs", 3, "--warmup-epochs", 1, "--lr", 0.005]
    result = here("trex", *flags, "--out", tmp_path / "o")
    assert result.status == 0, result
    log = log_of(tmp_path / "o")
    losses = [r["train_loss"] for r in log if "train_loss" in r]
    assert losses[-1] < losses[0]
    result = here("trex", *NANO_HERE, "--eval", "--data", folder, "--weights", tmp_path / "o/last.pt")
    assert f"top1 {log[-2]['val_top1']:.5g}" in result.out, result
    exported = tmp_path / "encoder.pth"
    assert here("trex", "--model", NANO["trex"], "--weights", tmp_path / "o/last.pt", "--export", exported).status == 0
    found = trex.ResNet(trex.BasicBlock, [1] * 4).load_state_dict(load(exported), strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and not found.unexpected_keys
    assert Image.open(tmp_path / "o/batch.png").height == 3 * (96 + 14)  # a global, two local crops; 3 times


def test_the_resnet_form_of_the_papers_page():
    encoder = trex.encoder_weights(trex.build_model("resnet50", 20, memory_size=16).state_dict())
    found = torchvision.models.resnet50(weights=None).load_state_dict(encoder, strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and found.unexpected_keys == []


def test_the_full_form_round_trips_with_official_prefixes(tmp_path):
    model = build("trex")
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "official.pth")
    from common import checkpoint

    other = trex.build_model("resnet50", 20, memory_size=64)
    state = checkpoint.weights(checkpoint.load(tmp_path / "official.pth", "--weights"))
    checkpoint.load_weights(other, state, "--weights")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("layers, memory_size", [(1, 64), (3, 32), (0, 16), (1, 0)])
def test_the_layers_and_the_memory_of_an_official_file_are_read_off_it(layers, memory_size, tmp_path):
    from common import checkpoint
    from common.models import from_checkpoint

    torch.manual_seed(0)
    model = trex.build_model("resnet_nano", 1000, hidden_layers=layers, memory_size=memory_size).eval()
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "star.pth")
    content = checkpoint.load(tmp_path / "star.pth", "--weights")
    found = from_checkpoint(content, "--weights star.pth", (224, 224), print, name="trex/resnet_nano").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.transfer_features(images), model.transfer_features(images))
        assert torch.equal(found(images), model(images))


def test_wrong_use(here, tmp_path):
    refused(here("trex", "--model", "resnet51"), "--model resnet51", "resnet50")
    refused(here("trex", "--model", "resnet50", "--memory-size", -1), "--memory-size -1: must be 0")
    result = here("trex", "--model", "resnet50", "--export", tmp_path / "e.pth", "--weights", tmp_path / "no.pt")
    refused(result, "no.pt: no such file")


def test_fine_tuning_takes_the_encoder_of_a_checkpoint_or_of_torchvision(here, folder, tmp_path):
    flags = ["--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("trex", *TREX, *flags, "--out", tmp_path / "o").status == 0
    start = load(tmp_path / "o/last.pt")["model"]
    exported = tmp_path / "encoder.pth"
    assert here("trex", "--model", NANO["trex"], "--weights", tmp_path / "o/last.pt", "--export", exported).status == 0
    frozen = ["--lr", 1e-12, "--min-lr", 0, "--weight-decay", 0]
    small = [
        "--model", NANO["trex"], "--recipe", "transfer", "--img-size", 32, "--batch-size", 16, "--epochs", 1,
        "--workers", 0, "--device", "cpu",
    ]
    for weights in (tmp_path / "o/last.pt", exported):
        out = tmp_path / weights.stem
        result = here("trex", *small, *frozen, "--data", folder, "--weights", weights, "--out", out)
        assert result.status == 0 and "encoder taken from the checkpoint; new: clf.fc, model.head" in result.out, result
        tuned = load(out / "last.pt")["model"]
        learned = {k for k in tuned if k.startswith("model.encoder.") and k.endswith(("weight", "bias"))}
        assert learned and all(torch.allclose(tuned[k], start[k], atol=1e-9) for k in learned)
        assert tuned["model.head.layers.1.weight"].shape == (256, 512) and "memory.features" not in tuned
    # into a full model: the averaged network is a copy
    again = [*TREX, *frozen, "--hidden-layers", 2, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("trex", *again, "--weights", exported, "--out", tmp_path / "again").status == 0
    state = load(tmp_path / "again/last.pt")["model"]
    for key in (k for k in state if k.startswith("model_ema.") and k.endswith("weight")):
        assert torch.allclose(state[key], state[key.replace("model_ema.", "model.")], atol=1e-9), key
