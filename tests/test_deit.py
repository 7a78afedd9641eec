"""deit.py against the official models' and components' numbers, against other libraries, and as a whole."""

import hashlib
import importlib
import math
import random
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    NANO,
    SMALL,
    TINY,
    FixedDraws,
    check_architecture,
    check_distribution,
    check_logits,
    fewer_shapes,
    fill,
    filled_images,
    load,
    log_of,
    reference,
    sine,
    triangle_image,
    write_folder,
)  # fmt: skip
from PIL import Image
from test_cli import refused
from test_run import child, status_of

import deit
from common.data import split_batch
from common.evaluate import normalize
from common.images import eval_transform, from_numpy, from_pil, to_pil
from common.models import from_checkpoint
from common.optim import make_optimizer, param_groups
from common.sources import Shapes

MODELS = reference("deit")
AUGMENT = reference("augment")
LOSSES = reference("losses")


# ---- Architecture ----------------------------------------------------------------------------------------------------


def on_meta(case: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return deit.build_model(case["model"], img_size=case["img_size"])


@pytest.mark.parametrize("variant", MODELS)
def test_state_dict_parameters_and_gmacs_are_the_official_ones(variant):
    check_architecture(on_meta(MODELS[variant]), MODELS[variant])


@pytest.mark.parametrize("variant", MODELS)
def test_logits_equal_the_official_ones_of_every_head(variant):
    case = MODELS[variant]
    model = deit.build_model(case["model"], img_size=case["img_size"], drop_path=0.0).eval()
    fill(model)
    images = filled_images(2, case["img_size"])
    with torch.no_grad():
        check_logits(model(images), case["logits"], case["logits_norm"])
        if model.distilled:
            for logits, head in zip(model.train()(images), ("head_cls_train", "head_dist_train")):
                check_logits(logits, case[head], case[f"{head}_norm"])


@pytest.mark.parametrize("variant", ["tiny", "tiny_distilled"])
def test_a_fresh_model_has_the_official_distribution(variant):
    case = MODELS[variant]
    torch.manual_seed(0)
    state = deit.build_model(case["model"]).state_dict()
    for key, (mean, std) in case["init_stats"].items():
        check_distribution(state[key], mean, std, key)


@pytest.mark.parametrize("variant", MODELS)
def test_weight_decay_groups_are_the_official_ones(variant):
    model = on_meta(MODELS[variant])
    plain, decayed = param_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    listed = "\n".join(sorted(names[id(p)] for p in plain["params"]))
    assert hashlib.sha256(listed.encode()).hexdigest() == MODELS[variant]["no_decay_sha256"]
    assert len(plain["params"]) + len(decayed["params"]) == len(names)


def test_patch_embedding_is_the_convolution():
    embed = deit.PatchEmbed(24, 8, (3, 5))
    images = torch.randn(2, 3, 24, 40)
    assert torch.allclose(embed(images), embed.proj(images).flatten(2).transpose(1, 2), atol=1e-5)


def test_attention_is_softmax_of_scaled_products():
    attention = deit.Attention(24, 3)
    x = torch.randn(2, 5, 24)
    q, k, v = attention.qkv(x).reshape(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    y = ((q @ k.transpose(-1, -2)) / math.sqrt(8)).softmax(-1) @ v
    assert torch.allclose(attention(x), attention.proj(y.transpose(1, 2).reshape(2, 5, 24)), atol=1e-6)


def test_the_keys_bias_gets_no_gradient_because_it_has_no_effect():
    attention = deit.Attention(24, 3)
    x = torch.randn(2, 5, 24)
    y = attention(x)
    y.square().sum().backward()
    assert not attention.qkv.bias.grad[24:48].any() and attention.qkv.bias.grad[:24].all()
    assert attention.qkv.bias.grad[48:].all()
    with torch.no_grad():
        attention.qkv.bias[24:48] += 3
        assert torch.allclose(attention(x), y, atol=1e-5)


def test_stochastic_depth_grows_linearly_and_keeps_the_expected_value():
    model = deit.build_model("deit_ti", 7)
    assert [b.drop_path for b in model.blocks] == pytest.approx(np.linspace(0, 0.1, 12).tolist())
    block = deit.Block(24, 3, drop_path=0.4, dropout=0.0)
    torch.manual_seed(0)
    x = torch.randn(1, 5, 24).expand(4000, -1, -1)
    with torch.no_grad():
        change = block(x) - x
        # both branches dropped
        assert (change.flatten(1) == 0).all(1).float().mean().item() == pytest.approx(0.16, abs=0.03)
        branch = block.attn(block.norm1(x))
        assert torch.allclose(block.drop(branch).mean(0), branch[0], atol=0.05 * branch.abs().max().item())


def test_dropout_falls_on_embeddings_and_branches_in_training_only():
    torch.manual_seed(0)
    model = deit.build_model("deit_nano", 5, 32, dropout=0.5, drop_path=0.0)
    plain = deit.build_model("deit_nano", 5, 32, dropout=0.0, drop_path=0.0)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert not torch.allclose(model.train()(images), plain(images))
    branch = model.blocks[0].drop(torch.ones(4, 100, 96))
    assert set(branch.unique().tolist()) == {0.0, 2.0} and branch.mean().item() == pytest.approx(1, abs=0.02)


def test_non_square_images_and_sizes_that_do_not_fit():
    assert deit.build_model("deit_nano_distilled", 5, (32, 64)).eval()(torch.randn(1, 3, 32, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match="224x224 or 240x240"):
        deit.build_model("deit_s", img_size=225)


@pytest.mark.parametrize("case", reference("pos_embed"), ids=lambda c: f"{c['source_grid']}to{c['target_grid']}")
def test_D7_position_embedding_resizes_as_the_official_code(case):
    pos_embed = sine(case["pos_embed"])
    grid = (case["source_grid"],) * 2
    resized = deit.resize_pos_embed(pos_embed, (case["target_grid"],) * 2, old_grid=grid)
    expected = case["expected"]
    assert list(resized.shape) == expected["shape"]
    for token, dim, value in expected["samples_token_dim_value"]:
        assert resized[0, token, dim].item() == pytest.approx(value, abs=1e-10)
    assert torch.equal(resized[:, : case["prefix_tokens"]], pos_embed[:, : case["prefix_tokens"]])
    assert torch.equal(deit.resize_pos_embed(pos_embed, grid, old_grid=grid), pos_embed)


# ---- Recipe ----------------------------------------------------------------------------------------------------------


def test_recipe_of_table_3_9():
    r = deit.paper_recipe("in1k", "deit_b")
    assert (
        r.epochs, r.batch_size, r.optimizer, r.weight_decay, r.warmup_epochs, r.smoothing
    ) == (300, 1024, "adamw", 0.05, 5, 0.1)
    assert r.lr == 0.0005 * r.batch_size / 512
    assert (r.dropout, r.drop_path, r.repeats, r.clip_grad, r.augment) == (0, 0.1, 3, None, "rand")
    assert (r.mixup, r.cutmix, r.erasing, r.ema, r.distillation) == (0.8, 1.0, 0.25, 0, "none")


def test_distillation_of_section_3_3():
    assert deit.paper_recipe("in1k", "deit_b_distilled").distillation == "hard"
    assert deit.paper_recipe("finetune", "deit_b_distilled").distillation == "hard"
    assert deit.paper_recipe("transfer", "deit_b_distilled").distillation == "none"
    assert deit.paper_recipe("in1k", "deit_b", distillation="hard").alpha == 0.5
    r = deit.paper_recipe("in1k", "deit_b", distillation="soft")
    assert (r.alpha, r.tau, deit.TEACHER) == (0.1, 3.0, "regnet_y_16gf")


def test_fine_tuning_transfer_and_cifar10_from_scratch():
    r = deit.paper_recipe("finetune", "deit_b")
    assert (r.epochs, r.img_size, r.augment, r.erasing, r.mixup) == (25, (384, 384), "rand", 0.25, 0.8)
    assert (r.batch_size, r.lr, r.min_lr, r.mix_group, r.drop_path) == (512, 5e-6, 5e-6, 32, 0.0)
    assert deit.paper_recipe("cifar10", "deit_b") == deit.Recipe(epochs=7200)
    names = ("cifar100", "flowers102", "inat2019")
    rows = {name: deit.paper_recipe("transfer", "deit_b", data=f"{name}:/d") for name in names}
    assert {k: (r.epochs, r.lr, r.min_lr) for k, r in rows.items()} == {
        "cifar100": (1000, 1e-5, 1e-7), "flowers102": (1000, 1e-4, 1e-6), "inat2019": (360, 1e-4, 1e-6)
    }


@pytest.mark.parametrize("script", ["deit", "cait"])
def test_fine_tuning_fits_the_official_16_gpus(script):
    recipe = importlib.import_module(script).parse_args(["--recipe", "finetune"])[1]
    assert split_batch(recipe.batch_size, 16, None, recipe.mix_group) == (32, 1)


def test_table_3_8s_sgd_is_nesterovs():
    recipe = deit.parse_args(["--optimizer", "nesterov"])[1]
    optimizer = make_optimizer(recipe.optimizer, torch.nn.Linear(2, 2), recipe.lr, recipe.weight_decay)
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


def test_the_learning_rate_follows_the_batch_unless_it_is_given():
    assert deit.parse_args(["--recipe", "in1k", "--batch-size", "512"])[1].lr == pytest.approx(5e-4)
    assert deit.parse_args(["--recipe", "in1k", "--batch-size", "512", "--lr", "1e-3"])[1].lr == 1e-3
    assert deit.parse_args(["--data", "/imagenet"])[1] == deit.paper_recipe("in1k", "deit_b")


# ---- Augmentation ----------------------------------------------------------------------------------------------------


NAMES = {
    "PosterizeIncreasing": "Posterize", "SolarizeIncreasing": "Solarize", "TranslateXRel": "TranslateX",
    "TranslateYRel": "TranslateY"
}


def is_of_deit(case: dict) -> bool:
    operation = NAMES.get(case["op"], case["op"].replace("Increasing", ""))
    return operation in deit.OPERATIONS and (case["m"] is not None or case["arg"] is None)


@pytest.mark.parametrize(
    "case", list(filter(is_of_deit, AUGMENT["op_cases"])), ids=lambda c: f"{c['op']}-{c['image']}-{c['m']}-{c['arg']}"
)
def test_rand_augment_operations_equal_the_official_ones(case):
    operation = NAMES.get(case["op"], case["op"].replace("Increasing", ""))
    centre = 1 if operation in ("Color", "Contrast", "Brightness", "Sharpness") else 0
    sign = -1 if case["arg"] is not None and case["arg"] < centre else 1
    image = Image.fromarray(triangle_image(AUGMENT["images"][case["image"]]))
    out = deit.apply_operation(image, operation, (9 if case["m"] is None else case["m"]) / 10, sign)
    assert np.array_equal(np.array(out), np.array(case["output"]))


def test_rand_augment_draws_operation_magnitude_and_sign_by_the_official_law(monkeypatch):
    drawn = []
    monkeypatch.setattr(deit, "apply_operation", lambda image, *draw: drawn.append(draw) or image)
    image = Image.new("RGB", (4, 4))
    for i in range(6000):
        deit.rand_augment(image, random.Random(i))
    names, levels, signs = zip(*drawn)
    assert len(drawn) / 12000 == pytest.approx(0.5, abs=0.02)
    assert {name: names.count(name) / len(names) for name in deit.OPERATIONS} == pytest.approx(
        dict.fromkeys(deit.OPERATIONS, 1 / 15), abs=0.015
    )
    official = np.clip(np.random.default_rng(0).normal(9, 0.5, 10**5), 0, 10) / 10
    assert (np.mean(levels), np.std(levels), max(levels)) == pytest.approx(
        (official.mean(), official.std(), 1.0), abs=0.002
    )
    assert np.mean(signs) == pytest.approx(0, abs=0.05)


def test_rand_augment_applies_one_operation_on_average():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    untouched = sum(deit.rand_augment(image, random.Random(i)) is image for i in range(2000)) / 2000
    assert untouched == pytest.approx(0.25, abs=0.04)  # two skips of probability 1/2


@pytest.mark.parametrize("case", AUGMENT["random_resized_crop_cases"], ids=str)
def test_random_resized_crop_geometry(case):
    class Draws(FixedDraws):
        def uniform(self, low, high):
            return case["area_fraction"] if low == 0.08 else math.log(case["aspect"])

        def randint(self, low, high):
            self.values.append(high)
            return high

    draws, expected = Draws(), case["expected"]
    top, left, height, width = deit.random_resized_crop(case["img_h"], case["img_w"], draws)
    assert (height, width) == (expected["crop_h"], expected["crop_w"])
    assert [top, left] == (draws.values if expected["accepted"] else expected["fallback_top_left"])
    if expected["accepted"]:
        assert draws.values == [expected["top_max"], expected["left_max"]]


@pytest.mark.parametrize("case", AUGMENT["random_erasing_cases"], ids=str)
def test_erasing_boxes_are_the_official_ones(case):
    class Draws(FixedDraws):
        def uniform(self, low, high):
            return case["area_fraction"] if low == 0.02 else case["log_aspect"]

        def randint(self, low, high):
            self.values.append(high)
            return high

    draws, expected = Draws(), case["expected"]
    top, left, height, width = deit.erasing_box(case["img_h"], case["img_w"], draws)
    if expected["accepted"]:
        assert (height, width) == (expected["h"], expected["w"])
        assert [top, left] == draws.values == [expected["top_max"], expected["left_max"]]
    else:
        assert (top, left, height, width) == (0, 0, 0, 0)


def test_erasing_draws_the_official_law():
    boxes = [deit.erasing_box(224, 224, random.Random(i)) for i in range(3000)]
    area = np.array([h * w / 224**2 for _, _, h, w in boxes])
    assert 0.018 < area.min() and area.max() < 0.337 and area.mean() == pytest.approx(0.17, abs=0.02)
    transform = deit.TrainTransform(deit.Recipe(img_size=(32, 32)))
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    erased = [transform(image, random.Random(i))[1][2] > 0 for i in range(2000)]
    assert np.mean(erased) == pytest.approx(0.25, abs=0.04)


def test_erasing_puts_standard_normal_noise_into_the_box_alone():
    images = torch.full((3, 3, 64, 64), 7.0)
    boxes = torch.tensor([[4, 8, 40, 50, 2**24 - 1], [0, 0, 0, 0, 5], [4, 8, 40, 50, 3]], dtype=torch.float32)
    erased = deit.erase(images.clone(), boxes)
    box = erased[0, :, 4:44, 8:58]
    assert box.mean().item() == pytest.approx(0, abs=0.06) and box.std().item() == pytest.approx(1, abs=0.04)
    outside = erased[0].clone()
    outside[:, 4:44, 8:58] = 7.0
    assert torch.equal(outside, images[0]) and torch.equal(erased[1], images[1])
    assert not torch.equal(box, erased[2, :, 4:44, 8:58])  # another seed, other noise
    alone = deit.erase(images[:1].clone(), boxes[:1])  # whatever the batch: a function of the image's own seed
    assert torch.equal(alone[0], erased[0])


@pytest.mark.parametrize("policy", ["rand", "auto", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 700), (700, 2), (37, 53)])
def test_B19_transform_gives_the_right_shape_for_any_image_and_the_same_pixels_again(policy, shape):
    transform = deit.TrainTransform(deit.Recipe(augment=policy, img_size=(32, 48)))
    image = from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    before = torch.get_rng_state()
    (one, a), (two, b) = (transform(image, random.Random(5)) for _ in range(2))
    assert one.shape == (3, 32, 48) and one.dtype == torch.uint8 and len(a) == 5
    assert torch.equal(one, two) and a == b
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("script", ["deit", "cait", "resmlp", "patchconvnet", "deit3"])
def test_auto_augment_is_bicubic_and_fills_with_the_mean(script):
    module = importlib.import_module(script)
    transform = module.TrainTransform(module.Recipe(augment="auto", img_size=(32, 32)))
    white = from_pil(Image.new("RGB", (40, 40), "white"))
    seen = torch.stack([transform(white, random.Random(i))[0] for i in range(20)]).permute(1, 0, 2, 3).flatten(1)
    assert (seen.T == torch.tensor(deit.FILL)).all(1).any()  # what a shear uncovers
    policy = transform.learned if script == "deit3" else transform.auto
    assert policy.interpolation == torchvision.transforms.InterpolationMode.BICUBIC


def test_pil_round_trip():
    image = from_pil(Image.fromarray(triangle_image(AUGMENT["images"]["B"])))
    assert torch.equal(from_pil(to_pil(image)), image)


# ---- Mixing and loss -------------------------------------------------------------------------------------------------

MIXUP = reference("mixup")


@pytest.mark.parametrize("case", MIXUP["cases"], ids=lambda c: c["name"])
def test_mixing_targets_and_losses_equal_the_official_ones(case):
    box = deit.cutmix_box(case["lam"], 6, 6, case["cy"], case["cx"]) if case["kind"] != "mixup" else None
    mix = box or deit.Mix(case["lam"])
    expected = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["expected"].items() if isinstance(v, list)}
    assert torch.allclose(deit.mix_images(sine(case["x"]), [mix]), expected["mixed_x"], atol=1e-6)
    targets = deit.mix_targets(torch.tensor(case["labels"]), [mix], case["num_classes"], case["smoothing"])
    assert torch.allclose(targets.double(), expected["target"], atol=1e-6)
    logits = sine(case["logits"]).requires_grad_()
    value = deit.label_loss(logits, targets.double())
    assert value.item() == pytest.approx(case["expected"]["soft_target_ce"], rel=1e-6)
    assert torch.allclose(torch.autograd.grad(value, logits)[0], expected["soft_target_ce_grad"], atol=1e-7)


@pytest.mark.parametrize("case", MIXUP["bbox_cases"], ids=str)
def test_cutmix_boxes_are_the_official_ones(case):
    mix = deit.cutmix_box(case["lam"], case["height"], case["width"], case["cy"], case["cx"])
    assert list(mix.box) == case["expected_bbox_yl_yh_xl_xh"]
    assert mix.lam == pytest.approx(case["expected_corrected_lam"], abs=1e-12)


def test_mixing_stays_inside_groups_and_odd_groups_work():
    images, labels = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 8, 8), torch.arange(10)
    mixed = deit.mix_images(images, [deit.Mix(0.75), deit.Mix(1.0)])[:, 0, 0, 0]
    assert torch.allclose(mixed, torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0]))
    targets = deit.mix_targets(labels, [deit.Mix(0.75), deit.Mix(1.0)], 10, 0.0)
    assert torch.allclose(targets @ torch.arange(10.0), mixed)


def test_draws_follow_the_recipe():
    draws = [deit.draw_mix(deit.Recipe(), random.Random(i)) for i in range(4000)]
    assert sum(d.box is None for d in draws) / 4000 == pytest.approx(0.5, abs=0.03)
    lam = torch.tensor([d.lam for d in draws if d.box is None])
    assert lam.mean().item() == pytest.approx(0.5, abs=0.02)
    assert lam.var().item() == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.01)  # variance of Beta(0.8, 0.8)
    assert all(deit.draw_mix(deit.Recipe(mixup=0), random.Random(i)).box for i in range(20))
    assert all(deit.draw_mix(deit.Recipe(cutmix=0), random.Random(i)).box is None for i in range(20))
    assert deit.draw_mix(deit.Recipe(mixup=0, cutmix=0), random.Random(0)) == deit.Mix(1.0)


# ---- Distillation ----------------------------------------------------------------------------------------------------


def loss_inputs(case: dict):
    """(class, distillation and teacher logits, targets as distillation_loss takes them) of a reference case."""
    inputs = LOSSES["inputs"]
    logits = [sine(inputs[f"{name}_logits"]) for name in ("cls", "dist", "teacher")]
    labels, kind = torch.tensor(inputs["labels"]), case["base"]
    if kind == "ce":
        return *logits, labels
    if kind == "soft_target_ce":
        return *logits, torch.tensor(inputs["targets_per_base"][kind]["values"], dtype=torch.float64)
    return *logits, deit.mix_targets(labels, [deit.Mix(1.0)], 6, 0.1).double()


@pytest.mark.parametrize(
    "case", [c for c in LOSSES["cases"] if c["base"] != "bce"],
    ids=lambda c: f"{c['base']}-{c['type']}-{c['tau']}-{c['alpha']}"
)
def test_distillation_losses_and_gradients_equal_the_official_ones(case):
    class_logits, dist_logits, teacher, targets = loss_inputs(case)
    expected, alpha = case["expected"], case["alpha"]
    heads = [class_logits.requires_grad_(), dist_logits.requires_grad_()]
    # The official soft term is divided by the number of classes too, the thesis' (and ours) is not.
    factor = 6 if case["type"] == "soft" else 1
    value = deit.distillation_loss(tuple(heads), targets, teacher, case["type"], alpha, case["tau"])
    official = expected["base_loss"]
    if case["type"] != "none":
        official = (1 - alpha) * official + alpha * factor * expected["distillation_loss"]
    assert value.item() == pytest.approx(official, rel=1e-7)
    of_class, of_dist = torch.autograd.grad(value, heads, allow_unused=True)
    assert torch.allclose(
        of_class, torch.tensor(expected["grad_cls_logits"], dtype=torch.float64), rtol=1e-6, atol=1e-8
    )
    wanted = torch.tensor(expected["grad_dist_logits"], dtype=torch.float64) * factor
    assert torch.allclose(torch.zeros_like(wanted) if of_dist is None else of_dist, wanted, rtol=1e-6, atol=1e-9)


def test_A8_usual_distillation_puts_both_terms_on_the_only_head():
    logits, _, teacher, targets = loss_inputs({"base": "ce"})
    for kind in ("soft", "hard"):
        assert torch.equal(
            deit.distillation_loss(logits, targets, teacher, kind, 0.3, 2.0),
            deit.distillation_loss((logits, logits), targets, teacher, kind, 0.3, 2.0),
        )
    with pytest.raises(ValueError, match="none, soft or hard"):
        deit.distillation_loss(logits, targets, teacher, "medium")


def test_soft_distillation_is_equation_3_2_in_words():
    logits, _, teacher, targets = loss_inputs({"base": "ce"})
    p, q = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    by_hand = 0.9 * F.cross_entropy(logits, targets) + 0.1 * 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert deit.distillation_loss(
        logits, targets, teacher, "soft", 0.1, 3.0
    ).item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_without_a_teacher_both_heads_learn_the_label():
    class_logits, dist_logits, _, targets = loss_inputs({"base": "ce"})
    mean = (F.cross_entropy(class_logits, targets) + F.cross_entropy(dist_logits, targets)) / 2
    assert torch.allclose(deit.label_loss((class_logits, dist_logits), targets), mean)
    assert torch.allclose(deit.label_loss(class_logits, targets), F.cross_entropy(class_logits, targets))


def test_evaluation_adds_softmax_outputs_and_forward_averages_logits():
    model = deit.build_model("deit_nano_distilled", 5, 32).eval()
    fill(model)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        class_logits, dist_logits = model.heads(images)
        found = deit.predict(model, images)
        assert torch.allclose(found[""].exp(), (class_logits.softmax(1) + dist_logits.softmax(1)) / 2, atol=1e-6)
        assert torch.equal(found["class"], class_logits) and torch.equal(found["distillation"], dist_logits)
        assert torch.allclose(model(images), (class_logits + dist_logits) / 2)
        assert list(deit.predict(deit.build_model("deit_nano", 5, 32).eval(), images)) == [""]


# ---- Runs ------------------------------------------------------------------------------------------------------------

DISTILLED = ["--model", "deit_nano_distilled", *SMALL]


@pytest.fixture(scope="session")
def convnet(tmp_path_factory):
    """Weights of an untrained torchvision classifier for 4 classes, as torchvision saves them."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "shufflenet.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=4).state_dict(), path)
    return path


def test_A8_a_teacher_that_cannot_serve_is_told_before_the_first_step(here, folder, convnet, tmp_path, monkeypatch):
    run = ["--data", folder, "--out", tmp_path / "o", "--distillation", "hard"]
    nothing = ["--data", tmp_path / "nowhere", *run[2:]]  # the teacher is looked at before the data
    refused(
        here("deit", *DISTILLED, *nothing, "--teacher-weights", tmp_path / "none.pth"), "--teacher-weights",
        "none.pth: no such file"
    )
    refused(here("deit", *DISTILLED, *run, "--teacher", "resnet51"), "--teacher resnet51", "resnet50")
    refused(
        here("deit", *DISTILLED, *run, "--teacher", "resnet18", "--teacher-weights", convnet), "as resnet18",
        "keys missing"
    )

    twelve = [
        *DISTILLED, "--data", "shapes", "--out", tmp_path / "o", "--distillation", "hard", "--teacher",
        "shufflenet_v2_x0_5"
    ]
    refused(
        here("deit", *twelve, "--teacher-weights", convnet), "shufflenet_v2_x0_5", "has 4 classes, the data 12",
        "--teacher-weights"
    )

    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), tmp_path / "squeeze.pth")
    small = ["--img-size", 16, "--teacher", "squeezenet1_1", "--teacher-weights", tmp_path / "squeeze.pth"]
    refused(here("deit", *DISTILLED, *run, *small), "squeezenet1_1: cannot take images of --img-size 16x16")

    def no_network(name, weights=None, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    refused(here("deit", *DISTILLED, *run), "regnet_y_16gf: has 1000 classes, the data 4")  # before a download
    four = SimpleNamespace(DEFAULT=SimpleNamespace(meta={"categories": ["a", "b", "c", "d"]}))
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: four)
    refused(here("deit", *DISTILLED, *run), "regnet_y_16gf: its weights cannot be downloaded", "--teacher-weights FILE")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("script", ["deit", "cait"])
def test_a_distilled_model_without_a_teacher_says_so(here, folder, tmp_path, script):
    """The thesis tried it (section 3.3: two class tokens, true labels only in fine-tuning), hence it is not refused."""
    short = ["--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--val-data", "none"]
    for name, told in ((f"{NANO[script]}_distilled", True), (NANO[script], False)):
        result = here(script, "--model", name, *SMALL, *short, "--out", tmp_path / name)
        assert result.status == 0 and ("teacher  none: both heads learn the true label" in result.out) == told, result


def test_a_flag_of_the_teacher_without_a_teacher_is_refused(here):
    refused(here("deit", "--tau", 2), "--tau", "--distillation hard or soft")
    refused(here("deit", "--teacher-weights", "x.pth"), "--teacher-weights: has no effect without a teacher")
    refused(here("deit", "--distillation", "hard", "--tau", 2), "--tau", "--distillation soft")
    refused(here("deit", "--distillation", "firm"), "--distillation firm", "hard")
    refused(here("deit", "--model", "torchvision/resnet18", "--dropout", 0.1), "--dropout: torchvision's models")
    refused(here("deit", "--erasing", 1.5), "--erasing 1.5: must be in [0, 1]")


def test_the_teacher_of_a_resumed_run_must_be_the_same(here, folder, convnet, tmp_path):
    flags = [
        *DISTILLED, "--data", folder, "--out", tmp_path / "o", "--distillation", "hard", "--teacher",
        "shufflenet_v2_x0_5"
    ]
    assert here("deit", *flags, "--epochs", 1, "--warmup-epochs", 0, "--teacher-weights", convnet).status == 0
    assert log_of(tmp_path / "o")[0]["teacher"].startswith("shufflenet_v2_x0_5 ")
    other = torchvision.models.shufflenet_v2_x0_5(num_classes=4).state_dict()
    torch.save(other, tmp_path / "other.pth")
    again = [*flags, "--epochs", 1, "--warmup-epochs", 0, "--teacher-weights", tmp_path / "other.pth", "--resume"]
    refused(here("deit", *again), "started differently", "teacher was shufflenet_v2_x0_5")


def test_teachers_of_other_scripts_and_classes(here, folder, tmp_path):
    assert here(
        "deit3", *TINY, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "t"
    ).status == 0
    flags = [*DISTILLED, "--data", folder, "--distillation", "soft", "--teacher-weights", tmp_path / "t/last.pt"]
    refused(here("deit", *flags, "--teacher", "resnet18"), "holds deit3 vit_nano, you asked for --teacher resnet18")
    # The teacher sees the student's resolution, hence its position embedding is resized.
    result = here("deit", *flags, "--img-size", 48, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "s")
    assert result.status == 0 and "teacher: position embedding resized to 6 x 6 patches" in result.out
    renamed = write_folder(tmp_path / "renamed", classes=("ant", "bee", "cow", "dog"))
    refused(here("deit", *flags, "--data", renamed), "its class 2 is 'cat', the data's is 'cow'")
    content = torch.load(tmp_path / "t/last.pt", weights_only=True)
    torch.save({**content, "recipe": {**content["recipe"], "glow": 1}}, tmp_path / "t/newer.pt")
    refused(here("deit", *flags[:-1], tmp_path / "t/newer.pt"), "newer.pt: was written by another version of deit3.py")
    torch.save({**content, "method": "os"}, tmp_path / "t/foreign.pt")
    refused(here("deit", *flags[:-1], tmp_path / "t/foreign.pt"), "needs os.py, which is not beside common/")


def test_eval_prints_every_head_on_every_set(here, folder, tmp_path):
    flags = [
        "--model", "deit_nano_distilled", "--weights", tmp_path / "o/last.pt", "--device", "cpu", "--workers", 0,
        "--eval"
    ]
    result = here("deit", *DISTILLED, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "o")
    logged = log_of(tmp_path / "o")[-2]
    result = here("deit", *flags, "--data", folder, "--eval-data", folder / "val", folder / "train")
    assert result.status == 0, result
    lines = [line for line in result.out.splitlines() if "no GPU" not in line]
    assert [line.split()[0].rstrip(":") for line in lines] == [
        name
        for data in (folder, folder / "val", folder / "train")
        for name in (str(data), "top1", "class", "distillation")
    ]
    for line, key in ((lines[1], "val_top1"), (lines[2], "val_top1_class"), (lines[3], "val_top1_distillation")):
        assert f"top1 {logged[key]:.5g}" in line
    assert lines[1] == lines[5]  # the same images, found another way
    alone = here("deit", *flags, "--eval-data", folder / "val")
    assert [line for line in alone.out.splitlines() if "no GPU" not in line][1:] == lines[1:4]


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, shapes_convnet):
    """Folder of a student distilled from a convnet (section 3.3's teacher), and of one that learns from labels only."""
    out = tmp_path_factory.mktemp("distilled")
    student = [
        "--model", "deit_nano_distilled", "--recipe", "shapes", "--img-size", 32, "--batch-size", 32, "--epochs", 4
    ]
    teacher = ["--distillation", "hard", "--teacher-weights", shapes_convnet / "last.pt"]
    with fewer_shapes(1200, 240):
        running = [
            child([*student, *flags, "--workers", 0, "--device", "cpu", "--out", out / name], script="deit")
            for name, flags in (("student", teacher), ("alone", []))
        ]
        for pid in running:
            assert status_of(pid, 300) == 0
    return out


@torch.no_grad()
def decisions(checkpoint, count: int = 600, size: tuple = (32, 32)) -> dict[str, torch.Tensor]:
    """What a trained model says of validation images of `shapes`, per head."""
    content = load(checkpoint)
    model = from_checkpoint(content, str(checkpoint), size, print).eval()
    source = Shapes("val")
    images = normalize(torch.stack([eval_transform(source.read(i), size, 0.875) for i in range(count)]))
    return {name: logits.argmax(1) for name, logits in deit.predict(model, images).items()}


def test_a_distilled_student_decides_like_its_teacher(distilled, shapes_convnet):
    """Table 3.4: the distillation head agrees most with the teacher, a student that never saw it least."""
    teacher = decisions(shapes_convnet / "last.pt")[""]
    agreement = {
        run: {
            head: (made == teacher).float().mean().item()
            for head, made in decisions(distilled / run / "last.pt").items()
        }
        for run in ("student", "alone")
    }
    student, alone = agreement["student"], agreement["alone"]
    assert student["distillation"] > alone["distillation"] + 0.15, agreement
    assert student[""] > alone[""] + 0.15, agreement
    assert student["distillation"] > student["class"] + 0.05, agreement


def test_fine_tuning_from_64_to_96_pixels_with_distillation_improves(here, tmp_path, shapes_convnet):
    flags = ["--recipe", "shapes", "--device", "cpu", "--workers", 0, "--epochs", 3, "--batch-size", 32]
    student = [
        "--model", "deit_nano_distilled", *flags, "--distillation", "hard", "--teacher-weights",
        shapes_convnet / "last.pt"
    ]
    at_96 = [
        "--model", "deit_nano_distilled", "--img-size", 96, "--device", "cpu", "--workers", 0, "--weights",
        tmp_path / "64/last.pt"
    ]
    with fewer_shapes(600, 120):
        assert here("deit", *student, "--img-size", 64, "--out", tmp_path / "64").status == 0
        before = here("deit", *at_96, "--eval")
        tuned = here("deit", *student, *at_96, "--out", tmp_path / "96")
    assert tuned.status == 0 and "position embedding resized to 12 x 12 patches" in tuned.out, tuned
    after = log_of(tmp_path / "96")[-2]
    losses = [float(line.split("loss ")[1].split()[0]) for line in before.out.splitlines() if "loss" in line]
    assert after["val_loss"] < losses[0] - 0.1 and after["val_loss_class"] < losses[1] - 0.1, (before.out, after)


def test_torchvisions_regnet_the_papers_teacher_is_trained_with_this_recipe(here, folder, tmp_path):
    """Its constructor computes with tensors, which the meta device has no values for."""
    flags = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "o"]
    result = here("deit", "--model", "torchvision/regnet_y_400mf", *flags)
    assert result.status == 0 and "M parameters" in result.out and (tmp_path / "o/last.pt").exists(), result
