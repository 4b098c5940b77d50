"""The pictures of the report page: which ones it shows, and how they lie inside it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from diffkit.data.images import decode
from diffkit.evaluation.wording import number, role_names

__all__ = ["Block", "Extremes", "Gallery", "Pair", "Row", "Shot", "embed"]

_SHOWN = 128  # CSS pixels: the least width of a picture on the page
_LARGE = 224  # the width of one that is larger than _SHOWN in its file
_DENSITY = 1.75  # file pixels a CSS pixel of a thumbnail, for sharp screens
_ROWS, _LARGE_ROWS = 10, 6
_PER_ROW = 4
_EXTREMES = 4


@dataclass(frozen=True)
class Shot:
    """One picture of one set.

    Attributes:
        role: "candidate" or "baseline"; "pictures" for a set alone.
        uri: the picture itself, as a data URI.
        width, height: on the page, in CSS pixels.
        pixelated: enlarged by a whole factor, each pixel a square.
        file: address of the original relative to the page; "" when the page holds it whole.
        alt: what the picture is, for those who cannot see it.
    """

    role: str
    uri: str
    width: int
    height: int
    pixelated: bool
    file: str
    alt: str


@dataclass(frozen=True)
class Pair:
    """The pictures of one row of samples.jsonl: one a set, made from the same noise."""

    shots: tuple[Shot, ...]
    caption: str
    prompt: str = ""


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt."""

    prompt: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Block:
    """The rows of one gallery: of pairs, or of the set called `role` where nothing pairs two sets.

    `prompts` counts those that there are, shown or not.
    """

    role: str
    rows: tuple[Row, ...]
    prompts: int


@dataclass(frozen=True)
class Extremes:
    """The pictures at both ends of one metric: (heading, pairs) of each end that has any."""

    label: str
    ends: tuple[tuple[str, tuple[Pair, ...]], ...]


class Gallery:
    """Chooses and embeds pictures; each file is read once.

    Args:
        samples: the rows of samples.jsonl.
        folder: where their paths start.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self.samples = samples
        self.folder = folder
        self._read: dict[str, Shot] = {}
        self._sets = {role for sample in samples for role in sample["pictures"]}
        self._names = role_names(self._sets)

    @property
    def large(self) -> bool:
        """Whether the first picture is shown as a thumbnail."""
        return self._pair(self.samples[0]).shots[0].file != ""

    def blocks(self) -> list[Block]:
        """The pictures side by side; one block a set where nothing pairs the sets."""
        blocks: dict[tuple[str, ...], dict[Any, list[Mapping[str, Any]]]] = {}
        for sample in self.samples:
            groups = blocks.setdefault(tuple(sample["pictures"]), {})
            groups.setdefault(sample["group"], []).append(sample)
        return [
            Block(
                self._names[roles[0]] if len(blocks) > 1 else "",
                tuple(self._rows(list(groups.values()))),
                len(groups),
            )
            for roles, groups in blocks.items()
        ]

    def _rows(self, groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
        """The first pictures of some prompts, spread evenly over all prompts.

        Where each prompt has one picture, they share one row without a prompt of its own.
        """
        most = _LARGE_ROWS if self.large else _ROWS
        if all(len(group) == 1 for group in groups):
            chosen = _spread(groups, most * _PER_ROW // 2)
            return [Row("", tuple(self._pair(s, prompt=True) for group in chosen for s in group))]
        return [
            Row(group[0]["prompt"] or "", tuple(self._pair(s) for s in group[:_PER_ROW]))
            for group in _spread(groups, most)
        ]

    def extremes(self, name: str, label: str, better: str) -> Extremes:
        """The greatest losses and gains between two sets; of unpaired ones the candidate's ends.

        A metric that compares the two sets has one value a pair: then the pairs that are furthest
        apart and the closest ones. `better` is "higher" or "lower". Pictures without a change
        belong to neither end.
        """
        sign = 1 if better == "higher" else -1
        values = [(sample["values"].get(name, {}), sample) for sample in self.samples]
        if any(len(value) == 2 for value, _ in values):
            changes = [(sign * (v["model"] - v["against"]), v, s) for v, s in values if len(v) == 2]
            losses = sorted((c for c in changes if c[0] < 0), key=lambda c: c[0])
            gains = sorted((c for c in changes if c[0] > 0), key=lambda c: -c[0])
            headings = ("Greatest losses", "Greatest gains")
        else:
            changes = [(sign * v["model"], v, s) for v, s in values if "model" in v]
            changes.sort(key=lambda c: c[0])
            half = len(changes) // 2
            losses, gains = changes[:half], changes[half:][::-1]
            headings = ("Worst", "Best")
            if values and len(values[0][1]["pictures"]) == 2:
                headings = ("Furthest from the baseline", "Closest to the baseline")
        ends = zip(headings, (losses, gains))
        return Extremes(
            label,
            tuple(
                (heading, tuple(self._pair(s, v, prompt=True) for _, v, s in end[:_EXTREMES]))
                for heading, end in ends
                if end
            ),
        )

    def _pair(
        self,
        sample: Mapping[str, Any],
        value: Mapping[str, float] | None = None,
        prompt: bool = False,
    ) -> Pair:
        shots = tuple(self._shot(role, path, sample) for role, path in sample["pictures"].items())
        caption = f"picture {sample['index']}"
        if value is not None and "against" in value:
            change = number(value["model"] - value["against"], 3, signed=True)
            caption += f": {number(value['against'], 3)} → {number(value['model'], 3)} ({change})"
        elif value is not None:
            caption += f": {number(value['model'], 3)}"
        return Pair(shots, caption, (sample["prompt"] or "") if prompt else "")

    def _shot(self, role: str, path: str, sample: Mapping[str, Any]) -> Shot:
        name = self._names[role]
        of_set = f"{name}, " if len(self._sets) > 1 else ""
        about = f", {sample['prompt']}" if sample["prompt"] else ""
        alt = f"{of_set}picture {sample['index']}{about}"
        if path not in self._read:
            self._read[path] = embed(self.folder / path, self.folder, name, alt)
        return replace(self._read[path], role=name, alt=alt)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def embed(path: Path, folder: Path, role: str, alt: str) -> Shot:
    """A picture file as a page in `folder` holds it."""
    uri, width, height, whole = _encode(path)
    return Shot(
        role=role,
        uri=uri,
        width=width,
        height=height,
        pixelated=whole,
        file="" if whole else _address(path, folder),
        alt=alt,
    )


def _encode(path: Path) -> tuple[str, int, int, bool]:
    """(data URI, width and height on the page, whether all pixels of the file are in it)."""
    image, _ = decode(path)
    side = max(image.size)
    whole = side <= _SHOWN
    scale = _SHOWN // side if whole else _LARGE / side
    width, height = (max(1, round(length * scale)) for length in image.size)
    buffer = io.BytesIO()
    if whole:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((round(_DENSITY * _LARGE),) * 2, Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=90, subsampling=0)
    kind = "png" if whole else "jpeg"
    uri = f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
    return uri, width, height, whole


def _address(path: Path, folder: Path) -> str:
    """The URL of a file relative to a page in the folder."""
    return quote(os.path.relpath(path, folder).replace(os.sep, "/"))
