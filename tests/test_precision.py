"""16 bits on a CPU: what the residual stream is kept in, what training in them changes, what is copied and counted."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import NANO, PeakMemory
from torch.utils._pytree import tree_leaves

import resmlp
import trex
from common.optim import make_optimizer
from common.precision import Precision

ARCHITECTURES = ["deit", "cait", "resmlp", "patchconvnet", "deit3"]


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def build(script: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return importlib.import_module(script).build_model(NANO[script], 4, 32, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("script", ARCHITECTURES)
def test_the_residual_stream_is_single_precision_under_autocast(script, training):
    """A block at LayerScale 1e-5 leaves 99.9% of a bf16 stream's elements as they were."""
    model, seen = build(script, drop_path=0.5).train(training), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with bf16():
        model(torch.randn(4, 3, 32, 32))
    assert seen and set(seen) == {torch.float32}


@pytest.mark.parametrize("script", ARCHITECTURES)
def test_J4_training_in_bf16_follows_single_precision(script):
    """Twenty steps on the same images: the losses differ by less than 2%."""
    labels = torch.arange(16) % 4
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + labels[:, None, None, None]
    losses = []
    for narrow in (False, True):
        model = build(script).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.2 and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_resmlps_matrix_is_cast_once_not_once_per_image():
    layer, x = resmlp.CrossPatch(64, 64), torch.randn(32, 64, 8)
    with torch.no_grad(), PeakMemory(layer) as memory, bf16():
        layer(x)
    assert memory.peak < 4 * 64 * 64 * 2 + 3 * x.numel() * 4  # 32 copies of A would be 262,144 bytes alone


def test_batchnorm_counts_an_image_once_when_activations_are_recomputed():
    images = torch.randn(4, 3, 32, 32)
    states = []
    for recompute in (False, True):
        model = build("patchconvnet", norm="batchnorm").train()
        model.grad_checkpoint = recompute
        model(images).sum().backward()
        states.append({k: v for k, v in model.state_dict().items() if "running" in k or "num_batches" in k})
        assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert states[0] and states[0].keys() == states[1].keys()
    assert all(torch.allclose(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("script", ["grafit", "trex", "deit3"])
def test_batchnorms_statistics_are_left_alone_by_a_step_that_was_skipped(script):
    """By the whole step, all of its micro-batches and views; those of a step that counts are taken."""
    name = NANO[script] if script != "deit3" else "torchvision/resnet18"
    model = importlib.import_module(script).build_model(name, 5).train()
    precision = Precision("fp32", torch.device("cpu"), accumulation=2)
    precision.amp = "fp16"  # for the CPU there is no autocast to it
    precision.autocast = contextlib.nullcontext
    optimizer, images = make_optimizer("sgd", model, 0.1, 0.0), torch.randn(4, 3, 32, 32)
    for broken in (False, True, False):
        before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "batches" in k}
        for number in range(2):
            with precision.forward(model):
                batch = images * (torch.inf if broken and number else 1)
                found = model(batch if script == "deit3" else [batch] * 2)
                found = [found, model.targets([batch] * 2)] if script == "grafit" else found
                loss = sum(x.mean() for x in tree_leaves(found) if isinstance(x, torch.Tensor))
            precision.backward(loss)
            if script == "trex":  # as its loop does
                model.model_ema([batch])
        _, skipped = precision.step(optimizer, 0.1)
        assert skipped.item() == broken
        same = [torch.equal(v, model.state_dict()[k]) for k, v in before.items()]
        assert same and (all(same) if broken else not any(same))


def test_trexs_memory_is_left_alone_by_a_step_that_was_skipped():
    bank = trex.MemoryBank(4, 6, 3)
    before = {k: v.clone() for k, v in bank.state_dict().items()}
    features, labels = torch.full((2, 4), torch.inf), torch.ones(2, dtype=torch.long)
    bank.update(features, labels, skip=torch.tensor(1.0))
    assert all(torch.equal(v, before[k]) for k, v in bank.state_dict().items())
    bank.update(torch.ones(2, 4), labels, skip=torch.tensor(0.0))
    assert bank.ptr.item() == 2 and torch.equal(bank.features[:2], torch.ones(2, 4))
    assert bank.labels[:2].tolist() == [1, 1]
