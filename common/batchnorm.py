"""BatchNorm whose statistics are those of all ranks' images: torch's own on a GPU, this one on a CPU."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather  # unlike dist.all_gather it has a gradient
from torch.nn.modules.batchnorm import _BatchNorm


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm of the batches (B, C, ...) of all ranks together; a drop-in for what it replaces (same state dict)."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        first = dist.get_rank() * len(x)
        everything = torch.cat(all_gather(x.contiguous()))
        return super().forward(everything)[first : first + len(x)]


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every BatchNorm synchronised; its parameters and buffers stay what they are."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncedBatchNorm
    return model
