"""Captions that name classes, "CONCEPT, STYLE style, COLOUR background", against the pictures.

The embedded model's captions are of this form. Concept and style are judged by the embedded
classifier among the classes that the prompts of the run name, the background by its colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.evaluation.metrics.base import Refusal, SampleBatch, SampleMetric, Situation
from diffkit.evaluation.metrics.tools import Toolbox

__all__ = ["BACKGROUND", "BACKGROUNDS", "CONCEPT", "STYLE", "Caption", "background_of"]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 220, 60),
    "green": (46, 139, 70),
    "blue": (40, 90, 210),
    "purple": (125, 50, 160),
}
"""Background colours that captions name, as 8-bit sRGB."""

_CORNER = 16  # the corner squares are a sixteenth of the edge


@dataclass(frozen=True)
class Caption:
    """The classes that a caption names; None for one that it leaves out."""

    concept: str | None
    style: str | None
    background: str | None

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Read "CONCEPT, STYLE style, COLOUR background", the last two in any order."""
        concept, *rest = (part.strip() for part in text.split(","))
        named: dict[str, str] = {}
        for part in rest:
            value, _, kind = part.rpartition(" ")
            named.setdefault(kind, value)
        return cls(concept or None, named.get("style"), named.get("background"))


def concept(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """1 (B,) where the classifier sees the caption's concept among those of the run, else 0."""
    return _judged(batch, tools, "concept")


def style(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """1 (B,) where the classifier sees the caption's style among those of the run, else 0."""
    return _judged(batch, tools, "style")


def _judged(batch: SampleBatch, tools: Toolbox, kind: str) -> Tensor:
    classes = _named(tools.prompts, kind)
    network = tools.classifier
    columns = network.concept_indices if kind == "concept" else network.style_indices
    with torch.no_grad():
        logits = network.classify(batch.images)[kind].cpu()[:, columns(classes)]
    wanted = [classes.index(getattr(Caption.parse(text), kind)) for text in batch.prompts]
    return (logits.argmax(1) == torch.tensor(wanted)).float()


def _named(prompts: Sequence[str], kind: str) -> list[str]:
    return sorted({str(getattr(Caption.parse(text), kind)) for text in prompts})


def background_of(images: Tensor) -> list[str]:
    """The palette colour nearest to the mean of the four corners of (B, 3, H, W) in [-1, 1]."""
    height, width = (max(1, side // _CORNER) for side in images.shape[-2:])
    corners = [
        images[..., y, x].mean((2, 3))
        for y in (slice(height), slice(-height, None))
        for x in (slice(width), slice(-width, None))
    ]
    palette = torch.tensor(list(BACKGROUNDS.values()), device=images.device).float() / 127.5 - 1
    nearest = torch.cdist(torch.stack(corners).mean(0), palette).argmin(1)
    names = list(BACKGROUNDS)
    return [names[index] for index in nearest.tolist()]


def background(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """1 (B,) where the corners have the caption's background colour, else 0."""
    wanted = [Caption.parse(text).background for text in batch.prompts]
    hits = [seen == named for seen, named in zip(background_of(batch.images), wanted, strict=True)]
    return torch.tensor(hits).float()


def _unnamed(kind: str, known: Callable[[Situation], Sequence[str]]) -> Refusal:
    def refuse(situation: Situation) -> str | None:
        classes = set(known(situation))
        for text in situation.prompts:
            if getattr(Caption.parse(text), kind) not in classes:
                return f"the prompt {text!r} names no {kind} that can be judged"
        if len(_named(situation.prompts, kind)) < 2:
            return f"all prompts name the same {kind}; there is nothing to confuse it with"
        return None

    return refuse


CONCEPT = SampleMetric(
    "concept",
    "concept recognised",
    "higher",
    frozenset({"prompts", "classifier"}),
    "Share of pictures in which a classifier sees the caption's concept among those of the run.",
    refuse=_unnamed("concept", lambda situation: situation.tools.classifier.config.concepts),
    run=concept,
)
STYLE = SampleMetric(
    "style",
    "style recognised",
    "higher",
    frozenset({"prompts", "classifier"}),
    "Share of pictures in which a classifier sees the caption's style among those of the run.",
    refuse=_unnamed("style", lambda situation: situation.tools.classifier.config.styles),
    run=style,
)
BACKGROUND = SampleMetric(
    "background",
    "background colour recognised",
    "higher",
    frozenset({"prompts"}),
    "Share of pictures whose corners have the colour that the caption names, of eight.",
    refuse=_unnamed("background", lambda situation: list(BACKGROUNDS)),
    run=background,
)
