"""The panels of the demo page: one function a method, in the order of the page.

To show a method on the page, write `def panel(stage: Stage) -> Panel` in a module of this folder
and name it in `PANELS`. A panel takes seconds on a CPU with the embedded model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffkit.generation.card import Card
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["PANELS", "Panel", "Picture", "Stage", "panels"]

PANELS = (
    "diffkit.commands.panels.generation:grid",
    "diffkit.commands.panels.generation:guidance",
    "diffkit.commands.panels.generation:from_a_picture",
    "diffkit.commands.panels.evaluation:few_steps",
    "diffkit.commands.panels.protection:before_and_after",
    "diffkit.commands.panels.model:what_it_is",
)


@dataclass(frozen=True)
class Picture:
    """A picture and what stands below it."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Panel:
    """One section of the page.

    Attributes:
        title: its heading.
        text: one paragraph for a person who has never seen the method.
        command: a command line that does the same, or "".
        rows: rows of pictures.
        table: (name, value) lines.
    """

    title: str
    text: str
    command: str = ""
    rows: tuple[tuple[Picture, ...], ...] = ()
    table: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Stage:
    """What a panel has to work with.

    Attributes:
        model: loaded, on its device.
        source: where it was loaded from, as the user typed it.
        prompts: captions that the model can draw; at least four.
        card: the model's own defaults.
        seed: of the first picture.
        scratch: a folder for temporary files.
    """

    model: LatentDiffusion
    source: str
    prompts: tuple[str, ...]
    card: Card
    seed: int
    scratch: Path


def panels(stage: Stage) -> Iterator[Panel]:
    """Every panel of `PANELS`, one after the other."""
    for entry in PANELS:
        module, _, function = entry.partition(":")
        yield getattr(importlib.import_module(module), function)(stage)
