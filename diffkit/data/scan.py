"""The headers of all pictures of a set: which can be read, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from diffkit.console import progress, warn
from diffkit.data.columns import CAPTIONS
from diffkit.data.images import BadImage, read_header
from diffkit.data.records import ImageSource, Sample, Size
from diffkit.errors import UserError

__all__ = ["Scan", "require_captions", "scan", "threaded"]

T = TypeVar("T")
_NAMED = 5
_THREADS = 8
_CHUNK = 512


@dataclass(frozen=True)
class Scan:
    """`kept` holds the readable indices of a source in order, `sizes` their (height, width)."""

    kept: list[int]
    sizes: list[Size]


def scan(source: ImageSource) -> Scan:
    """Open every picture as far as its header; unreadable ones are named in a warning and left out.

    Raises `UserError` when none can be read.
    """

    def size(index: int) -> Size | str:
        try:
            return read_header(source.encoded(index))
        except BadImage as error:
            return f"{source[index].name}: {error}"

    found = list(threaded(size, len(source), "Reading picture headers"))
    faults = [reason for reason in found if isinstance(reason, str)]
    listed = "\n  ".join(faults[:_NAMED] + ["..."] * (len(faults) > _NAMED))
    if len(faults) == len(found):
        raise UserError(f"None of the {len(found)} pictures can be read:\n  {listed}")
    if faults:
        warn(f"{len(faults)} of {len(found)} pictures cannot be read and are left out:\n  {listed}")
    kept = [index for index, value in enumerate(found) if not isinstance(value, str)]
    return Scan(kept, [value for value in found if not isinstance(value, str)])


def threaded(function: Callable[[int], T], count: int, label: str) -> Iterator[T]:
    """`function(0)` ... `function(count - 1)` in order, by several threads and with progress."""

    # A task for each of a million headers would cost more than the reading.
    size = max(1, min(_CHUNK, count // (8 * _THREADS)))

    def chunk(start: int) -> list[T]:
        return [function(index) for index in range(start, min(count, start + size))]

    def results() -> Iterator[T]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for values in pool.map(chunk, range(0, count, size)):
                yield from values

    return progress(results(), label, count)


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def require_captions(source: _Samples, noun: str = "picture") -> None:
    """Raise `UserError` naming the first samples without a caption, if there are any."""
    bare = [source[index].name for index in range(len(source)) if not source[index].captions]
    if bare:
        named = ", ".join(bare[:_NAMED]) + (", ..." if len(bare) > _NAMED else "")
        where = (
            'a column "text" in metadata.jsonl, metadata.csv or metadata.parquet, or a NAME.txt '
            "beside every NAME.png"
        )
        if noun == "pair":
            named_so = f"{', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}"
            where = f"a text in the column {named_so} of the table, or that of --caption-column"
        raise UserError(
            f"{len(bare)} of {len(source)} {noun}s have no caption: {named}. Training on text "
            f"needs one for each: {where}."
        )
