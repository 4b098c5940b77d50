"""Stored pairs beside pairs made anew from their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffkit.data.trajectory_store import (
    Header,
    Prompt,
    Shard,
    Stamp,
    read_shard,
    read_stamp,
    shard_path,
)
from diffkit.errors import RunFailed, UserError
from diffkit.generation.pictures import Size
from diffkit.generation.trajectories import Teacher, header_of, machine, whole_shard
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import permutation

__all__ = ["Verified", "teacher_of", "verify_pairs"]


@dataclass(frozen=True)
class Verified:
    """Pairs made anew beside the stored ones.

    Attributes:
        checked: number of pairs.
        identical: how many are equal bit by bit.
        largest: the largest |anew - stored| / |stored| of a pair.
        allowed: what rounding explains: 1e-3 in float32 on the kind of device where the pairs
            were made, 0.02 on another one, 0.1 in half precision.
    """

    checked: int
    identical: int
    largest: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether all pairs agree up to rounding."""
        return self.largest <= self.allowed


def verify_pairs(teacher: Teacher, folder: Path, count: int) -> Verified:
    """Make `count` stored pairs anew, chosen by the seed, each in the batch that it was made in.

    One that is not finite now is as far away as can be. Raises `UserError` for a folder without
    whole shards, and `RunFailed` naming a shard whose bits were changed, or out of memory.
    """
    header = teacher.header
    there = [k for k in range(header.shards) if whole_shard(folder, header, k)]
    candidates = [(k, row) for k in there for row in range(len(header.rows(k)))]
    if not candidates:
        raise UserError(f"{folder}: holds no pairs yet.")
    order = permutation(len(candidates), header.seed, "verify").tolist()
    checked, identical, largest, allowed = 0, 0, 0.0, 0.0
    for number, row in (candidates[i] for i in order):
        if checked == count:
            break
        stamp, shard = _stored(folder, number)
        index = header.rows(number)[row]
        if index not in (places := shard.indices.tolist()):
            continue  # it was not finite
        stored = shard.latents[places.index(index)].float()
        start = row - row % stamp.batch_size
        batch = header.rows(number)[start : start + stamp.batch_size]
        anew = _anew(teacher, batch)[row - start].half().float()
        checked += 1
        identical += bool(anew.equal(stored))
        apart = float((anew - stored).norm() / stored.norm())
        largest = max(largest, apart if math.isfinite(apart) else math.inf)
        allowed = max(allowed, _allowed(header, stamp, machine(teacher.model.device)))
    return Verified(checked, identical, largest, allowed)


def _anew(teacher: Teacher, batch: Sequence[int]) -> Tensor:
    try:
        return teacher.end_points(batch)
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"out of memory with {len(batch)} pairs at once, as they were made; verify them on a "
            "device with as much memory as that one, or, but for fp16, with --device cpu."
        ) from error


def _stored(folder: Path, number: int) -> tuple[Stamp, Shard]:
    path = shard_path(folder, number)
    stamp, shard = read_stamp(path), read_shard(path)
    if stamp is None or shard is None:
        raise RunFailed(
            f"{path}: its bits were changed since it was written. Run the command again that made "
            "the pairs: it makes this shard anew."
        )
    return stamp, shard


def _allowed(header: Header, stamp: Stamp, device: str) -> float:
    if header.dtype != "fp32":
        return 0.1
    return 1e-3 if stamp.device == device else 0.02


def teacher_of(
    folder: Path, header: Header, prompts: Sequence[Prompt], model: LatentDiffusion
) -> Teacher:
    """The model as the teacher of stored pairs; `UserError` when it is another one."""
    anew = header_of(
        model,
        prompts,
        count=header.count,
        seed=header.seed,
        shard=header.shard,
        steps=header.steps,
        guidance=header.guidance,
        size=Size(header.size[1], header.size[0]),
    )
    if differing := header.differing(anew):
        raise UserError(
            f"{folder}: was made with another {'; '.join(differing)}; give the "
            "teacher with --model."
        )
    return Teacher(model, header, prompts)
