"""Preference pairs as training data: of two pictures of one prompt, the better and the worse."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffkit.console import warn
from diffkit.data.addressed import AddressedData
from diffkit.data.batch import Batch
from diffkit.data.preference_sources import PairSource
from diffkit.data.records import ImageSource, Sample, Size
from diffkit.data.scan import scan
from diffkit.data.visits import Loaded, assemble, draw_caption
from diffkit.errors import UserError
from diffkit.randomness import SampleKeys

__all__ = ["PreferenceBatch", "PreferenceData"]


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs: row i of `winners` was preferred to row i of `losers`.

    Both halves have the same `keys`, one address a pair, so that a draw by address is the same for
    the two pictures of a pair; the same captions, conditioning and extras; the same target size and
    flips. `sizes` and `names` are those of each picture. Raises ValueError for halves of other
    pairs.
    """

    winners: Batch
    losers: Batch

    def __post_init__(self) -> None:
        for name in ("keys", "captions"):
            if getattr(self.winners, name) != getattr(self.losers, name):
                raise ValueError(f"winners and losers of other {name}")

    @property
    def keys(self) -> SampleKeys:
        """Addresses of the pairs."""
        return self.winners.keys

    def __len__(self) -> int:
        return len(self.winners)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """Both halves on `device`."""
        return PreferenceBatch(self.winners.to(device), self.losers.to(device))


class PreferenceData(AddressedData[PairSource, tuple[Loaded, Loaded], PreferenceBatch]):
    """The batches of a set of pairs, where every pair is a sample; see `AddressedData`.

    Both pictures of a pair are cut to the bucket of the winner, are mirrored together, and have
    their corners from one draw. A pair without a readable header is left out, and one of which a
    picture breaks later gives way to the next pair of its bucket.
    """

    noun = "pair"

    @property
    def pictures(self) -> ImageSource:
        """The pictures of the pairs; those of several pairs once."""
        return self.source.pictures

    def fingerprint(self) -> str:
        """Hash of the rows, names and sizes of all pairs, the winner first."""
        digest = hashlib.blake2b(digest_size=16)
        for number in self.kept:
            digest.update(f"{self.source[number].index}".encode())
            for picture in self.source.members[number]:
                name, size = self.pictures[picture].name, self.sizes[picture]
                digest.update(f"\t{name}\t{size}".encode())
        return digest.hexdigest()

    def cuts(self, position: int) -> list[tuple[int, Size, Size]]:
        """Those of the winner and the loser of the pair at `position` of `kept`."""
        members = self.source.members[self.kept[position]]
        return [(picture, self.sizes[picture], self.target(position)) for picture in members]

    def captions(self, position: int) -> tuple[str, ...]:
        """Those of the pair at `position` of `kept`."""
        return self.source[self.kept[position]].captions or ("",)

    def _scan(self) -> Sequence[Size]:
        found = scan(self.source.pictures)
        self.sizes = dict(zip(found.kept, found.sizes, strict=True))
        members = self.source.members
        self.kept = [i for i, pair in enumerate(members) if all(p in self.sizes for p in pair)]
        lost = len(members) - len(self.kept)
        if not self.kept:
            raise UserError(f"None of the {lost} pairs has two pictures that can be read.")
        if lost:
            warn(f"{lost} of {len(members)} pairs are left out with them.")
        return [self.sizes[members[number][0]] for number in self.kept]

    def _load(self, position: int, epoch: int) -> tuple[Loaded, Loaded]:
        pair = self.source[self.kept[position]]
        caption = draw_caption(pair, self.seed, epoch)

        def visit(picture: int) -> Loaded:
            name = self.pictures[picture].name
            sample = Sample(pair.index, name, pair.captions, None, pair.extras)
            size, target = self.sizes[picture], self.target(position)
            return self._visit(sample, picture, size, target, epoch, caption)

        return visit(pair.winner), visit(pair.loser)

    def _join(self, parts: Sequence[tuple[Loaded, Loaded]]) -> PreferenceBatch:
        winners, losers = zip(*parts, strict=True)
        return PreferenceBatch(assemble(self.seed, winners), assemble(self.seed, losers))
