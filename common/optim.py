"""LAMB, weight-decay groups, the cosine schedule and the average of weights."""

import copy
import math

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim.adam import adam


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv:1904.00962) as Apex's FusedLAMB computes it (thesis Table 6.1); step t of a tensor p with gradient g:
        g <- g / max(1, ||all gradients||_2 / max_grad_norm)        (None: no clipping)
        m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p
        p <- p - lr r u,   r = ||p||_2 / ||u||_2 where weight_decay != 0 and neither norm is 0, else 1 (not clamped)
    Like torch's fused optimizers it honours two optional attributes, tensors on the parameters' device: `grad_scale`
    (gradients are divided by it) and `found_inf` (1: the step changes nothing). Neither makes the host wait."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
                 max_grad_norm: float | None = 1.0):
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"Lamb: lr {lr}, eps {eps}, weight_decay {weight_decay} must be >= 0, betas {betas} < 1")
        options = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        super().__init__(params, options)
        self.register_load_state_dict_post_hook(fit_to_parameters)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        gradients = [p.grad for _, params in groups for p in params]
        scale, max_norm = getattr(self, "grad_scale", None), self.param_groups[0]["max_grad_norm"]
        if gradients and max_norm is not None:
            norm = get_total_norm(gradients, foreach=True) / (max_norm if scale is None else max_norm * scale)
            torch._foreach_div_(gradients, norm.clamp(min=1.0))
        for group, params in groups:
            # A GPU takes all tensors in one launch; a CPU is faster one tensor at a time, which stays in its cache.
            for chunk in [params] if params and params[0].is_cuda else [[p] for p in params]:
                self._update(group, chunk, scale, getattr(self, "found_inf", None))
        return loss

    def _update(self, group: dict, params: list[torch.Tensor], scale, skip) -> None:
        for p in params:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        means, squares, steps = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step"))
        # Adam on a zero tensor with learning rate -1 leaves there the direction m_hat / (sqrt(v_hat) + eps): one fused
        # pass that also divides the gradients and skips the update where found_inf says so.
        update, (beta1, beta2) = [torch.zeros_like(p) for p in params], group["betas"]
        adam(update, [p.grad for p in params], means, squares, [], steps, fused=True, amsgrad=False, maximize=False,
             beta1=beta1, beta2=beta2, lr=-1.0, weight_decay=0.0, eps=group["eps"], grad_scale=scale, found_inf=skip)
        step_size = -group["lr"] if skip is None else -group["lr"] * (1 - skip)
        if group["weight_decay"] == 0:
            torch._foreach_mul_(update, step_size)
        else:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            weight_norm, update_norm = (torch.stack(torch._foreach_norm(x)) for x in (params, update))
            ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
            torch._foreach_mul_(update, list((ratio * step_size).unbind()))
        torch._foreach_add_(params, update)


def fit_to_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded state its parameters' layout and device: fused kernels trust them, torch keeps the file's."""
    for p, state in optimizer.state.items():
        for key, value in state.items():
            state[key] = torch.empty_like(p).copy_(value) if value.shape == p.shape else value.to(p.device)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """[not decayed, decayed]: no decay for 1-d tensors, biases and model.no_weight_decay(); frozen ones: in neither."""
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") or name in skip else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def cosine_lr(step: float, total: float, warmup: float, base_lr: float, min_lr: float = 0.0,
              warmup_lr: float = 0.0) -> float:
    """Learning rate at time `step` of `total`, all three times in one unit (the scripts': epochs, as a real number):
    linear from warmup_lr to base_lr while step < warmup, then min_lr + (base_lr - min_lr) / 2 (1 + cos(pi step /
    total)), whose start the warm-up replaces. The official code evaluates this once per epoch, one epoch late."""
    if step < warmup:
        return warmup_lr + step * (base_lr - warmup_lr) / warmup
    return min_lr + 0.5 * (base_lr - min_lr) * (1 + math.cos(math.pi * min(step, total) / total))


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """ "lamb", "adamw", "sgd" (momentum 0.9) or "nesterov" on the groups of param_groups, eps 1e-8 as in the official
    commands. All honour `grad_scale` and `found_inf`; common.precision clips for all alike."""
    groups = [group for group in param_groups(model, weight_decay) if group["params"]]
    kept = ("exp_avg", "exp_avg_sq") if name in ("lamb", "adamw") else ("momentum_buffer",)
    if name == "lamb":
        optimizer = Lamb(groups, lr=lr, eps=1e-8, max_grad_norm=None)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-8, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=name == "nesterov", fused=True)
    for p in (p for group in groups for p in group["params"]):
        step = {} if kept == ("momentum_buffer",) else {"step": torch.zeros((), device=p.device)}
        optimizer.state[p] = step | {key: torch.zeros_like(p) for key in kept}  # SGD sets none if the first is skipped
    optimizer.register_load_state_dict_post_hook(fit_to_parameters)
    return optimizer


class EMA:
    """Exponential moving average of a model's state, buffers included: average <- decay average + (1 - decay) value,
    once a step. Integers are averaged as officially, in floating point and truncated: a batch counter hardly moves."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.pairs = copy.deepcopy(model).eval().requires_grad_(False), decay, []

    @torch.no_grad()
    def update(self, model: nn.Module, skip: torch.Tensor) -> None:
        """Average in the model's current state; where `skip` (0-dim, on the device) is 1 nothing changes."""
        if not self.pairs:  # state dicts hold the tensors themselves
            self.pairs = list(zip(self.model.state_dict().values(), model.state_dict().values()))
        averages, values = map(list, zip(*[pair for pair in self.pairs if pair[0].is_floating_point()]))
        weight = (1 - skip).to(averages[0].dtype) * (1 - self.decay)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        for average, value in self.pairs:
            if not average.is_floating_point():
                average.copy_(average * self.decay + (1 - self.decay) * value)
