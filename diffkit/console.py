"""What diffkit says while it works: on stderr, from the main process only, silent on request.

Results for machines go to stdout (`--json`); everything here is for the person who waits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["progress", "quiet", "say", "set_quiet", "warn"]

T = TypeVar("T")
LINE_EVERY = 10.0  # seconds
_quiet = False


def set_quiet(value: bool) -> None:
    """Silence `say` and `progress` (not `warn`) for this process."""
    global _quiet
    _quiet = value


def quiet() -> bool:
    """True when this process should not speak: silenced, or not the main one of its group."""
    return _quiet or os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    """One line for the person who waits."""
    if not quiet():
        print(text, file=sys.stderr, flush=True)


def warn(text: str, anywhere: bool = False) -> None:
    """One line that must be seen even by those who asked for silence.

    `anywhere`: from other processes too, for what only one of them meets.
    """
    if anywhere or os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` and show how far it is.

    On a terminal a bar named `label`; in a log file a line every `LINE_EVERY` seconds.
    """
    if quiet():
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, total=total, console=Console(stderr=True), transient=True)
    else:
        yield from _lines(items, label, total)


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    total = len(items) if total is None and isinstance(items, Sized) else total
    of = "" if total is None else f" of {total}"
    shown = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - shown > LINE_EVERY:
            shown = time.monotonic()
            say(f"{label}: {done}{of}")
        yield item
