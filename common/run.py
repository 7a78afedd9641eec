"""One run: ranks, output folder, log, progress, signals, checkpoints and resuming. What decides the result (order,
augmentation, learning rate, random draws) is a pure function of (seed, epoch, step): a run resumes exactly."""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import importlib.util
import json
import math
import multiprocessing.util
import os
import random
import select
import shutil
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torchvision
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

from common import checkpoint
from common.cli import differences
from common.errors import RunError, UserError, one_line, terminal
from common.images import IMAGENET, PIXELS, use_pixels

FLAG_LAG = 3  # steps after which the host reads a step's flags from a GPU: long done by then, so nothing waits
LEASE = 120.0  # seconds after which a lock that its owner on another host has not renewed no longer counts
QUIET = 40.0  # seconds without a line, where no bar is drawn, after which a step is said to be at work
SAVE, STOP = 1.0, 2.0**16  # what a signal asks of a rank; a sum over ranks tells both
COUNTERS = ("epoch", "step", "best", "loss_sum", "loss_count", "skipped_steps", "log_bytes")  # kept in checkpoints
MAX_SKIPPED = 20  # consecutive fp16 overflows before the run stops
LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "nccl", "socket")
_CURRENT: list = []  # this process' Run
_STORE: list = []  # where its ranks meet


def launch(main: Callable[[], None]) -> None:
    """Runs a script's main and ends the process, whatever main ended by and whatever still runs beside it."""
    # A closed one is None; no file of ours shall take its place.
    sys.stdin, sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdin, sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # it may know ASCII only
    multiprocessing.util.get_temp_dir()  # else each worker makes one of its own, and is killed before it removes it
    status = 1
    try:
        status = outcome(main)
    except SystemExit as end:  # a signal, while it was told how main ended
        status = outcome(functools.partial(sys.exit, end.code))
    finally:
        _quit(status)


def outcome(main: Callable[[], None]) -> int:
    """main()'s exit status: 0, 1, 2 or 128 + signal. A failure is told in one line; unforeseen: with its traceback."""
    status, line, rank = 1, None, int(os.environ.get("RANK", 0))
    try:
        main()
        status = 0
    except (SystemExit, KeyboardInterrupt) as end:
        status = getattr(end, "code", 130) or 0
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except (UserError, RunError) as error:
        status, line = 2 if isinstance(error, UserError) else 1, str(error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        with contextlib.suppress(RuntimeError):  # one rank tells it; before they are connected, rank 0
            if _STORE[-1].add("reported_error", 1) > 1 if _STORE else rank > 0:
                line = None
    except BaseException as error:
        if isinstance(end := error.__context__, SystemExit) and end.code:  # a signal's; this was raised on its way out
            status = end.code
        elif isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            whose = "the GPU's" if isinstance(error, torch.cuda.OutOfMemoryError) else "the machine's"
            line = f"{whose} memory is full; lower --micro-batch (same result) or --img-size, or use --grad-checkpoint"
        elif isinstance(error, RuntimeError) and dist.is_initialized() and any(s in str(error).lower() for s in LOST):
            time.sleep(3)  # the rank that failed speaks first
            where = "".join(f" at epoch {run.epoch}, step {run.step}" for run in _CURRENT if run.started)
            line = (f"lost contact with another rank{where}: it died or hangs (see its own message); "
                    "--resume auto goes on from the last checkpoint")
        else:
            traceback.print_exc()
    if line:
        with contextlib.suppress(OSError):
            print(f"error (rank {rank}):" if rank else "error:", *line.splitlines(), file=sys.stderr, flush=True)
    while _CURRENT:
        _CURRENT.pop().close(status)
    return status


def _quit(status: int) -> None:
    """Ends the process and its data loading workers at once. Nothing is taken down: workers ignore the SIGTERM by which
    Python would wait for them, gloo can block (torch 2.6) or abort (2.15), and by now everything is written."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise that a worker was killed
    for child in multiprocessing.active_children():
        child.kill()

    def tidy() -> None:  # a leak of semaphores of workers that were not forked would be told
        for last in (sys.stdout.flush, sys.stderr.flush, functools.partial(multiprocessing.util._run_finalizers, 0)):
            with contextlib.suppress(Exception):
                last()

    with contextlib.suppress(RuntimeError):  # no thread can be started
        beside = threading.Thread(target=tidy, daemon=True)  # nobody may read, or a signal came while we held a lock
        beside.start()
        beside.join(1)
    shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)  # which they have in common
    os._exit(status)


def connect(device: str | None, timeout: int) -> tuple[torch.device, int, int]:
    """(device, rank, world size) from torchrun's environment; one process without it. UserError for half of it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given, missing = ([n for n in names if (n in os.environ) == there] for there in (True, False))
    if given and missing:
        raise UserError(f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with torchrun")
    rank, world, local = (int(os.environ[n]) for n in names[:3]) if given else (0, 1, 0)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no GPU here; leave the flag out to run on the CPU")
    device = device or ("cuda" if gpus else "cpu")
    if device == "cuda":
        if local >= gpus:
            raise UserError(f"torchrun starts more ranks per node than there are GPUs ({gpus}); lower --nproc_per_node")
        device, torch.backends.cudnn.benchmark = f"cuda:{local}", True  # the fastest kernel of those measured
        torch.cuda.set_device(local)
    if given and not dist.is_initialized():
        wait, backend = datetime.timedelta(seconds=timeout), "nccl" if "cuda" in device else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", timeout=wait))
            # Ranks that torchrun starts again find the store of those that died: addresses in it would lead nowhere.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
            _STORE.append(store)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
                            f"{one_line(error, 200)}; use torchrun --standalone or another --master-port") from None
    return torch.device(device), rank, world


class AllGather(torch.autograd.Function):
    """(B, ...) of each rank -> (world B, ...) of all, rank 0's first; unlike dist.all_gather it has a gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return _CURRENT[-1].gather(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class SyncedBatchNorm(torch.nn.SyncBatchNorm):
    """BatchNorm of the batches (B, C, ...) of all ranks together; same state dict. torch's needs a GPU and waits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not self.training:
            # torch looks for ranks whose batch is empty, of which there are none, unless a CUDA graph is captured.
            with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
                return super().forward(x)
        everything = AllGather.apply(x)  # as many images of every rank
        return _BatchNorm.forward(self, everything).narrow(0, dist.get_rank() * len(x), len(x))


class Run:
    """State and bookkeeping of one training run. All its methods are called by all ranks alike."""

    def __init__(self, method: str, args, recipe, paper, content: dict | None = None):
        use_pixels(args, content or {})
        self.method, self.args, self.recipe, self.paper = method, args, recipe, paper
        self.device, self.rank, self.world = connect(args.device, args.timeout)
        exact = args.amp or self.device.type == "cpu" or args.eval or args.eval_data or args.predict
        self.amp = args.amp or ("fp32" if exact else "bf16")
        if "cuda" in str(self.device) and self.amp == "bf16" and not torch.cuda.is_bf16_supported(False):
            raise UserError(f"--amp bf16: {torch.cuda.get_device_name()} has no bf16 units; use --amp fp16 or fp32")
        if self.device.type == "cpu" and self.amp == "fp16":
            raise UserError("--amp fp16: not for the CPU; use --amp fp32")
        self.out = Path(args.out or f"runs/{method}_{args.model.replace('/', '_')}")
        self.best, self.loss_sum, self.last_loss, self.last_line = -math.inf, 0.0, math.nan, math.inf
        self.epoch = self.step = self.loss_count = self.skipped_in_a_row = self.skipped_steps = self.log_bytes = 0
        self.save_asked = self.stop_agreed = self.save_agreed = self.started = self.log_failed = False
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.most_workers = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # that help
        self.workers = self.most_workers if args.workers is None else args.workers  # loader processes of this rank
        self.lag = FLAG_LAG if self.device.type == "cuda" else 0
        # A GPU's convolutions in 16 bits take channels side by side; planes would be copied in every step.
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.pending: list[tuple] = []  # steps whose flags the host has not read
        self.bar, self.writer, self.lock, self.stop_signal = tqdm(disable=True), None, None, 0  # a number: gathered
        _CURRENT.append(self)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if threading.current_thread() is threading.main_thread():  # others hear no signals
                signal.signal(number, self._on_signal)
        if getattr(args, "note", None):
            self.say(args.note)
        if args.device is None and self.device.type == "cpu":
            self.say("no GPU found: running on the CPU")

    def say(self, text: str) -> None:
        """One line on rank 0's standard output; a closed one does not end the run."""
        if self.rank == 0:
            try:
                tqdm.write(text)
            except OSError:
                sys.stdout = open(os.devnull, "w")

    def log(self, record: dict) -> None:
        """One line of strict JSON in log.jsonl (numbers that are not finite become null)."""
        if self.rank == 0:
            finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
            try:
                with open(os.devnull if self._taken_over() else self.out / "log.jsonl", "ab") as f:
                    f.write(json.dumps(finite).encode() + b"\n")
                    self.log_bytes = f.tell()
            except OSError as error:
                if not self.log_failed:
                    self.say(f"warning: cannot write {self.out / 'log.jsonl'} ({error.strerror}); training goes on")
                self.log_failed = True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (n, ...), rank 0's first: (world n, ...), the same on all ranks. No gradient."""
        parts = [tensor] if self.world == 1 else [torch.empty_like(tensor) for _ in range(self.world)]
        if self.world > 1:
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def together(self, action: Callable):
        """action() on every rank, and what it returns there; if it fails on one, all stop."""
        result = error = None
        try:
            result = action()
        except (UserError, RunError) as raised:
            error = raised
        if self.gather(torch.tensor([error is not None], device=self.device)).any():
            raise error or SystemExit(1)  # the rank where it failed says why
        return result

    def on_rank_0(self, action: Callable):
        """action() on rank 0, and what it returns, while the others wait."""
        return self.together(lambda: action() if self.rank == 0 else None)

    def first(self, action: Callable):
        """action() of every rank, rank 0's before the others': what it builds (an index), they find."""
        result = self.on_rank_0(action)
        return result if self.rank == 0 else action()

    def read(self, path: str | Path, flag: str) -> dict:
        """A checkpoint's content. One rank of each node fetches and checks the file, the others share its pages."""
        leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
        content = self.together(lambda: checkpoint.load(path, flag) if leads else None)
        return content if leads else checkpoint.load(path, flag, checked=True)

    def _check_same_weights(self) -> None:
        """RunError if ranks hold different weights: they would diverge without a word."""
        sums = torch.stack([p.detach().double().sum() for p in self.parts["model"].parameters()]).sum()[None]
        if self.world > 1 and (self.gather(sums) != sums).any():
            raise RunError(f"ranks hold different weights at epoch {self.epoch}, step {self.step}; go on by --resume")

    def open_folder(self) -> None:
        """Takes the output folder; UserError if it cannot be written or holds another run."""
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and self.args.resume is None:
            self.args.resume = "auto"  # torchrun --max-restarts started this process again
        self.on_rank_0(self._open_folder)

    def _open_folder(self) -> None:
        """One writer. The kernel frees the lock of a process that ends; another host's, or without locks, ages."""
        where, here = f"--out {self.out}", f" on {os.uname().nodename}"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = open(self.out / "lock", "a+")
            os.utime(self.out)  # to now, by the file system's clock, which hosts share
            age = self.out.stat().st_mtime - os.fstat(lock.fileno()).st_mtime
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = True
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                ended = False  # a file system without locks
            if (holder := self._holder(lock)) and age < LEASE:
                if not holder.endswith(here) or not ended and os.path.exists(f"/proc/{holder.split()[1]}"):
                    raise BlockingIOError
        except BlockingIOError:
            hint = f"choose another or stop that run; dead on another host, it is forgotten after {LEASE:.0f} s"
            holder = self._holder(lock) or "another run"
            raise UserError(f"{where}: in use by {holder}, alive {age:.0f} s ago; {hint}") from None
        except OSError as error:
            raise UserError(f"{where}: cannot be written ({error.strerror})") from None
        self.heard, self.wakeup = socket.socketpair()  # where a signal is heard at once, not when torch returns
        self.wakeup.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self.woken = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        self.lock, self.owner = lock, f"process {os.getpid()}{here}"
        lock.truncate(0)
        print(self.owner, file=lock, flush=True)
        threading.Thread(target=self._watch, daemon=True).start()
        if (self.out / "last.pt").exists() and self.args.resume is None:
            raise UserError(f"{where}: holds a run already; --resume auto goes on with it, another --out starts anew")
        for leftover in self.out.glob("*.tmp"):  # of a write that was killed
            leftover.unlink(missing_ok=True)

    def _watch(self) -> None:
        """Beside the steps, which can be long: renews the lock, tells that a signal was heard or a step is at work."""
        said, heard = 0.0, b""
        while self.lock is not None:
            ready = select.select([self.heard], [], [], LEASE / 8)[0]
            with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody listens; the lock is being let go
                new = self.heard.recv(99) if ready else b""
                if (heard := heard + new).count(signal.SIGINT) > 1:
                    time.sleep(3)  # by then the main thread has ended the run, unless it is in one long call
                    self.stop_signal = int(signal.SIGINT)
                    self._on_signal(signal.SIGINT, None)
                listened = select.select([], [1, 2], [], 0)[1]  # to wait for a reader would hold up the lock
                for number in {signal.SIGTERM, signal.SIGINT} & set(new) if self.started and 2 in listened else ():
                    os.write(2, f"signal {number:d}: ends after this step\n".encode())
                if 1 in listened and self.bar.disable and (now := time.time()) - max(said, self.last_line) > QUIET:
                    said, seconds = now, now - self.last_line
                    self.say(f"epoch {self.epoch} step {self.step}/{self.data.steps}: at work for {seconds:.0f} s")
                self._taken_over() or os.utime(self.lock.fileno())

    def _holder(self, lock) -> str:
        """Who the lock names, read by our own handle of it: to close another one would free the kernel's lock."""
        path = self.out / "lock"  # its last owner may have removed it just now, and somebody have made another
        with contextlib.suppress(OSError):  # another host did, on a network's file system: our handle is stale
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return os.pread(lock.fileno(), 999, 0).decode().strip()
        return "another run"

    def _taken_over(self) -> str:
        """Whose the folder is by now, if another's: a run that stood still passed for dead. A removed one is remade."""
        held = self.lock is not None and os.path.exists(self.out / "lock")
        return holder if held and (holder := self._holder(self.lock)) != self.owner else ""

    def _unlock(self) -> None:
        if self.lock is not None:
            with contextlib.suppress(OSError), self.lock:
                if self._holder(self.lock) == self.owner:
                    (self.out / "lock").unlink()
            self.lock = None
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(self.woken)

    def prepare(self, model: torch.nn.Module, micro_batch: int) -> torch.nn.Module:
        """The model as it is trained: BatchNorm synchronised, compiled if asked for, wrapped for several ranks."""
        if micro_batch == 1 and any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise UserError("--micro-batch 1: this model's BatchNorm needs at least 2 images per forward pass")
        if self.args.compile:
            cuda = self.device.type == "cuda"
            if not (importlib.util.find_spec("triton") if cuda else any(map(shutil.which, ("c++", "g++", "clang++")))):
                raise UserError(f"--compile: needs {'the package triton' if cuda else 'a C++ compiler'}, not found")
            model.compile()
        if self.world > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
            # They are equal on all ranks by themselves: BatchNorm's statistics are synchronised, memories gathered.
            model.broadcast_buffers = False  # as an argument it is deprecated
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; parameters and buffers stay what they are
            for module in model.modules():
                if type(module) is torch.nn.SyncBatchNorm:
                    module.__class__ = SyncedBatchNorm
            if self.device.type == "cpu":
                model.register_comm_hook(None, self._average)
        return model

    def _average(self, _, bucket) -> torch.futures.Future[torch.Tensor]:
        """Gradients summed in the ranks' order: gloo's depends on their place in a bucket, which is another one in a
        process' first step; 3 ranks would not resume bit-identical."""
        future = torch.futures.Future()
        future.set_result(sum(self.gather(bucket.buffer()).chunk(self.world)) / self.world)
        return future

    def start(self, data: dict, **parts) -> None:
        """Registers what a checkpoint holds, resumes if asked to, and checks that all ranks hold the same weights.
        data: what may not change when the run goes on; parts: model, optimizer and what else has a state (or None)."""
        self.parts, self.data_info, args = parts, data | PIXELS, self.args
        if args.resume:
            self._resume()
        self._check_same_weights()
        if args.tensorboard and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: the package is not installed; pip install tensorboard") from None
            self.writer = SummaryWriter(self.out, purge_step=self.epoch)
        if self.rank == 0:  # what was logged after the checkpoint is forgotten
            with contextlib.suppress(OSError), open(self.out / "log.jsonl", "ab") as f:  # log() says so, once
                f.truncate(min(self.log_bytes, f.tell()))
        self.started = True
        self.log({"status": "started", "epoch": self.epoch, "step": self.step, "seed": args.seed,
                  "world_size": self.world, "recipe": dataclasses.asdict(self.recipe),
                  "differs_from_paper": differences(self.recipe, self.paper), "allowed_changes": args.allow_changes,
                  **{k: v for k, v in self.data_info.items() if k not in ("classes", "digest")}})

    def _newest_checkpoint(self) -> tuple[str, dict | None]:
        """(name, content) of what --resume asks for; no content if there is nothing."""
        if self.args.resume != "auto":
            return self.args.resume, self.read(self.args.resume, "--resume")
        found = [path for path in (self.out / "last.pt", self.out / "previous.pt") if path.exists()]
        for path in found:
            try:
                return path.name, self.read(path, "--resume")
            except (UserError, SystemExit) as error:
                if self.stop_signal:
                    raise  # asked to end while it read
                self.say(f"warning: {error if isinstance(error, UserError) else f'{path}: not read on every node'}")
        if found:
            raise UserError(f"--resume auto: no good checkpoint in {self.out}; start anew with another --out")
        return "", None

    def _resume(self) -> None:
        name, saved = self._newest_checkpoint()
        if saved is None:
            return self.say(f"nothing to resume in {self.out}: starting from the beginning")
        flag, own = f"--resume {self.args.resume}", self._state()
        held, asked = (f"{state.get('method')} {state.get('model_name')}" for state in (saved, own))
        if held != asked and "method" in saved:
            raise UserError(f"{flag}: holds {held}, you asked for {asked}")
        if lacking := [key for key in own if key not in saved or own[key] != {} and saved[key] == {}]:
            what = "weights only" if "optimizer" in lacking else f"no {lacking[0]}"
            raise UserError(f"{flag}: holds {what}; to start from its weights use --weights")
        then, now = ({**IMAGENET, **s["recipe"], "seed": s["seed"], **s["data"], "data": s["data"]["digest"],
                      "classes": len(s["data"]["classes"])} for s in (saved, own))
        differ = [k for k in {**then, **now} if then.get(k) != now.get(k) and k not in ("digest", "path", "val_images")]
        then["data"], now["data"] = then.get("path"), f"{now.get('path')} with other files or labels"
        change = "; ".join(f"{k} was {then.get(k)}, now {now.get(k)}" for k in differ)
        if change and not self.args.allow_changes:
            raise UserError(f"{flag}: the run was started differently: {change}; repeat its flags or --allow-changes")
        checkpoint.load_weights(self.parts["model"], saved["model"], flag)
        shapes = functools.partial(tree_map, lambda value: getattr(value, "shape", None))
        for key, part in self.parts.items():
            try:
                if key == "optimizer":  # the options of its groups are this recipe's
                    groups = zip(own[key]["param_groups"], saved[key]["param_groups"])
                    saved[key] = {**saved[key], "param_groups": [new | {"lr": old["lr"]} for new, old in groups]}
                if part is not None and key != "model":
                    if shapes(saved[key]) != shapes(own[key]):  # torch takes any, and its kernels trust it
                        raise ValueError("other entries or shapes")
                    part.load_state_dict(saved[key])
            except (TypeError, ValueError, KeyError, RuntimeError) as error:  # TypeError: it is None
                raise UserError(f"{flag}: its {key} state does not fit ({one_line(error)}); try --weights") from None
        vars(self).update({key: saved[key] for key in COUNTERS})
        torch.set_rng_state(saved["rng"]["torch"])
        random.setstate(saved["rng"]["python"])
        self.say(f"resumed from {name} at epoch {self.epoch}, step {self.step}{change and ' with changes: ' + change}")
        with contextlib.suppress(OSError):
            if saved["record"] and not change and '"completed"' in (self.out / "log.jsonl").read_text():
                raise SystemExit(self.say("it is complete: nothing is left to do"))

    def rng(self, purpose: str, number: int) -> random.Random:
        """A generator of this step, the same on all ranks."""
        return random.Random(f"{purpose}-{self.args.seed}-{self.epoch}-{self.step}-{number}")

    def steps(self, data) -> Iterator[int]:
        """The optimizer steps of this epoch that are still to do, with a progress bar on rank 0. data: TrainingData."""
        self.data, self.first_step, self.epoch_start = data, self.step, time.time()
        self.last_line = self.epoch_start
        data.begin(self.epoch, self.step)
        batch, hidden = self.recipe.batch_size, self.rank > 0 or not terminal()
        self.bar = tqdm(desc=f"epoch {self.epoch}", total=data.steps * batch, initial=self.step * batch, unit="img",
                        unit_scale=True, dynamic_ncols=True, leave=False, disable=hidden)
        while self.step < data.steps:
            yield self.step

    def asked(self) -> float:
        """What signals asked of this rank since the last step, for the other ranks to know: SAVE, STOP, both or 0."""
        save, self.save_asked = self.save_asked, False
        return SAVE * save + STOP * (self.stop_signal != 0)

    def after_step(self, stats: torch.Tensor, lr: float) -> None:
        """Counts and shows a step, reads an earlier one's flags, saves and stops if asked. stats: Precision.step's."""
        event = None
        if self.device.type == "cuda":
            stats = torch.empty(3, pin_memory=True).copy_(stats, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        self.pending.append((stats, event, lr, self.epoch, self.step, self.data.seen))
        self.step += 1
        self._read_flags(self.lag)
        self.bar.update(self.recipe.batch_size)
        self.bar.set_postfix(loss=f"{self.last_loss:.4f}", lr=f"{lr:.2e}", refresh=False)
        if self.bar.disable and time.time() - self.last_line > 30:
            self.last_line, total = time.time(), self.data.steps
            rate = (self.step - self.first_step) / (time.time() - self.epoch_start)  # steps per second
            left = datetime.timedelta(seconds=int(((self.recipe.epochs - self.epoch) * total - self.step) / rate))
            where, speed = f"epoch {self.epoch} step {self.step}/{total}", f"{rate * self.recipe.batch_size:.0f} img/s"
            self.say(f"{where}  loss {self.last_loss:.4f}  lr {lr:.2e}  {speed}  ETA {left}")
        if self.stop_agreed or self.save_agreed or (self.args.save_steps and self.step % self.args.save_steps == 0):
            self.save()

    def _read_flags(self, lag: int) -> None:
        while len(self.pending) > lag:
            stats, event, lr, epoch, step, seen = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            loss, bad, asked = stats.tolist()
            self.stop_agreed |= asked >= STOP
            self.save_agreed |= asked % STOP > 0
            if not bad:
                self.skipped_in_a_row, self.last_loss = 0, loss
                self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
                continue
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
            if self.amp != "fp16" or self.skipped_in_a_row > MAX_SKIPPED:
                names = [self.data.source.name(i) for i in self.gather(torch.cat(seen)).tolist()]
                reason = "loss or gradient not finite"
                self.log({"status": "failed", "reason": reason, "epoch": epoch, "step": step, "lr": lr, "files": names})
                raise RunError(f"{reason} at epoch {epoch}, step {step}, lr {lr:g}; nothing of that step was applied. "
                               f"Its images: {', '.join(names[:4])}, ... (all {len(names)} in {self.out}/log.jsonl)")

    def end_of_training_epoch(self, lr: float) -> dict:
        """Figures of the training epoch, with the next learning rate; a run that resumes from its last.pt evaluates."""
        self._read_flags(0)
        seconds, done, self.last_line = time.time() - self.epoch_start, self.step - self.first_step, math.inf
        self.bar.close()
        self._check_same_weights()
        unsaved = torch.tensor([not (self.out / "last.pt").exists()], device=self.device)
        if done or self.gather(unsaved)[0]:  # as rank 0 sees it: all ranks save, or none
            self.save()
        waiting = self.data.waited / seconds if done else 0.0
        if waiting > 0.3 and done >= 10 and self.workers < self.most_workers:  # the first steps always wait
            self.say(f"warning: {waiting:.0%} of this epoch was waiting for data; raise --workers (now {self.workers})")
        return {"epoch": self.epoch, "step": (self.epoch + 1) * self.data.steps,
                "train_loss": self.loss_sum / max(self.loss_count, 1),
                "images_per_s": done * self.recipe.batch_size / seconds if done else None,
                "waiting_for_data": waiting, "skipped_steps": self.skipped_steps, "lr": lr}

    def end_of_epoch(self, record: dict, score: float | None) -> None:
        """Logs the epoch; its weights become, with its record, best.pt if no `score` was higher, at the end last.pt."""
        if score is not None and score >= self.best:
            self.best = score
            self.save("best.pt", record)  # first: if it fails, a run that resumes from last.pt comes here again
        if self.epoch + 1 == self.recipe.epochs:
            self.save("last.pt", record)
        self.log(record)
        figures = {k: v for k, v in record.items() if v is not None}
        self.say("  ".join(f"{k} {f'{v:.5g}' if isinstance(v, float) else v}" for k, v in figures.items()))
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, self.epoch)
            self.writer.flush()
        self.epoch, self.step, self.loss_sum, self.loss_count = self.epoch + 1, 0, 0.0, 0

    def _state(self) -> dict:
        parts = {key: part if part is None else part.state_dict() for key, part in self.parts.items()}
        versions = {m.__name__: str(m.__version__) for m in (torch, torchvision)} | {"python": sys.version.split()[0]}
        return {**parts, **{name: getattr(self, name) for name in COUNTERS}, "versions": versions,
                "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
                "method": self.method, "model_name": self.args.model, "seed": self.args.seed,
                "recipe": dataclasses.asdict(self.recipe), "data": self.data_info, "world_size": self.world}

    def save(self, name: str = "last.pt", record: dict | None = None) -> None:
        """Writes last.pt (the one before becomes previous.pt), or `name` with its epoch's record; stops if agreed."""
        self._read_flags(0)  # raises if what would be saved comes after a broken step
        self.save_agreed = False
        self.on_rank_0(lambda: self._write(self.out / name, record))
        if self.stop_agreed:
            self._stop()

    def _write(self, path: Path, record: dict | None) -> None:
        if holder := self._taken_over():
            raise RunError(f"--out {self.out}: was taken over by {holder}; nothing was written, this run ends")
        content = self._state() | {"record": record}
        if path.name == "best.pt":  # what is needed to use the network; last.pt holds what the run needs
            content = {k: v for k, v in content.items() if k not in {*self.parts, "rng"} - {"model", "ema"}}
        checkpoint.save(content, path, keep=None if record else path.with_name("previous.pt"))

    def check_stop(self) -> None:
        """Ends the run if any rank was asked to, with what is on disk (before training, and during evaluation)."""
        if self.gather(torch.tensor([self.stop_signal], device=self.device)).any():
            self._stop()

    def _on_signal(self, number: int, _frame) -> None:
        if number == signal.SIGUSR1:  # Slurm's warning before the time is up: last.pt is written after this step
            self.save_asked = True
            return
        if number == signal.SIGHUP:  # the terminal is gone, the run is not
            for fd in (fd for fd in (1, 2) if stat.S_ISCHR(os.fstat(fd).st_mode)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            return
        if self.stop_signal and number == signal.SIGINT:  # the second ctrl-C: now
            self.log({"status": "preempted", "signal": int(number), "epoch": self.epoch, "step": self.step})
            self._unlock()
            _quit(130)
        self.stop_signal = int(number)
        if not self.started and self in _CURRENT:  # nothing to save yet, or ever; not while it is closed
            raise SystemExit(128 + number)

    def _stop(self) -> None:
        number = int(self.stop_signal or signal.SIGTERM)
        self.log({"status": "preempted", "signal": number, "epoch": self.epoch, "step": self.step})
        if self.started and (self.out / "last.pt").exists():
            hint = f"the same command with --resume auto --out {self.out} goes on"
            self.say(f"stopped by signal {number} at epoch {self.epoch}, step {self.step}; {hint}")
        raise SystemExit(128 + number)

    def close(self, status: int) -> None:
        self.bar.close()
        if status in (1, 2) and self.started:  # a refused start leaves the log of the run that was there alone
            self.log({"status": "failed", "exit": status, "epoch": self.epoch, "step": self.step})
        self._unlock()
        if status == 0 and dist.is_initialized() and dist.get_backend() == "nccl":
            dist.destroy_process_group()
