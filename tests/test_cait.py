"""cait.py against the official models' numbers, its equations written out, and as a whole."""

import hashlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NANO,
    SMALL,
    check_architecture,
    check_distribution,
    check_logits,
    fewer_shapes,
    fill,
    filled_images,
    load,
    log_of,
    reference,
)
from PIL import Image
from test_cli import refused
from test_run import child, status_of

import cait
import common.shapes
from common.evaluate import normalize
from common.images import eval_transform
from common.models import from_checkpoint
from common.optim import param_groups
from common.report import count
from common.sources import Shapes

MODELS = reference("cait")
slow = pytest.mark.slow
ALL = [pytest.param(v, marks=slow) if v.startswith("m") else v for v in MODELS]  # large ones: logits in the slow run


# ---- Architecture ----------------------------------------------------------------------------------------------------


def on_meta(case: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return cait.build_model(case["model"], img_size=case["img_size"])


@pytest.mark.parametrize("variant", MODELS)
def test_state_dict_parameters_and_gmacs_are_the_official_ones(variant):
    check_architecture(on_meta(MODELS[variant]), MODELS[variant])


@pytest.mark.parametrize("variant", ALL)
def test_logits_equal_the_official_ones(variant):
    case = MODELS[variant]
    model = cait.build_model(case["model"], img_size=case["img_size"]).eval()
    fill(model)
    with torch.no_grad():
        logits = model(filled_images(2, case["img_size"]))
    check_logits(logits, case["logits"], case["logits_norm"])


TABLE_3_15 = {  # parameters (millions), FLOPs (billions, multiply-adds) at 224 and at 384
    "cait_xxs24": (12.0, 2.5, 9.5),
    "cait_xxs36": (17.3, 3.8, 14.2),
    "cait_xs24": (26.6, 5.4, 19.3),
    "cait_xs36": (38.6, 8.1, 28.8),
    "cait_s24": (46.9, 9.4, 32.2),
    "cait_s36": (68.2, 13.9, 48.0),
    "cait_s48": (89.5, 18.6, 63.8),
    "cait_m24": (185.9, 36.0, 116.1),
    "cait_m36": (270.9, 53.7, 173.3),
}


@pytest.mark.parametrize("name", TABLE_3_15)
def test_parameters_and_flops_of_table_3_15(name):
    millions, at_224, at_384 = TABLE_3_15[name]
    parameters, gmacs = count(lambda: cait.build_model(name, img_size=224), (224, 224))
    assert parameters / 1e6 == pytest.approx(millions, rel=0.005)
    assert gmacs == pytest.approx(at_224, rel=0.02)
    assert count(lambda: cait.build_model(name, img_size=384), (384, 384))[1] == pytest.approx(at_384, rel=0.02)


TABLE_3_16 = {
    "xxs24": (0.05, 1e-5), "xxs36": (0.1, 1e-6), "xs24": (0.05, 1e-5), "xs36": (0.1, 1e-6), "s24": (0.1, 1e-5),
    "s36": (0.2, 1e-6), "s48": (0.3, 1e-6), "m24": (0.2, 1e-5), "m36": (0.3, 1e-6), "m48": (0.4, 1e-6),
}


@pytest.mark.parametrize("name", TABLE_3_16)
def test_drop_rate_and_epsilon_of_table_3_16(name):
    rate, epsilon = TABLE_3_16[name]
    with torch.random.fork_rng():
        config = cait.MODELS[f"cait_{name}"] | dict(dim=48, heads=1, num_classes=3, img_size=(32, 32))
        model = cait.CaiT(**config, branches="layerscale", class_in_keys=True)
    assert {b.drop_path for b in model.blocks} == {rate}
    scales = [g for b in (*model.blocks, *model.blocks_token_only) for g in (b.gamma_1, b.gamma_2)]
    assert all(torch.equal(g, torch.full((48,), epsilon)) for g in scales) and len(scales) == 2 * (int(name[-2:]) + 2)
    assert cait.paper_recipe("in1k", f"cait_{name}").drop_path == rate
    config = cait.MODELS[f"cait_{name}"]
    assert config["dim"] == 48 * config["heads"]


def test_a_fresh_model_has_the_official_distribution():
    torch.manual_seed(0)
    state = cait.build_model("cait_xxs24").state_dict()
    for key, (mean, std) in MODELS["xxs24"]["init_stats"].items():
        tensor = state[key]
        if tensor.numel() <= 16:  # the 4 x 4 matrices of the heads: too few numbers for a mean
            assert tensor.abs().max() <= 0.08, key
            continue
        check_distribution(tensor, mean, std, key)


@pytest.mark.parametrize("variant", ["xxs24", "m36"])
def test_weight_decay_groups_are_the_official_ones(variant):
    model = on_meta(MODELS[variant])
    plain, decayed = param_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(n.endswith(("proj_l.bias", "attn.k.bias")) for n in frozen)  # without effect, never decayed
    listed = "\n".join(sorted([names[id(p)] for p in plain["params"]] + frozen))
    assert hashlib.sha256(listed.encode()).hexdigest() == MODELS[variant]["no_decay_sha256"]
    assert len(plain["params"]) + len(decayed["params"]) + len(frozen) == len(names)


def scramble(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


def test_talking_heads_are_two_mixings_around_the_softmax():
    """Against the direct form: a Linear over the heads of the logits and of the weights, biases included."""
    attention = scramble(cait.Attention(48, 4))
    x = torch.randn(2, 7, 48, requires_grad=True)
    q, k, v = attention.qkv(x).reshape(2, 7, 3, 4, 12).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1)) / math.sqrt(12)
    weights = attention.proj_l(logits.permute(0, 2, 3, 1)).softmax(dim=2)
    weights = attention.proj_w(weights).permute(0, 3, 1, 2)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 7, 48))
    found = attention(x)
    assert torch.allclose(found, expected, atol=1e-5)
    parameters = {n: p for n, p in attention.named_parameters() if p.requires_grad}
    both = [torch.autograd.grad(y.square().sum(), [x, *parameters.values()]) for y in (found, expected)]
    for name, a, b in zip(["x", *parameters], *both):
        if name == "qkv.bias":  # of the keys: rounding noise there, zero here
            assert not a[48:96].any() and b[48:96].abs().max() < 1e-4 * b.abs().max()
            a, b = a.clone(), b.clone()
            b[48:96] = 0
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item()), name


def test_state_kept_for_the_backward_pass_is_three_maps():
    """12 h bytes per pair of tokens in float32, and what grows linearly; one layer's input with gradient
    checkpointing."""

    def kept(module, x) -> int:
        sizes = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x)
        return sum(sizes.values())

    attention = cait.Attention(48, 4)
    few, many = (kept(attention, torch.randn(1, n, 48, requires_grad=True)) for n in (200, 400))
    pairs = 400**2 - 200**2
    assert 12 * 4 * pairs <= many - few <= 12 * 4 * pairs + 200 * 48 * 4 * 16
    model = cait.build_model("cait_nano", 5, 160)  # 400 patches, 3 blocks
    images, amounts = torch.randn(1, 3, 160, 160), []
    for on in (False, True):
        model.grad_checkpoint = on
        amounts.append(kept(model, images))
    assert amounts[0] > 3 * 12 * 2 * 400**2 and amounts[1] < 0.2 * amounts[0]


@pytest.mark.parametrize("class_in_keys", [True, False])
def test_class_attention_is_full_attentions_first_row(class_in_keys):
    """Eq. 3.8-3.13: row 0 of the self-attention of z = [class, patches] with the same matrices."""
    attention = scramble(cait.ClassAttention(48, 4, class_in_keys))
    z = torch.randn(2, 7, 48)
    q, k, v = ((f(z)).reshape(2, 7, 4, 12).transpose(1, 2) for f in (attention.q, attention.k, attention.v))
    logits = q @ k.transpose(-2, -1) / math.sqrt(12)
    if not class_in_keys:
        logits[..., 0] = -math.inf
    full = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 48))
    assert torch.allclose(attention(z, 1), full[:, :1], atol=1e-5)
    assert attention(z, 1).shape == (2, 1, 48) and torch.allclose(attention.weights(z, 1).sum(-1), torch.ones(()))


def test_the_class_attention_stage_changes_the_tokens_only():
    model = cait.build_model("cait_nano_distilled", 5, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens, patches = model.stages(images)
    before = patches.clone()
    after = model.blocks_token_only[0](tokens, patches)
    assert after.shape == tokens.shape == (2, 2, 96) and torch.equal(patches, before)
    a, b = model.train().heads(images)
    assert torch.allclose(model.eval()(images), (a + b) / 2, atol=1e-6) and a.shape == (2, 5)


@pytest.mark.parametrize(
    "branches, shape, check",
    [
        ("layerscale", (96,), lambda g: (g == 0.25).all()), ("layerscale-zero", (96,), lambda g: (g == 0).all()),
        ("layerscale-uniform", (96,), lambda g: (g >= 0).all() and (g <= 0.5).all() and abs(g.mean() - 0.25) < 0.08),
        ("scalar", (1,), lambda g: (g == 0.25).all()), ("scalar-zero", (1,), lambda g: (g == 0).all()),
        ("none", None, None),
    ],
)
def test_branch_weights_of_tables_3_11_and_3_12(branches, shape, check):
    model = cait.build_model("cait_nano", 5, 32, branches=branches, epsilon=0.25)
    gammas = [g for b in (*model.blocks, *model.blocks_token_only) for g in (b.gamma_1, b.gamma_2)]
    if shape is None:
        assert gammas == [None] * 10
    else:
        assert all(g.shape == shape and check(g.detach()) for g in gammas)
        plain, _ = param_groups(model, 0.05)
        assert all(any(g is p for p in plain["params"]) for g in gammas)  # not decayed
    x = torch.randn(2, 16, 96)
    block = model.blocks[0].eval()
    first, second = (torch.ones(1) if g is None else g for g in (block.gamma_1, block.gamma_2))
    y = x + first * block.attn(block.norm1(x))
    assert torch.allclose(block(x), y + second * block.mlp(block.norm2(y)), atol=1e-6)


def test_kept_only_stochastic_depth_equals_masking():
    torch.manual_seed(0)
    block = cait.Block(48, cait.Attention(48, 1), "layerscale", 0.3, drop_path=0.4)
    x = torch.randn(16, 5, 48)
    torch.manual_seed(1)
    kept_only = block(x)
    torch.manual_seed(1)
    draws = [cait.kept_samples(16, 0.4, x.device) for _ in range(2)]
    masks = [torch.zeros(16, 1, 1).index_fill(0, kept, factor) for kept, factor in draws]
    y = x + masks[0] * block.attention_branch(x)
    assert torch.allclose(kept_only, y + masks[1] * block.mlp_branch(y), atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = cait.build_model("cait_nano", 5, 32, drop_path=0.3)
    images, grads = torch.randn(8, 3, 32, 32), []
    for on in (False, True):
        model.grad_checkpoint = on
        torch.manual_seed(3)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- Recipe and loss -------------------------------------------------------------------------------------------------


def test_recipe_of_section_3_7():
    r = cait.paper_recipe("in1k", "cait_s36")
    assert (r.epochs, r.batch_size, r.optimizer, r.lr) == (400, 1024, "adamw", 1e-3)
    assert (r.weight_decay, r.warmup_epochs, r.repeats, r.eval_crop_ratio) == (0.05, 5, 3, 1.0)
    assert (r.augment, r.erasing, r.mixup, r.cutmix, r.smoothing) == ("rand", 0.25, 0.8, 1.0, 0.1)
    rows = {"cifar10": (1000, 1e-5, 1e-7), "cars": (1000, 1e-4, 1e-6), "inat2018": (360, 1e-4, 1e-6)}
    for name, row in rows.items():
        r = cait.paper_recipe("transfer", "cait_s36", data=f"{name}:/d")
        assert (r.epochs, r.lr, r.min_lr) == row, name
    assert cait.paper_recipe("finetune", "cait_s36").img_size == (384, 384)


def test_hard_distillation_is_equation_3_3():
    torch.manual_seed(0)
    one, two, teacher = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    targets = torch.rand(4, 6, dtype=torch.float64).softmax(1)
    decided = F.one_hot(teacher.argmax(1), 6).double()
    for outputs, student in ((one, one), ((one, two), two)):
        label = -(targets * one.log_softmax(1)).sum(1).mean()
        decision = -(decided * student.log_softmax(1)).sum(1).mean()
        assert torch.allclose(cait.hard_distillation(outputs, targets, teacher), 0.5 * label + 0.5 * decision)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def test_distillation_on_one_head_and_with_the_token(here, folder, tmp_path):
    small = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("cait", "--model", NANO["cait"], *small, "--out", tmp_path / "t").status == 0
    teacher = ["--distillation", "hard", "--teacher-weights", tmp_path / "t/last.pt"]
    for model in ("cait_nano", "cait_nano_distilled"):
        result = here("cait", "--model", model, *small, *teacher, "--out", tmp_path / model)
        assert result.status == 0 and "teacher  cait cait_nano" in result.out, result
    assert "val_top1_distillation" in log_of(tmp_path / "cait_nano_distilled")[-2]
    refused(here("cait", "--model", "torchvision/resnet18"), "--model torchvision/resnet18: unknown")
    refused(here("cait", "--branches", "layer"), "--branches layer", "layerscale")


def test_an_evaluation_takes_the_trained_variant_from_the_checkpoint(here, folder, tmp_path):
    model = ["--model", NANO["cait"], "--data", folder]
    small = [*SMALL, "--epochs", 1, "--warmup-epochs", 0, "--branches", "scalar", "--class-in-keys", "false"]
    assert here("cait", *model, *small, "--out", tmp_path / "o").status == 0
    result = here("cait", *model, "--eval", "--weights", tmp_path / "o/last.pt", "--device", "cpu")
    assert f"top1 {log_of(tmp_path / 'o')[-2]['val_top1']:.5g}" in result.out, result


@torch.no_grad()
def shapes_batch(split: str, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = Shapes(split)
    images = normalize(torch.stack([eval_transform(source.read(i), (size, size), 1.0) for i in range(count)]))
    return images, torch.from_numpy(source.labels[:count])


def test_layerscale_trains_24_blocks_that_do_not_train_without_it():
    """Section 3.5.2 in small: 24 blocks, the same seed, rate, batches; plain pre-norm hardly leaves chance (2.48)."""
    images, labels = shapes_batch("train", 64, 32)
    last = {}
    for branches in ("none", "layerscale"):
        torch.manual_seed(0)
        model = cait.CaiT(
            48, depth=24, heads=1, patch=8, num_classes=12, img_size=(32, 32), drop_path=0.0, branches=branches,
            epsilon=1e-5, class_in_keys=True,
        )
        optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=3e-3, fused=True)
        draws, losses = torch.Generator().manual_seed(0), []
        for step in range(100):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 20)
            batch = torch.randint(len(images), (16,), generator=draws)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        last[branches] = sum(losses[-30:]) / 30
    assert last["layerscale"] < last["none"] - 0.4, last


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small CaiT trained on `shapes`, and pictures of that data set."""
    out = tmp_path_factory.mktemp("cait")
    flags = ["--model", "cait_nano", "--recipe", "shapes", "--img-size", 32, "--batch-size", 32, "--epochs", 3]
    with fewer_shapes(1800, 240):
        assert status_of(
            child([*flags, "--workers", 0, "--device", "cpu", "--out", out / "run"], script="cait"), 300
        ) == 0
    for i in (0, 5):
        Image.fromarray(common.shapes.draw("val", i)[0]).save(out / f"picture{i}.png")
    return out


def test_class_attention_falls_on_the_object(trained):
    """Share of the first class-attention layer's weights inside the object's mask, against the mask's share of the
    area."""
    model = from_checkpoint(load(trained / "run/last.pt"), "last.pt", (32, 32), print).eval()
    images, _ = shapes_batch("val", 240, 32)
    masks = torch.stack([torch.from_numpy(common.shapes.draw("val", i)[1]) for i in range(240)]).float()[:, None]
    masks = F.adaptive_avg_pool2d(masks, model.grid)[:, 0]
    first = cait.attention_maps(model, images)[0].mean(1)
    inside = ((first * masks).sum((1, 2)) / first.sum((1, 2))).mean().item()
    assert inside > masks.mean().item() + 0.07, (inside, masks.mean())
    fresh = cait.attention_maps(cait.build_model("cait_nano", 12, 32).eval(), images)[0].mean(1)
    before = ((fresh * masks).sum((1, 2)) / fresh.sum((1, 2))).mean().item()
    assert before == pytest.approx(masks.mean().item(), abs=0.03)  # an untrained one looks everywhere alike


def test_attention_maps_are_written(here, trained, tmp_path):
    flags = ["--model", "cait_nano", "--weights", trained / "run/last.pt", "--device", "cpu"]
    flags += ["--out", tmp_path / "maps"]
    result = here("cait", *flags, "--attention-maps", trained / "picture0.png", trained / "picture5.png")
    assert result.status == 0 and "picture0_attention.png: " in result.out and "%" in result.out, result
    sheet = Image.open(tmp_path / "maps/picture5_attention.png")
    assert sheet.height == 3 * (32 + 14) and sheet.width >= 3 * 32 + 2 * 4  # two layers of two heads, then the saliency
    refused(here("cait", *flags, "--attention-maps", tmp_path / "no.png"), "--attention-maps", "no.png: No such file")
    (tmp_path / "text.png").write_text("not an image")
    refused(here("cait", *flags, "--attention-maps", tmp_path / "text.png"), "text.png")


def test_branch_norms_are_the_ratios_of_figure_3_6(here, trained, tmp_path):
    flags = ["--model", "cait_nano", "--weights", trained / "run/last.pt", "--device", "cpu", "--out", tmp_path]
    result = here("cait", *flags, "--branch-norms")
    assert result.status == 0, result
    refused(here("cait", *flags, "--branch-norms", "--eval-data", tmp_path), "--eval-data", "--branch-norms")
    found = json.loads((tmp_path / "branch_norms.json").read_text())
    model = from_checkpoint(load(trained / "run/last.pt"), "last.pt", (32, 32), print).eval()
    source = Shapes("val")
    images = normalize(torch.stack([eval_transform(source.read(i), (32, 32), 1.0) for i in range(0, 1200, 19)]))
    with torch.no_grad():
        x = model.patch_embed(images) + model.pos_embed
        for i, block in enumerate(model.blocks):
            y = x + block.gamma_1 * block.attn(block.norm1(x))
            after = block(x)
            for name, change, stream in (("attention", y - x, x), ("mlp", after - y, y)):
                ratio = (change.flatten(1).norm(dim=1) / stream.flatten(1).norm(dim=1)).mean().item()
                assert found[name][i] == pytest.approx(ratio, rel=1e-4)
            x = after
    assert Image.open(tmp_path / "branch_norms.png").size == (840, 260)


def test_saliency_spans_0_to_1_and_follows_the_map():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, :, 1, 2] = 1.0
    shown = cait.saliency(maps, (32, 32))
    assert shown.shape == (1, 32, 32) and (shown.min(), shown.max()) == (0, 1)
    row, column = divmod(shown[0].argmax().item(), 32)
    assert 8 <= row < 16 and 16 <= column < 24
