"""AdverseCleaner (Lvmin Zhang, 2023): bilateral smoothing, then a guided filter brings detail back.

    y = 64 x bilateral(y; d = 5, sigma_colour = 8, sigma_space = 8),    y = x at first
    y = 4 x guided(y; guide x, radius 4, eps 16)

on pixels in 0..255 as floats. The guide is the noisy picture itself, so edges stay and what is
small beside sqrt(eps) = 4 levels goes. The filters follow OpenCV's definitions, their borders too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.audit.purifiers.base import Kind, Models, Work

__all__ = ["CLEANER", "adverse_cleaner", "bilateral", "guided"]

_REACH, _SIGMA = 2, 8.0
_RADIUS, _EPS = 4, 16.0


def adverse_cleaner(pixels: Tensor, smoothings: int = 64, guidings: int = 4) -> Tensor:
    """The cleaned picture, uint8 (3, H, W), of uint8 (3, H, W)."""
    guide = pixels.float()
    y = guide
    for _ in range(smoothings):
        y = bilateral(y)
    for _ in range(guidings):
        y = guided(guide, y)
    return y.round().clamp(0, 255).to(torch.uint8)


def bilateral(x: Tensor) -> Tensor:
    """Edge-keeping mean (Tomasi & Manduchi 1998) over a disk of radius 2, as in OpenCV.

        y(p) = sum_q w(p, q) x(q) / sum_q w(p, q),
        w(p, q) = exp(-|p - q|^2 / (2 8^2)) exp(-(sum_c |x_c(p) - x_c(q)|)^2 / (2 8^2))

    Arguments:
        x: (3, H, W) float32 in 0..255. Outside, it is mirrored without its border pixel.
    """
    height, width = x.shape[-2:]
    wide = _mirrored(x, _REACH, repeat=False)
    total, weights = x.clone(), torch.ones_like(x[:1])
    for down in range(-_REACH, _REACH + 1):
        for across in range(-_REACH, _REACH + 1):
            squared = down * down + across * across
            if squared == 0 or squared > _REACH * _REACH:
                continue
            top, left = _REACH + down, _REACH + across
            other = wide[:, top : top + height, left : left + width]
            distance = (other - x).abs().sum(0, keepdim=True)
            weight = torch.exp(-(distance.square() + squared) / (2 * _SIGMA**2))
            total += weight * other
            weights += weight
    return total / weights


def guided(guide: Tensor, x: Tensor) -> Tensor:
    """Guided filter with a colour guide (He et al. 2013, section 3.4), box of radius 4, eps 16.

        a_k = (Sigma_k + eps I)^-1 cov_k(I, x),   b_k = mean_k(x) - a_k . mean_k(I),
        y = mean(a) . I + mean(b)

    with mean_k and covariances over the box around pixel k.

    Arguments:
        guide, x: (3, H, W) float32 in 0..255. Outside, they are mirrored with their border pixel.
    """
    # Variances are differences of squares of up to 65025: float32 would lose small ones.
    image, wanted = guide.double(), x.double()
    mean_i, mean_x = _box(image), _box(wanted)
    squares = _box((image[:, None] * image[None]).flatten(0, 1)).unflatten(0, (3, 3))
    crossed = _box((image[:, None] * wanted[None]).flatten(0, 1)).unflatten(0, (3, 3))
    sigma = (squares - mean_i[:, None] * mean_i[None]).permute(2, 3, 0, 1)
    covariance = (crossed - mean_i[:, None] * mean_x[None]).permute(2, 3, 0, 1)
    eps = _EPS * torch.eye(3, dtype=torch.float64, device=x.device)
    # (H, W, 3 of the guide, 3 of x)
    a = torch.linalg.inv(sigma + eps) @ covariance
    slope = a.permute(2, 3, 0, 1)
    offset = mean_x - (slope * mean_i[:, None]).sum(0)
    mean_slope = _box(slope.flatten(0, 1)).unflatten(0, (3, 3))
    return ((mean_slope * image[:, None]).sum(0) + _box(offset)).float()


def _box(x: Tensor) -> Tensor:
    """Mean over a box of radius 4 of every channel: (C, H, W) -> (C, H, W)."""
    wide = _mirrored(x, _RADIUS, repeat=True)
    return torch.nn.functional.avg_pool2d(wide[None], 2 * _RADIUS + 1, stride=1)[0]


def _mirrored(x: Tensor, reach: int, repeat: bool) -> Tensor:
    """(C, H, W) with `reach` mirrored pixels on every side; `repeat` mirrors the border pixel too.

    OpenCV's BORDER_REFLECT with it and BORDER_REFLECT_101 without, for pictures of any size.
    """
    rows, columns = (_mirror(side, reach, repeat).to(x.device) for side in x.shape[-2:])
    return x[:, rows][:, :, columns]


def _mirror(side: int, reach: int, repeat: bool) -> Tensor:
    """Where the pixels -reach .. side + reach - 1 of a line are taken from."""
    places = torch.arange(-reach, side + reach)
    period = 2 * side if repeat else max(1, 2 * side - 2)
    folded = places % period
    return torch.where(folded < side, folded, period - folded - (1 if repeat else 0))


def _build(amount: float, models: Models, source: str | None) -> Work:
    return lambda pixels, seed: adverse_cleaner(pixels)


CLEANER = (
    Kind(
        "adverse-cleaner",
        "AdverseCleaner: 64 bilateral and 4 guided filters",
        _build,
        more={"bilateral": "64 x d 5, sigma 8 and 8", "guided": "4 x radius 4, eps 16"},
    ),
)
