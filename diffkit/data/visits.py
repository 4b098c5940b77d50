"""One visit of one picture: how it is read, and how visits become a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffkit.console import warn
from diffkit.data.batch import Batch
from diffkit.data.images import BadImage
from diffkit.data.records import Encoded, Sample
from diffkit.data.transforms import View, render, to_float
from diffkit.errors import RunFailed
from diffkit.models.conditioner import Conditioning, Sizes
from diffkit.randomness import SampleKeys, integers

__all__ = ["BrokenPictures", "Loaded", "assemble", "draw_caption", "read_pixels", "stack_rows"]


@dataclass(frozen=True)
class Loaded:
    """One sample of a batch: what is known of it, its view, and its pixels or its moments."""

    sample: Sample
    epoch: int
    view: View
    caption: str
    pixels: NDArray[np.uint8] | None
    moments: Tensor | None
    embedding: dict[str, Tensor] | None


class BrokenPictures:
    """Names every picture that cannot be decoded, once, whichever thread meets it.

    Arguments:
        noun: of what takes the place of its sample.
    """

    def __init__(self, noun: str = "picture") -> None:
        self.noun = noun
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def add(self, sample: Sample, error: BadImage) -> None:
        """A picture was found broken; the caller takes another sample for its own."""
        with self._lock:
            if sample.name in self._named:
                return
            self._named.add(sample.name)
        warn(
            f"{sample.name}: cannot be decoded ({error}); another {self.noun} takes its place. "
            "`diffkit data check` names every such file.",
            anywhere=True,
        )


def draw_caption(sample: Sample, seed: int, epoch: int) -> str:
    """The caption of a sample in one epoch, drawn uniformly; "" for a sample without any."""
    if len(sample.captions) < 2:
        return sample.captions[0] if sample.captions else ""
    choice = integers(0, len(sample.captions), (), seed, epoch, sample.index, "caption")
    return sample.captions[int(choice)]


def read_pixels(encoded: Encoded, sample: Sample, view: View) -> NDArray[np.uint8]:
    """The pixels of a view, (H, W, 3).

    Raises `BadImage` for a picture that is broken, and `RunFailed` naming one that the disk does
    not give: it may come back, and must not be taken for broken until then.
    """
    try:
        return render(encoded, view)
    except BadImage as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise RunFailed(
            f"{sample.name}: cannot be read ({error}). Bring it back and run the same command "
            "again: it goes on from the last checkpoint."
        ) from error


def assemble(seed: int, loaded: Sequence[Loaded]) -> Batch:
    """Stack samples of one target size, all of them with labels or none, into a batch."""
    samples = [item.sample for item in loaded]
    pixels = [item.pixels for item in loaded if item.pixels is not None]
    moments = [item.moments for item in loaded if item.moments is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    rows = [item.embedding for item in loaded if item.embedding is not None]
    return Batch(
        keys=SampleKeys(
            seed, tuple(item.epoch for item in loaded), tuple(sample.index for sample in samples)
        ),
        images=to_float(pixels) if pixels else None,
        moments=torch.stack(moments) if moments else None,
        captions=[item.caption for item in loaded],
        conditioning=stack_rows(rows) if rows else None,
        labels=torch.tensor(labels) if labels else None,
        sizes=[Sizes(item.view.original, item.view.corner, item.view.target) for item in loaded],
        names=[sample.name for sample in samples],
        extras=[sample.extras for sample in samples],
    )


def stack_rows(rows: Sequence[dict[str, Tensor]]) -> Conditioning:
    """Conditionings of single samples as one batch."""
    return Conditioning.from_dict(
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    )
