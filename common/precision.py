"""One path for fp32, bf16 and fp16: autocast, accumulation, loss scaling, clipping, the guard against broken numbers.
The host never waits for the device: a flag there decides if a step is applied, which common.run reads steps later."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

AMP = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_GROWTH_STEPS = 2000  # steps without overflow after which fp16's loss scale doubles, as torch's GradScaler does


class Precision:
    """Optimizer steps of `accumulation` micro-batches; the gradient is the mean over the global batch. A step with loss
    or gradient not finite on any rank changes no parameter and no optimizer state on any rank; in fp32 and bf16 all
    later ones are withheld too, because the run is about to be stopped; in fp16 the loss scale is halved, and
    BatchNorm's statistics become what they were."""

    def __init__(self, amp: str, device: torch.device, *, accumulation: int = 1, clip_grad: float | None = None):
        self.amp, self.device, self.accumulation, self.clip_grad = amp, device, accumulation, clip_grad
        self.scale = torch.tensor(2.0**16 if amp == "fp16" else 1.0, device=device)
        self.good_steps, self.broken, self.loss = (torch.zeros((), device=device) for _ in range(3))
        self.micro_batch, self.statistics = 0, []

    def autocast(self):
        return torch.autocast(self.device.type, dtype=AMP[self.amp], enabled=self.amp != "fp32")

    @contextlib.contextmanager
    def forward(self, model: nn.Module):
        """Around a micro-batch's forward and loss, before its backward(); ranks exchange gradients once per step."""
        if self.amp == "fp16" and self.micro_batch == 0:
            norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
            self.statistics = [(b, b.clone()) for norm in norms for b in norm.buffers()]
        self.micro_batch += 1
        alone = isinstance(model, DistributedDataParallel) and self.micro_batch < self.accumulation
        with self.autocast(), model.no_sync() if alone else contextlib.nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the micro-batch's share of the gradient of the global batch's mean loss."""
        (loss.float() * (self.scale / self.accumulation)).backward()
        self.loss += loss.detach().float() / self.accumulation

    def step(self, optimizer: optim.Optimizer, lr: float, asked: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, apply, clear: (stats, skipped) on the device. stats (3,): mean loss over all ranks, how many ranks have
        a loss or gradient that is not finite, sum of their `asked`; skipped: 1.0 if nothing was changed, else 0.0."""
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = get_total_norm(gradients, foreach=True) / self.scale
        bad = ~(torch.isfinite(norm) & torch.isfinite(self.loss))
        stats = torch.stack([self.loss, bad.float(), torch.full((), asked, device=self.device)])
        if dist.is_initialized():
            dist.all_reduce(stats)
            stats[0] /= dist.get_world_size()
        skipped = (stats[1] > 0).float()
        if self.amp != "fp16":
            skipped = self.broken = torch.maximum(self.broken, skipped)
        # The fused kernel divides by one number: unscaling, and clipping as LAMB (Apex) defines it, without epsilon.
        clip = 1.0 if self.clip_grad is None else (norm / self.clip_grad).clamp(min=1.0)
        optimizer.grad_scale, optimizer.found_inf = self.scale * clip, skipped
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.amp == "fp16":
            self.good_steps = (self.good_steps + 1) * (1 - skipped) % SCALE_GROWTH_STEPS
            grown = torch.where(self.good_steps == 0, 2.0, 1.0)
            self.scale = self.scale * torch.where(skipped > 0, 0.5, grown)
            for buffer, before in self.statistics:
                buffer.copy_(torch.where(skipped > 0, before, buffer))
        self.loss, self.micro_batch = torch.zeros_like(self.loss), 0
        return stats, skipped

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict) -> None:
        self.scale, self.good_steps = state["scale"].to(self.device), state["good_steps"].to(self.device)
