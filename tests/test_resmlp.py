"""resmlp.py against the official models' numbers and Table 4.3, its equations written out, and as a whole."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NANO,
    SMALL,
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
import resmlp
from common.optim import param_groups
from common.report import count

MODELS = reference("resmlp")
slow = pytest.mark.slow


# ---- Architecture ----------------------------------------------------------------------------------------------------


def on_meta(case: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return resmlp.build_model(case["model"], img_size=case["img_size"], patch_size=case["patch_size"])


@pytest.mark.parametrize("variant", MODELS)
def test_state_dict_parameters_and_gmacs_are_the_official_ones(variant):
    check_architecture(on_meta(MODELS[variant]), MODELS[variant])


@pytest.mark.parametrize("variant", ["12", "36", pytest.param("b24", marks=slow)])
def test_logits_equal_the_official_ones(variant):
    case = MODELS[variant]
    model = resmlp.build_model(case["model"], img_size=case["img_size"], patch_size=case["patch_size"]).eval()
    fill(model)
    with torch.no_grad():
        check_logits(model(filled_images(2, case["img_size"])), case["logits"], case["logits_norm"])


def test_a_fresh_model_has_the_official_distribution():
    torch.manual_seed(0)
    state = resmlp.build_model("resmlp_s12").state_dict()
    for key, (mean, std) in MODELS["12"]["init_stats"].items():
        check_distribution(state[key], mean, std, key, slack=1e-8)


@pytest.mark.parametrize("variant", MODELS)
def test_weight_decay_groups_are_the_official_ones(variant):
    model = on_meta(MODELS[variant])
    plain, decayed = param_groups(model, 0.2)
    names = {id(p): n for n, p in model.named_parameters()}
    listed = "\n".join(sorted(names[id(p)] for p in plain["params"]))
    assert hashlib.sha256(listed.encode()).hexdigest() == MODELS[variant]["no_decay_sha256"]
    assert len(plain["params"]) + len(decayed["params"]) == len(names)


TABLE_4_3 = [  # model, option, parameters (millions), FLOPs (billions)
    ("resmlp_s12", {}, 15.4, 3.0),
    ("resmlp_s24", {}, 30.0, 6.0),
    ("resmlp_b24", {}, 115.7, 23.0),
    ("resmlp_s12", {"norm": "layernorm"}, 15.4, 3.0),
    ("resmlp_s12", {"pooling": "class-mlp"}, 17.7, 3.0),
    ("resmlp_s12", {"communication": "none"}, 14.9, 2.8),
    ("resmlp_s12", {"communication": "mlp"}, 18.6, 4.3),
    ("resmlp_s12", {"communication": "conv"}, 30.8, 6.0),
    ("resmlp_s12", {"communication": "depthwise"}, 14.9, 2.8),
    ("resmlp_s12", {"communication": "separable"}, 16.7, 3.2),
    ("resmlp_s12", {"patch_size": 14}, 15.6, 4.0),
    ("resmlp_s12", {"patch_size": 8}, 22.1, 14.0),
    ("resmlp_b24", {"patch_size": 8}, 129.1, 100.2),
]


@pytest.mark.parametrize("name, option, millions, flops", TABLE_4_3, ids=str)
def test_parameters_and_flops_of_table_4_3(name, option, millions, flops):
    parameters, gmacs = count(lambda: resmlp.build_model(name, **option), (224, 224))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.051)  # the table prints one decimal
    assert gmacs == pytest.approx(flops, abs=0.06)  # and it counts a little more than matrix products and convolutions


def test_the_layer_is_equations_4_2_and_4_3():
    torch.manual_seed(0)
    block = resmlp.Block(8, (2, 3), "linear", "affine", 0.3, 0.0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p))
    X, A = torch.randn(1, 6, 8), block.attn.weight

    def aff(norm, x):
        return x @ torch.diag(norm.alpha) + norm.beta

    D = X[0] + (A @ aff(block.norm1, X[0]) + block.attn.bias[:, None]) @ torch.diag(block.gamma_1)
    B, C = block.mlp.fc1, block.mlp.fc2
    Y = D + (F.gelu(aff(block.norm2, D) @ B.weight.T + B.bias) @ C.weight.T + C.bias) @ torch.diag(block.gamma_2)
    assert torch.allclose(block(X)[0], Y, rtol=1e-4, atol=1e-3)


def test_an_affine_map_can_be_absorbed_in_the_adjacent_linear_layer():
    """Section 4.2 on Eq. 4.1, in the two places of Eq. 4.3: before B, which takes both its parameters, and after C."""
    torch.manual_seed(0)
    block = resmlp.Block(8, (2, 3), "linear", "affine", 0.3, 0.0)
    absorbed, x = resmlp.MLP(8), torch.randn(2, 6, 8)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p))
        (alpha, beta), gamma, fc1, fc2 = block.norm2.parameters(), block.gamma_2, block.mlp.fc1, block.mlp.fc2
        absorbed.fc1.weight.copy_(fc1.weight * alpha)
        absorbed.fc1.bias.copy_(fc1.bias + fc1.weight @ beta)
        absorbed.fc2.weight.copy_(gamma[:, None] * fc2.weight)
        absorbed.fc2.bias.copy_(gamma * fc2.bias)
    assert torch.allclose(absorbed(x), block.across_channels(x), rtol=1e-4, atol=1e-4)


def test_initial_scale_follows_the_depth_as_in_cait():
    assert [resmlp.initial_scale(d) for d in (12, 18, 24, 36)] == [0.1, 0.1, 1e-5, 1e-6]
    assert resmlp.build_model("resmlp_nano", 3, 32).blocks[0].gamma_1.unique().item() == pytest.approx(0.1)


def test_class_mlp_aggregates_tokens_linearly_and_freezes_the_patches():
    torch.manual_seed(0)
    layer = resmlp.ClassMLP(8, 7, "affine", 0.5)
    token, patches = torch.randn(2, 1, 8), torch.randn(2, 6, 8)
    z = torch.cat([token, patches], 1)
    mean = torch.einsum("t,btc->bc", layer.attn.weight[0], z)[:, None] + layer.attn.bias
    after = token + 0.5 * mean
    assert torch.allclose(layer(token, patches), after + 0.5 * layer.mlp(after), atol=1e-6)


def test_communication_by_convolution_is_local_and_none_is_absent():
    x = torch.zeros(1, 25, 8)
    x[0, 12] = 1  # the centre of a 5 x 5 grid
    for kind in ("conv", "depthwise", "separable"):
        layer = resmlp.CrossPatchConv(kind, 8, (5, 5))
        with torch.no_grad():
            for module in layer:
                module.bias.zero_()
        reached = layer(x)[0].abs().sum(1).view(5, 5) > 0
        assert reached[1:4, 1:4].all() and reached.sum() == 9
    bag = resmlp.build_model("resmlp_nano", 5, 32, communication="none").eval()
    one, two = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    swapped = torch.cat([one[..., 16:], one[..., :16]], dim=-1)  # a bag of patches: their order does not matter
    assert torch.allclose(bag(one), bag(swapped), atol=1e-5) and not torch.allclose(bag(one), bag(two), atol=1e-5)
    full = resmlp.build_model("resmlp_nano", 5, 32).eval()
    assert not torch.allclose(full(one), full(swapped), atol=1e-5)


# ---- Resolution ------------------------------------------------------------------------------------------------------


def test_interpolated_cross_patch_layers_keep_a_smooth_images_response():
    """On inputs that vary slowly over the grid the interpolated matrix does what the old one did on the old grid."""
    torch.manual_seed(0)
    old, new = (6, 6), (9, 9)
    y, x = (torch.linspace(0, 1, 6) + 0 * g for g in torch.zeros(2))
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(36, 2)
    A = torch.exp(-((place[:, None] - place[None]) ** 2).sum(-1) / 0.1)  # a smooth kernel
    bigger = resmlp.resize_across(resmlp.resize_across(A, 0, old, new), 1, old, new) * (36 / 81)
    assert bigger.shape == (81, 81)
    smooth = torch.cos(3 * place[:, :1])
    expected = resmlp.resize_across(A @ smooth, 0, old, new)
    found = bigger @ resmlp.resize_across(smooth, 0, old, new)
    assert (found - expected).abs().max() < 0.06 * expected.abs().max()
    assert torch.allclose(bigger.sum(1), resmlp.resize_across(A.sum(1), 0, old, new), rtol=0.05)


def test_class_mlp_keeps_a_smooth_images_response_and_its_tokens_own_share():
    torch.manual_seed(0)
    options, said = dict(patch_size=16, pooling="class-mlp"), []
    small, large = (resmlp.build_model(NANO["resmlp"], 3, size, **options) for size in (96, 144))
    state = small.state_dict()
    resmlp.fit_resolution(large, state, {"recipe": {"img_size": (96, 96)}}, said.append)
    large.load_state_dict(state)
    key = "blocks_token_only.0.attn.weight"
    old, new, ramp = small.state_dict()[key], state[key], torch.linspace(-1, 1, 6)
    assert old.shape == (1, 37) and new.shape == (1, 82) and "from 6 x 6 to 9 x 9" in said[0]
    assert torch.equal(new[:, 0], old[:, 0])
    assert torch.allclose(new[0, 1:], resmlp.resize_across(old[:, 1:], 1, (6, 6), (9, 9))[0] * 36 / 81)
    row = torch.cat([torch.tensor([3.0]), (ramp[:, None] + ramp + 1).ravel()])
    smooth = small.state_dict() | {key: row[None]}
    resmlp.fit_resolution(large, state := dict(smooth), {"recipe": {"img_size": (96, 96)}}, said.append)
    assert state[key][0, 1:].sum().item() == pytest.approx(smooth[key][0, 1:].sum().item(), rel=0.01)


def test_another_resolution_warns_that_it_is_lossy(here, folder, tmp_path):
    small = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--patch-size", 8]
    assert here("resmlp", "--model", NANO["resmlp"], *small, "--out", tmp_path / "o").status == 0
    flags = ["--model", NANO["resmlp"], "--weights", tmp_path / "o/last.pt", "--data", folder, "--device", "cpu"]
    result = here("resmlp", *flags, "--eval", "--img-size", 48)
    assert result.status == 0 and "interpolated from 4 x 4 to 6 x 6 patches; this is lossy" in result.out, result
    same = here("resmlp", *flags, "--eval")
    assert "interpolated" not in same.out and f"top1 {log_of(tmp_path / 'o')[-2]['val_top1']:.5g}" in same.out
    for communication in ("linear", "conv", "none"):
        class_mlp = [*small, "--pooling", "class-mlp", "--communication", communication]
        assert here("resmlp", "--model", NANO["resmlp"], *class_mlp, "--out", tmp_path / communication).status == 0
        flags[3] = tmp_path / communication / "last.pt"
        result = here("resmlp", *flags, "--eval", "--img-size", 48)
        assert result.status == 0 and "lossy" in result.out, result
    mlp = [*small, "--communication", "mlp", "--out", tmp_path / "m"]
    assert here("resmlp", "--model", NANO["resmlp"], *mlp).status == 0
    flags[3] = tmp_path / "m/last.pt"
    refused(here("resmlp", *flags, "--eval", "--img-size", 48), "an MLP across patches cannot be interpolated")


# ---- Recipe ----------------------------------------------------------------------------------------------------------


def test_recipes_of_section_4_3():
    r = resmlp.paper_recipe("in1k")
    assert (r.epochs, r.optimizer, r.lr, r.weight_decay, r.batch_size) == (400, "lamb", 5e-3, 0.2, 1024)
    assert (r.repeats, r.augment, r.drop_path, r.eval_crop_ratio) == (3, "rand", 0.1, 0.9)
    r = resmlp.paper_recipe("old_fashioned")
    assert (r.epochs, r.optimizer, r.lr, r.batch_size, r.schedule) == (90, "sgd", 0.1, 256, "waterfall")
    assert (r.augment, r.mixup) == ("none", 0)
    assert resmlp.paper_recipe("in21k").epochs == 60
    for name, rates in {"cifar10": (5e-5, 1e-7), "cars": (5e-4, 1e-6)}.items():
        r = resmlp.paper_recipe("transfer", data=f"{name}:/d")
        assert (r.lr, r.min_lr) == rates


def test_the_waterfall_falls_at_thirds(here, folder, tmp_path):
    flags = ["--model", NANO["resmlp"], *SMALL, "--data", folder, "--val-data", "none", "--out", tmp_path / "o"]
    recipe = ["--recipe", "old_fashioned", "--epochs", 6, "--warmup-epochs", 0, "--lr", 0.01]
    assert here("resmlp", *flags, *recipe).status == 0
    rates = [r["lr"] for r in log_of(tmp_path / "o") if "train_loss" in r]
    assert rates == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4])  # at the end of each epoch


ABLATIONS = [{}, {"norm": "layernorm"}, {"pooling": "class-mlp"}, {"patch-size": 16}]
ABLATIONS += [{"communication": kind} for kind in resmlp.COMMUNICATION[1:]]


@pytest.mark.parametrize("option", ABLATIONS, ids=str)
def test_every_ablation_trains_and_is_evaluated_as_trained(here, folder, tmp_path, option):
    flags = [x for k, v in option.items() for x in (f"--{k}", v)]
    small = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--drop-path", 0.1, "--out", tmp_path / "o"]
    assert here("resmlp", "--model", NANO["resmlp"], *small, *flags).status == 0
    weights = ["--data", folder, "--weights", tmp_path / "o/last.pt", "--device", "cpu"]
    result = here("resmlp", "--model", NANO["resmlp"], "--eval", *weights)
    assert f"top1 {log_of(tmp_path / 'o')[-2]['val_top1']:.5g}" in result.out, result


def test_distillation_on_the_one_head(here, folder, tmp_path):
    small = [*SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("resmlp", "--model", NANO["resmlp"], *small, "--out", tmp_path / "t").status == 0
    teacher = ["--distillation", "hard", "--teacher-weights", tmp_path / "t/last.pt"]
    result = here("resmlp", "--model", NANO["resmlp"], *small, *teacher, "--out", tmp_path / "s")
    assert result.status == 0 and "teacher  resmlp resmlp_nano" in result.out, result


def test_dinos_files_without_a_classifier_are_judged_and_fine_tuned(here, folder, tmp_path):
    """Tables 4.2 and 4.3: a bare state dict with the official keys but the head's, here of the smallest model."""
    from common import transfer

    state = resmlp.build_model(NANO["resmlp"], img_size=32).state_dict()
    body = {k: v for k, v in state.items() if not k.startswith("head.")}
    assert state.keys() - body.keys() == {"head.weight", "head.bias"}
    torch.save(body, tmp_path / "resmlp_12_dino.pth")
    flags = ["--weights", tmp_path / "resmlp_12_dino.pth", "--data", folder]
    result = here("resmlp", "--model", NANO["resmlp"], *SMALL, *flags, "--out", tmp_path / "o", "--epochs", 1,
                  "--warmup-epochs", 0, "--lr", 1e-9, "--min-lr", 0, "--warmup-lr", 0)
    assert result.status == 0 and "new head: the checkpoint has none\n" in result.out, result
    tuned = load(tmp_path / "o/last.pt")["model"]
    assert all(torch.allclose(tuned[k], v, atol=1e-6) for k, v in body.items()) and len(tuned["head.weight"]) == 4
    refused(here("resmlp", "--model", NANO["resmlp"], *SMALL, *flags, "--eval"), "keys missing", "head.weight")

    asked = ["features", "--model", f"resmlp/{NANO['resmlp']}", *flags[:2], "--sets", folder, "--img-size", 32]
    asked += ["--seeds", 1, "--workers", 0, "--device", "cpu", "--out", tmp_path / "features.json"]
    transfer.features(transfer.parse_args(list(map(str, asked))))
    found = json.loads((tmp_path / "features.json").read_text())["sets"][str(folder)]
    assert found["accuracy"] > 25 and found["knn"] > 25


# ---- Pictures --------------------------------------------------------------------------------------------------------


def test_filters_and_sparsity(here, tmp_path, monkeypatch):
    monkeypatch.setattr(common.shapes, "TRAIN_IMAGES", 64)
    monkeypatch.setattr(common.shapes, "VAL_IMAGES", 24)
    model = ["--model", NANO["resmlp"], "--device", "cpu"]
    recipe = ["--recipe", "shapes", "--epochs", 1, "--warmup-epochs", 0, "--workers", 0, "--img-size", 64]
    assert here("resmlp", *model, *recipe, "--out", tmp_path / "o").status == 0
    flags = [*model, "--weights", tmp_path / "o/last.pt", "--filters", tmp_path / "f"]
    assert here("resmlp", *flags).status == 0
    pictures = [f"layer_0{i}.png" for i in range(4)]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [*pictures, "sparsity.json", "sparsity.png"]
    state = load(tmp_path / "o/last.pt")["model"]

    # The picture: 6 x 6 tiles of 8 x 8 weights, 4 pixels each; tile (i, j) is the row of A of the patch (1 + i, 1 + j).
    sheet = np.array(Image.open(tmp_path / "f/layer_02.png")).astype(int)
    brightness = sheet.sum(2)
    A = state["blocks.2.attn.weight"].view(8, 8, 8, 8)
    for i, j in ((0, 0), (2, 5), (5, 3)):
        top, left = 14 + i * (32 + 4), j * (32 + 4)
        tile = brightness[top : top + 32, left : left + 32]
        assert (tile == tile[::4, ::4].repeat(4, 0).repeat(4, 1)).all()
        weights, shown = A[1 + i, 1 + j], torch.from_numpy(tile[::4, ::4].copy())
        order = weights.flatten().argsort()
        assert (shown.flatten()[order].diff() >= -2).all()  # cividis grows brighter with the weight, but for rounding

    found = json.loads((tmp_path / "f/sparsity.json").read_text())
    for name, key in (("A", "attn"), ("B", "mlp.fc1"), ("C", "mlp.fc2")):
        W = state[f"blocks.1.{key}.weight"].abs()
        assert found[name][1] == pytest.approx((W < 0.05 * W.max()).float().mean().item(), abs=1e-6)
        assert len(found[name]) == 4
    refused(here("resmlp", *flags, "--layers", 4), "--layers 4: this model has the layers 0 to 3")
    refused(here("resmlp", "--layers", 4), "--layers: has no effect without --filters")
