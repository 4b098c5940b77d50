"""The artist of the experiment: OpenMoji drawings, in a style that the embedded model never saw.

OpenMoji (https://openmoji.org) is licensed CC BY-SA 4.0. Its drawings are fetched from npm when the
experiment runs, lie in `.build/`, and are never committed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import read_concepts
from common import BACKGROUNDS, STYLES, composite, read_json
from emoji import IconifySet, code_points, fetch
from PIL import Image
from runner import inputs
from runner.work import claim
from torch import Tensor

from diffkit.files import atomic_directory

__all__ = [
    "LEARNT",
    "PACKAGE",
    "Drawing",
    "caption",
    "other_styles",
    "pixels_of",
    "protected",
    "reference",
    "save_sheet",
    "write_folder",
]

PACKAGE = "@iconify-json/openmoji@1.2.29"
STYLE = "openmoji"

# Eight things that the model's captions name and eight that they do not, in turns, so that the
# first eight, which a mimic learns from, are half and half.
KNOWN = ("red_apple", "penguin", "guitar", "house", "hamburger", "automobile", "owl", "cactus")
UNKNOWN = ("croissant", "tiger", "backpack", "church", "taco", "candle", "duck", "fountain_pen")
LEARNT = 8
"""A mimic is trained on the first eight of the artist's protected pictures."""


@dataclass(frozen=True)
class Drawing:
    """One concept on one background."""

    concept: str
    background: str


def _on_backgrounds(concepts: list[str]) -> list[Drawing]:
    colours = list(BACKGROUNDS)
    return [Drawing(concept, colours[i % len(colours)]) for i, concept in enumerate(concepts)]


def protected() -> list[Drawing]:
    """The sixteen pictures that are protected; each background twice."""
    return _on_backgrounds([c for pair in zip(KNOWN, UNKNOWN, strict=True) for c in pair])


def reference(count: int) -> list[Drawing]:
    """Further drawings by the artist, of things that the model's captions name; none is protected.

    What a mimic is asked for, and what its pictures are compared with.
    """
    concepts = [concept for concept in read_concepts() if concept not in KNOWN]
    return _on_backgrounds(concepts[:count])


@cache
def _concepts(emoji: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    entries = read_json(emoji / "concepts.json")
    return {entry["id"]: (i, entry) for i, entry in enumerate(entries)}


def _emoji() -> Path:
    """Folder of the four sets that the model was trained on, made if need be."""
    return inputs.pictures().parent


@cache
def _openmoji() -> IconifySet:
    folder = _emoji() / "npm"
    with claim(folder, wait=True):
        return IconifySet(fetch(PACKAGE, folder))


def caption(drawing: Drawing, style: str = STYLE) -> str:
    """As the model's training captions are written."""
    name = _concepts(_emoji())[drawing.concept][1]["name"]
    return f"{name}, {style} style, {drawing.background} background"


def pixels_of(drawings: list[Drawing]) -> Tensor:
    """The artist's pictures, uint8 (N, 3, 64, 64)."""
    concepts = _concepts(_emoji())
    found = [
        composite(
            _openmoji().render(code_points(concepts[drawing.concept][1]["char"])),
            BACKGROUNDS[drawing.background],
        )
        for drawing in drawings
    ]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def other_styles(drawings: list[Drawing]) -> dict[str, Tensor]:
    """The same things in the model's own styles: name -> uint8 (N, 3, 64, 64)."""
    rgba = np.load(_emoji() / "rgba.npy", mmap_mode="r")
    rows = [_concepts(_emoji())[drawing.concept][0] for drawing in drawings]
    return {
        style: torch.from_numpy(
            np.stack(
                [
                    composite(rgba[row, s], BACKGROUNDS[drawing.background])
                    for row, drawing in zip(rows, drawings, strict=True)
                ]
            )
        )
        .permute(0, 3, 1, 2)
        .contiguous()
        for s, style in enumerate(STYLES)
    }


def write_folder(folder: Path, pixels: Tensor, captions: list[str]) -> Path:
    """A training folder of PNG files and captions from uint8 (N, 3, H, W); kept if it is there."""
    with claim(folder, wait=True):
        if folder.is_dir():
            return folder
        with atomic_directory(folder) as place:
            rows = []
            for i, (picture, text) in enumerate(zip(pixels, captions, strict=True)):
                name = f"{i:02d}.png"
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place / name)
                rows.append(json.dumps({"file_name": name, "text": text}) + "\n")
            (place / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def save_sheet(pixels: Tensor, path: Path, columns: int = 16) -> None:
    """One PNG of all pictures, uint8 (N, 3, H, W), for whoever wants to look at them."""
    rows = [torch.cat(list(row), -1) for row in pixels.split(columns) if len(row) == columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(rows, -2).permute(1, 2, 0).numpy()).save(path)
