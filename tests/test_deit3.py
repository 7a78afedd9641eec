"""deit3.py against the official models' and components' numbers, and against other libraries."""

import hashlib
import random

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    TINY,
    FixedDraws,
    check_architecture,
    check_distribution,
    check_logits,
    fill,
    filled_images,
    log_of,
    psnr,
    reference,
    sine,
    triangle_image,
)
from PIL import Image, ImageFilter
from test_cli import refused
from torchvision import transforms

import deit3
from common.images import from_numpy, resize
from common.optim import param_groups
from common.report import count

MODELS = reference("deit3")
AUGMENT = reference("augment")
slow = pytest.mark.slow


# ---- Architecture ----------------------------------------------------------------------------------------------------


def on_meta(case: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return deit3.build_model(case["model"], img_size=case["img_size"])


@pytest.mark.parametrize("variant", MODELS)
def test_state_dict_parameters_and_gmacs_are_the_official_ones(variant):
    check_architecture(on_meta(MODELS[variant]), MODELS[variant])


@pytest.mark.parametrize(
    "variant",
    ["tiny", "small", "base", "small_384"] + [pytest.param(v, marks=slow) for v in ("large_384", "huge", "huge_26x2")]
)
def test_logits_equal_the_official_ones(variant):
    case = MODELS[variant]
    model = deit3.build_model(case["model"], img_size=case["img_size"]).eval()
    fill(model)
    with torch.no_grad():
        logits = model(filled_images(2, case["img_size"]))
    check_logits(logits, case["logits"], case["logits_norm"])


@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_a_fresh_model_has_the_official_distribution(variant):
    case = MODELS[variant]
    torch.manual_seed(0)
    state = deit3.build_model(case["model"]).state_dict()
    for key, (mean, std) in case["init_stats"].items():
        check_distribution(state[key], mean, std, key)


@pytest.mark.parametrize("variant", ["small", "huge_26x2"])
def test_weight_decay_groups_are_the_official_ones(variant):
    model = on_meta(MODELS[variant])
    plain, decayed = param_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    listed = "\n".join(sorted(names[id(p)] for p in plain["params"]))
    assert hashlib.sha256(listed.encode()).hexdigest() == MODELS[variant]["no_decay_sha256"]
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert len(plain["params"]) + len(decayed["params"]) == len(names)


@pytest.mark.parametrize("name", deit3.MODELS)
def test_every_model_builds_with_the_papers_drop_rate(name):
    with torch.device("meta"):
        model = deit3.build_model(name, 7)
    assert {b.drop_path for b in model.blocks} == {deit3.DROP_PATH[name][0]}
    assert model.head.out_features == 7


def test_parallel_branches_are_two_residual_sums():
    torch.manual_seed(0)
    block = deit3.ParallelBlock(48, 3, scale=0.5, drop_path=0.0).eval()
    x = torch.randn(2, 5, 48)
    y = x + block.gamma_1 * block.attn(block.norm1(x)) + block.gamma_1_1 * block.attn1(block.norm11(x))
    y = y + block.gamma_2 * block.mlp(block.norm2(y)) + block.gamma_2_1 * block.mlp1(block.norm21(y))
    assert torch.allclose(block(x), y, atol=1e-6)


def test_kept_only_stochastic_depth_equals_masking():
    torch.manual_seed(0)
    block = deit3.Block(48, 3, scale=0.3, drop_path=0.4)
    x = torch.randn(16, 5, 48, requires_grad=True)
    torch.manual_seed(1)
    kept_only = block(x)
    torch.manual_seed(1)
    masks = []
    for _ in range(2):
        kept, factor = deit3.kept_samples(16, 0.4, x.device)
        assert (len(kept), factor) == (10, 1.6) and len(set(kept.tolist())) == 10
        masks.append(torch.zeros(16, 1, 1).index_fill(0, kept, factor))
    y = x + masks[0] * block.gamma_1 * block.attn(block.norm1(x))
    y = y + masks[1] * block.gamma_2 * block.mlp(block.norm2(y))
    assert torch.allclose(kept_only, y, atol=1e-6)
    parameters = [x, *block.parameters()]
    gradients = (torch.autograd.grad(out.square().sum(), parameters) for out in (kept_only, y))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_stochastic_depth_keeps_the_expectation_of_value_and_gradient():
    """Every sample's branch counts once on average, whatever the batch and the rate, as a mean of many draws shows."""
    torch.manual_seed(0)
    for batch, rate in ((7, 0.3), (16, 0.45), (4, 0.1), (3, 0.9)):
        share = torch.zeros(batch, dtype=torch.float64)
        for _ in range(4000):
            kept, factor = deit3.kept_samples(batch, rate, share.device)
            share[kept] += factor / 4000
        assert (share - 1).abs().max() < 6 * (factor - 1) ** 0.5 / 4000**0.5 + 1e-9  # six standard errors


@pytest.mark.parametrize("batch", [1, 4])
def test_F11_a_block_that_drops_nearly_every_sample_still_has_gradients(batch):
    block = deit3.Block(48, 3, scale=0.3, drop_path=1 - 1e-9)
    x = torch.randn(batch, 5, 48)
    y = block(x)
    assert (y != x).flatten(1).any(1).sum() == 1
    y.square().sum().backward()
    assert all(p.grad is not None and (name == "attn.qkv.bias" or p.grad.any()) for name, p in block.named_parameters())


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = deit3.build_model("vit_nano", 5, 32, drop_path=0.3)
    images, grads = torch.randn(8, 3, 32, 32), []
    for on in (False, True):
        model.grad_checkpoint = on
        torch.manual_seed(3)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_non_square_images_and_sizes_that_do_not_fit():
    assert deit3.build_model("vit_nano", 5, (32, 64))(torch.randn(1, 3, 32, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match="224x224 or 240x240"):
        deit3.build_model("vit_s", img_size=225)


def test_torchvision_models_train_under_the_same_recipe():
    assert deit3.build_model("torchvision/resnet18", 5).fc.out_features == 5


@pytest.mark.parametrize("model", ["cait/cait_nano", "resmlp/resmlp_nano", "patchconvnet/patchconvnet_nano"])
def test_other_scripts_models_train_under_the_same_recipe(deit3_here, folder, tmp_path, model):
    """Table 6.13; what it leaves is evaluated and loaded like any other checkpoint."""
    flags = [*TINY, "--model", model, "--data", folder, "--out", tmp_path / "o", "--epochs", 2, "--layer-scale"]
    refused(deit3_here(*flags, 0.1), "--layer-scale", "not for others' models")
    result = deit3_here(*flags[:-1])
    assert result.status == 0 and "lamb" in result.out, result
    top1 = [r["val_top1"] for r in log_of(tmp_path / "o") if "val_top1" in r][-1]
    again = deit3_here(*flags[:-1], "--eval")
    assert again.status == 0 and f"top1 {top1:.5g}" in again.out, again
    network, classes, _ = deit3.load_model(str(tmp_path / "o/last.pt"))
    assert type(network).__module__ == model.partition("/")[0] and classes == ["ant", "bee", "cat", "dog"]
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_cait_b12_has_the_size_of_table_6_13_which_leaves_out_the_classifier():
    args, recipe, _ = deit3.parse_args(["--model", "cait/cait_b12", "--data", "/imagenet"])
    parameters, gmacs = count(lambda: deit3.make_model(args, recipe, 1000), (224, 224))
    assert round((parameters - 1000 * 769) / 1e6, 1) == 100.0 and round(gmacs, 1) == 18.2
    assert (recipe.optimizer, recipe.epochs, recipe.loss) == ("lamb", 400, "bce")


@pytest.mark.parametrize("model, words", [
    ("cait/cait_b13", ["cait_b12"]), ("cat/cait_b12", ["--model cat", "cait"]), ("trex/resnet50", ["--model trex"]),
    ("deit/deit_nano_distilled", ["--model deit/deit_nano_distilled", "auxiliary"]), ("cait", ["--model cait: "]),
])
def test_what_cannot_be_trained_under_this_recipe_is_refused(deit3_here, folder, tmp_path, model, words):
    refused(deit3_here(*TINY, "--model", model, "--data", folder, "--out", tmp_path / "o"), *words)


# ---- Recipe ----------------------------------------------------------------------------------------------------------


def test_recipe_of_table_6_1():
    r = deit3.paper_recipe("in1k", "vit_b")
    assert (
        r.epochs, r.batch_size, r.optimizer, r.lr, r.weight_decay, r.warmup_epochs
    ) == (400, 2048, "lamb", 3e-3, 0.02, 5)
    assert (r.clip_grad, r.repeats, r.crop, r.augment, r.color_jitter) == (1.0, 3, "rrc", "3-augment", 0.3)
    assert (
        r.mixup, r.cutmix, r.loss, r.smoothing, r.layer_scale, r.eval_crop_ratio
    ) == (0.8, 1.0, "bce", 0.0, 1e-4, 1.0)
    r = deit3.paper_recipe("in21k", "vit_l")
    assert (r.epochs, r.lr, r.repeats, r.crop, r.mixup, r.cutmix, r.loss, r.smoothing, r.drop_path) == (
        90,
        3e-3,
        1,
        "src",
        0,
        1.0,
        "ce",
        0.1,
        0.3,
    )
    r = deit3.paper_recipe("in21k_to_in1k", "vit_l")
    assert (r.epochs, r.batch_size, r.lr, r.loss, r.crop) == (50, 2048, 3e-4, "ce", "src")
    r = deit3.paper_recipe("finetune", "vit_b")
    assert (r.epochs, r.batch_size, r.lr, r.weight_decay, r.optimizer, r.repeats) == (20, 512, 1e-5, 0.1, "adamw", 1)


@pytest.mark.parametrize(
    "model, in1k, in21k",
    [("vit_ti", 0, 0), ("vit_s", 0, 0), ("vit_b", 0.1, 0.1), ("vit_l", 0.4, 0.3), ("vit_h", 0.5, 0.5)]
)
def test_drop_rates_of_table_6_14(model, in1k, in21k):
    assert deit3.paper_recipe("in1k", model).drop_path == in1k
    assert deit3.paper_recipe("in21k", model).drop_path == in21k


@pytest.mark.parametrize(
    "model, from_21k, after_800, above_224",
    [("vit_s", 0.05, 0, 0), ("vit_b", 0.15, 0.2, 0.15), ("vit_l", 0.4, 0.45, 0.4), ("vit_h", 0.45, 0.55, 0.5)]
)
def test_drop_rates_of_fine_tuning_are_the_official_ones(model, from_21k, after_800, above_224, tmp_path):
    runs = {400: tmp_path / "a.pt", 800: tmp_path / "b.pt"}
    for epochs, file in runs.items():
        torch.save({"recipe": {"epochs": epochs}, "model": {"w": torch.zeros(2)}}, file)

    def rate(*flags):
        return deit3.parse_args(["--model", model, "--recipe", *map(str, flags)])[1].drop_path

    assert rate("in21k_to_in1k") == rate("in21k_to_in1k", "--img-size", 384) == from_21k
    assert rate("finetune", "--weights", runs[800]) == after_800
    assert rate("finetune", "--weights", runs[400]) == rate("finetune") == deit3.DROP_PATH[model][0]
    for file in (runs[800], tmp_path / "none.pt"):
        assert rate("finetune", "--img-size", "384", "--weights", file) == above_224
    assert rate("finetune", "--weights", runs[800], "--drop-path", 0.3) == 0.3
    assert rate("in1k", "--weights", runs[800]) == deit3.DROP_PATH[model][0]


def test_a_checkpoint_is_asked_for_its_epochs_only(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "official.pth")
    files = (None, tmp_path / "text.pt", tmp_path / "official.pth", tmp_path / "missing", tmp_path, "official:deit_b")
    assert [deit3.epochs_of(f and str(f)) for f in files] == [0] * 6


def test_torchvisions_models_keep_their_own_stochastic_depth():
    assert deit3.parse_args(["--model", "torchvision/swin_s"])[1].drop_path is None
    for name, rate in {"swin_s": 0.3, "swin_b": 0.5}.items():
        with torch.device("meta"):
            model = deit3.build_model(f"torchvision/{name}")
        assert max(m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)) == rate


def test_longer_schedules_regularise_more():
    r = deit3.paper_recipe("in1k", "vit_b", epochs=800)
    assert (r.weight_decay, r.drop_path) == (0.05, pytest.approx(0.2))
    assert deit3.paper_recipe("in1k", "vit_b", epochs=300).weight_decay == 0.02
    assert deit3.paper_recipe("in21k", "vit_b", epochs=240).drop_path == pytest.approx(0.15)


def test_transfer_adapts_to_the_data_set():
    r = deit3.paper_recipe("transfer", "vit_b", data="cifar100:/data")
    assert (r.lr, r.min_lr) == (3e-5, 1e-7)
    assert deit3.paper_recipe("transfer", "vit_b", data="inat2018@genus:/data").epochs == 360


# ---- Augmentation ----------------------------------------------------------------------------------------------------

STEPS = {"Brightness": 0, "Contrast": 1, "Saturation": 2}


def replay(case: dict) -> np.ndarray:
    """A reference pipeline's steps by our functions."""
    x = from_numpy(triangle_image(AUGMENT["images"][case["image"]]))
    flip = choice = radius = 0.0
    factors, order = [1.0, 1.0, 1.0], []
    for step, arg in case["steps"]:
        if step == "ResizedCrop":
            top, left, height, width, *size = arg
            x = resize(x[:, top : top + height, left : left + width], tuple(size))
        elif step == "ResizeShorter":
            x = resize(x, tuple(arg))
        elif step == "ReflectPadCrop":
            x = deit3.simple_random_crop(x, tuple(arg[2:]), FixedDraws(arg[0], arg[1]))
        elif step == "HFlip":
            flip = 1.0
        elif step in STEPS:
            factors[STEPS[step]] = arg
            order.append(STEPS[step])
        else:
            choice, radius = {"Grayscale3": 1, "Solarize128": 2, "GaussianBlur": 3}[step], arg or 0.0
    order += [i for i in range(3) if i not in order]  # a factor of 1 changes nothing
    index = deit3.ORDERS.index(tuple(order))
    return deit3.augment(x[None], torch.tensor([[flip, choice, radius, *factors, index]]))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", AUGMENT["pipeline_cases"], ids=lambda c: c["kind"])
def test_three_augment_equals_the_official_pipeline_pixel_by_pixel(case):
    assert np.array_equal(replay(case), np.array(case["final_uint8"]))


SINGLE = ("Grayscale3", "HFlip", "GaussianBlur", "Brightness", "Contrast", "Saturation")


@pytest.mark.parametrize(
    "case", [c for c in AUGMENT["op_cases"] if c["op"] in SINGLE and c["m"] is None],
    ids=lambda c: f"{c['op']}-{c['arg']}"
)
def test_device_operations_equal_pils(case):
    assert np.array_equal(
        replay({"image": case["image"], "steps": [[case["op"], case["arg"]]]}), np.array(case["output"])
    )


@pytest.mark.parametrize(
    "case", [c for c in AUGMENT["op_cases"] if c["op"] in ("ResizedCrop", "ReflectPadCrop")],
    ids=lambda c: f"{c['op']}-{c['arg']}"
)
def test_crops_equal_pils(case, monkeypatch):
    x = from_numpy(triangle_image(AUGMENT["images"][case["image"]]))
    top, left, height, width, *size = case["arg"]
    if case["op"] == "ReflectPadCrop":
        monkeypatch.setattr("common.images.resize_to_cover", lambda image, size: image)  # the padded crop alone
        out = deit3.simple_random_crop(x, (height, width), FixedDraws(top, left))
        assert np.array_equal(out.permute(1, 2, 0).numpy(), np.array(case["output"]))
    else:
        out = resize(x[:, top : top + height, left : left + width], tuple(size)).permute(1, 2, 0).numpy()
        assert psnr(out, np.array(case["output"])) > 50


@pytest.mark.parametrize("radius", [0.1, 0.5, 0.77, 1.0, 1.3, 1.9])
def test_blur_equals_pils(radius):
    pixels = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)
    expected = np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    for blur in (deit3.gaussian_blur, deit3.gaussian_blur_by_pil):
        assert np.array_equal(
            blur(from_numpy(pixels)[None].float(), torch.tensor([radius]))[0].permute(1, 2, 0), expected
        )


def test_color_jitter_equals_torchvisions_on_pil_images():
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    adjust = (
        transforms.functional.adjust_brightness, transforms.functional.adjust_contrast,
        transforms.functional.adjust_saturation
    )
    for index, order in enumerate(deit3.ORDERS):
        factors = [0.7 + 0.1 * index, 1.3 - 0.07 * index, 0.75 + 0.09 * index]
        expected = Image.fromarray(pixels)
        for which in order:
            expected = adjust[which](expected, factors[which])
        out = deit3.augment(from_numpy(pixels)[None], torch.tensor([[0, 0, 0, *factors, index]]))[0].permute(1, 2, 0)
        # one level where PIL's float32 product falls on a tie
        assert np.abs(out.numpy() - np.array(expected)).max() <= 1


@pytest.mark.parametrize("policy", ["3-augment", "gray+blur", "rand", "auto", "trivial", "none"])
@pytest.mark.parametrize("crop", ["rrc", "src"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 700), (700, 2), (37, 53)])
def test_B19_transform_gives_the_right_shape_for_any_image_and_the_same_pixels_again(policy, crop, shape):
    recipe = deit3.Recipe(augment=policy, crop=crop, img_size=(32, 48))
    transform = deit3.TrainTransform(recipe)
    image = from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    before = torch.get_rng_state()
    (one, a), (two, b) = (transform(image, random.Random(5)) for _ in range(2))
    assert one.shape == (3, 32, 48) and one.dtype == torch.uint8 and len(a) == 7
    assert torch.equal(one, two) and a == b
    assert torch.equal(before, torch.get_rng_state())
    chosen = {transform(image, random.Random(i))[1][1] for i in range(40)}
    assert chosen == {"3-augment": {1, 2, 3}, "gray+blur": {1, 3}}.get(policy, {0})


# ---- Loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [c for c in reference("mixup")["cases"] if c["smoothing"] == 0], ids=lambda c: c["name"]
)
def test_binary_cross_entropy_equals_the_official_one(case):
    box = deit3.cutmix_box(case["lam"], 6, 6, case["cy"], case["cx"]) if case["kind"] != "mixup" else None
    mix = box or deit3.Mix(case["lam"])
    targets = deit3.mix_targets(torch.tensor(case["labels"]), [mix], case["num_classes"], 0.0)
    logits = sine(case["logits"]).requires_grad_()
    value = deit3.bce_loss(logits, targets.double())
    assert value.item() == pytest.approx(case["expected"]["bce_loss"], rel=1e-6)
    expected = torch.tensor(case["expected"]["bce_grad"], dtype=torch.float64)
    assert torch.allclose(torch.autograd.grad(value, logits)[0], expected, atol=1e-7)
