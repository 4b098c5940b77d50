"""What to do when memory runs out: first spare it, then take fewer pictures, then say so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from diffkit.console import warn
from diffkit.errors import RunFailed

__all__ = ["Effort", "free_memory", "is_out_of_memory", "with_fallback", "with_less"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Effort:
    """How the next pictures are tried; lowered where memory ran out, and kept so.

    Attributes:
        batch_size: pictures at once.
        lean: two passes and recomputed activations.
    """

    batch_size: int = 1
    lean: bool = False

    def lower(self) -> bool:
        """Ask for less memory; False when there is no less."""
        if not self.lean:
            self.lean = True
        elif self.batch_size > 1:
            self.batch_size //= 2
        else:
            return False
        return True


def free_memory(device: str) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if kind == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return 1024 * int(values["MemAvailable"].split()[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or this machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(words in text for words in known)


def with_fallback(
    items: Sequence[T], effort: Effort, call: Callable[[Sequence[T], bool], list[R]], name: str
) -> list[R]:
    """call(batch, lean) over all items, in order, with less and less memory as needed.

    Arguments:
        items: of one size.
        effort: where to begin; changed in place.
        call: gives one result an item.
        name: what errors call the items.

    Raises:
        RunFailed: one item does not fit, even so.
    """
    results: list[R] = []
    while len(results) < len(items):

        def next_batch() -> list[R]:
            start = len(results)
            return call(items[start : start + effort.batch_size], effort.lean)

        left = len(items) - len(results)
        results.extend(with_less(effort, next_batch, name, left))
    return results


def with_less(effort: Effort, call: Callable[[], R], name: str, count: int) -> R:
    """call(), which reads `effort` anew in each try, with less and less memory as needed.

    Arguments:
        effort: where to begin; changed in place.
        call: the whole work, from its beginning.
        name: what errors call it.
        count: pictures that could be taken at once.

    Raises:
        RunFailed: nothing less is left.
    """
    while True:
        batch = min(effort.batch_size, count)
        found = _tried(call)
        if found is not None:
            return found[0]
        # Here, not in the handler, the failed attempt's frames and tensors are gone.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not effort.lower():
            raise RunFailed(
                f"{name}: out of memory, even one picture at a time in two passes; try --dtype "
                "bf16, --views 1, or a smaller picture."
            )
        how = "in two passes" if effort.batch_size >= batch else f"{effort.batch_size} at once"
        warn(f"out of memory with {batch} at once; going on {how}.", anywhere=True)


def _tried(call: Callable[[], R]) -> tuple[R] | None:
    try:
        return (call(),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
