"""Training pictures with random access: the micro-batch of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from diffkit.data.addressed import AddressedData
from diffkit.data.batch import Batch
from diffkit.data.records import ImageSource, Size
from diffkit.data.scan import scan
from diffkit.data.visits import Loaded, assemble, draw_caption

__all__ = ["TrainingData"]


class TrainingData(AddressedData[ImageSource, Loaded, Batch]):
    """The batches of an image set, where every picture is a sample; see `AddressedData`."""

    @property
    def pictures(self) -> ImageSource:
        """The set itself."""
        return self.source

    def fingerprint(self) -> str:
        """Hash of the names and sizes of all pictures: equal sets give equal batch sequences."""
        digest = hashlib.blake2b(digest_size=16)
        for position, size in zip(self.kept, self.sizes, strict=True):
            digest.update(f"{self.source[position].name}\t{size}\n".encode())
        return digest.hexdigest()

    def cuts(self, position: int) -> list[tuple[int, Size, Size]]:
        """That of the picture at `position` of `kept`."""
        return [(self.kept[position], self.sizes[position], self.target(position))]

    def captions(self, position: int) -> tuple[str, ...]:
        """Those of the picture at `position` of `kept`."""
        return self.source[self.kept[position]].captions or ("",)

    def _scan(self) -> Sequence[Size]:
        found = scan(self.source)
        self.kept, self.sizes = found.kept, found.sizes
        return self.sizes

    def _load(self, position: int, epoch: int) -> Loaded:
        sample = self.source[self.kept[position]]
        size, target = self.sizes[position], self.target(position)
        caption = draw_caption(sample, self.seed, epoch)
        return self._visit(sample, sample.index, size, target, epoch, caption)

    def _join(self, parts: Sequence[Loaded]) -> Batch:
        return assemble(self.seed, parts)
