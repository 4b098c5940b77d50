"""Everything that is wrong with a folder of noise-image pairs."""

from __future__ import annotations

from pathlib import Path

from diffkit.data.layout import Problem
from diffkit.data.scan import threaded
from diffkit.data.trajectory_store import (
    PROMPTS,
    Header,
    Shard,
    read_header,
    read_prompt_rows,
    read_shard,
    read_stamp,
    shard_path,
)
from diffkit.errors import UserError

__all__ = ["check_trajectories"]


def check_trajectories(folder: Path) -> tuple[list[Problem], dict[str, int]]:
    """Read every shard; returns the problems, and the counts "pairs", "dropped" and "prompts".

    The kinds of problem are "missing shard", "corrupt" (torn, with changed bits, or with tensors
    that are not those of a shard), "other settings" (of the shard, or of the prompts, than the
    header's) and "missing prompts". Raises `UserError` for a folder without a header that can be
    read.
    """
    header = read_header(folder)
    problems, counts = [], {"pairs": 0, "dropped": 0, "prompts": 0}
    try:
        counts["prompts"] = len(read_prompt_rows(folder, header))
    except UserError as error:
        message = str(error).removeprefix(f"{folder / PROMPTS}: ")
        kind = "other settings" if (folder / PROMPTS).exists() else "missing prompts"
        problems.append(Problem(PROMPTS, kind, message))
    looks = threaded(lambda k: _look(folder, header, k), header.shards, "Checking shards")
    for number, found in enumerate(looks):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            counts["pairs"] += found
            counts["dropped"] += len(header.rows(number)) - found
    return problems, counts


def _look(folder: Path, header: Header, number: int) -> Problem | int:
    """What is wrong with a shard, or its number of pairs."""
    path = shard_path(folder, number)
    rows = header.rows(number)
    if not path.exists():
        return Problem(path.name, "missing shard", f"pairs {rows.start} to {rows.stop - 1}")
    stamp = read_stamp(path)
    if stamp is None:
        return Problem(path.name, "corrupt", "is not whole")
    if stamp.header != header.digest():
        return Problem(path.name, "other settings", "was made with others than the header's")
    if stamp.stop < rows.stop:
        lacking = f"pairs {stamp.stop} to {rows.stop - 1}"
        return Problem(path.name, "missing shard", f"is of a smaller count: {lacking} are missing")
    shard = read_shard(path)
    if shard is None:
        return Problem(path.name, "corrupt", "its bits were changed since it was written")
    if fault := _fault(header, rows, shard):
        return Problem(path.name, "corrupt", fault)
    return len(shard.indices)


def _fault(header: Header, rows: range, shard: Shard) -> str:
    indices = shard.indices.tolist()
    if indices != sorted(set(indices) & set(rows)):
        return f"its indices are not some of {rows.start} to {rows.stop - 1}, in order"
    if tuple(shard.latents.shape) != (len(indices), *header.shape):
        return f"its latents are {tuple(shard.latents.shape)}, not {(len(indices), *header.shape)}"
    return "" if bool(shard.latents.isfinite().all()) else "some of its latents are not finite"
