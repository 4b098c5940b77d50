"""What a change of a picture looks like, in levels: one level is one step of 8 bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffkit.perceptual.pixels import psnr
from diffkit.perceptual.spectra import high_frequency_energy

__all__ = ["DeltaStatistics", "amplified_difference", "delta_statistics"]


@dataclass(frozen=True)
class DeltaStatistics:
    """Of delta = other - clean, over all channels and pixels.

    Attributes:
        largest: max |delta| in levels.
        mean: mean |delta| in levels.
        shift: mean delta in levels; 0 unless the change makes the picture lighter or darker.
        high_frequency: share of delta's power above half of Nyquist, in [0, 1]; 0 for no change.
        psnr: in dB, at most 100.
    """

    largest: int
    mean: float
    shift: float
    high_frequency: float
    psnr: float

    def to_dict(self) -> dict[str, float]:
        """The numbers by name, for JSON."""
        return asdict(self)


def delta_statistics(clean: Tensor, other: Tensor) -> DeltaStatistics:
    """Compare two pictures of uint8 (C, H, W) and one shape.

    Raises `ValueError` for other dtypes or shapes.
    """
    if {clean.dtype, other.dtype} != {torch.uint8} or clean.shape != other.shape:
        raise ValueError("delta_statistics compares two uint8 pictures (C, H, W) of one shape")
    delta = other.double() - clean.double()
    return DeltaStatistics(
        largest=int(delta.abs().max()),
        mean=float(delta.abs().mean()),
        shift=float(delta.mean()),
        high_frequency=float(high_frequency_energy(delta[None])),
        psnr=float(psnr(clean[None], other[None])),
    )


def amplified_difference(clean: Tensor, other: Tensor, factor: int = 8) -> Tensor:
    """128 + 8 (other - clean) in 0..255: a picture of the change, grey where there is none.

    Arguments:
        clean, other: uint8 of one shape.
    """
    delta = other.to(torch.int32) - clean.to(torch.int32)
    return (128 + factor * delta).clamp(0, 255).to(torch.uint8)
