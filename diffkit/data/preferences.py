"""One micro-batch of preference pairs: of two pictures of one prompt, the better and the worse."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffkit.data.batch import Batch
from diffkit.randomness import SampleKeys

__all__ = ["PreferenceBatch"]


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
