"""Noise-image pairs of a teacher, made once for all cells of an experiment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from diffkit.data.trajectories import TrajectoryData
from diffkit.data.trajectory_store import Prompt
from diffkit.errors import UserError
from diffkit.generation.engine import choose_device
from diffkit.generation.trajectories import (
    Teacher,
    check_folder,
    header_of,
    make_pairs,
    prepare,
)
from diffkit.models.latent_diffusion import LatentDiffusion
from runner.work import claim

__all__ = ["pair_folder"]

BATCH = 192
SHARD = 192
PAUSE = 2.0
"""Seconds between looks at what other processes are making."""


def pair_folder(
    folder: Path,
    teacher: Path,
    captions: Sequence[str],
    *,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
) -> Path:
    """A folder of `count` pairs for the captions in turn; made here and by whoever else asks.

    By the model in `teacher`, on CUDA where there is one. What lies there of an interrupted call
    is kept.
    """
    if _whole(folder):
        return folder
    device = choose_device("auto")
    model = LatentDiffusion.load(teacher, device=device)
    prompts = [Prompt(caption) for caption in captions]
    header = header_of(
        model, prompts, count=count, seed=seed, shard=SHARD, steps=steps, guidance=guidance
    )
    with claim(folder, wait=True):
        check_folder(folder, header)
        prepare(folder, header, prompts, overwrite=False)
    while make_pairs(Teacher(model, header, prompts), folder, BATCH).elsewhere:
        time.sleep(PAUSE)  # another process makes the last ones, or was killed and left them
    return folder


def _whole(folder: Path) -> bool:
    try:
        TrajectoryData(folder, batch_size=1, seed=0)
    except UserError:
        return False
    return True
