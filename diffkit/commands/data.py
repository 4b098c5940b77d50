"""`diffkit data check`: everything that is wrong with a folder of training pictures."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffkit.console import set_quiet
from diffkit.errors import UserError

__all__ = ["DataCheckConfig", "configs", "main"]


@dataclass(frozen=True)
class DataCheckConfig:
    """Read every picture and caption of a folder and name the bad ones; exits with 1 if any is."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Pictures with metadata.{jsonl,csv,parquet}, with .txt files beside them, or in class
    folders; preference pairs where the table has columns winner and loser, or image_0, image_1 and
    label_0; or the noise-image pairs of `diffkit trajectories`."""

    smallest: int = 32
    """A shorter side below this many pixels is a problem; for pictures."""

    json: bool = False
    """Print the problems and counts as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The subcommands."""
    return {"check": DataCheckConfig}


def main(config: DataCheckConfig) -> int:
    """Check a folder; 0 when nothing is wrong, 1 when something is. See `DataCheckConfig`."""
    from diffkit.data.check import check
    from diffkit.data.trajectory_store import is_trajectory_folder

    set_quiet(config.json)
    if config.smallest < 1:
        raise UserError(f"--smallest {config.smallest}: must be at least 1.")
    default = next(f.default for f in dataclasses.fields(config) if f.name == "smallest")
    if config.smallest != default and is_trajectory_folder(config.folder):
        raise UserError("--smallest: is about pictures, and these are noise-image pairs; omit it.")
    report = check(config.folder, smallest=config.smallest)
    print(json.dumps(dataclasses.asdict(report)) if config.json else report.summary())
    return 1 if report.problems else 0
