"""Evaluation: top-1, top-5 and loss, exact over any number of ranks; accuracy against ImageNet-Real's labels."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common.data import Samples, eval_batches, make_loader, to_device
from common.errors import UserError
from common.images import eval_transform
from common.run import Run
from common.sources import Source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1, RGB


@functools.lru_cache
def _mean_and_scale(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Kept on the device: making them anew would cost a synchronising copy per batch.
    mean = torch.tensor([255 * m for m in MEAN], device=device).view(1, 3, 1, 1)
    return mean, torch.tensor([1 / (255 * s) for s in STD], device=device).view(1, 3, 1, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) with values 0..255 -> float32, ImageNet mean and deviation removed."""
    mean, scale = _mean_and_scale(images.device)
    return (images.float() - mean) * scale


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The inverse of normalize, for pictures."""
    mean, scale = _mean_and_scale(images.device)
    return images / scale + mean


def eval_loader(source: Source, size: tuple[int, int], crop_ratio: float, batch_size: int, run: Run) -> DataLoader:
    """This rank's share of `source`, resized and centre-cropped, as uint8 batches."""

    def transform(image: torch.Tensor, _rng) -> tuple[torch.Tensor, tuple]:
        return eval_transform(image, size, crop_ratio), ()

    batches = eval_batches(len(source), batch_size, run.world, run.rank)
    return make_loader(Samples(source, transform, 0), batches, run.workers, run.device, persistent=False)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader,
    device: torch.device,
    autocast: Callable,
    *,
    real: list[list[int]] | None = None,
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """{"top1", "top5", "loss"} over all ranks' images (each rank brings its own loader), and "real" with `real` labels.

    real: the labels that count as right per image index; images without any are left out of that figure.
    between: called every 8 batches, by all ranks equally often. Accuracies in percent, loss the mean cross-entropy.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=device)  # top-1, top-5, loss, images, Real right, Real images
    rounds = torch.tensor([len(loader)], device=device)
    if dist.is_initialized():
        dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    batches = to_device(loader, device)
    for round_ in range(int(rounds)):
        if between is not None and round_ % 8 == 0:
            between()
        batch = next(batches, None)
        if batch is None:
            continue
        images, _, labels, indices = batch
        with autocast():
            logits = model(normalize(images))
        logits = logits.float()
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums[0] += right[:, 0].sum()
        sums[1] += right.sum()
        sums[2] += F.cross_entropy(logits, labels, reduction="sum")
        sums[3] += len(labels)
        if real is not None:
            for index, answer in zip(indices.tolist(), logits.argmax(1).tolist()):
                sums[4] += answer in real[index]
                sums[5] += len(real[index]) > 0
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    top1, top5, loss, count, real_right, real_count = sums.tolist()
    result = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
    return {**result, "real": 100 * real_right / max(real_count, 1)} if real is not None else result


def real_labels(file: str, source: Source) -> list[list[int]]:
    """Per image of `source` (ImageNet's validation files), the labels of ImageNet-Real's real.json (arXiv:2006.07159).

    The JSON is a list in the order of the official file numbers, ILSVRC2012_val_00000001 first.
    """
    try:
        labels = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--real-labels {file}: {error}") from None
    found = []
    for i in range(len(source)):
        match = re.search(r"ILSVRC2012_val_(\d{8})", source.name(i))
        number = int(match[1]) - 1 if match else -1
        if not isinstance(labels, list) or not 0 <= number < len(labels):
            raise UserError(f"--real-labels {file}: no entry for {source.name(i)}; files must keep their names ILSVRC2012_val_NNNNNNNN")
        found.append(labels[number])
    return found
