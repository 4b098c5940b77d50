"""The two errors that a person meets at the command line."""

from __future__ import annotations

__all__ = ["RunFailed", "UserError"]


class UserError(ValueError):
    """The work could not start: wrong input, wrong option, missing file.

    The message names the thing, says what was wrong with it and what would be right. The command
    line prints it without a traceback and exits with code 2.
    """


class RunFailed(RuntimeError):
    """The work started and could not be finished: a full disk, a NaN loss, a lost device.

    The message says what is kept and how to go on. The command line exits with code 1.
    """
