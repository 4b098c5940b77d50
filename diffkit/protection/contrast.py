"""Where a change is seen least: a map of local contrast that shares out the budget."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["contrast_weight"]

WINDOW = 7
"""Side of the neighbourhood in pixels."""

FULL = 12.0
"""Standard deviation in levels from which a pixel has the whole budget."""

LEAST = 0.25
"""Share of the budget in perfectly flat areas."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def contrast_weight(pixels: Tensor) -> Tensor:
    """m = clip(s/12, 1/4, 1): the share of the budget of each pixel.

    s is the standard deviation of the luma over 7 x 7 pixels in levels (divided by 49, edges
    mirrored; repeated where a side is too short to mirror). Noise hides in texture and shows on
    flat areas.

    Args:
        pixels: the clean picture, uint8 (B, C, H, W) with C = 1 or 3.

    Returns:
        float32 (B, 1, H, W) in [0.25, 1], on the same device.
    """
    channels = pixels.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"a picture of {channels} channels has no luma")
    weights = torch.tensor(LUMA if channels == 3 else (1.0,), dtype=torch.float64)
    # In float64, where the mean square minus the squared mean does not cancel on flat areas.
    luma = (pixels.cpu().double() * weights.view(1, -1, 1, 1)).sum(1, keepdim=True)
    reach = WINDOW // 2
    short = min(luma.shape[-2:]) <= reach
    padded = F.pad(luma, (reach,) * 4, mode="replicate" if short else "reflect")
    mean, square = (F.avg_pool2d(values, WINDOW, stride=1) for values in (padded, padded.square()))
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    return (deviation / FULL).clamp(LEAST, 1.0).to(pixels.device, torch.float32)
