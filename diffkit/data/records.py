"""What every set of training images gives: numbered samples and their encoded pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

__all__ = ["Encoded", "ImageSource", "Sample", "Size"]

Encoded: TypeAlias = Path | bytes
"""A picture as it lies in storage: a file, or the bytes of one."""

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Sample:
    """What is known of one picture without decoding it.

    `index` is its place in the source, `name` what messages call it. `captions` is empty, or holds
    the alternatives of which one is drawn at each visit. `label` is the class number, 0-based.
    `extras` keeps every other column of the metadata as it was read.
    """

    index: int
    name: str
    captions: tuple[str, ...] = ()
    label: int | None = None
    extras: Mapping[str, object] = field(default_factory=dict)


class ImageSource(Protocol):
    """A set of pictures of known length with random access.

    `identity(index)` is a text that changes whenever the picture's bytes change; it keys caches.
    `class_names[label]` names the classes; it is empty when the set has none.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def encoded(self, index: int, /) -> Encoded:
        """The picture's file or bytes."""

    def identity(self, index: int, /) -> str:
        """A text that changes when the picture changes."""
