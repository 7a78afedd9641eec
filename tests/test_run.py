"""Signals, ranks, broken numbers and resuming: rows E to H of the fault list. Each run is a process of its own."""

import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import termios
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, finish, load, log_of, python, same_training, start, wait_until

import common.run
from common.run import Run, launch

# A run in a forked child: it inherits the imported torch, hence starts in milliseconds. Threads are off (conftest).
LONG = [*TINY, "--data", "FOLDER", "--epochs", "3"]  # 3 x 4 steps


def child(arguments, *, script: str = "deit3", env=None, patch=None, log: Path | None = None) -> int:
    """Forks a process that runs a script; `patch` is called in it first. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # what is inherited is nobody's garbage
    status = 99
    try:
        os.setsid()
        os.environ.update(env or {})
        multiprocessing.current_process()._config["tempdir"] = None  # its own, to be removed at its end
        with open(log or os.devnull, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not pytest's captured ones
        sys.argv = [f"{script}.py", *map(str, arguments)]
        main = importlib.import_module(script).main
        if patch:
            patch()
        try:
            launch(main)
        except SystemExit as end:
            status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(pid: int, timeout: float = 60) -> int:
    """Exit status of a child (negative: killed by that signal); one that outlasts the timeout is killed: a failure."""
    end = time.time() + timeout
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"still running after {timeout} s")


def ranks(
    world: int, arguments, tmp_path: Path, *, script: str = "deit3", patch=None, timeout: float = 60
) -> list[int]:
    """Runs `world` gloo ranks as forked children, returns their exit statuses. They write to tmp_path/rank*.log."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = start_ranks(world, arguments, tmp_path, port, patch, script)
    return [status_of(pid, timeout) for pid in pids]


def start_ranks(world, arguments, tmp_path, port, patch=None, script="deit3") -> list[int]:
    base = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }
    return [
        child(
            arguments, script=script, env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, patch=patch,
            log=tmp_path / f"rank{r}.log"
        )
        for r in range(world)
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def command(folder, tmp_path):
    def make(out, *extra):
        return [folder if a == "FOLDER" else a for a in LONG] + ["--out", tmp_path / out, *extra]

    return make


@pytest.fixture(scope="session")
def undisturbed(folder, tmp_path_factory):
    """The folder of the run that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "o"
    assert status_of(
        child([folder if a == "FOLDER" else a for a in LONG] + ["--out", out, "--ema", "0.9", "--drop-path", "0.2"])
    ) == 0
    return out


@pytest.fixture
def smooth(monkeypatch):
    """GELU for ReLU in this test and its children: a value that rounding moves across ReLU's kink changes gradients."""
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, x: torch.nn.functional.gelu(x))


SAME = ["--ema", "0.9", "--drop-path", "0.2"]


def epochs(out: Path) -> list[tuple]:
    return [(r["epoch"], r["train_loss"], r["val_loss"], r["val_top1"]) for r in log_of(out) if "train_loss" in r]


def at_steps(action, steps):
    """Patch: calls action() before the given global steps (counted in optimizer steps of this process)."""

    def patch():
        from common.precision import Precision

        original, count = Precision.step, [0]

        def step(self, *args, **kwargs):
            if count[0] in steps:
                action()
            count[0] += 1
            return original(self, *args, **kwargs)

        Precision.step = step

    return patch


# ---- E: signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_E1_E5_a_signal_at_any_step_saves_and_the_resumed_run_is_bit_identical(
    command, tmp_path, undisturbed, number, expected
):
    random.seed(int(number))
    for attempt, step in enumerate(random.sample(range(12), 5) + [3]):
        out = f"o{attempt}"
        start_time = time.time()
        assert status_of(
            child(command(out, *SAME), patch=at_steps(lambda: os.kill(os.getpid(), number), [step]))
        ) == expected
        assert time.time() - start_time < 30
        assert log_of(tmp_path / out)[-1]["status"] == "preempted"
        saved = load(tmp_path / out / "last.pt")
        # the signal came while step `step` was being applied
        assert saved["epoch"] * 4 + saved["step"] - step in (1, 2)
        assert status_of(child(command(out, *SAME, "--resume"))) == 0
        assert same_training(undisturbed, tmp_path / out) and epochs(tmp_path / out) == epochs(undisturbed)


def test_E4_the_whole_group_is_signalled_with_workers(command, tmp_path, undisturbed):
    pid = child(
        command("o", *SAME, "--workers", 2), patch=at_steps(lambda: os.killpg(os.getpgrp(), signal.SIGTERM), [5])
    )
    assert status_of(pid) == 143
    assert status_of(child(command("o", *SAME, "--workers", 1, "--resume"))) == 0
    assert same_training(undisturbed, tmp_path / "o")


def test_E5_the_second_ctrl_c_ends_at_once(command, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    pid = child(command("o", "--workers", 2, "--save-steps", 1), patch=at_steps(twice, [6]))
    assert status_of(pid) == 130
    assert load(tmp_path / "o/last.pt")["step"] == 2 and not (tmp_path / "o/lock").exists()
    assert log_of(tmp_path / "o")[-1]["status"] == "preempted"
    with pytest.raises(ProcessLookupError):  # no worker is left
        wait_until(lambda: os.killpg(pid, 0), timeout=5)


def test_E1_a_signal_is_heard_and_work_told_while_a_step_is_in_one_long_call(command, tmp_path):
    """As a backward pass can be: Python's own handlers wait for its end, which never comes here."""

    def patch():
        common.run.LEASE, common.run.QUIET = 0.8, 0.2
        at_steps(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1), [5])()

    log = tmp_path / "log"
    log.touch()
    pid = child(command("o"), patch=patch, log=log)
    try:
        wait_until(lambda: re.search(r"^epoch 1 step 1/4: at work for \d s$", log.read_text(), re.M), timeout=20)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: "signal 15: ends after this step\n" in log.read_text(), timeout=10)
    finally:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_E5_the_second_ctrl_c_ends_one_long_call(command, tmp_path):
    pid = child(command("o", "--save-steps", 1), patch=at_steps(
        lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1) * os.path.exists(tmp_path / "never"), [5]))
    wait_until(lambda: (tmp_path / "o/best.pt").exists() and load(tmp_path / "o/last.pt")["step"] == 1)
    time.sleep(0.5)
    for _ in range(2):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
    assert status_of(pid, timeout=10) == 130
    assert log_of(tmp_path / "o")[-1]["status"] == "preempted" and not (tmp_path / "o/lock").exists()


def test_E5_the_second_ctrl_c_ends_a_run_whose_output_nobody_reads(command, tmp_path):
    """As `| less` does. While a step is at work, so that what is said of it waits for the reader."""
    read, write = os.pipe()

    def patch():
        common.run.LEASE, common.run.QUIET = 0.8, 0.01
        os.dup2(write, 1)
        sys.stdout = open(1, "w", closefd=False)
        at_steps(lambda: time.sleep(60), [5])()

    pid = child(command("o", "--save-steps", 1), patch=patch)
    wait_until(lambda: (tmp_path / "o/best.pt").exists() and load(tmp_path / "o/last.pt")["step"] == 1)
    filling = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_NONBLOCK)  # the run's own end still waits
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filling, b"x" * 4096)
    time.sleep(1)
    for _ in range(2):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
    try:
        assert status_of(pid, timeout=10) == 130
    finally:
        for fd in (read, write, filling):
            os.close(fd)


def test_E9_a_run_goes_on_when_its_terminal_is_closed(command, tmp_path):
    """It writes a line to it after that, which nobody can read."""
    master, slave = os.openpty()

    def patch():
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for fd in (1, 2):
            os.dup2(slave, fd)
        os.close(master)
        os.close(slave)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        at_steps(lambda: wait_until(lambda: not (tmp_path / "open").exists()), [5])()

    (tmp_path / "open").touch()
    pid = child(command("o"), patch=patch)
    os.close(slave)
    wait_until(lambda: (tmp_path / "o/log.jsonl").exists() and len(epochs(tmp_path / "o")) > 0)
    os.close(master)
    (tmp_path / "open").unlink()
    assert status_of(pid) == 0 and log_of(tmp_path / "o")[-1]["status"] == "completed"


def usr1_then_killed(signalled: str):
    def action():
        if count.pop(0) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        elif os.environ.get("RANK", "0") == signalled:
            os.kill(os.getpid(), signal.SIGUSR1)

    count = [5, 7]
    return at_steps(action, [5, 7])


def test_E8_SIGUSR1_saves_and_goes_on(command, tmp_path, undisturbed):
    assert status_of(child(command("o", *SAME), patch=usr1_then_killed("0"))) == -signal.SIGKILL
    assert (load(tmp_path / "o/last.pt")["epoch"], load(tmp_path / "o/last.pt")["step"]) == (1, 3)
    assert status_of(child(command("o", *SAME, "--resume"))) == 0
    assert same_training(undisturbed, tmp_path / "o")


def test_E8_SIGUSR1_to_one_of_two_ranks(command, tmp_path):
    assert ranks(2, command("o"), tmp_path, patch=usr1_then_killed("1")) == [-signal.SIGKILL] * 2
    assert (load(tmp_path / "o/last.pt")["epoch"], load(tmp_path / "o/last.pt")["step"]) == (1, 3)


def test_E6_a_signal_before_the_first_step_and_in_evaluation(command, tmp_path, undisturbed):
    def in_scan():
        import common.sources

        original = common.sources.scan_folder
        common.sources.scan_folder = lambda path: os.kill(os.getpid(), signal.SIGTERM) or original(path)
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    assert status_of(child(command("a"), patch=in_scan)) == 143
    assert not list((tmp_path / "a").glob("*.pt"))

    def in_evaluation():
        import common.evaluate

        original = common.evaluate.evaluate

        def evaluate(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        common.evaluate.evaluate = evaluate

    assert status_of(child(command("b", *SAME), patch=in_evaluation)) == 143
    assert status_of(child(command("b", *SAME, "--resume"))) == 0
    assert same_training(undisturbed, tmp_path / "b") and epochs(tmp_path / "b") == epochs(undisturbed)

    def in_save():
        original = os.fsync
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGTERM) or original(fd)

    assert status_of(child(command("c", *SAME), patch=in_save)) == 143
    assert status_of(child(command("c", *SAME, "--resume"))) == 0
    assert same_training(undisturbed, tmp_path / "c")


# Where the process is killed, and at which call there. One round of seven advances the run by an epoch of four steps.
PLACES = (
    ("os.fsync", 0),
    ("common.checkpoint.save", 0),
    ("torch.save", 0),
    ("os.link", 0),
    ("common.precision.Precision.step", 1),
    ("common.run.Run.log", 0),
    ("common.evaluate.evaluate", 0),
)


def kill_in(place: str, call: int):
    """Patch: SIGKILL to this process at the given call (0: the first) of the function `place`."""

    def patch():
        import importlib

        path = place.split(".")
        depth = 2 if path[-2][0].isupper() else 1
        owner = importlib.import_module(".".join(path[:-depth]))
        owner = getattr(owner, path[-2]) if depth == 2 else owner
        original, count = getattr(owner, path[-1]), [0]

        def killed(*args, **kwargs):
            count[0] += 1
            if count[0] > call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, path[-1], killed)

    return patch


def test_E7_H1_twenty_kills_and_automatic_resume_give_the_undisturbed_run(command, tmp_path, undisturbed):
    out = tmp_path / "o"
    for kill in range(20):
        patch = kill_in(*PLACES[kill % len(PLACES)])
        assert status_of(
            child(command("o", *SAME, "--save-steps", 1, "--resume", "auto"), patch=patch)
        ) == -signal.SIGKILL
        if (out / "log.jsonl").exists():
            with open(out / "log.jsonl", "ab") as f:  # as a kill in the middle of a write leaves it
                f.write(b'{"epoch": 1, "train_lo')
    saved = load(out / "last.pt")
    assert 0 < saved["epoch"] * 4 + saved["step"] < 12  # the kills fell inside the run
    assert status_of(child(command("o", *SAME, "--save-steps", 1, "--resume", "auto"))) == 0
    assert same_training(undisturbed, out) and epochs(out) == epochs(undisturbed)
    assert not list(out.glob("*.tmp"))


def test_J3_a_run_that_passed_for_dead_writes_nothing_more(deit3_here, tmp_path, folder, monkeypatch):
    """Two hosts, one folder: the first was cut off until the second took the folder over."""
    after, logs = Run.after_step, []

    def cut_off(self, *args):
        (tmp_path / "o/lock").write_text("process 2 on another-host\n")
        logs.append((tmp_path / "o/log.jsonl").read_bytes())  # the other's by now, the end of this run is not in it
        after(self, *args)

    monkeypatch.setattr(Run, "after_step", cut_off)
    result = deit3_here(*TINY, "--data", folder, "--out", tmp_path / "o", "--save-steps", 1)
    assert result.status == 1 and "was taken over by process 2 on another-host" in result.err, result
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["batch.png", "lock", "log.jsonl"]
    assert (tmp_path / "o/lock").read_text() == "process 2 on another-host\n"
    assert (tmp_path / "o/log.jsonl").read_bytes() == logs[0]


def test_J3_a_lock_that_cannot_be_asked_does_not_end_a_run_by_its_log(tmp_path):
    """On a network's file system the handle of a file that another host removed is stale."""
    said = []

    def stale():
        raise OSError(errno.ESTALE, "Stale file handle")

    run = SimpleNamespace(rank=0, out=tmp_path, log_failed=False, say=said.append, _taken_over=stale)
    Run.log(run, {"epoch": 1})
    Run.log(run, {"epoch": 2})
    assert said == [f"warning: cannot write {tmp_path}/log.jsonl (Stale file handle); training goes on"]


def test_J3_a_stale_lock_is_another_runs_and_one_that_cannot_be_seen_nobodys(tmp_path, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with open(tmp_path / "lock", "a+") as lock:
        print("process 1 on this-host", file=lock, flush=True)
        run = SimpleNamespace(out=tmp_path, lock=lock, owner="process 1 on this-host")
        run._holder = functools.partial(Run._holder, run)
        assert Run._taken_over(run) == ""
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", stale)
            assert Run._taken_over(run) == "another run"
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stale)
            assert Run._taken_over(run) == ""


def test_J3_a_second_job_on_another_host_is_refused_while_the_first_renews_its_lock(command, tmp_path):
    """The file system knows no locks between hosts (patched away), a lock counts for 1.6 s without being renewed."""

    def patch(host="one", steps=0.0):
        fcntl.lockf = lambda *_: None
        common.run.LEASE = 1.6
        os.uname = lambda: SimpleNamespace(nodename=host)
        after = Run.after_step
        Run.after_step = lambda self, *args: (time.sleep(steps), after(self, *args))

    first = child(command("o"), patch=lambda: patch(steps=0.4))
    wait_until(lambda: (tmp_path / "o/lock").exists() and (tmp_path / "o/lock").read_text())
    time.sleep(2.5)  # longer than the lock counts
    second = child(command("o", "--resume", "auto"), patch=lambda: patch("two"), log=tmp_path / "two.log")
    assert status_of(second) == 2 and "on one, alive 0 s ago" in (tmp_path / "two.log").read_text()
    os.killpg(first, signal.SIGKILL)
    assert status_of(first) == -signal.SIGKILL
    time.sleep(2)
    assert status_of(child(command("o", "--resume", "auto"), patch=lambda: patch("two"))) == 0
    assert not (tmp_path / "o/lock").exists()


def test_J3_the_lock_outlives_a_save(command, tmp_path):
    """A second job on the same host is refused after the first has written a checkpoint, too."""

    def patch():
        after = Run.after_step
        Run.after_step = lambda self, *args: (after(self, *args), time.sleep(60 * (self.step == 2)))

    first = child(command("o", "--save-steps", 1), patch=patch)
    wait_until(lambda: (tmp_path / "o/previous.pt").exists())
    second = child(command("o", "--resume", "auto"), log=tmp_path / "two.log")
    assert status_of(second) == 2 and f"in use by process {first} on" in (tmp_path / "two.log").read_text()
    os.killpg(first, signal.SIGKILL)
    assert status_of(first) == -signal.SIGKILL


def test_a_run_in_a_thread_trains_and_leaves_no_lock(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deit3.py", *TINY, "--data", str(folder), "--out", str(tmp_path / "o")])
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(common.run.outcome, importlib.import_module("deit3").main).result() == 0
    assert (tmp_path / "o/last.pt").exists() and not (tmp_path / "o/lock").exists()


def test_a_signal_in_a_long_step_is_heard_at_once(command, tmp_path):
    def patch():
        after = Run.after_step
        Run.after_step = lambda self, *args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(1), after(self, *args))

    started = child(command("o"), patch=patch, log=tmp_path / "log")
    wait_until(lambda: (tmp_path / "log").exists() and "signal 15: ends after" in (tmp_path / "log").read_text())
    assert os.waitpid(started, os.WNOHANG) == (0, 0) and not (tmp_path / "o/last.pt").exists()
    assert status_of(started) == 143 and (tmp_path / "o/last.pt").exists()


def test_E6_a_signal_while_a_checkpoint_is_read_ends_the_run(command, tmp_path):
    """It is no sign of damage."""

    def patch():
        zipfile.ZipFile.read = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    assert status_of(child(command("o", *SAME, "--save-steps", 1))) == 0
    before = (tmp_path / "o/last.pt").read_bytes()
    assert status_of(child(command("o", *SAME, "--resume", "auto"), patch=patch, log=tmp_path / "log")) == 143
    assert "warning" not in (tmp_path / "log").read_text() and (tmp_path / "o/last.pt").read_bytes() == before


def test_one_rank_of_a_node_reads_every_byte_of_a_checkpoint(command, tmp_path):
    def patch():
        read = zipfile.ZipFile.read
        zipfile.ZipFile.read = lambda *args: print("part read", flush=True) or read(*args)

    assert status_of(child(command("o", *SAME, "--epochs", 2))) == 0
    resumed = command("o", *SAME, "--resume", "--allow-changes")
    assert ranks(2, resumed, tmp_path, patch=patch) == [0, 0]
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert "part read" in logs[0] and "resumed from last.pt" in logs[0] and "part read" not in logs[1]
    damaged = (tmp_path / "o/last.pt").read_bytes()
    (tmp_path / "o/last.pt").write_bytes(damaged[: len(damaged) // 2])
    assert ranks(2, resumed, tmp_path) == [0, 0]
    assert "resumed from previous.pt" in (tmp_path / "rank0.log").read_text()
    (tmp_path / "half.pt").write_bytes(damaged[: len(damaged) // 2])
    assert ranks(2, command("p", *SAME, "--resume", tmp_path / "half.pt"), tmp_path) == [2, 1]
    assert "damaged checkpoint" in (tmp_path / "rank0.log").read_text()
    assert "Traceback" not in (tmp_path / "rank1.log").read_text()


def test_E9_a_closed_standard_output_does_not_stop_training(command, fresh, tmp_path):
    argv = ["deit3.py", *map(str, command("o"))]
    code = f"import os, runpy, sys; sys.argv = {argv!r}; read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
    result = fresh("-c", f"{code}; runpy.run_path('deit3.py', run_name='__main__')", cwd=ROOT)
    assert result.status == 0, result
    assert log_of(tmp_path / "o")[-1]["status"] == "completed"


# ---- F: ranks --------------------------------------------------------------------------------------------------------


def close(a: Path, b: Path, tolerance: float) -> bool:
    one, two = load(a / "last.pt")["model"], load(b / "last.pt")["model"]
    return all(torch.allclose(one[k], two[k], atol=tolerance, rtol=0) for k in one)


def test_C6_F6_F7_F8_ranks_and_accumulation_do_not_change_the_result(command, tmp_path):
    """12 steps with 3-Augment, repeated augmentation, mixup and cutmix."""
    recipe = ["--repeats", 2, "--lr", 2e-3]
    assert status_of(child(command("one", *recipe))) == 0
    assert status_of(child(command("micro", *recipe, "--micro-batch", 4))) == 0
    assert ranks(2, command("two", *recipe), tmp_path) == [0, 0]
    assert ranks(4, command("four", *recipe), tmp_path) == [0] * 4
    for other in ("micro", "two", "four"):
        assert close(tmp_path / "one", tmp_path / other, 1e-5), other
        for a, b in zip(epochs(tmp_path / "one"), epochs(tmp_path / other)):
            assert a[1] == pytest.approx(b[1], abs=1e-5) and a[3] == b[3]
    assert sorted(p.name for p in (tmp_path / "two").glob("*.pt")) == ["best.pt", "last.pt", "previous.pt"]  # C6


# What each other script adds to a step: there too ranks, accumulation and a kill do not change the result.
METHODS = {
    "patchconvnet": ["--model", "patchconvnet_nano", "--augment", "rand", "--lr", 2e-3],
    "resmlp": ["--model", "resmlp_nano", "--augment", "rand", "--lr", 2e-3],
    "cait": ["--model", "cait_nano", "--augment", "rand", "--distillation", "hard", "--teacher-weights", "TEACHER"],
    "deit": [
        "--model",
        "deit_nano_distilled",
        "--augment",
        "rand",
        "--erasing",
        0.5,
        "--distillation",
        "hard",
        "--teacher-weights",
        "TEACHER",
    ],
}


@pytest.mark.parametrize("script", METHODS)
def test_F7_F8_ranks_accumulation_and_kills_do_not_change_the_result_of_any_method(
    command, tmp_path, undisturbed, script
):
    def flags(out, *extra):
        own = [undisturbed / "last.pt" if a == "TEACHER" else a for a in METHODS[script]]
        return command(out, *own, "--repeats", 2, *extra)

    assert status_of(child(flags("one"), script=script)) == 0
    assert status_of(child(flags("micro", "--micro-batch", 4), script=script)) == 0
    assert ranks(2, flags("two"), tmp_path, script=script) == [0, 0], (tmp_path / "rank0.log").read_text()
    for other in ("micro", "two"):
        assert close(tmp_path / "one", tmp_path / other, 1e-5), other
    kill = at_steps(lambda: os.kill(os.getpid(), signal.SIGKILL), [6])
    assert status_of(child(flags("killed", "--save-steps", 1), script=script, patch=kill)) == -signal.SIGKILL
    assert status_of(child(flags("killed", "--save-steps", 1, "--resume"), script=script)) == 0
    assert same_training(tmp_path / "one", tmp_path / "killed")


def test_batchnorms_statistics_are_those_of_all_ranks(command, tmp_path):
    flags = ["--model", "patchconvnet_nano", "--norm", "batchnorm", "--lr", 2e-3]
    assert status_of(child(command("one", *flags), script="patchconvnet")) == 0
    for world in (2, 4):
        assert ranks(world, command(f"of{world}", *flags), tmp_path, script="patchconvnet") == [0] * world
        assert close(tmp_path / "one", tmp_path / f"of{world}", 1e-4), world
    saved = load(tmp_path / "of2/last.pt")["model"]
    assert saved.keys() == load(tmp_path / "one/last.pt")["model"].keys()
    assert saved["blocks.0.norm1.num_batches_tracked"] == 12


def test_trex_ranks_fill_one_memory_and_a_kill_changes_nothing(folder, tmp_path, smooth):
    flags = "--model resnet_nano --recipe shapes --img-size 32 --local-size 32 --local-crops 1 --memory-size 40".split()
    flags += "--warmup-epochs 0 --workers 0 --device cpu".split()

    def run(out, *extra):
        return [*flags, "--data", folder, "--out", tmp_path / out, *extra]

    # Two steps of 32 images: more of them only blow up rounding, as this rate and so small a network do.
    two_steps = ["--batch-size", 32, "--epochs", 1]
    assert status_of(child(run("one", *two_steps), script="trex")) == 0
    one = load(tmp_path / "one/last.pt")["model"]
    for world in (2, 4):
        assert ranks(world, run(f"of{world}", *two_steps), tmp_path, script="trex") == [0] * world
        other = load(tmp_path / f"of{world}/last.pt")["model"]
        assert torch.equal(one["memory.labels"], other["memory.labels"])
        assert one["memory.ptr"] == other["memory.ptr"] == 64 % 40
        assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one), world
    eight = ["--batch-size", 16, "--epochs", 2]  # eight steps
    assert status_of(child(run("whole", *eight), script="trex")) == 0
    kill = at_steps(lambda: os.kill(os.getpid(), signal.SIGKILL), [5])
    assert status_of(child(run("killed", *eight, "--save-steps", 1), script="trex", patch=kill)) == -signal.SIGKILL
    assert status_of(child(run("killed", *eight, "--resume"), script="trex")) == 0
    assert same_training(tmp_path / "whole", tmp_path / "killed")  # memory and averaged network included


@pytest.mark.parametrize("method", ["grafit", "ce"])
def test_grafits_memory_is_the_same_on_any_number_of_ranks_and_after_a_kill(folder, tmp_path, method, smooth):
    flags = f"--model regnet_nano --recipe shapes --method {method} --img-size 32 --mix-group 4".split()
    flags += "--warmup-epochs 0 --workers 0 --device cpu".split()

    def run(out, *extra):
        return [*flags, "--data", folder, "--out", tmp_path / out, *extra]

    # The first step, and the second from the same state: so small a network blows up rounding between them.
    two_steps = ["--batch-size", 32, "--epochs", 1, "--repeats", 2]  # images repeat within a batch
    kill = at_steps(lambda: os.kill(os.getpid(), signal.SIGKILL), [1])
    assert status_of(child(run("start", *two_steps, "--save-steps", 1), script="grafit", patch=kill)) == -signal.SIGKILL
    found = {}
    for world in (1, 2, 4):
        shutil.copytree(tmp_path / "start", tmp_path / f"second{world}")
        for out, extra in ((f"first{world}", ["--batch-size", 64]), (f"second{world}", ["--resume"])):
            flags_here = run(out, *two_steps, *extra)
            if world == 1:
                assert status_of(child(flags_here, script="grafit")) == 0
            else:
                assert ranks(world, flags_here, tmp_path, script="grafit") == [0] * world
            found[out] = load(tmp_path / out / "last.pt")
    for step in ("first", "second"):
        one = found[f"{step}1"]
        for world in (2, 4):
            other = found[f"{step}{world}"]
            assert all(
                torch.allclose(one["model"][k], other["model"][k], atol=1e-5) for k in one["model"]
            ), (step, world)
            if method == "grafit":
                a, b = one["memory"]["embeddings"], other["memory"]["embeddings"]
                # the images of this epoch
                assert torch.allclose(a, b, atol=1e-5) and 20 < (a.norm(dim=1) > 0).sum() < 64
            else:
                assert one["memory"] is None
    eight = ["--batch-size", 16, "--epochs", 2]  # eight steps
    assert status_of(child(run("whole", *eight), script="grafit")) == 0
    kill = at_steps(lambda: os.kill(os.getpid(), signal.SIGKILL), [5])
    assert status_of(child(run("killed", *eight, "--save-steps", 1), script="grafit", patch=kill)) == -signal.SIGKILL
    assert status_of(child(run("killed", *eight, "--resume"), script="grafit")) == 0
    assert same_training(tmp_path / "whole", tmp_path / "killed")
    memories = [load(tmp_path / out / "last.pt")["memory"] for out in ("whole", "killed")]
    assert method == "ce" or torch.equal(memories[0]["embeddings"], memories[1]["embeddings"])
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "killed")]
    assert results[0] == results[1]


def test_E6_a_signal_while_grafit_embeds_the_training_images_at_its_end(folder, tmp_path):
    flags = "--model regnet_nano --recipe shapes --img-size 32 --batch-size 32 --mix-group 4 --epochs 1".split()
    flags += "--warmup-epochs 0 --workers 0 --device cpu".split()

    def run(out, *extra):
        return [*flags, "--data", folder, "--out", tmp_path / out, *extra]

    def at_the_end():
        import grafit

        original = grafit.evaluate_levels
        grafit.evaluate_levels = lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a)

    assert status_of(child(run("whole"), script="grafit")) == 0
    assert status_of(child(run("stopped"), script="grafit", patch=at_the_end)) == 143
    assert log_of(tmp_path / "stopped")[-1]["status"] == "preempted"
    assert not (tmp_path / "stopped/results.json").exists()
    assert status_of(child(run("stopped", "--resume"), script="grafit")) == 0
    assert (tmp_path / "stopped/results.json").read_text() == (tmp_path / "whole/results.json").read_text()


def test_F9_a_run_resumes_on_another_number_of_ranks(command, tmp_path):
    stop = at_steps(lambda: os.kill(os.getpid(), signal.SIGTERM), [5])
    assert status_of(child(command("one"))) == 0
    assert ranks(2, command("o"), tmp_path, patch=stop) == [143, 143]
    assert status_of(child(command("o", "--resume"), patch=at_steps(lambda: os.kill(os.getpid(), 15), [1]))) == 143
    assert ranks(4, command("o", "--resume"), tmp_path) == [0] * 4
    assert close(tmp_path / "one", tmp_path / "o", 1e-5)


@pytest.mark.parametrize("signalled", ["0", "1"])
def test_E3_a_signal_to_one_rank_stops_both_at_the_same_step(command, tmp_path, signalled):
    def if_mine():
        if os.environ["RANK"] == signalled:
            os.kill(os.getpid(), signal.SIGTERM)

    assert ranks(2, command("o"), tmp_path, patch=at_steps(if_mine, [6])) == [143, 143]
    assert load(tmp_path / "o/last.pt")["step"] in (3, 4)  # the step being applied, or the next


def test_E2_torchrun_passes_the_signal_on_and_slurm_variables_do_not_matter(command, tmp_path):
    """SLURM's variables, which mean other processes, do not matter under torchrun."""
    slurm = {"SLURM_PROCID": 3, "SLURM_NTASKS": 8}
    process = start(*TORCHRUN, "--nproc_per_node", 2, "deit3.py", *command("o", "--epochs", 200), **slurm)
    wait_until(lambda: (tmp_path / "o/log.jsonl").exists() and len(epochs(tmp_path / "o")) > 0)
    process.send_signal(signal.SIGTERM)
    begin = time.time()
    finish(process, 60)
    assert time.time() - begin < 30
    assert log_of(tmp_path / "o")[-1]["status"] == "preempted" and load(tmp_path / "o/last.pt")["epoch"] > 0


def test_F1_an_exception_on_one_rank_is_the_first_message(command, tmp_path):
    def fail():
        from common.errors import RunError

        if os.environ["RANK"] == "1":
            raise RunError("image x.jpg is gone")

    begin = time.time()
    assert ranks(2, command("o", "--timeout", 20), tmp_path, patch=at_steps(fail, [5])) == [1, 1]
    assert time.time() - begin < 60
    assert "error (rank 1): image x.jpg is gone" in (tmp_path / "rank1.log").read_text()
    text = (tmp_path / "rank0.log").read_text()
    assert "lost contact with another rank at epoch 1, step 1" in text and "Traceback" not in text


def test_F2_max_restarts_resumes_after_a_rank_was_killed(command, fresh, tmp_path):
    """torchrun starts both ranks again when one dies; the second start resumes by itself and the run is completed."""
    assert ranks(2, command("two"), tmp_path) == [0, 0]
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, deit3; from common.precision import Precision; from common.run import launch\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1'\n"
        "original, count = Precision.step, [0]\n"
        "def step(self, *args, **kwargs):\n"
        "    if first and count[0] == 6: os.kill(os.getpid(), 9)\n"
        "    count[0] += 1\n"
        "    return original(self, *args, **kwargs)\n"
        "Precision.step = step\n"
        "launch(deit3.main)\n"
    )
    torchrun = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    flags = ["--standalone", "--nproc_per_node", 2, "--max-restarts", 1, killer, *command("o", "--timeout", 20)]
    result = fresh("-c", torchrun, *flags, cwd=ROOT, PYTHONPATH=ROOT)
    assert result.status == 0 and "resumed from last.pt at epoch 0, step 4" in result.out, result
    assert close(tmp_path / "two", tmp_path / "o", 0)


def test_F3_a_rank_that_hangs_ends_the_run(command, tmp_path):
    def hang():
        if os.environ["RANK"] == "1":
            time.sleep(3600)

    port = free_port()
    pids = start_ranks(2, command("o", "--timeout", 3), tmp_path, port, at_steps(hang, [5]))
    assert status_of(pids[0]) == 1
    os.killpg(pids[1], signal.SIGKILL)
    status_of(pids[1])
    assert "lost contact with another rank at epoch 1, step 1" in (tmp_path / "rank0.log").read_text()


def test_F4_F5_half_an_environment_or_a_port_in_use(command, tmp_path, monkeypatch):
    log = tmp_path / "log"
    assert status_of(child(command("o"), env={"RANK": "0"}, log=log)) == 2
    missing = "RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    assert f"{missing}; start with torchrun" in log.read_text()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        env = {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(s.getsockname()[1])
        }
        assert status_of(child(command("o"), env=env, log=log)) == 2
    assert "--standalone" in log.read_text()


def test_F10_ranks_with_unlike_weights_are_stopped(command, tmp_path):
    def disturb():
        import gc

        if os.environ["RANK"] == "1":
            model = next(o for o in gc.get_objects() if type(o).__name__ == "ViT" and not next(o.parameters()).is_meta)
            next(model.parameters()).data += 1e-3

    statuses = ranks(2, command("o", "--timeout", 20), tmp_path, patch=at_steps(disturb, [2]))
    assert statuses == [1, 1]
    assert "ranks hold different weights" in "".join((tmp_path / f"rank{r}.log").read_text() for r in (0, 1))


# ---- G: numbers ------------------------------------------------------------------------------------------------------


def nan_at(step: int, rank: str = "0"):
    def patch():
        from common.precision import Precision

        original, count = Precision.backward, [0]

        def backward(self, loss):
            count[0] += 1
            broken = count[0] == step + 1 and os.environ.get("RANK", "0") == rank
            original(self, loss * (float("nan") if broken else 1.0))

        Precision.backward = backward

    return patch


def test_G1_H2_a_nan_loss_stops_the_run_and_names_step_rate_and_files(command, tmp_path):
    log = tmp_path / "log"
    assert status_of(child(command("o", *SAME, "--save-steps", 1), patch=nan_at(6), log=log)) == 1
    text = log.read_text()
    assert "loss or gradient not finite at epoch 1, step 2, lr 0.0" in text and ".jpg" in text
    assert "Traceback" not in text
    record = [r for r in log_of(tmp_path / "o") if r.get("reason")][0]
    assert (record["epoch"], record["step"], len(record["files"])) == (1, 2, 16)
    saved = load(tmp_path / "o/last.pt")
    assert (saved["epoch"], saved["step"]) == (1, 2) and all(
        torch.isfinite(t).all() for t in (*saved["model"].values(), *saved["ema"].values())
    )


def test_G2_a_nan_on_one_rank_stops_all_at_the_same_step(command, tmp_path):
    assert ranks(2, command("o", "--timeout", 20), tmp_path, patch=nan_at(6, rank="1")) == [1, 1]
    assert [(r["step"], len(r["files"])) for r in log_of(tmp_path / "o") if r.get("reason")] == [(2, 16)]


def reading_late(patch=lambda: None):
    """Patch: the host reads a step's flags three steps later, as it does with a GPU."""

    def both():
        from common.run import Run

        original = Run.__init__

        def init(self, *args):
            original(self, *args)
            self.lag = 3

        Run.__init__ = init
        patch()

    return both


def test_flags_read_three_steps_late_stop_and_resume_exactly_too(command, tmp_path, undisturbed):
    assert status_of(child(command("nan", *SAME), patch=reading_late(nan_at(4)))) == 1
    assert [(r["epoch"], r["step"]) for r in log_of(tmp_path / "nan") if r.get("reason")] == [(1, 0)]
    assert load(tmp_path / "nan/last.pt")["epoch"] == 0  # nothing after the broken step was saved
    assert status_of(child(command("nan", *SAME, "--resume"))) == 0
    assert same_training(undisturbed, tmp_path / "nan") and epochs(tmp_path / "nan") == epochs(undisturbed)
    stop = at_steps(lambda: os.kill(os.getpid(), signal.SIGTERM), [4])
    assert status_of(child(command("stop", *SAME), patch=reading_late(stop))) == 143
    assert status_of(child(command("stop", *SAME, "--resume"), patch=reading_late())) == 0
    assert same_training(undisturbed, tmp_path / "stop") and epochs(tmp_path / "stop") == epochs(undisturbed)


def test_G6_seeds(command, tmp_path):
    short = ("--epochs", "1", "--warmup-epochs", "0")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert status_of(child(command(name, *short, "--seed", seed))) == 0
    assert same_training(tmp_path / "a", tmp_path / "b") and not same_training(tmp_path / "a", tmp_path / "c")


# ---- H: logs and environment -----------------------------------------------------------------------------------------


def test_H3_ascii_terminals_and_files_get_plain_text(command, tmp_path):
    result = python("deit3.py", *command("naïve"), LC_ALL="C", PYTHONIOENCODING="ascii", NO_COLOR="1")
    assert result.status == 0 and "\x1b" not in result.out + result.err and "\r" not in result.out, result
    assert (tmp_path / "naïve" / "log.jsonl").read_bytes().isascii()


def test_H4_a_full_log_disk_warns_once_and_training_goes_on(command, tmp_path):
    (tmp_path / "o").mkdir()

    def full():
        from common.run import Run

        original = Run._resume
        Run._resume = lambda self: (
            original(self),
            (self.out / "log.jsonl").unlink(missing_ok=True),
            (self.out / "log.jsonl").symlink_to("/dev/full"),
        )

    log = tmp_path / "log"
    assert status_of(child(command("o", "--resume", "auto"), patch=full, log=log)) == 0
    assert log.read_text().count("cannot write") == 1
    (tmp_path / "o/log.jsonl").unlink()
    (tmp_path / "o/log.jsonl").mkdir()  # nor does one that cannot be read
    assert status_of(child(command("o", "--resume", "auto"), log=log)) == 0
    assert log.read_text().count("cannot write") == 1


def test_C4_an_output_folder_removed_in_the_run_is_made_again(command, tmp_path):
    import shutil

    log = tmp_path / "log"
    assert status_of(child(command("o"), patch=at_steps(lambda: shutil.rmtree(tmp_path / "o"), [5]), log=log)) == 0
    assert load(tmp_path / "o/last.pt")["epoch"] == 2 and log_of(tmp_path / "o")[-1]["status"] == "completed"


def test_B28_waiting_for_data_is_logged_and_warned_about(command, tmp_path):
    def slow():
        from common.data import Samples

        original = Samples.__getitems__
        Samples.__getitems__ = lambda self, keys: time.sleep(0.1) or original(self, keys)

    log = tmp_path / "log"
    assert status_of(child(command("o", "--batch-size", 4), patch=slow, log=log)) == 0
    assert "of this epoch was waiting for data; raise --workers (now 0)" in log.read_text()
    assert all(r["waiting_for_data"] > 0.3 for r in log_of(tmp_path / "o") if "train_loss" in r)
