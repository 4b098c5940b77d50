"""LPIPS's distance between two feature maps, without its map-sized intermediate results.

    d(x, y) = 1 / (H W) sum_pixels sum_c w_c (x_c / |x| - y_c / |y|)^2

with the norms over the channels (Zhang et al., "The Unreasonable Effectiveness of Deep Features as
a Perceptual Metric", 2018, eq. 1, where w stands squared).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffkit.kernels import channel_distance

__all__ = ["unit_distance"]

_EPS = 1e-10


def unit_distance(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """d(x, y) as above with |x| + 1e-10 for |x|: (B,) in >= float32, 0 for equal maps.

    Gradients reach both maps, 0 at pixels that are all zero, where the norm has none; the weights
    get none.

    Arguments:
        x, y: (B, C, H, W), any floating dtype, the same for both.
        weights: w, (C,).
    """
    value: Tensor = _Unit.apply(x, y, weights.detach())
    return value


class _Unit(torch.autograd.Function):
    """Saves the maps, their norms and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        found = channel_distance.normed(x, y, None, _EPS, own=True)
        ctx.save_for_backward(x, y, weights, found.norm_p, found.norm_t)
        return (found.rows * weights).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, weights, norm_x, norm_y = ctx.saved_tensors
        scale = 2 * grad[:, None] * weights / (x.shape[2] * x.shape[3])

        def slope(own: Tensor, other: Tensor, norms: tuple[Tensor, Tensor]) -> Tensor:
            return channel_distance.normed_slope(own, other, None, norms, scale, _EPS)

        needs_x, needs_y, _ = ctx.needs_input_grad
        of_x = slope(x, y, (norm_x, norm_y)) if needs_x else None
        of_y = slope(y, x, (norm_y, norm_x)) if needs_y else None
        return of_x, of_y, None
