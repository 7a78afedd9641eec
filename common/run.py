"""One run: ranks, output folder, log, progress, signals, checkpoints and resuming.

What decides the result (order, augmentation, learning rate, random draws) is a pure function of (seed, epoch, step), so a
run is resumed exactly from weights, optimizer state and these two counters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import checkpoint
from common.batchnorm import synchronise
from common.cli import differences
from common.errors import RunError, UserError

FLAG_LAG = 3  # steps after which the host reads a step's flags from a GPU: long done by then, so nothing waits
SAVE, STOP = 1.0, 2.0**16  # what a signal asks of a rank; a sum over ranks tells both
MAX_SKIPPED = 20  # consecutive fp16 overflows before the run stops


class Stopped(Exception):
    """A signal asked for an end and the state is saved."""


# ---- Starting and ending -----------------------------------------------------------------------------------------------


def launch(main: Callable[[], None]) -> None:
    """Runs a script's main; turns its end into one line and an exit status (0, 1, 2, 128 + signal)."""
    status, rank = 1, int(os.environ.get("RANK", 0))
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except Stopped as stopped:
        _end_of_run(128 + stopped.args[0])
        _quit(128 + stopped.args[0])  # from here: leaving the block takes a loader down whose workers are in the middle of a batch
    except (UserError, RunError) as error:
        status = 2 if isinstance(error, UserError) else 1
        if "--debug" in sys.argv:
            traceback.print_exc()
        if _first_to_report(rank):
            _report(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}")
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        status = 1
    except torch.cuda.OutOfMemoryError:
        status = 1
        _report(f"error (rank {rank}): the GPU's memory is full; lower --micro-batch (the result stays the same) or use --grad-checkpoint")
    except RuntimeError as error:
        status = 1
        if not _lost_contact(error):
            raise
        time.sleep(3)  # the rank that failed speaks first
        _report(
            f"error (rank {rank}): lost contact with another rank{_WHERE['text']}: it died or hangs (see its own message); --resume auto goes on from the last checkpoint"
        )
    finally:
        _end_of_run(status)
    sys.stdout.flush()
    if dist.is_initialized():  # taking gloo down can block (torch 2.6) or abort (2.15); by now all is written
        _quit(status)
    sys.exit(status)


def _quit(status: int) -> None:
    """Ends the process and its data loading workers at once; nothing is taken down."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that a worker was killed
    for child in multiprocessing.active_children():
        child.kill()  # they ignore SIGTERM
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, RuntimeError):  # closed, or a signal came in the middle of a print
            stream.flush()
    os._exit(status)


_WHERE = {"text": ""}  # " at epoch E, step S" for the message above
_CURRENT: list[Run] = []
_STORE: list = []  # where the ranks meet


def _end_of_run(status: int) -> None:
    while _CURRENT:
        _CURRENT.pop().close(status)


def _report(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line.replace("\n", " "), file=sys.stderr, flush=True)


def _first_to_report(rank: int) -> bool:
    """True on one rank only, where ranks can be asked; before they are connected, on rank 0."""
    if not _STORE:
        return rank == 0
    try:
        return _STORE[-1].add("reported_error", 1) == 1
    except RuntimeError:
        return True


def _lost_contact(error: RuntimeError) -> bool:
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "timed out", "gloo", "NCCL", "Socket")
    return dist.is_initialized() and any(s in str(error) for s in signs)


def connect(device: str | None, timeout: int) -> tuple[torch.device, int, int]:
    """(device, rank, world size) from torchrun's environment; one process without it. UserError if half of it is set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [n for n in names if n in os.environ]
    if given and len(given) < len(names):
        missing = ", ".join(n for n in names if n not in given)
        raise UserError(
            f"the environment sets {', '.join(given)} but not {missing}; start several ranks with torchrun, one with plain python"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave the flag out to run on the CPU")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun starts more ranks per node than there are GPUs ({torch.cuda.device_count()}); lower --nproc_per_node"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if given and not dist.is_initialized():
        wait = datetime.timedelta(seconds=timeout)
        try:
            store, _, _ = next(rendezvous("env://", timeout=wait))
            # Ranks that torchrun starts again find the store of those that died: addresses in it would lead nowhere.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if "cuda" in device else "gloo", store=store, rank=rank, world_size=world, timeout=wait)
            _STORE.append(store)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"ranks cannot meet at {where}: {' '.join(str(error).split())[:200]}; use torchrun --standalone or another --master-port"
            ) from None
    return torch.device(device), rank, world


def split_batch(batch_size: int, world: int, micro_batch: int | None, group: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps) with world x micro-batch x accumulation = batch_size.

    Micro-batches consist of whole mixing groups. UserError with the two nearest batch sizes that would do.
    """
    unit = world * (micro_batch or group)
    if micro_batch is not None and (micro_batch < 1 or micro_batch % group):
        raise UserError(f"--micro-batch {micro_batch}: must be a multiple of the {group} images that are mixed together (--mix-group)")
    if batch_size % unit:
        near = sorted({max(1, batch_size // unit) * unit, (batch_size // unit + 1) * unit})
        parts = f"{world} ranks x {micro_batch or group} images" + ("" if micro_batch else " (--mix-group, the least a rank can take)")
        raise UserError(f"--batch-size {batch_size}: not a multiple of {parts}; the nearest that are: {' and '.join(map(str, near))}")
    local = batch_size // world
    micro = micro_batch or max(m for m in range(group, local + 1, group) if local % m == 0 and (m <= 256 or m == group))
    return micro, local // micro


# ---- The run -------------------------------------------------------------------------------------------------------------


class Run:
    """State and bookkeeping of one training run. All its methods are called by all ranks alike."""

    def __init__(self, method: str, args, recipe, paper):
        self.method, self.args, self.recipe, self.paper = method, args, recipe, paper
        self.device, self.rank, self.world = connect(args.device, args.timeout)
        self.amp = args.amp or ("bf16" if self.device.type == "cuda" else "fp32")
        self.out = Path(args.out or f"runs/{method}_{args.model.replace('/', '_')}")
        self.epoch = self.step = 0  # what comes next
        self.best = -math.inf
        self.loss_sum, self.loss_count = 0.0, 0
        self.stop_signal, self.stop_agreed = 0, False  # asked of this rank; known to all ranks
        self.save_asked, self.save_agreed = False, False
        self.lag = FLAG_LAG if self.device.type == "cuda" else 0
        self.pending: deque = deque()  # (stats, files, lr) of steps whose flags the host has not read
        self.skipped_in_a_row = self.skipped_steps = 0
        self.log_bytes = 0
        self.waited = 0.0
        self.bar = self.writer = None
        self.locked = self.started = False
        _CURRENT.append(self)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_usr1)
        if args.device is None and self.device.type == "cpu":
            self.say("no GPU found: running on the CPU")

    # -- talking

    def say(self, text: str) -> None:
        """One line on rank 0's standard output; a closed or ASCII-only output does not end the run."""
        if self.rank == 0:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except UnicodeEncodeError:
                tqdm.write(text.encode("ascii", "backslashreplace").decode(), file=sys.stdout)
            except BrokenPipeError:
                sys.stdout = open(os.devnull, "w")

    def log(self, record: dict) -> None:
        """One line of strict JSON in log.jsonl (numbers that are not finite become null)."""
        if self.rank != 0:
            return
        line = json.dumps(_json_safe(record), allow_nan=False) + "\n"
        try:
            with open(self.out / "log.jsonl", "ab") as f:
                f.write(line.encode())
                f.flush()
            self.log_bytes += len(line.encode())
        except OSError as error:
            if not getattr(self, "log_failed", False):
                self.log_failed = True
                self.say(f"warning: cannot write {self.out / 'log.jsonl'} ({error.strerror}); training goes on")

    # -- ranks

    @property
    def workers(self) -> int:
        """Loader processes of this rank."""
        if self.args.workers is not None:
            return self.args.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def _of_all_ranks(self, items: list) -> list:
        if self.world == 1:
            return items
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (n, ...), rank 0's first: (world n, ...), the same on all ranks. No gradient."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def first(self, action: Callable):
        """action() of every rank, rank 0's before the others': what it builds (an index), they find."""
        result = []
        self._on_rank_0(lambda: result.append(action()))
        return result[0] if result else action()

    # -- folder

    def open_folder(self) -> None:
        """Takes the output folder; UserError if it cannot be written or holds another run."""
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and self.args.resume is None:
            self.args.resume = "auto"  # torchrun --max-restarts started this process again
        self._on_rank_0(self._open_folder)

    def _open_folder(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / ".probe"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror})") from None
        lock = self.out / "lock"
        me = f"{socket.gethostname()} {os.getpid()} {_process_start(os.getpid())}"
        if lock.exists():
            host, pid, start = (lock.read_text().split() + ["", "0", ""])[:3]
            if host == socket.gethostname() and pid.isdigit() and (_process_start(int(pid)) or "gone") == start:
                raise UserError(f"--out {self.out}: in use by process {pid}; choose another folder or stop that run")
            if host and host != socket.gethostname() and self.args.resume is None:
                raise UserError(f"--out {self.out}: locked by process {pid} on {host}; if that run is dead, remove {lock}")
        if (self.out / "last.pt").exists() and self.args.resume is None:
            raise UserError(f"--out {self.out}: holds a run already; --resume auto goes on with it, another --out starts anew")
        lock.unlink(missing_ok=True)  # a dead process's
        try:
            with open(lock, "x") as f:
                f.write(me)
        except FileExistsError:
            raise UserError(f"--out {self.out}: another run has just started there; choose another folder") from None
        self.locked = True
        for leftover in self.out.glob("*.tmp"):  # of a write that was killed
            leftover.unlink(missing_ok=True)

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Runs `action` on rank 0 while the others wait; if it fails there, all ranks stop."""
        error = None
        if self.rank == 0:
            try:
                action()
            except (UserError, RunError) as raised:
                error = raised
        if self.world > 1:
            failed = torch.tensor([error is not None], dtype=torch.int32, device=self.device)
            dist.broadcast(failed, 0)
            if failed.item() and error is None:
                sys.exit(1)  # rank 0 says why
        if error is not None:
            raise error

    # -- starting

    def prepare(self, model: nn.Module, micro_batch: int) -> nn.Module:
        """The model as it is trained: BatchNorm synchronised, compiled if asked for, wrapped for several ranks."""
        if micro_batch == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise UserError("--micro-batch 1: this model's BatchNorm needs at least 2 images per forward pass")
        model = synchronise(model, self.device)
        if self.args.compile:
            cuda = self.device.type == "cuda"
            if importlib.util.find_spec("triton") is None if cuda else not any(map(shutil.which, ("c++", "g++", "clang++"))):
                raise UserError(
                    f"--compile: needs {'the package triton' if cuda else 'a C++ compiler'}, not found here; leave the flag out"
                )
            model.compile()
        if self.world > 1:
            # Buffers are equal on all ranks by themselves: BatchNorm's statistics are synchronised, memories gathered.
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False)
        return model

    def start(self, *, model: nn.Module, optimizer, precision, ema=None, data: dict, extra: dict[str, object] | None = None) -> None:
        """Registers what a checkpoint holds, resumes if asked to, and checks that all ranks hold the same weights.

        data: TrainingData.identity() and what else must be the same when the run goes on (a teacher);
        extra: further objects with state_dict() and load_state_dict() (method state).
        """
        self.parts = {"model": model, "optimizer": optimizer, "scaler": precision, "ema": ema and ema.model, **(extra or {})}
        self.data_info = data
        if self.args.resume:
            self._resume()
        self._check_same_weights()
        if self.args.tensorboard and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: the package is not installed; pip install tensorboard") from None
            self.writer = SummaryWriter(self.out, purge_step=self.epoch)
        if self.epoch == self.step == 0:
            if self.rank == 0:
                with contextlib.suppress(OSError):  # log() says so, once
                    (self.out / "log.jsonl").write_bytes(b"")
            self.log_bytes = 0
        self.started = True
        self.log(
            {
                "status": "started",
                "epoch": self.epoch,
                "step": self.step,
                "seed": self.args.seed,
                "world_size": self.world,
                "recipe": dataclasses.asdict(self.recipe),
                "differs_from_paper": differences(self.recipe, self.paper),
                "allowed_changes": self.args.allow_changes,
                **{k: v for k, v in data.items() if k not in ("classes", "digest")},
            }
        )

    def _resume(self) -> None:
        saved, changes = None, []
        if self.args.resume == "auto":
            for name in ("last.pt", "previous.pt"):
                if (self.out / name).exists():
                    try:
                        saved = checkpoint.load(self.out / name, "--resume")
                        break
                    except UserError as error:
                        self.say(f"warning: {error}")
            if saved is None:
                if (self.out / "last.pt").exists():
                    raise UserError(f"--resume auto: no good checkpoint in {self.out}; start anew with another --out")
                self.say(f"nothing to resume in {self.out}: starting from the beginning")
                return
        else:
            saved, name = checkpoint.load(self.args.resume, "--resume"), self.args.resume
        if "optimizer" not in saved or "epoch" not in saved:
            raise UserError(f"--resume {self.args.resume}: holds weights only; to start from them use --weights {self.args.resume}")
        lacking = [key for key in (*self.parts, *self._counters(), *self._identity()) if key not in saved]
        if lacking:
            raise UserError(f"--resume {self.args.resume}: lacks {', '.join(lacking)}; it was not written by this version's training")
        asked = (self.method, self.args.model)
        if (saved["method"], saved["model_name"]) != asked:
            raise UserError(
                f"--resume {self.args.resume}: holds {saved['method']} {saved['model_name']}, you asked for {asked[0]} {asked[1]}"
            )
        now = _compared(plain_recipe(self.recipe), self.args.seed, self.data_info)
        then = _compared(saved["recipe"], saved["seed"], saved["data"])
        changes = [f"{k} was {then.get(k)}, now {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)]
        if changes and not self.args.allow_changes:
            raise UserError(
                f"--resume {self.args.resume}: the run was started differently: {'; '.join(changes)}; repeat its flags, or add --allow-changes"
            )
        checkpoint.load_weights(self.parts["model"], saved["model"], f"--resume {self.args.resume}")
        for key, part in self.parts.items():
            if key == "model" or (part is None and saved.get(key) is None):
                continue
            if part is None or saved.get(key) is None:
                raise UserError(
                    f"--resume {self.args.resume}: the checkpoint {'has' if part is None else 'lacks'} {key}, this run {'lacks' if part is None else 'has'} it"
                )
            try:
                part.load_state_dict(saved[key])
            except (ValueError, KeyError, RuntimeError) as error:
                raise UserError(
                    f"--resume {self.args.resume}: its {key} state does not fit ({' '.join(str(error).split())[:120]}); to start from the weights use --weights"
                ) from None
        for key in self._counters():
            if key not in ("rng", "log_bytes"):
                setattr(self, key, saved[key])
        torch.set_rng_state(saved["rng"]["torch"])
        random.setstate(saved["rng"]["python"])
        if self.rank == 0 and (self.out / "log.jsonl").exists():  # forget what was logged after the checkpoint
            with open(self.out / "log.jsonl", "r+b") as f:
                self.log_bytes = min(saved["log_bytes"], f.seek(0, 2))
                f.truncate(self.log_bytes)
        self.say(
            f"resumed from {name} at epoch {self.epoch}, step {self.step}" + (f" with changes: {'; '.join(changes)}" if changes else "")
        )

    def _check_same_weights(self) -> None:
        """RunError if ranks hold different weights: they would diverge without a word."""
        if self.world == 1:
            return
        sums = torch.stack([p.detach().double().sum() for p in self.parts["model"].parameters()]).sum().reshape(1)
        all_sums = [torch.empty_like(sums) for _ in range(self.world)]
        dist.all_gather(all_sums, sums)
        if any(not torch.equal(s, all_sums[0]) for s in all_sums):
            raise RunError(f"the ranks hold different weights at epoch {self.epoch}, step {self.step}; resume from the last checkpoint")

    # -- the loop

    def seed_step(self, micro_batch: int) -> None:
        """Torch's generators for one micro-batch (stochastic depth, dropout): a function of seed, step and rank."""
        torch.manual_seed(hash((self.args.seed, self.epoch, self.step, micro_batch, self.rank)) & (2**63 - 1))

    def steps(self, total: int, images_per_step: int) -> Iterator[int]:
        """The optimizer steps of this epoch that are still to do, with a progress bar on rank 0."""
        if self.rank == 0 and sys.stderr.isatty():
            total_images, done = total * images_per_step, self.step * images_per_step
            self.bar = tqdm(total=total_images, initial=done, desc=f"epoch {self.epoch}", unit="img", unit_scale=True, dynamic_ncols=True, leave=False)  # fmt: skip
        self.epoch_start, self.first_step, self.waited, self.last_line = time.time(), self.step, 0.0, time.time()
        self.images_per_step, self.total_steps = images_per_step, total
        while self.step < total:
            _WHERE["text"] = f" at epoch {self.epoch}, step {self.step}"
            yield self.step

    def wait_for(self, batches: Iterator):
        """The next batch; the time spent waiting for it is counted."""
        start = time.time()
        batch = next(batches)
        self.waited += time.time() - start
        return batch

    def asked(self) -> float:
        """What signals asked of this rank since the last step, for the other ranks to know: SAVE, STOP, both or 0."""
        save, self.save_asked = self.save_asked, False
        return SAVE * save + STOP * (self.stop_signal != 0)

    def after_step(self, stats: torch.Tensor, lr: float, files: Callable[[], list[str]]) -> None:
        """Counts the step, reads the flags of an earlier one, saves and stops where asked.

        files() names the images of this rank's batch, for the message about a loss that is not finite.
        """
        event = None
        if self.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            stats = host.copy_(stats, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((stats, event, lr, self.epoch, self.step, files))
        self.step += 1
        self._read_flags(self.lag)
        self._progress(lr)
        if self.stop_agreed or self.save_agreed or (self.args.save_steps and self.step % self.args.save_steps == 0):
            self.save_agreed = False
            self.save()
        if self.stop_agreed:
            self._stop()

    def _read_flags(self, lag: int) -> None:
        while len(self.pending) > lag:
            stats, event, lr, epoch, step, files = self.pending.popleft()
            if event is not None:
                event.synchronize()
            loss, bad, asked = stats.tolist()
            self.stop_agreed |= asked >= STOP
            self.save_agreed |= asked % STOP > 0
            if bad:
                self.skipped_steps += 1
                self.skipped_in_a_row += 1
                if self.amp != "fp16" or self.skipped_in_a_row > MAX_SKIPPED:
                    names = self._of_all_ranks(files())
                    self.log({"status": "failed", "reason": "loss or gradient not finite", "epoch": epoch, "step": step, "lr": lr, "files": names})  # fmt: skip
                    raise RunError(
                        f"loss or gradient not finite at epoch {epoch}, step {step}, lr {lr:g}; nothing of that step was applied."
                        f" Its images: {', '.join(names[:4])}, ... (all {len(names)} in {self.out / 'log.jsonl'})"
                    )
            else:
                self.skipped_in_a_row = 0
                self.loss_sum += loss
                self.loss_count += 1
                self.last_loss = loss

    def _progress(self, lr: float) -> None:
        loss = getattr(self, "last_loss", float("nan"))
        if self.bar is not None:
            self.bar.update(self.images_per_step)
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
        elif self.rank == 0 and time.time() - self.last_line > 30:
            self.last_line = time.time()
            done, rate = self.step - self.first_step, (self.step - self.first_step) / (time.time() - self.epoch_start)
            left = (self.total_steps - self.step + (self.recipe.epochs - self.epoch - 1) * self.total_steps) / max(rate, 1e-9)
            self.say(
                f"epoch {self.epoch} step {self.step}/{self.total_steps}  loss {loss:.4f}  lr {lr:.2e}  {done * self.images_per_step / (time.time() - self.epoch_start):.0f} img/s  ETA {datetime.timedelta(seconds=int(left))}"
            )

    def end_of_training_epoch(self) -> dict:
        """Figures of the epoch's training part; saves `last.pt`, from which a resumed run goes straight to evaluation."""
        self._read_flags(0)
        seconds, done = time.time() - self.epoch_start, self.step - self.first_step
        if self.bar is not None:
            self.bar.close()
        self._check_same_weights()
        if done or not (self.out / "last.pt").exists():
            self.save()
        if self.stop_agreed:
            self._stop()
        waiting = self.waited / seconds if done else 0.0
        if waiting > 0.3 and self.rank == 0:
            self.say(f"warning: {waiting:.0%} of this epoch was waiting for data; raise --workers (now {self.workers})")
        return {
            "epoch": self.epoch,
            "step": (self.epoch + 1) * self.total_steps,
            "train_loss": self.loss_sum / max(self.loss_count, 1),
            "images_per_s": done * self.images_per_step / seconds if done else None,
            "waiting_for_data": waiting,
            "skipped_steps": self.skipped_steps,
        }

    def end_of_epoch(self, record: dict, score: float | None) -> None:
        """Logs the epoch, keeps `best.pt` if `score` is the highest so far, and moves on to the next epoch."""
        if score is not None and score > self.best:
            self.best = score
            self._on_rank_0(lambda: checkpoint.save_copy(self.out / "last.pt", self.out / "best.pt"))
        self.log(record)
        self.say("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items() if v is not None))
        if self.writer is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self.writer.add_scalar(key, value, self.epoch)
            self.writer.flush()
        self.epoch, self.step, self.loss_sum, self.loss_count = self.epoch + 1, 0, 0.0, 0

    def finish(self) -> None:
        self.log({"status": "completed", "epochs": self.recipe.epochs, "best": self.best})

    def check_stop(self) -> None:
        """Ends the run if any rank was asked to, with what is on disk (before training, and during evaluation)."""
        asked = torch.tensor([float(self.stop_signal != 0)], device=self.device)
        if self.world > 1:
            dist.all_reduce(asked)
        if asked.item():
            self._stop()

    # -- saving and stopping

    def _counters(self) -> dict:
        """Where the run is."""
        rng = {"torch": torch.get_rng_state(), "python": random.getstate()}
        names = ("epoch", "step", "best", "loss_sum", "loss_count", "skipped_steps", "log_bytes")
        return {**{name: getattr(self, name) for name in names}, "rng": rng}

    def _identity(self) -> dict:
        """What the run is."""
        return {
            "method": self.method,
            "model_name": self.args.model,
            "seed": self.args.seed,
            "recipe": plain_recipe(self.recipe),
            "data": self.data_info,
            "world_size": self.world,
            "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__), "python": sys.version.split()[0]},
        }

    def save(self) -> None:
        """Writes last.pt (the one before becomes previous.pt); only rank 0 writes."""
        self._read_flags(0)  # raises if what would be saved comes after a broken step
        state = {key: part if part is None else part.state_dict() for key, part in self.parts.items()}

        def write() -> None:
            checkpoint.save(
                {**state, **self._counters(), **self._identity()},
                self.out / "last.pt",
                keep=self.out / "previous.pt",
            )

        self._on_rank_0(write)

    def _on_signal(self, number: int, _frame) -> None:
        if self.stop_signal and number == signal.SIGINT:  # the second ctrl-C: now
            self._unlock()
            _quit(130)
        self.stop_signal = number
        if not self.started:  # nothing to save yet, or ever
            raise Stopped(int(number))

    def _on_usr1(self, _number: int, _frame) -> None:
        self.save_asked = True  # Slurm's warning before the time is up: last.pt is written after this step

    def _stop(self) -> None:
        number = self.stop_signal or signal.SIGTERM
        self.log({"status": "preempted", "signal": int(number), "epoch": self.epoch, "step": self.step})
        if hasattr(self, "parts") and (self.out / "last.pt").exists():
            self.say(
                f"stopped by signal {int(number)} at epoch {self.epoch}, step {self.step}; the same command with --resume auto --out {self.out} goes on"
            )
        raise Stopped(int(number))

    def _unlock(self) -> None:
        if self.locked:
            with contextlib.suppress(OSError):
                (self.out / "lock").unlink()
            self.locked = False

    def close(self, status: int) -> None:
        if self.bar is not None:
            self.bar.close()
        if status in (1, 2) and self.started:  # a refused start leaves the log of the run that was there alone
            self.log({"status": "failed", "exit": status, "epoch": self.epoch, "step": self.step})
        self._unlock()
        if status == 0 and dist.is_initialized() and dist.get_backend() == "nccl":
            dist.destroy_process_group()


def _compared(recipe: dict, seed: int, data: dict) -> dict:
    """What must be the same when a run goes on."""
    others = {k: v for k, v in data.items() if k not in ("classes", "digest", "val_images")}
    return {**recipe, "seed": seed, "data": data["digest"], "classes": len(data["classes"]), **others}


def plain_recipe(recipe) -> dict:
    return checkpoint.plain(dataclasses.asdict(recipe))


def _json_safe(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return value


def _process_start(pid: int) -> str:
    """When process `pid` started, in clock ticks, "" if there is none ("alive" where the system does not tell)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return "alive"
