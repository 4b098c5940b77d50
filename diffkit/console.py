"""What diffkit says while it works: on stderr, from the main process only, silent on request.

Results for machines go to stdout (`--json`); everything here is for the person who waits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["progress", "quiet", "say", "set_quiet", "warn"]

T = TypeVar("T")
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


def warn(text: str) -> None:
    """One line that must be seen even by those who asked for silence."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a progress bar named `label`, shown on a terminal only."""
    if quiet() or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, label, total=total, console=Console(stderr=True), transient=True)
