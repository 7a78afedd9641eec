"""How far a wait is: told by rank 0, wherever a user would wonder."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm


def terminal() -> bool:
    """Whether a bar can be drawn: on a terminal, not a dumb one, that knows its width (some report 0 columns)."""
    try:
        able = sys.stderr.isatty() and os.getenv("TERM") != "dumb"
        return able and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it cannot be asked
        return True


def watched(items: Iterable, title: str, unit: str, say: Callable, total: int | None = None, each: int = 1) -> Iterator:
    """`items`, `each` of them worth so many units (all: `total`, where known), counted by a bar or every 10 seconds by
    say(line)."""
    first, done, said = os.environ.get("RANK", "0") == "0", 0, time.monotonic()
    with tqdm(desc=title, total=total, unit=f" {unit}", leave=False, disable=not (first and terminal())) as bar:
        for item in items:
            yield item
            done += each if total is None else min(each, total - done)
            bar.update(done - bar.n)
            if first and bar.disable and time.monotonic() > said + 10:
                said = time.monotonic()
                say(f"{title}: {done}{f' of {total}' if total else ''} {unit} so far")
