"""What a reader is told: the two ways a command fails on purpose, each in one line, and how far a wait is."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm


class UserError(Exception):
    """Wrong use, found before the first step: one line saying what, where and what to do. Exit status 2."""


class RunError(Exception):
    """A failure while running (a damaged image, a full disk, a loss that is not finite). Exit status 1."""


def one_line(error: Exception, limit: int = 120) -> str:
    """What a library's error says, for use in a message of ours."""
    return " ".join(str(error).split())[:limit]


def terminal() -> bool:
    """Whether a bar can be drawn: on a terminal, not a dumb one, that knows its width (some report 0 columns)."""
    try:
        able = sys.stderr.isatty() and os.getenv("TERM") != "dumb"
        return able and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it cannot be asked
        return True


def watched(items: Iterable, title: str, unit: str, say: Callable, total: int | None = None, each: int = 1) -> Iterator:
    """`items`, worth `each` units of `total` (None: unknown), counted by a bar, or every 10 seconds by say(line)."""
    first, done, said = os.environ.get("RANK", "0") == "0", 0, time.monotonic()
    with tqdm(desc=title, total=total, unit=f" {unit}", leave=False, disable=not (first and terminal())) as bar:
        for item in items:
            yield item
            done += each if total is None else min(each, total - done)
            bar.update(done - bar.n)
            if first and bar.disable and time.monotonic() > said + 10:
                said = time.monotonic()
                say(f"{title}: {done}{f' of {total}' if total else ''} {unit} so far")
