"""The two ways a command fails on purpose: each is one line for the reader, never a traceback."""


class UserError(Exception):
    """Wrong use, found before the first step: one line saying what, where and what to do. Exit status 2."""


class RunError(Exception):
    """A failure while running (a damaged image, a full disk, a loss that is not finite). Exit status 1."""


def one_line(error: Exception, limit: int = 120) -> str:
    """What a library's error says, for use in a message of ours."""
    return " ".join(str(error).split())[:limit]
