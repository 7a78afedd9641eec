"""A trained network in use: what the head is given, export."""

import importlib

import pytest
import torch
from conftest import NANO, SCRIPTS

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(script: str, name: str | None = None, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {} if script in ("grafit", "trex") else {"img_size": 32}
    return importlib.import_module(script).build_model(name or NANO[script], 4, **size, **options).eval()


HEADS = [  # script, model, options, shape of one image's features, logits of features
    ("deit", "deit_nano", {}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("deit", "deit_nano_distilled", {}, (18, 96), lambda m, x: (m.head(x[:, 0]) + m.head_dist(x[:, 1])) / 2),
    ("deit3", "vit_nano", {}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("cait", "cait_nano", {}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("cait", "cait_nano_distilled", {}, (18, 96), lambda m, x: (m.head(x[:, 0]) + m.head_dist(x[:, 1])) / 2),
    ("resmlp", "resmlp_nano", {}, (16, 96), lambda m, x: m.head(x.mean(1))),
    ("resmlp", "resmlp_nano", {"pooling": "class-mlp"}, (17, 96), lambda m, x: m.head(x[:, 0])),
    ("patchconvnet", "patchconvnet_nano", {"pooling": "average"}, (4, 4, 64), lambda m, x: m.head(m.norm(x.mean((1, 2))))),  # fmt: skip
]


@pytest.mark.parametrize("script, name, options, shape, head", HEADS)
@torch.no_grad()
def test_forward_features_are_what_the_head_is_given(script, name, options, shape, head):
    model = build(script, name, **options)
    features = model.forward_features(IMAGES)
    assert features.shape == (5, *shape)
    torch.testing.assert_close(head(model, features), model(IMAGES))


@pytest.mark.parametrize("script", SCRIPTS)
@torch.no_grad()
def test_exported_programs_take_any_batch(script):
    model = build(script)
    program = torch.export.export(model, (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim("b")},)).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(program(IMAGES[:count]), model(IMAGES[:count]))
