"""The order in which images are visited, and the loaders.

Everything random is a function of (seed, epoch, sample, repeat): never of worker, rank or history. Hence the same pixels
for any number of workers and ranks, and a run that was killed in the middle of an epoch resumes exactly.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import RunError, UserError
from common.run import Run, split_batch
from common.sources import Source, open_data

# ---- Order -------------------------------------------------------------------------------------------------------------


def epoch_order(length: int, epoch: int, seed: int, repeats: int) -> np.ndarray:
    """Sample indices of one epoch for all ranks together: a permutation, each index `repeats` times in a row.

    With repeats > 1 (repeated augmentation) an epoch still has about `length` samples, hence length/repeats distinct
    images; it is cut to a multiple of 256 as the official sampler does, except for data sets smaller than that.
    """
    generator = torch.Generator().manual_seed(epoch + (seed << 20))
    order = torch.randperm(length, generator=generator).numpy()
    if repeats == 1:
        return order
    return np.repeat(order[: -(-length // repeats)], repeats)[: length // 256 * 256 or length]


class RepeatedAugSampler(Sampler[int]):
    """Repeated augmentation (Hoffer et al.; Berman et al.) in the official order: rank r takes every world_size-th sample.

    seed 0 gives exactly the indices of DeiT's sampler, whose permutation depends on the epoch only.
    """

    def __init__(self, length: int, world_size: int, rank: int, repeats: int = 3, seed: int = 0):
        self.length, self.world_size, self.rank, self.repeats, self.seed, self.epoch = length, world_size, rank, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return (self.length // 256 * 256 or self.length) // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.length, self.epoch, self.seed, self.repeats)
        return iter(order[self.rank :: self.world_size][: len(self)].tolist())


class GlobalBatches(Sampler[list]):
    """This rank's micro-batches of every global batch, as lists of keys (epoch, index, repeat).

    The global batch of step s is samples [s B, (s + 1) B) of epoch_order, dealt out like cards to B / group groups. A group
    is what one GPU was in the papers: `group` images that share one mixup or cutmix draw and are mixed with each other only.
    Ranks and micro-batches are made of whole groups, so that who is mixed with whom depends on neither. Neighbouring
    groups stay together: repeats of an image then mostly land in one micro-batch and share a decode.
    """

    def __init__(self, length: int, *, batch_size: int, micro_batch: int, group: int, world_size: int, rank: int, repeats: int, seed: int):
        self.length, self.batch_size, self.micro_batch, self.group = length, batch_size, micro_batch, group
        self.world_size, self.rank, self.repeats, self.seed = world_size, rank, repeats, seed
        self.steps = len(epoch_order(length, 0, seed, repeats)) // batch_size  # optimiser steps per epoch
        self.accumulation = batch_size // world_size // micro_batch
        self.epoch = self.first_step = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def groups(self, micro_batch: int) -> range:
        """Numbers, within the global batch, of the groups in this rank's given micro-batch (0, 1, ... of a step)."""
        per_micro = self.micro_batch // self.group
        first = (self.rank * self.accumulation + micro_batch) * per_micro
        return range(first, first + per_micro)

    def __iter__(self) -> Iterator[list]:
        order = epoch_order(self.length, self.epoch, self.seed, self.repeats)
        groups_per_batch = self.batch_size // self.group
        for step in range(self.first_step, self.steps):
            positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size).reshape(self.group, groups_per_batch).T
            for micro_batch in range(self.accumulation):
                mine = positions[list(self.groups(micro_batch))].ravel()
                yield [(self.epoch, int(order[p]), int(p % self.repeats)) for p in mine]


# ---- Loading -------------------------------------------------------------------------------------------------------------

Images = torch.Tensor | tuple[torch.Tensor, ...]
Transform = Callable[[torch.Tensor, random.Random], tuple[Images, tuple[float, ...]]]


class Samples(Dataset):
    """Whole micro-batches of transformed images.

    transform(image, rng) -> (uint8 (3, h, w), parameters of what is left to the device). rng is seeded by the key.
    Items: (images uint8 (B, 3, h, w) channels-last, parameters float32 (B, P), labels int64 (B,), indices int64 (B,)),
    or a string naming the image that could not be read. A transform that makes several crops returns a tuple of tensors
    (n, 3, h, w), one per size; images is then a tuple of (B, n, 3, h, w).
    """

    def __init__(self, source: Source, transform: Transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple | str:
        batches, parameters, decoded = None, [], {}
        for i, (epoch, index, repeat) in enumerate(keys):
            if index not in decoded:
                try:
                    decoded[index] = self.source.read(index)
                except (OSError, ValueError) as error:
                    return f"{self.source.name(index)}: {' '.join(str(error).split())}"
            rng = random.Random((((self.seed << 32) + epoch) << 40) + (index << 8) + repeat)
            crops, extra = self.transform(decoded[index], rng)
            several = isinstance(crops, tuple)
            crops = [crop.movedim(-3, -1) for crop in (crops if several else (crops,))]
            if batches is None:
                batches = [torch.empty((len(keys), *crop.shape), dtype=torch.uint8) for crop in crops]
            for batch, crop in zip(batches, crops):
                batch[i] = crop
            parameters.append(extra)
        indices = torch.tensor([index for _, index, _ in keys])
        labels = torch.from_numpy(self.source.labels[indices.numpy()])
        images = tuple(batch.movedim(-1, -3) for batch in batches)
        return images if several else images[0], torch.tensor(parameters, dtype=torch.float32), labels, indices

    def __len__(self) -> int:
        return len(self.source)


def _identity(batch):
    return batch


def _worker_init(_: int) -> None:
    # A signal sent to the whole process group is the main process's to answer: it still needs its workers to finish.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(samples: Samples, batches: Sampler, workers: int, device: torch.device, *, persistent: bool = True) -> DataLoader:
    """DataLoader over whole micro-batches, which workers have ready ahead of need; persistent ones live through all epochs."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=device.type == "cuda",
        worker_init_fn=_worker_init,
        persistent_workers=workers > 0 and persistent,
        prefetch_factor=2 if workers else None,
        timeout=300 if workers else 0,
    )


class TrainingData:
    """What a training loop draws from: the training images in the recipe's order and batches, and the validation images.

    source, val: training and validation Source (val None with --val-data none); classes; micro_batch (images per rank and
    forward pass), accumulation (micro-batches per step and rank), steps (per epoch).
    """

    def __init__(self, run: Run, recipe, transform: Transform):
        args = run.args
        self.group = min(recipe.mix_group if hasattr(recipe, "mix_group") else 1, recipe.batch_size)  # 1: nothing is mixed
        self.micro_batch, self.accumulation = split_batch(recipe.batch_size, run.world, args.micro_batch, self.group)
        splits = ("train",) if args.val_data == "none" else ("train", "val")
        found = run.first(
            lambda: open_data(args.data, val_data=args.val_data, coarse_labels=args.coarse_labels, splits=splits, say=run.say)
        )
        self.source, self.val = found["train"], found.get("val")
        self.classes = self.source.classes
        self.batches = GlobalBatches(
            len(self.source),
            batch_size=recipe.batch_size,
            micro_batch=self.micro_batch,
            group=self.group,
            world_size=run.world,
            rank=run.rank,
            repeats=recipe.repeats,
            seed=args.seed,
        )
        self.steps = self.batches.steps
        if self.steps == 0:
            raise UserError(f"--batch-size {recipe.batch_size}: larger than the training set of {len(self.source)} images; lower it")
        self.samples = Samples(self.source, transform, args.seed)
        self.loader = make_loader(self.samples, self.batches, run.workers, run.device)
        self.device = run.device

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """The epoch's micro-batches of this rank from optimizer step `first_step` on."""
        self.batches.set_epoch(epoch, first_step)
        return to_device(self.loader, self.device)

    def identity(self) -> dict:
        """For Run.start: the classes' names, a digest of the training images' names and labels, the number of validation images."""
        return {"classes": self.classes, "digest": self.source.digest(), "val_images": len(self.val or ())}

    def names(self, indices: torch.Tensor) -> list[str]:
        """File names of training images, for messages."""
        return [self.source.name(i) for i in indices.tolist()]

    def first_images(self, count: int) -> tuple[tuple[torch.Tensor, ...], range]:
        """(the run's first `count` images, or the few more that make whole groups, on the device, numbers of the groups)."""
        groups = range(-(-count // self.group))
        keys = next(iter(self.batches))[: self.group * len(groups)]
        batch = self.samples.__getitems__(keys)
        if isinstance(batch, str):
            raise RunError(f"cannot read {batch}")
        images, parameters, labels, indices = batch
        return (moved(images, self.device), parameters, moved(labels, self.device), indices), range(len(keys) // self.group)


def eval_batches(length: int, batch_size: int, world_size: int, rank: int) -> list[list]:
    """Every image exactly once over all ranks; the last batches may be smaller, and ranks may differ by one image."""
    keys = [(0, index, 0) for index in range(rank, length, world_size)]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


def moved(images: Images, device: torch.device) -> Images:
    """Images on the device, without waiting for the copy."""
    return images.to(device, non_blocking=True) if isinstance(images, torch.Tensor) else tuple(moved(i, device) for i in images)


def to_device(loader: DataLoader, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """The loader's batches, images and labels on `device`, parameters and indices on the host.

    The next batch is copied (on a stream of its own) while the current one is in use.

    Raises RunError naming the image that cannot be read, or the likely reason if a worker process died.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches() -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in loader:
            if isinstance(batch, str):
                raise RunError(f"cannot read {batch}")
            if stream is not None:
                images, parameters, labels, indices = batch
                with torch.cuda.stream(stream):
                    batch = moved(images, device), parameters, moved(labels, device), indices
            yield batch

    try:
        if stream is None:
            yield from batches()
            return
        iterator = batches()
        ahead = next(iterator, None)
        while ahead is not None:
            current = ahead
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in (*(current[0] if isinstance(current[0], tuple) else current[:1]), current[2]):
                tensor.record_stream(torch.cuda.current_stream(device))
            ahead = next(iterator, None)
            yield current
    except RuntimeError as error:
        if "DataLoader" in str(error):
            reason = str(error).splitlines()[0]
            raise RunError(
                f"a data loading worker died or hung ({reason}); if memory or /dev/shm ran out, lower --workers or --micro-batch"
            ) from None
        raise
