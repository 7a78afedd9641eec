"""A night of abuse: runs that are killed, stopped, starved and fed damaged files, and what is left of them.

    python tests/soak.py --work FOLDER [--hours 3] [--only deit files ...]     prints one table; goes on if stopped
    python tests/soak.py --work FOLDER --trial deit-7                          that trial again; its folder is kept

By hand; SIGINT stops it. A trial is a random configuration, a function of its name: run once undisturbed, then torn up
to 20 times, and compared. Its ranks are forked, as in test_run.py. Not done: the machine's own clock (a run's own is
set), a full file system (a limit on files' sizes needs no rights and does the same to a writer), power cuts, several
machines, torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import torch
from conftest import NANO, SCRIPTS, encoded, fewer_shapes, load, picture, same_training, write_folder, write_tar
from PIL import features
from test_run import child, free_port, start_ranks

from common import checkpoint
from common.data import Samples
from common.errors import RunError, UserError
from common.sources import Files, open_data

BATCH, EPOCHS, LIVES = 24, 4, 20  # images per step, which 1 to 4 ranks can share; epochs of 4 steps; lives of a trial
TIMEOUT, LONGEST = 60, 900  # seconds that ranks wait for each other, and that any life may take
# On other numbers of ranks the loss may differ by 1e-3 (fault list, F9); nobody says by what in bf16, rounded to 2^-8.
BOUND = {"fp32": 1e-3, "bf16": 2e-2}
OWN_FLAGS = {
    "deit": "--cutmix 1 --mix-group 2 --erasing 0.5 --augment rand",
    "grafit": "--mix-group 2",
    "cait": "--mixup 0.8 --mix-group 2",
    "resmlp": "--mixup 0.8 --mix-group 2 --repeats 2",
    "patchconvnet": "--cutmix 1 --mix-group 2",
    "trex": "--local-size 32 --local-crops 1 --memory-size 40 --hidden-layers 0",
    "deit3": "--mixup 0.8 --cutmix 1 --mix-group 2 --ema 0.9 --repeats 2",
}
EVENTS = {  # what comes over a run: (signal, whom it is sent to, exit statuses that may follow, what must be said)
    "kill": (SIGKILL, "all", {-SIGKILL, 1}, ""),  # 1: its worker was killed a moment earlier
    "kill a rank": (SIGKILL, "rank", {-SIGKILL, 1}, ""),
    "kill a worker": (SIGKILL, "worker", {1}, "worker"),
    "term": (SIGTERM, "ranks", {143, -SIGTERM}, ""),  # -SIGTERM: before the program listens
    "term a rank": (SIGTERM, "rank", {143}, ""),
    "stop": (SIGKILL, "all", {-SIGKILL, 1}, ""),  # stopped, and let go on for a while, before that
    "full disk": (None, "ranks", {1, 2}, "writ"),  # cannot write, cannot be written
    "bad image": (None, "ranks", {1}, ".jpg"),
    "clock": (SIGKILL, "all", {-SIGKILL, 1}, ""),
    "second run": (SIGKILL, "all", {-SIGKILL, 1}, ""),  # on the same folder: it is refused
}

# ---- Runs ------------------------------------------------------------------------------------------------------------


class Trial:
    """One configuration; `events` counts what was done to it, `faults` says what should not have been."""

    def __init__(self, name: str, work: Path):
        self.script, self.rng, self.work = name.split("-")[0], random.Random(name), work / name
        self.events, self.faults, self.pids, choice = Counter(), [], [], self.rng.choice
        self.difference = 0.0
        self.world, self.amp = choice([1, 2, 3, 4]), choice(["fp32", "bf16"])
        self.data, self.elsewhere = choice(["data", "data.tar", "shapes"]), choice([True, False, False])
        self.workers, self.save, self.cut = choice([0, 1, 2, 3]), choice([0, 1, 2, 3]), choice([1, 2, 3])
        self.config = (f"{self.world} ranks{', then others' * self.elsewhere}, {self.workers} workers, {self.amp}, "
                       f"{self.data}, {self.cut} micro-batches, --save-steps {self.save}")

    def command(self, out: str, world: int) -> list[str]:
        batchnorm = self.script in ("trex", "grafit")
        share = BATCH // world
        micro = share if (self.elsewhere and batchnorm) or share % (2 * self.cut) else share // self.cut
        flags = f"--model {NANO[self.script]} --recipe shapes --img-size 32 --epochs {EPOCHS} --warmup-epochs 0"
        flags += f" --lr 5e-4 --batch-size {BATCH} --micro-batch {micro} --workers {self.workers} --resume auto"
        flags += f" --save-steps {self.save} --device cpu --amp {self.amp} --timeout {TIMEOUT} {OWN_FLAGS[self.script]}"
        if not self.elsewhere and not batchnorm:
            flags += " --drop-path 0.2"  # drawn by each rank for itself
        data = "shapes" if self.data == "shapes" else self.work / self.data
        return [*flags.split(), "--data", str(data), "--out", str(self.work / out)]

    def start(self, out: str, world: int, jump: tuple | None = None) -> list[int]:
        """The pids of a run's ranks, each the leader of its session. jump: (after so many seconds, so many forward)."""

        def patch():
            if self.elsewhere:  # rounding would move values across ReLU's kink
                torch.nn.ReLU.forward = lambda self, x: torch.nn.functional.gelu(x)
            if jump:
                now, begin = time.time, time.time()
                time.time = lambda: now() + jump[1] * (now() - begin > jump[0])

        if world == 1:
            self.pids = [child(self.command(out, 1), script=self.script, patch=patch, log=self.work / f"{out}0.log")]
        else:
            self.pids = start_ranks(world, self.command(out, world), self.work, free_port(), patch, self.script)
        return self.pids

    def wait(self, pids: list[int], what: str, allowed=frozenset(), words: str = "") -> bool:
        """Waits for ranks; whether they have completed. A fault: other exit statuses than these, a traceback, none of
        `words` said, or any of their processes left a minute later."""
        statuses, end = {}, time.time() + LONGEST
        while len(statuses) < len(pids) and time.time() < end:
            for pid in set(pids) - set(statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        end = time.time() + 60
        while (left := in_sessions(pids)) and time.time() < end and len(statuses) == len(pids):
            time.sleep(0.05)
        send(left, SIGKILL)
        for pid in set(pids) - set(statuses):
            os.waitpid(pid, 0)
        found, said = sorted(statuses.values()), "".join(p.read_text(errors="replace") for p in self.work.glob("*.log"))
        for log in self.work.glob("*.log"):
            log.unlink()
        # multiprocessing's: in a worker without its parent, and in one whose memory the limit on files concerns too
        starved = said.count("in _feed")
        own = said.count("Traceback") > said.count("in _serve") + starved
        words = "worker" if starved or (what == "full disk" and "worker died or hung" in said) else words
        if left or own or not set(found) <= allowed | {0} or (any(found) and words not in said):
            self.faults.append(f"{what}: statuses {found}, {len(left)} processes left, said: {said[-1500:]}")
        return found == [0] * len(pids)

    def life(self, event: str, world: int, seconds: float) -> bool:
        """Starts the run anew, lets `event` come over it within about so many seconds; whether it was completed."""
        number, whom, allowed, words = EVENTS[event]
        log, pause, begin = self.work / "torn/log.jsonl", self.rng.uniform(0, seconds), time.time()
        jump = (pause / 2, self.rng.choice([40, 90_000, 3e8])) if event == "clock" else None
        with damaged(self.work, self.data, self.rng) if event == "bad image" else contextlib.nullcontext():
            pids = self.start("torn", world, jump)
            time.sleep(pause)
            if whom == "rank":  # before the run has begun the others cannot know
                while not (log.exists() and log.stat().st_mtime > begin) and len(in_sessions(pids)) >= world:
                    time.sleep(0.02)
                time.sleep(self.rng.uniform(0.1, seconds / 3))
            if event == "stop":
                send(in_sessions(pids), SIGSTOP)
                time.sleep(self.rng.uniform(0.2, 5))
                send(in_sessions(pids), SIGCONT)
                time.sleep(self.rng.uniform(0, seconds))
            elif event == "second run" and log.exists() and log.stat().st_mtime > begin:
                second = child(self.command("torn", 1), script=self.script, log=self.work / "second.log")
                if self.wait([second], event, {2}, "in use") and in_sessions(pids) >= set(pids):
                    self.faults.append("second run: was not refused")
            elif event == "full disk":
                size = self.rng.choice([10_000, 100_000, 1_000_000])  # the log on which the message goes still fits
                for pid in set(pids) & in_sessions(pids):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
            alive = in_sessions(pids)
            reached = {"all": alive, "ranks": pids, "rank": [self.rng.choice(pids)],
                       "worker": sorted(alive - set(pids))[:1]}[whom]
            if number:
                send(reached, number)
            completed = self.wait(pids, event, allowed, words)
        self.events[event] += not completed
        return completed

    def run(self) -> dict:
        shutil.rmtree(self.work, ignore_errors=True)
        for name in ("TMPDIR", "XDG_CACHE_HOME"):
            os.environ[name] = str(self.work / name)
            (self.work / name).mkdir(parents=True)
        tempfile.tempdir = None
        data = write_folder(self.work / "data", train=24)
        files = {str(p.relative_to(data)): p.read_bytes() for p in sorted(data.rglob("*.jpg"))}
        write_tar(self.work / "data.tar", files)
        begin = time.time()
        self.wait(self.start("whole", self.world), "undisturbed")
        self.leftovers()
        seconds = 0.35 * (time.time() - begin)
        kinds = ["kill"] * 6 + ["term"] * 2 + ["stop", "full disk", "clock", "second run"]
        kinds += ["bad image"] * (self.data != "shapes") + ["kill a worker"] * (self.workers > 0)
        for _ in range(LIVES):
            world = self.rng.randint(1, 4) if self.elsewhere else self.world
            several = ["kill a rank", "term a rank"] if world > 1 else []
            if self.life(self.rng.choice(kinds + several), world, seconds):
                break
        shutil.rmtree(self.work / "TMPDIR")  # what is killed leaves something there
        (self.work / "TMPDIR").mkdir()
        self.wait(self.start("torn", self.world), "the last life")
        self.leftovers()
        self.compare()
        row = {"config": self.config, "events": self.events, "faults": self.faults, "identical": not self.elsewhere}
        return row | {"difference": self.difference, "seconds": round(time.time() - begin)}

    def compare(self) -> None:
        """The torn run's weights and log are those of the undisturbed one."""
        whole, torn = (self.records(self.work / out / "log.jsonl") for out in ("whole", "torn"))
        if [r["epoch"] for r in torn] != [*range(EPOCHS)]:
            self.faults.append(f"the log's epochs: {[r['epoch'] for r in torn]}")
        elif self.elsewhere:
            self.difference = max(abs(a["train_loss"] / b["train_loss"] - 1) for a, b in zip(whole, torn))
            if not self.difference <= BOUND[self.amp]:
                self.faults.append(f"the loss differs by {self.difference:.1e}")
        elif whole != torn or not same_training(self.work / "whole", self.work / "torn"):
            self.faults.append("not bit-identical")
        for name in ("last.pt", "previous.pt", "best.pt"):
            load(self.work / "torn" / name)

    def leftovers(self) -> None:
        """A fault: a temporary file or a lock, of the run's or of its workers'."""
        names = [f"{path.parent.name}/{path.name}" for path in self.work.rglob("*")]
        extra = Counter(re.sub("-.*", "-...", name) for name in names if re.search("tmp|TMPDIR/|lock", name))
        if extra:
            self.faults.append(f"left: {', '.join(f'{n} {name}' for name, n in extra.items())}")

    def records(self, log: Path) -> list[dict]:
        """The log's epochs without what depends on the clock. A fault: a broken line, or another end than completed."""
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        if [r.get("status") for r in rows[-1:]] != ["completed"] or "NaN" in log.read_text():
            self.faults.append(f"the log ends with {rows[-1:]}")
        timed = ("images_per_s", "waiting_for_data")
        return [{k: v for k, v in r.items() if k not in timed} for r in rows if "train_loss" in r]


def in_sessions(leaders: list[int]) -> set[int]:
    """The live processes of these sessions."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(session) in leaders and state != "Z":
                found.add(int(stat.parent.name))
    return found


def send(pids, number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def damaged(work: Path, data: str, rng: random.Random):
    """A training image of the folder or tar cannot be read within; its time stays, as where a disk has failed."""
    path = rng.choice(sorted((work / "data/train").rglob("*.jpg")))
    at, size, name = 0, path.stat().st_size, str(path.relative_to(work / "data"))
    if data == "data.tar":
        path = work / data
        with tarfile.open(path) as tar:
            at = tar.getmember(name).offset_data
    whole, times = path.read_bytes(), path.stat()
    bad = rng.choice([bytes(size), (b"<html>" * size)[:size]])
    try:
        path.write_bytes(whole[:at] + bad + whole[at + size :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# ---- Damaged files ---------------------------------------------------------------------------------------------------


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, bytes changed, a part zeroed, doubled, taken out or filled with noise; of the head more often."""
    data, kind = bytearray(data), rng.randrange(6)
    at = rng.randrange(min(len(data), rng.choice([64, 1024, len(data)])))
    end = min(len(data), at + rng.choice([1, 4, 64, 4096]))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(rng.choice([1, 2, 20])):
            data[(at + rng.randrange(64)) % len(data)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    else:
        data[at:end] = {2: bytes(end - at), 3: data[at:end] * 2, 4: b"", 5: rng.randbytes(end - at)}[kind]
    return bytes(data)


def read_all(source) -> str:
    for index in range(len(source)):
        found = Samples(source, lambda image, rng: (image, ()), 0).__getitems__([(0, index, 0)])
        if isinstance(found, str):
            assert found.startswith(source.name(index) + ": ") and "\n" not in found, found
            return "refused"
        assert found[0].dtype == torch.uint8 and found[0].shape[:2] == (1, 3), found[0].shape
    return "read"


def images(rng: random.Random, folder: Path) -> str:
    kinds = ["JPEG"] * 4 + ["PNG", "GIF", "BMP", "TIFF", "PPM"] + ["WEBP"] * features.check("webp")
    (folder / "image.jpg").write_bytes(damage(encoded(picture(1, rng.randrange(99), 64), rng.choice(kinds)), rng))
    return read_all(Files(folder, ["image.jpg"], ["a"], [0]))


def odd(content: dict, rng: random.Random) -> dict:
    """A checkpoint with something in it that should not be there."""
    name = rng.choice([*content["model"], 7, "", "module.x", ("a", 1)])
    like = content["model"].get(name, torch.eye(3)).float()
    values = [like.to_sparse(), like * 1j, torch.quantize_per_tensor(like, 0.1, 0, torch.qint8), like.new_empty(0),
              torch.tensor(3), torch.eye(3).to_sparse_csr(), {"w": like}, [1], None, "x", 10**30]
    state = content["model"] | {name: rng.choice(values)}
    other = {rng.choice(["format", "data", "recipe", "method"]): rng.choice(values)}
    return rng.choice([content | {"model": state}, state, content | other])


def checkpoints(rng: random.Random, folder: Path) -> str:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    content, path = {"model": model.state_dict(), "epoch": 1}, folder / "last.pt"
    kind = rng.choice(["own", "odd", "old"])
    if kind == "own":
        checkpoint.save(content, path)
    else:
        torch.save(odd(content, rng) if kind == "odd" else content, path, _use_new_zipfile_serialization=kind == "odd")
    if kind != "odd":
        path.write_bytes(damage(path.read_bytes(), rng))
    found = checkpoint.load(path, "--weights")
    checkpoint.classes_of(found), checkpoint.recipe_of(found)
    checkpoint.fit(model, found, "--weights", lambda text: None)
    if kind == "odd" or all(torch.equal(v, content["model"][k]) for k, v in checkpoint.weights(found).items()):
        return "read"
    assert kind == "old", "read, but its numbers are others"
    return "read with other numbers (torch's old format has no checksum)"


def archives(rng: random.Random, folder: Path) -> str:
    image = {c: encoded(picture(i, 0, 16)) for i, c in enumerate("ab")}
    members = {f"train/{c}/{i}.jpg": image[c] for c in image for i in range(3)}
    if rng.random() < 0.3:  # a tar of class tars
        inner = {c: {f"{i}.jpg": image[c] for i in range(3)} for c in image}
        members = {f"{c}.tar": write_tar(folder / f"{c}.tar", inside).read_bytes() for c, inside in inner.items()}
    path = write_tar(folder / "data.tar", members, format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    path.write_bytes(damage(path.read_bytes(), rng))
    source = open_data(str(path), splits=("train",), say=lambda text: None)["train"]
    source.digest()
    return read_all(source)


FILES = {images: 3000, checkpoints: 600, archives: 900}  # how many of each


def try_files(make, start: int, stop: int, work: Path) -> dict:
    """{outcome: number} of files start..stop, in a process of their own: a decoder might take it down."""
    counts, out = Counter(), work / "counts.json"
    out.write_text("{}")
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg's remarks
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        for number in range(start, stop):
            begin, outcome = time.time(), ""
            try:
                outcome = make(random.Random(f"{make.__name__}-{number}"), work)
            except (UserError, RunError) as error:
                outcome = "refused" if "\n" not in str(error) else f"fault {number}: {error}"
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                outcome = f"fault {number}: {where} {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            counts[f"fault {number}: slow" if time.time() - begin > 20 else outcome] += 1
            out.write_text(json.dumps(counts))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    found = json.loads(out.read_text())
    return found | ({f"fault {start + sum(found.values())}: status {status}": 1} if status else {})


# ---- The program -----------------------------------------------------------------------------------------------------


def table(results: dict) -> None:
    columns = ["script", "trials", *EVENTS, "bit-identical", "other ranks: loss", "faults"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for script in SCRIPTS:
        rows = [row for name, row in results.items() if name.startswith(f"{script}-")]
        events = sum((Counter(row["events"]) for row in rows), Counter())
        same = [row for row in rows if row["identical"]]
        moved = [row["difference"] for row in rows if not row["identical"]]
        good = sum("not bit-identical" not in row["faults"] for row in same)
        cells = [script, len(rows), *(events[e] for e in EVENTS), f"{good} of {len(same)}",
                 f"{max(moved, default=0):.0e} of {len(moved)}", sum(len(row["faults"]) for row in rows)]
        print(f"| {' | '.join(map(str, cells))} |")
    faults = [(name, f"({row['config']}) {fault}") for name, row in results.items() for fault in row.get("faults", ())]
    for make in FILES:
        rows = [(name, row) for name, row in results.items() if name.startswith(make.__name__)]
        counts = sum((Counter(row) for _, row in rows), Counter())
        fine = {k: n for k, n in counts.items() if not k.startswith("fault")}
        said = ", ".join(f"{n} {k}" for k, n in fine.items())
        print(f"{make.__name__}: {counts.total()} damaged; {said}; {counts.total() - sum(fine.values())} faults")
        faults += [(name, k) for name, row in rows for k in row if k.startswith("fault")]
    for name, fault in faults:
        print(f"\n{name}: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--hours", type=float, default=3)
    parser.add_argument("--only", nargs="+", default=["files", *SCRIPTS], help="scripts, or files")
    parser.add_argument("--trial", metavar="SCRIPT-NUMBER")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    end, file = time.time() + 3600 * args.hours, args.work.resolve() / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is started without

    def make_sure_of(name: str, make) -> None:
        if name not in results:
            results[name] = make()
            file.with_suffix(".new").write_text(json.dumps(results, indent=1))
            os.replace(file.with_suffix(".new"), file)

    with fewer_shapes(96, 24), contextlib.suppress(KeyboardInterrupt):
        if args.trial:
            return print(json.dumps(Trial(args.trial, file.parent).run(), indent=1))
        for make, count in FILES.items() if "files" in args.only else ():
            for start in range(0, count, 50):
                some = functools.partial(try_files, make, start, start + 50, file.parent)
                make_sure_of(f"{make.__name__}-{start}", some)
        for name in (f"{script}-{number}" for number in range(10_000) for script in SCRIPTS if script in args.only):
            if time.time() > end:
                break
            trial = Trial(name, file.parent)
            try:
                make_sure_of(name, trial.run)
            finally:
                send(in_sessions(trial.pids), SIGKILL)
            if not results[name]["faults"]:
                shutil.rmtree(file.parent / name, ignore_errors=True)
    table(results)


if __name__ == "__main__":
    main()
