"""How far a pixel may move: budgets in 8-bit levels, kept on the saved integers.

A level is one step of an 8-bit pixel, 1/255 of [0, 1] and 2/255 of [-1, 1]. The picture that counts
is x8, uint8; what an attack moves is x = x8 / 127.5 - 1. With a budget of k levels and weights
m in [0, 1] for each pixel, x stays within 2 k m / 255 of its start, and the saved pixel within
floor(k m) of x8, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["LARGEST", "LEVEL", "as_signed", "box", "check_levels", "to_levels"]

LEVEL = 2 / 255
"""One level in units of [-1, 1]."""

LARGEST = 32
"""The largest budget; beyond it nobody would keep the picture."""


def check_levels(levels: int) -> None:
    """Raise `UserError` unless 0 <= levels <= 32 and whole."""
    if isinstance(levels, bool) or not isinstance(levels, int) or not 0 <= levels <= LARGEST:
        raise UserError(f"levels: {levels!r} must be a whole number from 0 to {LARGEST}.")


def as_signed(pixels: Tensor) -> Tensor:
    """x8 / 127.5 - 1: uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def box(pixels: Tensor, levels: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(lowest, highest) value of every x: within 2 k m / 255 of the start and within [-1, 1].

    Arguments:
        pixels: x8, uint8 (B, C, H, W).
        levels: k.
        weight: m, float (B, 1, H, W) in [0, 1]; 1 without. 0 keeps a pixel as it is.
    """
    x = as_signed(pixels)
    reach = torch.full_like(x, levels * LEVEL) if weight is None else levels * LEVEL * weight.to(x)
    # A pixel that may not move keeps its own bits, which x - 0 and x + 0 do.
    return (x - reach).clamp_min(-1), (x + reach).clamp_max(1)


def to_levels(x: Tensor, pixels: Tensor, levels: int, weight: Tensor | None = None) -> Tensor:
    """The uint8 picture nearest to x within the budget: |q - x8| <= floor(k m), 0 <= q <= 255.

    Arguments as in `box`; x (B, C, H, W) in [-1, 1].
    """
    start = pixels.to(torch.int16)
    q = torch.round((x + 1) * 127.5).to(torch.int16)
    if weight is None:
        reach = torch.full_like(start, levels)
    else:
        # A weight of 1/4 in float32 must not turn 8 levels into 1.9999. On the CPU, for some GPUs
        # have no float64.
        exact = torch.floor(levels * weight.cpu().double() + 1e-6)
        reach = exact.to(start.device, torch.int16)
    q = torch.minimum(torch.maximum(q, start - reach), start + reach)
    return q.clamp(0, 255).to(torch.uint8)
