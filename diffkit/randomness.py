"""Randomness that is addressed, not consumed.

Every draw is a function of an address such as (seed, epoch, sample index, purpose). No generator
is carried along, so a draw does not depend on the batch split, on the number of processes, or on
how many draws came before it: a resumed run repeats an uninterrupted one exactly. All draws are
made on the CPU in float32; the caller moves them to its device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "SampleKeys",
    "address",
    "generator",
    "integers",
    "normal",
    "permutation",
    "uniform",
]


def address(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, on its type and on the order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream of this address."""
    return torch.Generator().manual_seed(address(*parts))


def normal(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal draws of `shape`, float32."""
    return torch.randn(tuple(shape), generator=generator(*parts))


def uniform(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Uniform draws in [0, 1) of `shape`, float32."""
    return torch.rand(tuple(shape), generator=generator(*parts))


def integers(low: int, high: int, shape: Sequence[int], *parts: int | str) -> Tensor:
    """Uniform integers in [low, high) of `shape`, int64."""
    return torch.randint(low, high, tuple(shape), generator=generator(*parts))


def permutation(n: int, *parts: int | str) -> Tensor:
    """A permutation of 0..n-1, int64."""
    return torch.randperm(n, generator=generator(*parts))


@dataclass(frozen=True)
class SampleKeys:
    """Addresses of the samples of a batch: one (epoch, index) a sample, one seed for the run.

    Row i of any draw depends on `seed`, `epochs[i]`, `indices[i]` and the purpose alone.
    """

    seed: int
    epochs: tuple[int, ...]
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.epochs) != len(self.indices):
            raise ValueError(f"{len(self.epochs)} epochs for {len(self.indices)} indices")

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, rows: slice) -> SampleKeys:
        """The keys of some rows, for a micro-batch."""
        return SampleKeys(self.seed, self.epochs[rows], self.indices[rows])

    def _rows(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        pairs = zip(self.epochs, self.indices, strict=True)
        rows = [draw(generator(self.seed, epoch, index, purpose)) for epoch, index in pairs]
        return torch.stack(rows)

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal draws (B, *shape), float32."""
        return self._rows(purpose, lambda g: torch.randn(tuple(shape), generator=g))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0, 1) of shape (B, *shape), float32."""
        return self._rows(purpose, lambda g: torch.rand(tuple(shape), generator=g))

    def integers(self, low: int, high: int, purpose: str) -> Tensor:
        """Uniform integers in [low, high), shape (B,), int64."""
        return self._rows(purpose, lambda g: torch.randint(low, high, (), generator=g))
