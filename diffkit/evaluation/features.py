"""Feature vectors of a picture set, streamed to disk; a killed run loses at most one batch.

`NAME.f32` holds the rows as plain little-endian float32. `NAME.jsonl` says what they are: one line
with the extractor, then one line a block of rows with the digests of its bytes and of its pictures.
A block is appended to the first file, then to the second. On the next run every block that both
files agree on and whose pictures are the same is kept; the first that is torn, altered, or of other
pictures ends what is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from diffkit.console import progress, say
from diffkit.errors import UserError
from diffkit.evaluation.extractors import Extractor
from diffkit.evaluation.pictures import PictureSet
from diffkit.files import append_jsonl, atomic_write, read_jsonl, storage_errors

__all__ = ["stream_features"]

FORMAT = 1
_ROW = np.dtype("<f4")


def stream_features(
    pictures: PictureSet,
    extractor: Extractor,
    path: str | os.PathLike[str],
    batch_size: int = 64,
) -> npt.NDArray[np.float32]:
    """Features (n, d) of all pictures, a copy-on-write memory map of `path`.

    Arguments:
        path: ends in ".f32"; the log lies beside it with the ending ".jsonl".
        batch_size: pictures a network call, and rows that a kill can cost.

    Memory does not grow with n but for the pages of the map that the caller reads, n * d * 4 bytes
    at most. Rows depend on the batch size only in their last bits, and not at all on a kill. Raises
    `RunFailed` when a picture changes or disappears meanwhile.
    """
    file = Path(path)
    if file.suffix != ".f32":
        raise UserError(f"{file}: a feature file must end in .f32.")
    log = file.with_suffix(".jsonl")
    done = _keep_valid(file, log, pictures, extractor)
    blocks = progress(
        range(done, len(pictures), batch_size), f"{extractor.label}: {pictures.root.name}"
    )
    batches = pictures.batches(batch_size, done)
    with storage_errors(file), open(file, "ab") as rows:
        for start in blocks:
            stop = min(start + batch_size, len(pictures))
            block = np.empty((stop - start, extractor.dim), _ROW)
            filled = 0
            while filled < len(block):
                for batch in next(batches).pieces():
                    block[np.array(batch.indices) - start] = extractor(batch.images).numpy()
                    filled += len(batch.indices)
            rows.write(block.tobytes())
            rows.flush()
            append_jsonl(log, _entry(start, block.tobytes(), stop, pictures))
    shape = (len(pictures), extractor.dim)
    return np.memmap(file, _ROW, mode="c", shape=shape)


def _entry(start: int, data: bytes, stop: int, pictures: PictureSet) -> dict[str, Any]:
    return {
        "start": start,
        "stop": stop,
        "bytes": hashlib.blake2b(data, digest_size=16).hexdigest(),
        "pictures": pictures.identity(start, stop),
    }


def _head(extractor: Extractor) -> dict[str, Any]:
    return {"format": FORMAT, "extractor": extractor.key, "dim": extractor.dim}


def _keep_valid(file: Path, log: Path, pictures: PictureSet, extractor: Extractor) -> int:
    """Cut both files back to the blocks that hold; return the number of rows that are kept."""
    lines = _read_log(log) if file.is_file() else []
    kept: list[Any] = []
    if lines and lines[0] == _head(extractor):
        with open(file, "rb") as rows:
            kept = [line for line, holds in _checked(lines[1:], rows, pictures, extractor) if holds]
    done: int = kept[-1]["stop"] if kept else 0
    size = done * extractor.dim * _ROW.itemsize
    if done == len(pictures) and len(kept) == len(lines) - 1 and file.stat().st_size == size:
        return done
    if len(kept) < len(lines) - 1:
        say(f"{file}: from row {done} on it is torn or of other pictures; this is done again")
    # Also where all lines hold: a last line torn by a kill must not get the next one appended.
    with atomic_write(log, "w") as text:
        text.writelines(json.dumps(line) + "\n" for line in [_head(extractor), *kept])
    with storage_errors(file), open(file, "ab") as rows:
        rows.truncate(size)
    return done


def _read_log(log: Path) -> list[Any]:
    try:
        return read_jsonl(log) if log.is_file() else []
    except UserError:  # an altered line: nothing in the file can be trusted
        return []


def _checked(
    lines: list[Any], rows: IO[bytes], pictures: PictureSet, extractor: Extractor
) -> Iterator[tuple[Any, bool]]:
    """Each block's line and whether it holds, up to the first that does not."""
    done = 0
    for line in lines:
        start, stop = line["start"], line["stop"]
        data = rows.read((stop - start) * extractor.dim * _ROW.itemsize)
        holds = start == done and stop <= len(pictures)
        holds = holds and line == _entry(start, data, stop, pictures)
        yield line, holds
        if not holds:
            return
        done = stop
