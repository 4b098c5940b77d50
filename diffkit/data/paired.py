"""Two sets of pictures side by side: each step has as many samples of the second as of the first.

Each set keeps its own order and its own seed, so that no draw of the one is a draw of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from diffkit.data.batch import Batch
from diffkit.data.loader import TrainingData
from diffkit.randomness import SampleKeys

__all__ = ["PairedBatch", "PairedData"]


@dataclass(frozen=True)
class PairedBatch:
    """One micro-batch of each set, B samples each; row i of one goes with row i of the other."""

    own: Batch
    companions: Batch

    @property
    def keys(self) -> SampleKeys:
        """Addresses of the samples of the first set, which count the epochs."""
        return self.own.keys

    def __len__(self) -> int:
        return len(self.own)


class PairedData:
    """The batches of a set, each with one of its companions.

    Arguments:
        own: the set that is trained on.
        companions: another one of the same batch size and another seed.
    """

    def __init__(self, own: TrainingData, companions: TrainingData) -> None:
        if own.seed == companions.seed:
            raise ValueError("two sets with one seed would share their noises and times")
        self.own = own
        self.companions = companions

    def __len__(self) -> int:
        return len(self.own)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every picture of the first set is seen once, on average."""
        return self.own.steps_per_epoch

    def fingerprint(self) -> str:
        """Changes with the pictures of either set."""
        both = self.own.fingerprint() + self.companions.fingerprint()
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()

    def batches(
        self,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int = 4,
        ahead: int = 2,
    ) -> Iterator[PairedBatch]:
        """As `TrainingData.batches`; closing the iterator ends the threads of both sets."""
        place = (first_step, last_step, rank, world, accumulation, workers, ahead)
        with (
            closing(self.own.batches(*place)) as own,  # type: ignore[type-var]
            closing(self.companions.batches(*place)) as companions,  # type: ignore[type-var]
        ):
            for pair in zip(own, companions, strict=True):
                yield PairedBatch(*pair)
