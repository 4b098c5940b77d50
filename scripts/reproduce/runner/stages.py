"""Training in stages: the models after some numbers of steps of one and the same run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffkit.errors import RunFailed
from diffkit.files import atomic_directory, read_json
from diffkit.training.config import TrainConfig
from diffkit.training.folder import RunFolder
from diffkit.training.launch import train
from runner.work import INTERRUPTED, Interrupted, claim

__all__ = ["stage_folder", "train_stages"]


def stage_folder(output: Path, steps: int) -> Path:
    """Where the result after `steps` steps lies."""
    return output.with_name(f"{output.name}-{steps}")


def train_stages(config: TrainConfig, stages: Sequence[int]) -> list[Path]:
    """Train to each of the stages in turn and keep the result of each; returns their folders.

    The learning rate must not depend on the last step (a constant one, with or without warm-up),
    so that all stages lie on one trajectory. Called again, it goes on from the last checkpoint.
    Raises `Interrupted` after Ctrl-C or SIGTERM, with a checkpoint written, and `RunFailed` where
    the run is further on than a stage that was not kept.
    """
    output = Path(config.output)
    folders = [stage_folder(output, steps) for steps in stages]
    with claim(output, wait=True):
        for steps, folder in zip(stages, folders, strict=True):
            if folder.is_dir():
                continue
            done = output / "finished.json"
            if done.exists() and (there := read_json(done)["step"]) > steps:
                raise RunFailed(
                    f"{output}: is at step {there}, and its result after {steps} was not kept; "
                    "remove the folder to train anew."
                )
            code = train(replace(config, max_steps=steps))
            if code == INTERRUPTED:
                raise Interrupted
            if code:
                raise RunFailed(f"{output}: the training ended with code {code}.")
            with atomic_directory(folder) as new:
                shutil.copytree(RunFolder(config).result, new, dirs_exist_ok=True)
    return folders
