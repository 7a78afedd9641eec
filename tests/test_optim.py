"""LAMB, EMA, schedule, groups and the precision path against the official components' numbers and against torch."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import reference, sine
from torch import nn

from common.errors import RunError
from common.optim import EMA, Lamb, cosine_lr, make_optimizer, param_groups
from common.precision import Precision
from common.run import Run

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", reference("lamb"), ids=lambda c: c["name"])
def test_lamb_equals_apex(case, dtype, tolerance):
    params = {k: nn.Parameter(sine(p["init"], dtype)) for k, p in case["params"].items()}
    groups = [{"params": [params[k]], "weight_decay": p["weight_decay"]} for k, p in case["params"].items()]
    optimizer = Lamb(groups, lr=1.0, betas=case["betas"], eps=case["eps"], max_grad_norm=case["max_grad_norm"])
    for t, lr in enumerate(case["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for k, p in case["params"].items():
            params[k].grad = sine(p["grads"][t], dtype)
        optimizer.step()
        for k, expected in case["expected"][t]["params"].items():
            expected = torch.tensor(expected, dtype=torch.float64)
            assert ((params[k].double() - expected).abs() / expected.abs().clamp(min=1)).max() <= tolerance


def test_lamb_state_survives_a_round_trip():
    def step(optimizer, p, seed):
        p.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    p = nn.Parameter(torch.ones(5, 4))
    optimizer = Lamb([p], lr=0.1, weight_decay=0.1)
    step(optimizer, p, 0)
    q = nn.Parameter(p.detach().clone())
    resumed = Lamb([q], lr=0.1, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, p, 1)
    step(resumed, q, 1)
    assert torch.equal(p, q)


def test_lamb_refuses_nonsense():
    with pytest.raises(ValueError):
        Lamb([nn.Parameter(torch.ones(1))], lr=-1)


@pytest.mark.parametrize("case", reference("ema"), ids=lambda c: c["name"])
def test_ema_equals_the_official_one(case):
    def set_state(model, values):
        state = {k: sine(v) for k, v in values["specs"].items()}
        state["bn.num_batches_tracked"] = torch.tensor(values["bn.num_batches_tracked"])
        model.load_state_dict(state)

    model = nn.ModuleDict({"fc": nn.Linear(3, 4), "bn": nn.BatchNorm1d(4)}).double()
    set_state(model, case["initial"])
    ema = EMA(model, case["decay"])
    for step in case["steps"]:
        set_state(model, step["model"])
        ema.update(model, skip=torch.zeros(()))
        for key, expected in step["expected_ema"].items():
            found, expected = ema.model.state_dict()[key].double(), torch.tensor(expected, dtype=torch.float64)
            assert torch.allclose(found, expected, rtol=0, atol=1e-12), key
    before = copy.deepcopy(ema.model.state_dict())
    ema.update(model, skip=torch.ones(()))
    assert all(torch.equal(before[k], v) for k, v in ema.model.state_dict().items() if v.is_floating_point())


@pytest.mark.parametrize("case", reference("schedule"), ids=lambda c: c["name"])
def test_G5_schedule_equals_the_official_formula(case):
    for t, expected in enumerate(case["formula_value_at_t"]):
        lr = cosine_lr(t, case["epochs"], case["warmup_epochs"], case["base_lr"], case["min_lr"], case["warmup_lr"])
        assert lr == pytest.approx(expected, rel=1e-12)


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(3, 3)
    model.bias.requires_grad = False
    assert [len(g["params"]) for g in param_groups(model, 0.1)] == [0, 1]


# ---- Precision -------------------------------------------------------------------------------------------------------


def run_steps(name, losses, *, amp="fp32", accumulation=1, clip=None, steps=3):
    """Parameters of a small model after `steps` steps on fixed data; losses: factor on the loss per step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    optimizer = make_optimizer(name, model, 1e-2, 0.1)
    precision = Precision(amp, CPU, accumulation=accumulation, clip_grad=clip)
    data = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    skipped = []
    for factor in losses[:steps]:
        for x in data.chunk(accumulation):
            with precision.forward(model):
                loss = model(x).float().square().mean() * factor
            precision.backward(loss)
        skipped.append(precision.step(optimizer, 1e-2)[1].item())
    return model, optimizer, precision, skipped


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_F8_accumulation_does_not_change_the_result(name):
    one, four = (run_steps(name, [1, 1, 1], accumulation=a, clip=0.05)[0] for a in (1, 4))
    for a, b in zip(one.parameters(), four.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_clipping_is_torchs_clip_grad_norm():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    other = copy.deepcopy(model)
    x = torch.randn(5, 6)
    precision = Precision("fp32", CPU, clip_grad=0.1)
    with precision.forward(model):
        loss = model(x).square().sum()
    precision.backward(loss)
    precision.step(make_optimizer("sgd", model, 1.0, 0.0), 1.0)
    other(x).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert torch.allclose(model.weight, other.weight, atol=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_G1_a_loss_that_is_not_finite_touches_nothing_and_withholds_what_follows(name, broken):
    good, good_optimizer, _, _ = run_steps(name, [1], steps=1)
    model, optimizer, _, skipped = run_steps(name, [1, broken, 1])
    assert skipped == [0, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), model.parameters()))
    for a, b in zip(good_optimizer.state.values(), optimizer.state.values()):
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_G3_overflow_in_fp16_skips_the_step_and_halves_the_scale(name):
    model, optimizer, precision, skipped = run_steps(name, [math.inf, 1e-2], amp="fp16", steps=2)
    assert skipped == [1, 0] and precision.scale.item() == 2**15
    plain = run_steps(name, [1e-2], steps=1)[0]
    for a, b in zip(model.parameters(), plain.parameters()):  # forward in half precision: close, not equal
        assert torch.isfinite(a).all() and torch.allclose(a, b, atol=2e-3)


def test_G3_more_than_twenty_overflows_in_a_row_end_the_run(tmp_path):
    """20 are the loss scale's search for its place; a good step between two starts the count anew."""

    def run_of(*bad):
        said = []
        steps = [(torch.tensor([1.0, b, 0.0]), None, 0.1, 2, i, [torch.tensor([i])]) for i, b in enumerate(bad)]
        run = SimpleNamespace(pending=steps, stop_agreed=False, save_agreed=False, amp="fp16", out=tmp_path, loss_sum=0,
                              skipped_in_a_row=0, skipped_steps=0, loss_count=0, gather=lambda x: x, log=said.append,
                              data=SimpleNamespace(source=SimpleNamespace(name="image {}".format)))
        return run, said

    Run._read_flags(run := run_of(*[1] * 20, 0, *[1] * 20)[0], 0)
    assert run.skipped_steps == 40 and run.loss_count == 1
    run, said = run_of(*[1] * 21)
    with pytest.raises(RunError, match="not finite at epoch 2, step 20, lr 0.1"):
        Run._read_flags(run, 0)
    assert said[0]["status"] == "failed" and said[0]["files"] == ["image 20"]


def test_loss_scale_grows_after_good_steps(monkeypatch):
    monkeypatch.setattr("common.precision.SCALE_GROWTH_STEPS", 2)
    assert run_steps("sgd", [1e-3, 1e-3], amp="fp16")[2].scale.item() == 2**17


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_sgd_is_torchs_from_the_first_step_on(name):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    mine = make_optimizer(name, ours, 0.1, 0.0)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=name == "nesterov")
    x = torch.randn(5, 3)
    for _ in range(4):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6) and torch.allclose(ours.bias, theirs.bias, atol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd", "nesterov"])
def test_J2_a_restored_state_lies_on_its_parameters_device(name):
    """A checkpoint is read to the host; the meta device stands for a GPU."""
    saved, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, device="meta")
    optimizer = make_optimizer(name, saved, 0.1, 0.1)
    saved(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    restored = make_optimizer(name, fresh, 0.1, 0.1)
    restored.load_state_dict(optimizer.state_dict())
    states = {p: state for p, state in restored.state.items()}
    assert len(states) == 2 and all(v.device == p.device for p, state in states.items() for v in state.values())


@pytest.mark.parametrize("layouts", [[torch.channels_last, torch.contiguous_format][::way] for way in (1, -1)])
@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_state_is_loaded_in_the_parameters_own_layout(name, layouts):
    """A run on a GPU (channels last) that goes on on a CPU, or the other way: fused kernels go through memory in order,
    whatever the strides say."""

    def step(optimizer, model, seed):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    one = nn.Conv2d(3, 4, 5).to(memory_format=layouts[0])
    first = make_optimizer(name, one, 0.1, 0.05)
    step(first, one, 0)
    two = copy.deepcopy(one).to(memory_format=layouts[1])
    second = make_optimizer(name, two, 0.1, 0.05)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(first, one, 1)
    step(second, two, 1)
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-5, atol=1e-6, check_stride=False)
