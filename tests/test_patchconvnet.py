"""patchconvnet.py against the official models' numbers, its pooling written out, and as a whole."""

import hashlib
import importlib
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NANO,
    SMALL,
    PeakMemory,
    check_architecture,
    check_distribution,
    check_logits,
    fill,
    filled_images,
    load,
    log_of,
    reference,
)
from PIL import Image
from test_cli import refused

import common.shapes
import deit
import patchconvnet
from common.data import epoch_length
from common.evaluate import normalize
from common.images import eval_transform
from common.models import from_checkpoint
from common.optim import param_groups
from common.report import count
from common.sources import Shapes

MODELS = reference("patchconvnet")
slow = pytest.mark.slow


# ---- Architecture ----------------------------------------------------------------------------------------------------


def on_meta(case: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return patchconvnet.build_model(case["model"], img_size=case["img_size"])


@pytest.mark.parametrize("variant", MODELS)
def test_state_dict_parameters_and_gmacs_are_the_official_ones(variant):
    check_architecture(on_meta(MODELS[variant]), MODELS[variant])


@pytest.mark.parametrize("variant", ["s60", "s120", pytest.param("l60", marks=slow), pytest.param("b120", marks=slow)])
def test_logits_equal_the_official_ones(variant):
    case = MODELS[variant]
    model = patchconvnet.build_model(case["model"]).eval()
    fill(model)
    with torch.no_grad():
        logits = model(filled_images(2, case["img_size"]))
    check_logits(logits, case["logits"], case["logits_norm"])


def test_a_fresh_model_has_the_official_distribution():
    torch.manual_seed(0)
    state = patchconvnet.build_model("patchconvnet_s60").state_dict()
    for key, (mean, std) in MODELS["s60"]["init_stats"].items():
        check_distribution(state[key], mean, std, key)


@pytest.mark.parametrize("variant", ["s60", "b120"])
def test_weight_decay_groups_are_the_official_ones(variant):
    model = on_meta(MODELS[variant])
    plain, decayed = param_groups(model, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["blocks_token_only.0.attn.k.bias"]  # without effect
    listed = "\n".join(sorted([names[id(p)] for p in plain["params"]] + frozen))
    assert hashlib.sha256(listed.encode()).hexdigest() == MODELS[variant]["no_decay_sha256"]


TABLE_5_8 = {"s20": 0.0, "s36": 0.05, "s60": 0.15, "s120": 0.2, "b36": 0.2, "b60": 0.3, "b120": 0.4}
TABLE_5_1 = {"s60": (25.2, 4.0), "s120": (47.7, 7.5), "b60": (99.4, 15.8), "b120": (188.6, 29.9)}


@pytest.mark.parametrize("name", TABLE_5_8)
def test_drop_rates_of_table_5_8(name):
    assert patchconvnet.paper_recipe("in1k", f"patchconvnet_{name}").drop_path == TABLE_5_8[name]
    finetune = patchconvnet.paper_recipe("finetune", f"patchconvnet_{name}")
    assert finetune.drop_path == pytest.approx(max(0, TABLE_5_8[name] - 0.1))
    with torch.device("meta"):
        model = patchconvnet.build_model(f"patchconvnet_{name}", 5)
    assert {b.drop_path for b in model.blocks} == {TABLE_5_8[name]} and len(model.blocks) == int(name[1:])


@pytest.mark.parametrize("name", TABLE_5_1)
def test_parameters_and_flops_of_table_5_1(name):
    parameters, gmacs = count(lambda: patchconvnet.build_model(f"patchconvnet_{name}"), (224, 224))
    assert parameters / 1e6 == pytest.approx(TABLE_5_1[name][0], abs=0.06)
    assert gmacs == pytest.approx(TABLE_5_1[name][1], abs=0.15)


def test_learned_pooling_on_resnet_50_costs_what_section_5_3_4_says():
    _, gmacs = count(lambda: patchconvnet.build_model("resnet50_attention"), (224, 224))
    assert gmacs == pytest.approx(4.6, abs=0.06)
    model = patchconvnet.build_model("resnet50_attention", 5).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


def test_a_block_is_its_convolutions_in_the_usual_layout():
    block = scrambled(patchconvnet.Block(16, "layernorm", 0.5, 0.0))
    first, _, depthwise, _, se, last = block.attn.qkv_pos
    x = torch.randn(2, 5, 7, 16)
    y = block.norm1(x).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
    y = F.gelu(depthwise(F.gelu(first(y))))
    y = last(y * torch.sigmoid(se.conv_expand(F.relu(se.conv_reduce(y.mean((2, 3), keepdim=True))))))
    assert torch.allclose(block(x), x + block.gamma_1 * y.permute(0, 2, 3, 1), atol=1e-4)


def test_the_pooling_is_one_softmax_over_class_token_and_patches():
    pool = scrambled(patchconvnet.AggregationBlock(16, 1, 0.5, per_class=False))
    token, patches = torch.randn(2, 1, 16), torch.randn(2, 6, 16)
    z = pool.norm1(torch.cat([token, patches], 1))
    a = pool.attn
    weights = (a.q(z[:, :1]) @ a.k(z).transpose(1, 2) / 4).softmax(-1)
    after = token + pool.gamma_1 * a.proj(weights @ a.v(z))
    after = after + pool.gamma_2 * pool.mlp(pool.norm2(after))
    assert torch.allclose(pool(token, *pool.keys_and_values(token, patches)), after, atol=1e-5)
    assert torch.allclose(pool.weights(token, patches)[:, 0], weights[:, :, 1:], atol=1e-6)


# ---- One token per class ---------------------------------------------------------------------------------------------


def per_class(classes: int) -> patchconvnet.PatchConvNet:
    return scrambled(patchconvnet.build_model("patchconvnet_nano", classes, class_tokens="per_class"))


def test_per_class_tokens_see_the_patches_only_and_pieces_change_nothing(monkeypatch):
    model = per_class(7)
    heads = [f"head.{i}.{p}" for i in range(7) for p in ("weight", "bias")]
    assert [k for k in model.state_dict() if k.startswith("head")] == heads
    assert model.cls_token.shape == (1, 7, 64)
    images = torch.randn(2, 3, 40, 56)
    whole = model.eval()(images)
    # Class i by itself: the pooling with its token, then its classifier.
    patches, pool = model.forward_features(images).flatten(1, 2), model.blocks_token_only[0]
    for i in (0, 6):
        token = model.cls_token[:, i : i + 1].expand(2, -1, -1)
        alone = model.head[i](model.norm(pool(token, *pool.keys_and_values(token, patches))))[:, 0, 0]
        assert torch.allclose(whole[:, i], alone, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(patchconvnet.PatchConvNet, "CLASSES_AT_ONCE", 3)
    assert torch.allclose(model(images), whole, rtol=1e-4, atol=1e-4)
    maps = patchconvnet.attention_maps(model, images, [6, 0])
    assert maps.shape == (2, 2, 5, 7) and torch.allclose(maps.sum((2, 3)), torch.ones(2, 2), atol=1e-5)


def test_per_class_memory_does_not_grow_with_the_classes():
    with torch.device("meta"):
        peaks = []
        for classes in (256, 1024):
            model = patchconvnet.build_model("patchconvnet_nano", classes, class_tokens="per_class")
            with PeakMemory(model.eval().requires_grad_(False)) as memory:
                model(torch.empty(8, 3, 64, 64))
            peaks.append(memory.peak)
    assert peaks[1] < 1.3 * peaks[0]


def test_per_class_tokens_are_fine_tuned_from_a_single_one(here, folder, tmp_path):
    small = [*SMALL, "--model", NANO["patchconvnet"], "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("patchconvnet", *small, "--out", tmp_path / "one").status == 0
    tuned = ["--class-tokens", "per_class", "--weights", tmp_path / "one/last.pt"]
    result = here("patchconvnet", *small, *tuned, "--lr", 1e-4, "--out", tmp_path / "many")
    assert result.status == 0 and "carried over to 4 tokens, one per class" in result.out, result
    single = load(tmp_path / "one/last.pt")["model"]
    model = patchconvnet.build_model(NANO["patchconvnet"], 4, class_tokens="per_class")
    state = dict(single)
    patchconvnet.carry_over(model, state, {}, print)
    model.load_state_dict(state)  # strict
    assert all(torch.equal(model.cls_token[0, i], single["cls_token"][0, 0]) for i in range(4))
    assert torch.equal(model.head[2].weight[0], single["head.weight"][2])
    maps = ["--attention-maps", next(folder.rglob("*.jpg")), "--weights", tmp_path / "many/last.pt"]
    result = here("patchconvnet", "--model", NANO["patchconvnet"], *maps, "--device", "cpu", "--out", tmp_path / "maps")
    assert result.status == 0 and Image.open(next((tmp_path / "maps").glob("*.png"))).height == 3 * (32 + 14), result
    twelve = ["--model", NANO["patchconvnet"], "--recipe", "shapes", *tuned, "--out", tmp_path / "x"]
    refused(here("patchconvnet", *twelve), "the weights have 4 classes, the data 12")


# ---- Any resolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (320, 200), (512, 512)])
def test_any_resolution_with_the_same_weights(size):
    torch.manual_seed(0)
    model = patchconvnet.build_model("patchconvnet_s20", 5).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, *size))
        assert features.shape == (1, -(-size[0] // 16), -(-size[1] // 16), 384)
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_the_column_computes_a_crop_as_it_computes_the_whole():
    """Away from borders; squeeze-and-excitation, which sees the whole image by design, held constant."""
    model = scrambled(patchconvnet.build_model("patchconvnet_nano", 5)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv_pos[4].conv_expand.weight.zero_()
        images = torch.randn(1, 3, 160, 240)
        whole = model.forward_features(images)
        crop = model.forward_features(images[:, :, 32:128, 64:208])  # 12 x 18 patches from (4, 8)
    margin = 6  # one per block, and the stem's
    inner = crop[:, 5:7, margin:-margin]
    assert torch.allclose(inner, whole[:, 9:11, 8 + margin : 26 - margin], atol=1e-4) and inner.shape[2] == 6
    assert not torch.allclose(crop[:, 0], whole[:, 4, 8:26], atol=1e-2)  # at the border it does differ


def test_memory_grows_linearly_with_the_image_surface():
    with torch.device("meta"):
        peaks = {}
        for size in (512, 1024):
            for name, model in (
                ("patchconvnet", patchconvnet.build_model("patchconvnet_s20")),
                ("vit", deit.build_model("deit_s", img_size=size)),
            ):
                with PeakMemory(model.eval().requires_grad_(False)) as memory:
                    model(torch.empty(1, 3, size, size))
                peaks[name, size] = memory.peak
    assert peaks["patchconvnet", 1024] == pytest.approx(4 * peaks["patchconvnet", 512], rel=0.1)
    assert peaks["vit", 1024] > 8 * peaks["vit", 512]  # its attention maps, where they are written out


def test_kept_only_stochastic_depth_equals_masking():
    block = scrambled(patchconvnet.Block(16, "layernorm", 0.5, drop_path=0.4))
    x = torch.randn(12, 3, 4, 16)
    torch.manual_seed(1)
    kept_only = block(x)
    torch.manual_seed(1)
    kept, factor = patchconvnet.kept_samples(12, 0.4, x.device)
    mask = torch.zeros(12, 1, 1, 1).index_fill(0, kept, factor)
    assert torch.allclose(kept_only, x + mask * block.branch(x), atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = patchconvnet.build_model("patchconvnet_nano", 5, drop_path=0.3)
    images, grads = torch.randn(8, 3, 32, 32), []
    for on in (False, True):
        model.grad_checkpoint = on
        torch.manual_seed(3)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- Recipe ----------------------------------------------------------------------------------------------------------


def test_recipes_of_section_5_2_3():
    r = patchconvnet.paper_recipe("in1k", "patchconvnet_s60")
    assert (r.epochs, r.batch_size, r.optimizer, r.lr, r.weight_decay, r.repeats) == (400, 2048, "lamb", 3e-3, 0.01, 3)
    assert (r.mixup, r.cutmix, r.augment, r.clip_grad) == (0.8, 1.0, "rand", None)
    assert patchconvnet.paper_recipe("in1k", "patchconvnet_b60").weight_decay == 0.05
    r = patchconvnet.paper_recipe("finetune", "patchconvnet_b120")
    assert (r.epochs, r.batch_size, r.lr, r.weight_decay, r.drop_path) == (10, 1024, 1e-5, 0.01, 0.3)
    r = patchconvnet.paper_recipe("in21k_to_in1k", "patchconvnet_b120")
    assert (r.epochs, r.batch_size, r.lr, r.drop_path) == (100, 1024, 5e-4, 0.3)
    r = patchconvnet.paper_recipe("in21k", "patchconvnet_s60")
    assert (r.epochs, r.batch_size, r.lr, r.weight_decay, r.repeats, r.drop_path) == (90, 2048, 3e-3, 0.01, 1, 0.15)
    r = patchconvnet.paper_recipe("transfer", "patchconvnet_s60", data="cifar10:/d")
    assert (r.lr, r.min_lr, r.repeats, r.weight_decay) == (3e-5, 1e-7, 1, 0.01)
    assert patchconvnet.paper_recipe("transfer", "patchconvnet_b120", data="cars:/d").weight_decay == 0.05
    assert patchconvnet.Recipe().magnitude == 7


def test_a2_is_table_6_1s_column_of_wightman_et_al():
    for model in ("resnet50_attention", "torchvision/resnet50"):
        r = patchconvnet.parse_args(["--model", model, "--recipe", "a2"])[1]
        assert (r.epochs, r.batch_size, r.optimizer, r.lr, r.weight_decay) == (300, 2048, "lamb", 5e-3, 0.02)
        assert (r.warmup_epochs, r.smoothing, r.repeats, r.clip_grad, r.augment) == (5, 0, 3, 1.0, "rand")
        assert (r.magnitude, r.mixup, r.cutmix, r.eval_crop_ratio, r.loss) == (7, 0.2, 1.0, 0.95, "bce")
        assert r.drop_path is None


def test_a2_trains(here, folder, tmp_path):
    flags = ["--model", NANO["patchconvnet"], *SMALL, "--recipe", "a2", "--epochs", 1, "--warmup-epochs", 0]
    result = here("patchconvnet", *flags, "--data", folder, "--out", tmp_path)
    assert result.status == 0, result
    losses = [r["train_loss"] for r in log_of(tmp_path) if "train_loss" in r]
    assert losses and losses[0] < math.log(4)  # binary: per class, not per image
    refused(here("patchconvnet", "--recipe", "a2", "--smoothing", 0.1), "--smoothing", "--loss ce")


@pytest.mark.parametrize("magnitude", [0.0, 7.0, 9.0])
def test_rand_augment_has_the_magnitude_that_is_asked_for(magnitude, monkeypatch):
    levels, picture = [], Image.new("RGB", (8, 8))
    monkeypatch.setattr(patchconvnet, "apply_operation", lambda image, _, level, sign: levels.append(level) or image)
    for i in range(300):
        patchconvnet.rand_augment(picture, random.Random(i), magnitude)
    assert np.mean(levels) == pytest.approx(max(magnitude / 10, 0.02), abs=0.01)


@pytest.mark.parametrize("script", ["patchconvnet", "deit3"])
def test_flowers_are_more_than_a_batch(script):
    recipe = importlib.import_module(script).parse_args(["--recipe", "transfer", "--data", "flowers102:/d"])[1]
    steps = epoch_length(2040, recipe.repeats) // recipe.batch_size
    assert steps == 3 and recipe.lr == 3e-4 * recipe.batch_size / 2048
    assert recipe.min_lr == recipe.warmup_lr == 1e-6 * recipe.batch_size / 2048


@pytest.mark.parametrize(
    "option",
    [
        {"pooling": "average"}, {"pooling": "multi-head"}, {"stem": "linear"}, {"norm": "batchnorm", "drop-path": 0.2},
        {"class-tokens": "per_class"},
    ],
    ids=str,
)
def test_every_row_of_table_5_7_trains_and_is_evaluated_as_trained(here, folder, tmp_path, option):
    flags = [x for k, v in option.items() for x in (f"--{k}", v)]
    small = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path / "o"]
    assert here("patchconvnet", "--model", NANO["patchconvnet"], *small, *flags).status == 0
    flags = ["--model", NANO["patchconvnet"], "--weights", tmp_path / "o/last.pt", "--data", folder, "--device", "cpu"]
    result = here("patchconvnet", *flags, "--eval")
    assert f"top1 {log_of(tmp_path / 'o')[-2]['val_top1']:.5g}" in result.out, result


def test_options_that_do_not_go_together(here):
    model = ["--model", NANO["patchconvnet"], "--recipe", "shapes"]
    result = here("patchconvnet", *model, "--pooling", "average", "--class-tokens", "per_class")
    refused(result, "average pooling has no class tokens")
    result = here("patchconvnet", *model, "--stem", "linear", "--img-size", 50)
    refused(result, "50x50 is not a multiple", "48x48 or 56x56")
    refused(here("patchconvnet", "--model", "resnet50_attention", "--norm", "batchnorm"), "ResNet's own")
    refused(here("patchconvnet", "--model", "resnet50_attention", "--drop-path", 0.1), "has no stochastic depth")


# ---- Pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_convnet):
    out = tmp_path_factory.mktemp("patchconvnet")
    (out / "run").symlink_to(shapes_convnet)
    Image.fromarray(common.shapes.draw("val", 5)[0]).save(out / "picture.png")
    return out


def test_the_pooling_attends_to_the_object(trained):
    """Share of the pooling's weights inside the object's mask, against the mask's share of the area."""
    model = from_checkpoint(load(trained / "run/last.pt"), "last.pt", (48, 48), print).eval()
    source = Shapes("val")
    images = normalize(torch.stack([eval_transform(source.read(i), (48, 48), 1.0) for i in range(240)]))
    masks = torch.stack([torch.from_numpy(common.shapes.draw("val", i)[1]) for i in range(240)]).float()[:, None]
    maps = patchconvnet.attention_maps(model, images)[:, 0]
    masks = F.adaptive_avg_pool2d(masks, maps.shape[1:])[:, 0]
    inside = ((maps * masks).sum((1, 2)) / maps.sum((1, 2))).mean().item()
    assert inside > masks.mean().item() + 0.1, (inside, masks.mean())


def test_maps_are_written_beside_a_vits(here, folder, trained, tmp_path):
    vit = [*SMALL, "--model", NANO["deit"], "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("deit", *vit, "--out", tmp_path / "vit").status == 0
    flags = ["--model", NANO["patchconvnet"], "--weights", trained / "run/last.pt", "--device", "cpu"]
    flags += ["--out", tmp_path / "maps", "--attention-maps", trained / "picture.png"]
    result = here("patchconvnet", *flags, "--vit", tmp_path / "vit/last.pt")
    assert result.status == 0 and "position embedding resized" in result.out, result
    assert Image.open(tmp_path / "maps/picture_attention.png").height == 2 * (48 + 14)
    refused(here("patchconvnet", *flags, "--vit", trained / "run/last.pt"), "--vit", "no checkpoint of deit.py")
    refused(here("patchconvnet", "--vit", "x.pt"), "--vit: has no effect without --attention-maps")


def test_a_vits_map_is_its_last_attention():
    torch.manual_seed(0)
    vit = deit.build_model("deit_nano_distilled", 5, (32, 48)).eval()
    images = torch.randn(2, 3, 32, 48)
    seen = []
    vit.blocks[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = patchconvnet.vit_attention_map(vit, images)
    block, N = vit.blocks[-1], 2 + 24
    q, k, _ = block.attn.qkv(block.norm1(seen[0])).reshape(2, N, 3, 3, 32).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-1, -2) / math.sqrt(32)).softmax(-1).mean(1)[:, 0, 2:].view(2, 4, 6)
    assert torch.allclose(found, expected, atol=1e-6)
