"""Every kind of end: whatever main() ends by, the process and its loader workers are gone at once (fault list, J1)."""

import json
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from test_run import at_steps, child, free_port, ranks, start_ranks, status_of
from tqdm import tqdm

from common import checkpoint, data
from common.errors import RunError, UserError

ENDS = {  # what is raised in the middle of a step: (exit status, what standard error says)
    "a mistake of ours": (TypeError("unsupported operand"), 1, "TypeError: unsupported operand"),
    "the GPU": (RuntimeError("CUDA error: an illegal memory access was encountered"), 1, "CUDA error"),
    "the GPU's memory": (torch.cuda.OutOfMemoryError("out of memory"), 1, "error: the GPU's memory is full"),
    "the host's memory": (MemoryError(), 1, "error: the machine's memory is full"),
    "the disk": (OSError(28, "No space left on device"), 1, "No space left on device"),
    "a foreseen failure": (RunError("image x.jpg is gone"), 1, "error: image x.jpg is gone"),
    "wrong use": (UserError("--lr: too high"), 2, "error: --lr: too high"),
    "an exit": (SystemExit(5), 5, ""),
    "ctrl-C, unhandled": (KeyboardInterrupt(), 130, ""),
}


def test_memory_that_torch_cannot_have_is_told_in_one_line(launched):
    result = launched(lambda: torch.empty(2**60), ["deit3.py"])
    assert result.status == 1 and len(result.err.splitlines()) == 1, result
    assert "error: the machine's memory is full; lower --micro-batch (same result) or --img-size" in result.err, result


def raising(error, rank: str = "0"):
    def action():
        if os.environ.get("RANK", "0") == rank:
            raise error

    return at_steps(action, [1])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("end", ENDS)
def test_J1_whatever_ends_a_run_the_process_and_its_workers_are_gone(folder, tmp_path, end, workers):
    error, status, said = ENDS[end]
    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", workers]
    begin = time.time()
    pid = child(flags, patch=raising(error), log=tmp_path / "log")
    assert status_of(pid, timeout=30) == status and time.time() - begin < 20
    assert said in (tmp_path / "log").read_text()
    with pytest.raises(ProcessLookupError):  # the child led a session of its own: no worker is left in it
        for _ in range(100):
            os.killpg(pid, 0)
            time.sleep(0.05)
    assert not (tmp_path / "o/lock").exists()


@pytest.mark.parametrize("end", ENDS)
def test_J1_of_two_ranks_with_workers_both_are_gone(folder, tmp_path, end):
    error, status, said = ENDS[end]
    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", 1, "--timeout", 20]
    begin = time.time()
    assert ranks(2, flags, tmp_path, patch=raising(error, rank="1"), timeout=40) == [1, status]
    assert time.time() - begin < 35 and said.removeprefix("error: ") in (tmp_path / "rank1.log").read_text()
    assert "lost contact" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize("world, end", [
    *((1, end) for end in ("a mistake of ours", "the GPU", "the host's memory", "the disk")), (2, "a mistake of ours"),
])  # fmt: skip
def test_J1_a_save_that_fails_in_an_unforeseen_way_ends_the_run_in_ten_seconds(folder, tmp_path, world, end):
    error, status, said = ENDS[end]

    def patch():
        def save(*_, **__):
            (tmp_path / "raised").touch()
            raise error

        checkpoint.save = save

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", 2 // world, "--timeout", 20]
    pids = start_ranks(world, flags, tmp_path, free_port(), patch)
    assert [status_of(pid, 40) for pid in pids] == [status] + [1] * (world - 1)
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 10
    assert said in (tmp_path / "rank0.log").read_text()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.killpg(pid, 0)
                time.sleep(0.05)


def test_a_signal_while_a_failure_is_reported_changes_nothing(folder, tmp_path):
    """SIGTERM arrives when the run has failed already and is being closed."""

    def patch():
        from common.run import Run

        close = Run.close
        Run.close = lambda self, status: (os.kill(os.getpid(), signal.SIGTERM), close(self, status))
        raising(TypeError("unsupported operand"))()

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", 1]
    assert status_of(child(flags, patch=patch, log=tmp_path / "log"), timeout=30) == 1


def test_of_two_ranks_one_is_asked_to_end_during_validation(folder, tmp_path):
    """What they tell each other then has the same form, whether a rank was asked or not."""

    def patch():
        from common import evaluate

        original = evaluate.validate

        def validate(run):
            if run.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(run)

        evaluate.validate = validate

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", 0, "--timeout", 20]
    assert ranks(2, flags, tmp_path, patch=patch) == [143, 143], (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize("code, status", [(143, 143), (0, 1)])
def test_a_signal_while_the_lock_of_the_progress_bars_is_taken_ends_the_run_as_any(launched, code, status):
    """tqdm lets go of the lock that it does not hold yet, which fails: not our failure, but after an exit of 0."""

    def interrupted():
        raise SystemExit(code)

    def main():
        tqdm.get_lock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tqdm, "_lock", SimpleNamespace(acquire=interrupted, release=threading.RLock().release))
            tqdm.write("a line")

    result = launched(main, ["main"])
    assert result.status == status and ("cannot release un-acquired lock" in result.err) == (status == 1), result


def test_curves_that_cannot_be_written_do_not_fail_what_is_trained(folder, tmp_path):
    (tmp_path / "o/curves.png").mkdir(parents=True)
    assert status_of(child([*TINY, "--data", folder, "--out", tmp_path / "o"], log=tmp_path / "log")) == 0
    assert f"warning: {tmp_path / 'o/curves.png'}: cannot be written (Is a dir" in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "o/log.jsonl").read_text().splitlines()[-1])["status"] == "completed"


def test_a_worker_killed_when_all_is_trained_is_not_missed(folder, tmp_path):
    def patch():
        from common import report

        def save_plot(*_):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.5)

        report.save_plot = save_plot

    flags = [*TINY, "--data", folder, "--out", tmp_path / "o", "--workers", 1]
    assert status_of(child(flags, patch=patch, log=tmp_path / "log")) == 0
    assert json.loads((tmp_path / "o/log.jsonl").read_text().splitlines()[-1])["status"] == "completed"


def test_a_worker_whose_parent_was_killed_before_it_began_ends(tmp_path, monkeypatch):
    """torch's own watch begins later, and would watch whoever has adopted the worker."""

    def orphan():
        while os.getppid() == parent:
            time.sleep(0.01)
        data._worker_init(0)
        (tmp_path / "alive").touch()

    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    reader, writer = os.pipe()
    if (middle := os.fork()) == 0:
        parent = os.getpid()
        multiprocessing.get_context("fork").Process(target=orphan).start()
        os.kill(parent, signal.SIGKILL)
    os.close(writer)
    os.waitpid(middle, 0)
    assert os.read(reader, 1) == b""  # its last writer, the worker, has ended
    assert not (tmp_path / "alive").exists()


def test_a_signal_while_a_run_ends_that_has_not_begun(folder, tmp_path):
    """SIGTERM when it is closed, which changes nothing, and when its mistake is told."""
    flags = [*TINY, "--data", folder, "--out", tmp_path / "o"]
    assert status_of(child(flags, log=tmp_path / "log")) == 0

    def signalled_in_close():
        from common.run import Run

        close = Run.close
        Run.close = lambda self, status: (os.kill(os.getpid(), signal.SIGTERM), close(self, status))

    assert status_of(child([*flags, "--resume", "auto"], patch=signalled_in_close, log=tmp_path / "log")) == 0
    assert not (tmp_path / "o/lock").exists()

    def signalled_in_the_message():
        from common.run import Run

        class Mistake(UserError):
            def __str__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                return "told"

        def start(self, *_, **parts):
            raise Mistake

        Run.start = start

    assert status_of(child([*flags, "--resume", "auto"], patch=signalled_in_the_message, log=tmp_path / "log")) == 143
    assert not (tmp_path / "o/lock").exists()


def test_ranks_do_not_decide_by_their_own_view_of_the_folder_whether_to_save(folder, tmp_path):
    """A run stopped in its last evaluation goes on where one rank does not see last.pt yet, as over a network."""
    flags = [*TINY, "--data", folder, "--out", tmp_path / "o"]

    def stop_in_the_last_evaluation():
        import common.evaluate

        evaluate, calls = common.evaluate.evaluate, []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        common.evaluate.evaluate = stopping

    def blind():
        from common.run import Run

        original = Run.end_of_training_epoch

        def end_of_training_epoch(self, lr):
            exists, type(self.out).exists = type(self.out).exists, lambda path: os.environ["RANK"] == "0"
            try:
                return original(self, lr)
            finally:
                type(self.out).exists = exists

        Run.end_of_training_epoch = end_of_training_epoch

    assert ranks(2, flags, tmp_path, patch=stop_in_the_last_evaluation) == [143, 143]
    assert ranks(2, [*flags, "--resume", "--timeout", 15], tmp_path, patch=blind) == [0, 0]
    assert "deprecated" not in (tmp_path / "rank0.log").read_text()
