"""Noise-image pairs of a teacher: the end points of its deterministic sampler, into a folder.

x = ODE(z, c): DDIM with eta 0 or Euler, a fixed number of steps and a fixed guidance, from unit
noise z. What decides a pair is in the folder's header; where shards lie and how they are read is in
`diffkit.data.trajectory_store`. Any number of processes work on one folder: whoever makes a shard
holds a lock on it, which a killed process lets go.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.console import progress, say, warn
from diffkit.data.scan import threaded
from diffkit.data.trajectory_store import (
    Header,
    Prompt,
    Shard,
    Stamp,
    is_trajectory_folder,
    latent_space,
    prompts_digest,
    read_header,
    read_shard,
    read_stamp,
    shard_path,
    trajectory_noise,
    write_header,
    write_prompt_rows,
    write_shard,
)
from diffkit.errors import RunFailed, UserError
from diffkit.files import TEMPORARY_PREFIX, check_writable
from diffkit.generation.card import is_student, read_card
from diffkit.generation.engine import DTYPES, size_rule, weights_digest
from diffkit.generation.pictures import Size
from diffkit.generation.run import Processes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample

__all__ = [
    "Made",
    "Teacher",
    "check_folder",
    "check_place",
    "header_of",
    "machine",
    "make_pairs",
    "prepare",
    "whole_shard",
]

LOCK = ".lock"


def header_of(
    model: LatentDiffusion,
    prompts: Sequence[Prompt],
    *,
    count: int,
    seed: int,
    shard: int,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
) -> Header:
    """What decides the pairs of a model, with its own defaults for what is None.

    Raises `UserError` for a size that the model does not make, a number of steps that its schedule
    does not have, guidance that it cannot have, and a model whose own sampler draws noise.
    """
    if is_student(model):
        raise UserError(
            f"{model.source}: was distilled to few steps, and is no teacher of others; give the "
            "model that it was made from."
        )
    card = read_card(model.source, model.revision)
    steps = steps or card.step_count(model.family.steps)
    if guidance is None:
        guidance = card.guidance(model.family.guidance_scale)
    if not model.family.takes_guidance:
        if guidance > 1:
            model.family.require("cfg")
        elif 0 < guidance < 1:
            raise UserError(f"guidance: {guidance:g} is none; 1 is no guidance, above it is some.")
    rule = size_rule(model)
    size = size or rule.native
    rule.check(size)
    shape = model.latent_shape(size.height, size.width)
    schedule = model.schedule
    mu = schedule.mu(model.denoiser.tokens(*shape[1:])) if schedule.shifts_by_resolution else None
    return Header(
        model=os.path.abspath(model.source) if Path(model.source).exists() else model.source,
        weights=weights_digest(model),
        scheduler=_told_scheduler(model),
        times=tuple(float(t) for t in schedule.sampling_timesteps(steps, mu)),
        steps=steps,
        guidance=float(guidance),
        seed=seed,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == model.dtype),
        size=(size.height, size.width),
        shape=shape,
        space=latent_space(model),
        shard=shard,
        prompts=prompts_digest(prompts),
        count=count,
    )


def _told_scheduler(model: LatentDiffusion) -> dict[str, Any]:
    """Class and config of the model's scheduler, as JSON data."""
    scheduler = model.pipeline().scheduler
    told: dict[str, Any] = {"class": type(scheduler).__name__}
    told |= {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return plain


@dataclass(frozen=True)
class Teacher:
    """The model that makes the pairs of a header for its prompts."""

    model: LatentDiffusion
    header: Header
    prompts: Sequence[Prompt]

    @torch.no_grad()
    def end_points(self, indices: Sequence[int]) -> Tensor:
        """x (B, C, h, w) of these pairs, float32 on the CPU; all in one batch."""
        model, header = self.model, self.header
        conditioner, device = model.conditioner, model.device
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        labels = [prompt.label for prompt in prompts if prompt.label is not None]
        if labels:
            cond = conditioner.encode_labels(torch.tensor(labels), len(labels))
        else:
            cond = conditioner.encode([prompt.text for prompt in prompts], header.size)
        told = model.family.takes_guidance
        guided = header.guidance > 1 and not told
        uncond = conditioner.null(len(prompts), header.size).to(device) if guided else None
        found = sample(
            model.denoiser,
            trajectory_noise(header, indices).to(device),
            cond.to(device),
            uncond,
            steps=header.steps,
            guidance_scale=header.guidance if told or guided else 1.0,
            shown=False,
        )
        return found.float().cpu()


@dataclass
class Made:
    """What a run did to a folder.

    Attributes:
        made: pairs made by this process, those that were dropped included.
        kept: pairs that were there.
        dropped: pairs of the whole folder that came out with numbers that are not finite.
        elsewhere: shards that other processes are making.
    """

    made: int = 0
    kept: int = 0
    dropped: int = 0
    elsewhere: int = 0


def check_place(folder: Path) -> None:
    """Raise `UserError` for a file, and for a folder that has something else than pairs."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; an output folder is needed here.")
    if folder.is_dir() and not is_trajectory_folder(folder):
        names = [path.name for path in folder.iterdir()]
        # Temporary files are of another process that is just starting, or of one that was killed.
        if any(name != LOCK and not name.startswith(TEMPORARY_PREFIX) for name in names):
            raise UserError(f"{folder}: is not empty and holds no pairs; choose another --output.")


def check_folder(folder: Path, header: Header, overwrite: bool = False) -> None:
    """Raise `UserError` as `check_place` does, and for pairs of other settings or more of them.

    One with fewer pairs grows. Pairs that `overwrite` removes may be any.
    """
    check_place(folder)
    if is_trajectory_folder(folder) and not overwrite:
        old = read_header(folder)
        if differing := old.differing(header):
            raise UserError(
                f"{folder}: holds pairs of another {'; '.join(differing)}. Choose another "
                "--output, or add --overwrite to remove them."
            )
        if old.count > header.count:
            raise UserError(
                f"{folder}: holds {old.count} pairs, more than --count {header.count}. Give at "
                "least as many, or another --output."
            )
    check_writable(folder)


def prepare(folder: Path, header: Header, prompts: Sequence[Prompt], overwrite: bool) -> None:
    """Write header and prompts of a checked folder; `overwrite` removes the pairs in it."""
    if overwrite:
        for path in folder.glob("pairs-*.safetensors"):
            path.unlink(missing_ok=True)
    write_header(folder, header)  # first: it is what tells the folder from anybody's
    write_prompt_rows(folder, prompts)


def make_pairs(
    teacher: Teacher, folder: Path, batch_size: int, processes: Processes | None = None
) -> Made:
    """Make every shard that is missing or damaged and that no other process is making.

    Arguments:
        folder: prepared by `prepare`.
        batch_size: pairs at once.
        processes: those of one launch; alone by default.

    Raises `RunFailed` when storage or memory runs out, and when no pair of the folder is finite;
    finished shards stay.
    """
    header, me, made = teacher.header, processes or Processes(), Made()
    looks = threaded(lambda k: _sound(folder, header, k), header.shards, "Checking shards")
    missing = [k for k, sound in enumerate(looks) if not sound]
    made.kept = header.count - sum(len(header.rows(k)) for k in missing)
    if made.kept:
        say(f"{made.kept} of {header.count} pairs are in {folder} already")
    batches = sum(-(-len(header.rows(k)) // batch_size) for k in missing)
    # All must have looked at the folder before one of them changes it.
    me.wait()
    with open(folder / LOCK, "w") as lock:
        work = _work(teacher, folder, missing, batch_size, lock)
        for count in progress(work, "batches of pairs", batches):
            made.made += count
    me.wait()
    stamps = [(k, whole_shard(folder, header, k)) for k in range(header.shards)]
    made.elsewhere = sum(stamp is None for _, stamp in stamps)
    made.dropped = sum(len(header.rows(k)) - stamp.pairs for k, stamp in stamps if stamp)
    if made.dropped:
        warn(f"{made.dropped} pairs are left out: their latents are not finite in {header.dtype}")
    if made.dropped == header.count:
        raise RunFailed(f"{folder}: not one pair is finite; try --dtype fp32.")
    return made


def whole_shard(folder: Path, header: Header, number: int) -> Stamp | None:
    """The stamp of a shard that is there, whole, and of this header."""
    stamp = read_stamp(shard_path(folder, number))
    if stamp and stamp.header == header.digest() and stamp.stop >= header.rows(number).stop:
        return stamp
    return None


def _sound(folder: Path, header: Header, number: int) -> bool:
    """Whether a shard is there and has the bits that were written; it is read for that."""
    stamped = whole_shard(folder, header, number) is not None
    return stamped and read_shard(shard_path(folder, number)) is not None


def _work(
    teacher: Teacher, folder: Path, missing: Sequence[int], batch_size: int, lock: Any
) -> Iterator[int]:
    """Make shards, yielding the number of pairs of every finished batch."""
    header = teacher.header
    for number in missing:
        with _claim(lock, number) as ours:
            if not ours or _sound(folder, header, number):  # it may have come in between
                continue
            rows = header.rows(number)
            parts = []
            for start in rows[::batch_size]:
                parts.append(_end_points(teacher, rows[start - rows.start :][:batch_size]))
                yield len(parts[-1])
            latents, indices = torch.cat(parts), torch.tensor(rows)
            finite = latents.isfinite().flatten(1).all(1)
            kind, kept = machine(teacher.model.device), int(finite.sum())
            stamp = Stamp(header.digest(), rows.stop, kept, batch_size, kind, "")
            shard = Shard(latents[finite], indices[finite])
            write_shard(shard_path(folder, number), shard, stamp)


def _end_points(teacher: Teacher, indices: Sequence[int]) -> Tensor:
    try:
        return teacher.end_points(indices).half()
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"out of memory with {len(indices)} pairs at once; use a smaller --batch-size, or "
            "--dtype bf16. Finished shards are kept."
        ) from error


def machine(device: torch.device) -> str:
    """The kind of a device, by which the last bits of its arithmetic go: a GPU's name, cpu, mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def _claim(file: Any, number: int) -> Iterator[bool]:
    """Hold byte `number` of the lock file against other processes; yields whether it is ours."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, number)
