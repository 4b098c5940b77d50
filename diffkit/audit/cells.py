"""What was measured so far: one small file a (model, threat, picture, purifier).

OUTPUT/changes/DIGEST.json     what the change of a picture looks like
OUTPUT/cells/DIGEST.json       the values, and what they were made from
OUTPUT/pictures/DIGEST/*.png   the first edit of each version, for the pictures that the page shows

DIGEST is that of everything that decides the values, so a cell is either right or not there: an
audit that was killed goes on, and one with another setting measures only what is new.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.audit.effects import Measured
from diffkit.audit.purifiers.plain import to_pillow
from diffkit.errors import UserError
from diffkit.files import atomic_write, read_json, sha256, write_json
from diffkit.protection.sidecar import parameter_digest

__all__ = ["CELLS", "CHANGES", "MIMICRY", "PICTURES", "Cell", "CellStore", "content_digest"]

CELLS, CHANGES, PICTURES, MIMICRY = "cells", "changes", "pictures", "mimicry"


@dataclass(frozen=True)
class Cell:
    """What was measured of one picture.

    Attributes:
        measured: of each version.
        cost: d(P(x), x) (seeds,) by distance, behind a purifier; empty without one.
        pictures: the first edit of each version, relative to the output; empty unless asked for.
        purified: each version behind the purifier, likewise.
    """

    measured: dict[str, Measured]
    cost: dict[str, Tensor]
    pictures: dict[str, str]


class CellStore:
    """The cells of an output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def path(self, made_of: Mapping[str, Any]) -> Path:
        """Where a cell lies."""
        return self.output / CELLS / f"{parameter_digest(made_of)[:24]}.json"

    def load(self, made_of: Mapping[str, Any], shown: bool) -> Cell | None:
        """The cell, None where it is not there, or lacks pictures that are to be shown."""
        path = self.path(made_of)
        if not path.is_file():
            return None
        values = read_json(path)
        pictures = {name: self._picture(path, name) for name in values["measured"]}
        if shown and not all((self.output / place).is_file() for place in pictures.values()):
            return None
        return Cell(
            {name: Measured(**_tensors(entry)) for name, entry in values["measured"].items()},
            _tensor_row(values["cost"]),
            pictures if shown else {},
        )

    def save(
        self,
        made_of: Mapping[str, Any],
        measured: Mapping[str, Measured],
        cost: Mapping[str, Tensor],
        edits: Mapping[str, Tensor],
    ) -> None:
        """Write a cell; `edits` are uint8 (3, H, W) by version, written before the values."""
        path = self.path(made_of)
        for name, pixels in edits.items():
            with atomic_write(self.output / self._picture(path, name)) as file:
                to_pillow(pixels).save(file, "PNG")
        rows = {
            name: {
                "effect": _plain(entry.effect),
                "vs_original": _plain(entry.vs_original),
                "scores": _plain(entry.scores),
            }
            for name, entry in measured.items()
        }
        write_json(path, {"made_of": made_of, "measured": rows, "cost": _plain(cost)})

    def change(self, made_of: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The JSON value that `measure` gives, measured once."""
        path = self.output / CHANGES / f"{parameter_digest(made_of)[:24]}.json"
        if not path.is_file():
            write_json(path, measure())
        return read_json(path)

    def forget(self) -> None:
        """Remove everything that was measured or trained."""
        for name in (CELLS, CHANGES, PICTURES, MIMICRY):
            shutil.rmtree(self.output / name, ignore_errors=True)

    def _picture(self, path: Path, version: str) -> str:
        return f"{PICTURES}/{path.stem}/{version.replace(' ', '-')}.png"


def check_output(output: Path) -> None:
    """Raise `UserError` where the output folder holds something that is no audit."""
    known = {CELLS, CHANGES, PICTURES, MIMICRY, "audit.json", "audit.html"}
    if not output.is_dir():
        return
    strange = sorted(p.name for p in output.iterdir() if not p.name.startswith("."))
    foreign = [name for name in strange if name not in known]
    if foreign:
        raise UserError(
            f"--output {output}: holds {foreign[0]}, which is not of an audit; give another folder."
        )


def content_digest(place: Path) -> str:
    """Digest of a file, or of all files of a folder and their names, wherever it lies."""
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for path in files:
        name = "" if path == place else path.relative_to(place).as_posix()
        digest.update(f"{name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _plain(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in values.items()}


def _tensor_row(values: Mapping[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def _tensors(entry: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, Tensor]]:
    return {name: _tensor_row(values) for name, values in entry.items()}
