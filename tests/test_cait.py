"""cait.py against the official models' numbers, its equations written out, and as a whole."""

import hashlib
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NANO,
    ROOT,
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
    same_training,
    write_folder,
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


# ---- The studies on DeiT-S: Tables 3.11 to 3.13, 3.20, 3.21 ----------------------------------------------------------


def on_command(flags: str) -> tuple:
    """(arguments, recipe, model without memory) of a command line."""
    args, recipe, _ = cait.parse_args(["--data", "/imagenet", *flags.split()])
    with torch.device("meta"):
        return args, recipe, cait.make_model(args, recipe, 1000)


def test_the_studies_network_is_deit_s():
    case = reference("deit")["small"]
    with torch.device("meta"):
        check_architecture(cait.build_model("deit_s"), case)
    model = cait.build_model("deit_s").eval()
    fill(model)
    with torch.no_grad():
        check_logits(model(filled_images(2, 224)), case["logits"], case["logits_norm"])
    recipe = cait.paper_recipe("in1k", "deit_s")
    assert (recipe.epochs, recipe.lr, recipe.drop_path, recipe.eval_crop_ratio) == (300, 1e-3, 0.05, 0.875)
    assert {b.drop_path for b in model.blocks} == {0.05}  # Table 3.11: the same for all blocks


README = (ROOT / "README.md").read_text()
COUNTED = re.findall(r"cait.py (--model deit_s .*?)--out.*?(\d+) M, ([\d.]+) G(?: \(here ([\d.]+)\))?", README)


@pytest.mark.parametrize("flags, millions, gmacs, here", COUNTED, ids=lambda v: v.partition("/imagenet ")[2])
def test_commands_in_readme_have_their_rows_parameters_and_flops(flags, millions, gmacs, here):
    args, recipe, _ = on_command(flags)
    parameters, found = count(lambda: cait.make_model(args, recipe, 1000), recipe.img_size)
    assert recipe.epochs == 300 and parameters / 1e6 == pytest.approx(int(millions), abs=0.7)
    assert found == pytest.approx(float(here or gmacs), abs=0.07) and float(gmacs) == pytest.approx(found, abs=0.1)


def test_readme_has_every_row_of_the_tables():
    assert len(COUNTED) == 1 + 12 + 6 + 1  # DeiT-S; Table 3.13; Table 3.20; one of Table 3.21
    assert count(lambda: cait.build_model("cait_s36", img_size=256), (256, 256))[1] == pytest.approx(18.6, abs=0.1)
    for heads in (1, 2, 3, 6, 8, 12, 16, 24):  # Table 3.21
        parameters, gmacs = count(lambda: cait.build_model("deit_s", heads=heads), (224, 224))
        assert (round(parameters / 1e6, 2), round(gmacs, 1)) == (22.05, 4.6)


def test_the_path_of_table_3_20_ends_at_cait_s36():
    last = [flags for flags, *_ in COUNTED if "--talking-heads true" in flags and "--insert-class none" in flags]
    _, recipe, model = on_command(last[0])
    _, paper, official = on_command("--model cait_s36")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, official)]
    assert len(last) == 1 and shapes[0] == shapes[1] and repr(model) == repr(official)
    differ = {k: v for k, v in vars(recipe).items() if v != getattr(paper, k)}
    assert differ == {"epochs": 300, "eval_crop_ratio": 0.875}


@pytest.mark.parametrize("depth, epsilon", [(1, 0.1), (12, 0.1), (18, 0.1), (24, 1e-5), (36, 1e-6), (48, 1e-6)])
def test_epsilon_follows_the_depth(depth, epsilon):
    model = cait.build_model("cait_nano", 3, 16, depth=depth)
    assert len(model.blocks) == depth and all((g == epsilon).all() for n, g in model.named_parameters() if "gamma" in n)
    assert (cait.build_model("cait_nano", 3, 16, depth=depth, epsilon=0.5).blocks[-1].gamma_2 == 0.5).all()


@pytest.mark.parametrize("insert, layers", [(0, 0), (1, 0), (2, 0), (None, 0), (None, 1), (3, 3), (0, 2), (1, 1)])
@pytest.mark.parametrize("distilled", [False, True])
def test_where_the_class_token_enters(insert, layers, distilled):
    """Table 3.13, block by block; norms of Figure 3.6 along the way."""
    if distilled and (insert, layers) == (None, 0):
        return
    name, options = "cait_nano_distilled" if distilled else "cait_nano", dict(insert_class=insert, class_layers=layers)
    model = scramble(cait.build_model(name, 5, 32, **options)).eval()
    images, tokens, norms = torch.randn(2, 3, 32, 32), None, {"attention": [], "mlp": []}
    x = model.patch_embed(images)
    own = [model.cls_token.expand(2, 1, -1)] if (insert, layers) != (None, 0) else []
    own += [model.dist_token.expand(2, 1, -1)] if distilled else []
    for number, block in enumerate([*model.blocks, None]):
        if number == (3 if insert is None else insert):
            x = torch.cat([*own, x], dim=1)
        if number == 0:
            x = x + model.pos_embed
        if block is not None:
            y = x + block.gamma_1 * block.attn(block.norm1(x))
            x, before = block(x), x
            for kind, change, stream in (("attention", y - before, before), ("mlp", x - y, y)):
                norms[kind].append((change.flatten(1).norm(dim=1) / stream.flatten(1).norm(dim=1)).mean().item())
    tokens, patches = x[:, : len(own)], x[:, len(own) :]
    for block in model.blocks_token_only or ():
        tokens = block(tokens, patches)
    features = model.norm(torch.cat([tokens, patches], dim=1))
    with torch.no_grad():
        assert torch.allclose(model.forward_features(images), features, atol=1e-5)
        logits = model.head(features[:, 0] if own else features.mean(1))
        assert torch.allclose(model.heads(images)[0], logits, atol=1e-4)
    found = cait.branch_norms(model, images)
    assert all(found[kind] == pytest.approx(norms[kind], rel=1e-4) for kind in norms)
    assert ("cls_token" in model.state_dict()) == bool(own) and len(model.blocks_token_only or ()) == layers
    assert model.pos_embed.shape[1] == 16 + (len(own) if insert == 0 else 0)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(images)[0, 0], images)
    assert gradient[0].any()  # whatever is chosen, the head sees the image


def test_talking_heads_and_scales_of_class_attention_can_be_left_out():
    model = cait.build_model("cait_nano", 5, 32, talking_heads=False, class_scale=False)
    keys = "\n".join(model.state_dict())
    assert "proj_l" not in keys and "blocks.2.gamma_1" in keys and "blocks_token_only.0.gamma_1" not in keys
    block, tokens, patches = scramble(model.blocks_token_only[0]), torch.randn(2, 1, 96), torch.randn(2, 16, 96)
    y = tokens + block.attn(block.norm1(torch.cat([tokens, patches], dim=1)), 1)  # T:1671
    assert torch.allclose(block(tokens, patches), y + block.mlp(block.norm2(y)), atol=1e-6)


def test_what_does_not_fit_together_is_refused(here, folder):
    for flags in (["--heads", 5], ["--insert-class", 12], ["--insert-class", 14, "--class-layers", 2]):
        refused(here("cait", "--model", "deit_s", "--data", folder, *flags), "do not fit together")
    flags = ["--class-layers", 0, "--insert-class", "none"]
    refused(here("cait", "--model", "cait_nano_distilled", "--data", folder, *flags), "do not fit together")
    refused(here("cait", "--depth", 0, "--data", folder), "--depth 0", "1 or more")
    constant = (["--branches", kind] for kind in ("none", "scalar-zero", "layerscale-zero", "layerscale-fixed"))
    for flags in (*constant, ["--model", "deit_s"]):
        refused(here("cait", *flags, "--epsilon", 0.1, "--data", folder), "--epsilon: has no effect")


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


ONE_BLOCK = ("--insert-class none", "--class-layers 1 --insert-class 1")


@pytest.mark.parametrize("flags", ["--depth 2 --insert-class 1", *(f"--depth 1 {flags}" for flags in ONE_BLOCK)])
def test_the_studies_networks_train_and_are_evaluated(here, folder, tmp_path, flags):
    small = ["--model", "deit_s", *SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--heads", 2]
    result = here("cait", *small, "--drop-path", 0.3, *flags.split(), "--out", tmp_path)
    assert result.status == 0 and "loss" in result.out, result
    model, classes, _ = cait.load_model(str(tmp_path / "last.pt"))  # as it was trained
    assert len(classes) == 4 and model.blocks[0].attn.heads == 2 and model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    result = here("cait", "--model", "deit_s", "--eval", "--data", folder, "--out", tmp_path, "--device", "cpu")
    assert f"top1 {log_of(tmp_path)[-2]['val_top1']:.5g}" in result.out, result
    if model.blocks_token_only is None:
        maps = here("cait", "--model", "deit_s", "--attention-maps", "a.png", "--out", tmp_path, "--device", "cpu")
        refused(maps, "--attention-maps", "no class attention")


def test_training_again_with_the_learned_branch_weights(here, folder, tmp_path):
    """Section 3.5.3, "Re-training": they come from the file and stay, all else is the seed's and trains."""
    small = ["--model", "cait_nano", *SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    again, states = [*small, "--branches", "layerscale-fixed"], {}
    refused(here("cait", *again, "--out", tmp_path / "no"), "--branches", "--weights FILE")
    assert here("cait", *small, "--out", tmp_path / "first").status == 0
    source = ["--weights", tmp_path / "first/last.pt"]
    result = here("cait", *again, *source, "--seed", 1, "--out", tmp_path / "again")
    assert result.status == 0 and "only the branch weights" in result.out, result
    still = ["--seed", 1, "--lr", 1e-12, "--min-lr", 0, "--warmup-lr", 0, "--out", tmp_path / "fresh"]
    assert here("cait", *small, *still).status == 0
    for name in ("first", "again", "fresh"):
        states[name] = load(tmp_path / name / "last.pt")["model"]
    for key, value in states["again"].items():
        if ".gamma_" in key:
            assert torch.equal(value, states["first"][key]) and (value != 0.1).any(), key
        elif value.ndim > 1:
            assert 0 < (value - states["fresh"][key]).norm() < 0.5 * (value - states["first"][key]).norm(), key
    assert here("cait", *small, "--branches", "none", "--out", tmp_path / "none").status == 0
    wrong = ["--weights", tmp_path / "none/last.pt", "--out", tmp_path / "no"]
    refused(here("cait", *again, *wrong), "none/last.pt", "keys missing", "gamma_1")
    evaluate = ["--model", "cait_nano", "--eval", "--data", folder, "--device", "cpu"]
    result = here("cait", *evaluate, "--out", tmp_path / "again")
    assert f"top1 {log_of(tmp_path / 'again')[-2]['val_top1']:.5g}" in result.out, result


def test_branch_norms_over_the_epochs(here, folder, tmp_path):
    small = ["--model", "cait_nano", *SMALL, "--data", folder, "--warmup-epochs", 0, "--log-branch-norms"]
    refused(here("cait", *small, "--epochs", 1, "--val-data", "none", "--out", tmp_path / "no"), "--log-branch-norms")
    plain = [f for f in small if f != "--log-branch-norms"]
    for flags, out in ((plain, "without"), (small, "with")):
        assert here("cait", *flags, "--epochs", 10, "--out", tmp_path / out).status == 0
    assert same_training(tmp_path / "with", tmp_path / "without")  # looking changes nothing
    logged = [r for r in log_of(tmp_path / "with") if "branch_norms" in r]
    assert [r["epoch"] for r in logged] == [1, 2, 3, 4, 6, 7, 8, 9]  # 8 times, the end among them
    figure = ["--model", "cait_nano", "--data", folder, "--branch-norms", "--device", "cpu", "--out", tmp_path / "with"]
    assert here("cait", *figure).status == 0
    final = json.loads((tmp_path / "with/branch_norms.json").read_text())
    for kind in final:
        assert logged[-1]["branch_norms"][kind] == pytest.approx(final[kind], rel=1e-4)
        assert logged[0]["branch_norms"][kind] != pytest.approx(final[kind], rel=1e-4)
    assert Image.open(tmp_path / "with/branch_norms.png").size == (840, 260)


def test_a_checkpoint_from_before_these_fields_still_loads(here, folder, tmp_path):
    small = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("cait", "--model", "cait_nano", *small, "--out", tmp_path).status == 0
    content = load(tmp_path / "last.pt")
    for field in ("depth", "heads", "talking_heads", "class_layers", "insert_class", "class_scale"):
        del content["recipe"][field]
    content["recipe"]["epsilon"] = 0.1
    torch.save(content, tmp_path / "old.pt")
    images = torch.randn(2, 3, 32, 32)
    old, new = (cait.load_model(str(tmp_path / name))[0](images) for name in ("old.pt", "last.pt"))
    assert torch.equal(old, new)


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


def test_branch_norms_name_a_damaged_image_in_one_line(here, trained, tmp_path):
    data = write_folder(tmp_path / "d", train=1, val=2)
    (tmp_path / "d/val/bee/bee_001.jpg").write_bytes(b"<html>")
    flags = ["--model", "cait_nano", "--weights", trained / "run/last.pt", "--device", "cpu", "--out", tmp_path]
    result = here("cait", *flags, "--branch-norms", "--data", data)
    assert result.status == 1 and len(result.err.splitlines()) == 1 and "val/bee/bee_001.jpg: " in result.err, result


def test_saliency_spans_0_to_1_and_follows_the_map():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, :, 1, 2] = 1.0
    shown = cait.saliency(maps, (32, 32))
    assert shown.shape == (1, 32, 32) and (shown.min(), shown.max()) == (0, 1)
    row, column = divmod(shown[0].argmax().item(), 32)
    assert 8 <= row < 16 and 16 <= column < 24
