"""Pictures that are told one text, or one of several, instead of their own captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffkit.data.records import Encoded, ImageSource, Sample

__all__ = ["Recaptioned"]


class Recaptioned:
    """A source in which every picture has the same captions.

    Arguments:
        source: the pictures; their own captions are not used.
        captions: of every picture; with several, one is drawn at each visit.
    """

    def __init__(self, source: ImageSource, captions: Sequence[str]) -> None:
        self.source = source
        self.captions = tuple(captions)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the source's classes."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        return replace(self.source[index], captions=self.captions)

    def encoded(self, index: int, /) -> Encoded:
        """The picture's file or bytes."""
        return self.source.encoded(index)

    def identity(self, index: int, /) -> str:
        """That of the source: a picture does not change with its caption."""
        return self.source.identity(index)
