"""The order in which images are visited, and the loaders. Everything random is a function of (seed, epoch, sample,
repeat), never of worker, rank or history: the same pixels for any number of them, and when a run is resumed."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from common.errors import RunError, UserError, one_line
from common.run import Run
from common.sources import Source, open_data

HUNG = 300.0  # seconds after which a loader worker that lives, but brings nothing, counts as hung


def epoch_length(length: int, repeats: int) -> int:
    """Samples of an epoch. With repeats (repeated augmentation) still about as many as there are images, hence
    length/repeats distinct ones: a multiple of 256, as in the official sampler, unless there are fewer images."""
    return length if repeats == 1 else length // 256 * 256 or length


def epoch_order(length: int, epoch: int, seed: int, repeats: int) -> np.ndarray:
    """Sample indices of one epoch for all ranks together: a permutation, each index `repeats` times in a row."""
    generator = torch.Generator().manual_seed(epoch + (seed << 20))
    order = torch.randperm(length, generator=generator, dtype=torch.int32).numpy()
    return np.repeat(order[: -(-length // repeats)], repeats)[: epoch_length(length, repeats)] if repeats > 1 else order


class GlobalBatches(Sampler[list]):
    """This rank's micro-batches of every global batch, as lists of keys (epoch, index, repeat).
    The global batch of step s is samples [s B, (s + 1) B) of epoch_order, dealt out like cards to B / group groups.
    A group is what a GPU was in the papers: images that share one mixup or cutmix draw and are mixed with each other
    only. Ranks and micro-batches are made of whole groups: who is mixed with whom depends on neither. Neighbouring
    groups stay together: repeats of an image then mostly land in one micro-batch and share a decode."""

    def __init__(self, length: int, *, batch_size: int, micro_batch: int, group: int, world_size: int, rank: int,
                 repeats: int, seed: int):
        self.length, self.batch_size, self.micro_batch, self.group = length, batch_size, micro_batch, group
        self.world_size, self.rank, self.repeats, self.seed = world_size, rank, repeats, seed
        self.steps = epoch_length(length, repeats) // batch_size  # optimizer steps per epoch
        self.accumulation = batch_size // world_size // micro_batch
        self.epoch = self.first_step = 0  # what comes next

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def groups(self, micro_batch: int) -> range:
        """Numbers, within the global batch, of the groups in this rank's given micro-batch (0, 1, ... of a step)."""
        per_micro = self.micro_batch // self.group
        first = (self.rank * self.accumulation + micro_batch) * per_micro
        return range(first, first + per_micro)

    def __iter__(self) -> Iterator[list]:
        order = epoch_order(self.length, self.epoch, self.seed, self.repeats)
        for step in range(self.first_step, self.steps):
            positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size).reshape(self.group, -1).T
            for micro_batch in range(self.accumulation):
                mine = positions[list(self.groups(micro_batch))].ravel()
                yield [(self.epoch, int(order[p]), int(p % self.repeats)) for p in mine]


class RepeatedAugSampler(GlobalBatches):
    """Rank r's share of epoch_order, every world_size-th sample; with seed 0 exactly the official sampler's indices."""

    def __init__(self, length: int, world_size: int, rank: int, repeats: int = 3, seed: int = 0):
        super().__init__(length, batch_size=world_size, micro_batch=1, group=1, world_size=world_size, rank=rank,
                         repeats=repeats, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (index for [(_, index, _)] in super().__iter__())


class Samples(Dataset):
    """Whole micro-batches of transformed images: (images uint8 (B, 3, h, w) channels-last, parameters float32 (B, P),
    labels int64 (B,), indices int64 (B,)), or a string naming the image that could not be read. transform(image, rng
    seeded by the key) -> (uint8 (3, h, w), parameters of what is left to the device). One that makes several crops
    returns a tuple of tensors (n, 3, h, w), one per size; images is then a tuple of (B, n, 3, h, w)."""

    def __init__(self, source: Source, transform: Callable, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple | str:
        crops, parameters, image, shown = [None] * len(keys), [()] * len(keys), None, None
        for i in sorted(range(len(keys)), key=lambda i: keys[i][1]):  # repeats share a decode, no two images live
            epoch, index, repeat = keys[i]
            try:
                if index != shown:
                    image, shown = None, index
                    image = self.source.named(self.source.read, index)
            except RunError as error:
                return str(error)
            rng = random.Random((((self.seed << 32) + epoch) << 40) + (index << 8) + repeat)
            crops[i], parameters[i] = self.transform(image, rng)
        images = tree_map(lambda *size: torch.stack([c.movedim(-3, -1) for c in size]).movedim(-1, -3), *crops)
        indices = torch.tensor([index for _, index, _ in keys])
        labels = torch.from_numpy(self.source.labels[indices.numpy()])
        return images, torch.tensor(parameters, dtype=torch.float32), labels, indices


def _worker_init(_: int) -> None:
    parent = multiprocessing.parent_process().pid
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)  # killed already: torch's worker would take init for its parent and live on
    # A signal sent to the whole process group is the main process's to answer: it still needs its workers to finish.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(samples: Samples, batches, workers: int, device: torch.device, persistent: bool = True) -> DataLoader:
    """DataLoader over whole micro-batches, ready ahead of need; persistent workers live through all epochs."""
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, worker_init_fn=_worker_init,
                      persistent_workers=workers > 0 and persistent, timeout=HUNG if workers else 0,
                      collate_fn=default_convert, pin_memory=device.type == "cuda")


def split_batch(batch_size: int, world: int, micro_batch: int | None, group: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps) with world x micro-batch x accumulation = batch_size, micro-batches of
    whole mixing groups. UserError with the two nearest batch sizes that would do."""
    unit, local = world * (micro_batch or group), batch_size // world
    if micro_batch is not None and (micro_batch < 1 or micro_batch % group):
        raise UserError(f"--micro-batch {micro_batch}: must be a multiple of --mix-group {group}, mixed together")
    if batch_size % unit:
        near = " and ".join(map(str, sorted({max(1, batch_size // unit) * unit, (batch_size // unit + 1) * unit})))
        raise UserError(f"--batch-size {batch_size}: not a multiple of {world} ranks x {micro_batch or group} images"
                        f"{' (--mix-group)' * (group > 1 and not micro_batch)}; the nearest that are: {near}")
    fits = [m for m in range(group, local + 1, group) if local % m == 0 and m >= min(local, 32)]  # for BatchNorm's sake
    micro = micro_batch or max((m for m in fits if m <= 256), default=fits[0])
    return micro, local // micro


# A micro-batch: images uint8 (B, 3, h, w) or a tuple of crops (B, n, 3, h, w), labels and indices (B,) on the device;
# parameters (B, P) of the transform on the host; its mixing groups' numbers.
Batch = namedtuple("Batch", "images parameters labels indices groups")


class TrainingData:
    """The training images (a Source) in the recipe's order and batches; val: the validation images (Source or None);
    micro_batch: images per rank and forward pass, accumulation: micro-batches per step and rank, steps: per epoch."""

    def __init__(self, run: Run, recipe, transform: Callable, samples: type = Samples):
        args, self.run = run.args, run
        self.group = min(recipe.mix_group if hasattr(recipe, "mix_group") else 1, recipe.batch_size)
        self.micro_batch, self.accumulation = split_batch(recipe.batch_size, run.world, args.micro_batch, self.group)
        splits = ("train",) if args.val_data == "none" else ("train", "val")
        options = dict(val_data=args.val_data, coarse_labels=args.coarse_labels, splits=splits, say=run.say)
        found = run.first(lambda: open_data(args.data, **options))
        self.source, self.val, self.classes = found["train"], found.get("val"), found["train"].classes
        self.batches = GlobalBatches(
            len(self.source), batch_size=recipe.batch_size, micro_batch=self.micro_batch, group=self.group,
            world_size=run.world, rank=run.rank, repeats=recipe.repeats, seed=args.seed)
        self.steps = self.batches.steps
        if self.steps == 0:
            why = f"more than the {len(self.source)} images to train on; for few: --weights FILE --recipe own"
            raise UserError(f"--batch-size {recipe.batch_size}: {why}")
        self.loader = make_loader(samples(self.source, transform, args.seed), self.batches, run.workers, run.device)

    def begin(self, epoch: int, first_step: int) -> None:
        """An epoch, from optimizer step `first_step` on."""
        self.batches.epoch, self.batches.first_step, self.waited = epoch, first_step, 0.0
        self.stream = to_device(self.loader, self.run.device)

    def micro_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next optimizer step; torch's generators are seeded for each."""
        self.seen, run = [], self.run
        for number in range(self.accumulation):
            start = time.time()
            batch = Batch(*next(self.stream), self.batches.groups(number))
            self.waited += time.time() - start
            torch.manual_seed(hash((run.args.seed, run.epoch, run.step, number, run.rank)) & (2**63 - 1))
            self.seen.append(batch.indices)
            yield batch

    def identity(self) -> dict:
        """For Run.start: the classes, digests of the images' names and labels, the validation set's size."""
        val = "none" if self.val is None else f"{len(self.val)} ({self.val.digest()})"
        return {"classes": self.classes, "digest": self.source.digest(), "val_images": len(self.val or ()),
                "validation images": val}

    def first_images(self, count: int) -> Batch:
        """The run's first `count` images, or the few more that make whole groups."""
        keys = next(iter(self.batches))[: -(-count // self.group) * self.group]
        return Batch(*moved(self.loader.dataset.__getitems__(keys), self.run.device), range(len(keys) // self.group))


def eval_batches(length: int, batch_size: int, world_size: int, rank: int) -> list[list]:
    """Every image exactly once over all ranks; the last batches may be smaller, and ranks may differ by one image."""
    keys = [(0, index, 0) for index in range(rank, length, world_size)]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


def moved(batch: tuple | str, device: torch.device) -> tuple:
    """What Samples returned, on the device (which is not waited for) but the parameters; RunError if a string."""
    if isinstance(batch, str):
        raise RunError(f"cannot read {batch}")
    images, parameters, labels, indices = batch
    images, *known = tree_map(lambda tensor: tensor.to(device, non_blocking=True), (images, labels, indices))
    return images, parameters, *known


def brought(loader: DataLoader) -> Iterator:
    """The loader's batches. RunError with the likely reason if a worker process died."""
    batches, workers, begin = None, getattr(loader, "num_workers", 0), time.monotonic()
    while True:
        try:
            if batches is None:
                if not all(worker.is_alive() for worker in getattr(getattr(loader, "_iterator", None), "_workers", ())):
                    raise EOFError("between epochs")
                batches = iter(loader)
                if threading.current_thread() is threading.main_thread():  # torch's handler raises wherever we are,
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # also where it is lost or taken for a full disk
            if workers:
                batches._timeout = 5  # torch looks only then for dead workers whose signal was lost
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while a batch was fetched from it
            if "DataLoader timed out" in str(error) and batches is not None and time.monotonic() < begin + HUNG:
                continue
            if isinstance(error, RuntimeError) and ("DataLoader" not in str(error) or str(error).startswith("Caught")):
                raise  # what a worker raised
            hint = "if memory or /dev/shm ran out, lower --workers or --micro-batch"
            raise RunError(f"a data loading worker died or hung ({one_line(error)}); {hint}") from None
        finally:
            if workers and batches is not None:
                batches._timeout = HUNG  # for the next epoch's start, which cannot be tried again
        yield batch
        begin = time.monotonic()


def to_device(loader: DataLoader, device: torch.device) -> Iterator[tuple]:
    """The loader's batches, on `device` as `moved` says."""
    return (moved(batch, device) for batch in brought(loader))
