"""AdverseCleaner (Lvmin Zhang, 2023): bilateral smoothing, then a guided filter brings detail back.

    y = 64 x bilateral(y; d = 5, sigma_colour = 8, sigma_space = 8),    y = x at first
    y = 4 x guided(y; guide x, radius 4, eps 16)

on pixels in 0..255 as floats. The guide is the noisy picture itself, so edges stay and what is
small beside sqrt(eps) = 4 levels goes. The filters follow OpenCV's definitions, their borders too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffkit.audit.purifiers.base import Kind, Models, Work

__all__ = ["CLEANER", "adverse_cleaner", "bilateral", "guided"]

_REACH, _SIGMA = 2, 8.0
_HALF_DISK = ((0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 0))
_RADIUS, _EPS = 4, 16.0
_STRIP = 1 << 17  # pixels that are filtered at once: they stay in the processor's cache


def adverse_cleaner(pixels: Tensor, smoothings: int = 64, guidings: int = 4) -> Tensor:
    """The cleaned picture, uint8 (3, H, W), of uint8 (3, H, W)."""
    guide = pixels.float()
    y = guide
    for _ in range(smoothings):
        y = _in_strips(bilateral, _REACH, y)
    for _ in range(guidings):
        y = _in_strips(guided, 2 * _RADIUS, guide, y)
    return y.round().clamp(0, 255).to(torch.uint8)


def _in_strips(filter_: Callable[..., Tensor], halo: int, *images: Tensor) -> Tensor:
    """A filter on strips of rows, in memory that does not grow with the picture.

    `halo` rows around a strip go in and are cut off again; only at the picture's own borders does
    the filter mirror, so the result is that of the whole picture.
    """
    height, width = images[0].shape[-2:]
    rows = max(4 * halo, _STRIP // width)
    parts = []
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        first, last = max(0, top - halo), min(height, bottom + halo)
        made = filter_(*(image[:, first:last] for image in images))
        parts.append(made[:, top - first : bottom - first])
    return torch.cat(parts, 1)


def bilateral(x: Tensor) -> Tensor:
    """Edge-keeping mean (Tomasi & Manduchi 1998) over a disk of radius 2, as in OpenCV.

        y(p) = sum_q w(p, q) x(q) / sum_q w(p, q),
        w(p, q) = exp(-|p - q|^2 / (2 8^2)) exp(-(sum_c |x_c(p) - x_c(q)|)^2 / (2 8^2))

    Arguments:
        x: (3, H, W) float32 in 0..255. Outside, it is mirrored without its border pixel.
    """
    wide = _mirrored(x, _REACH, repeat=False)
    height, width = wide.shape[-2:]
    total, weights = wide.clone(), torch.ones_like(wide[:1])
    # the weight of two pixels is that of either for the other: half of the disk is enough
    for down, across in _HALF_DISK:
        left, right = max(0, -across), max(0, across)
        here = (..., slice(0, height - down), slice(left, width - right))
        there = (..., slice(down, height), slice(right, width - left))
        distance = (wide[there] - wide[here]).abs_().sum(0, keepdim=True)
        weight = distance.square_().add_(down * down + across * across)
        weight = weight.mul_(-1 / (2 * _SIGMA**2)).exp_()
        total[here].addcmul_(weight, wide[there])
        total[there].addcmul_(weight, wide[here])
        weights[here] += weight
        weights[there] += weight
    inner = (..., slice(_REACH, height - _REACH), slice(_REACH, width - _REACH))
    return total[inner] / weights[inner]


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
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    squares = _box(torch.stack([image[i] * image[j] for i, j in pairs]))
    sigma = {
        (i, j): square - mean_i[i] * mean_i[j] + (_EPS if i == j else 0.0)
        for (i, j), square in zip(pairs, squares, strict=True)
    }
    inverse = _inverse(sigma)
    result = torch.empty_like(x)
    for channel in range(3):
        crossed = _box(image * wanted[channel]) - mean_i * mean_x[channel]
        a = (inverse * crossed[None]).sum(1)
        b = mean_x[channel] - (a * mean_i).sum(0)
        means = _box(torch.cat([a, b[None]]))
        result[channel] = ((means[:3] * image).sum(0) + means[3]).float()
    return result


def _inverse(s: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Of symmetric 3 x 3 matrices, upper halves given by (row, column): (3, 3, H, W), Cramer's."""
    c00 = s[1, 1] * s[2, 2] - s[1, 2].square()
    c01 = s[0, 2] * s[1, 2] - s[0, 1] * s[2, 2]
    c02 = s[0, 1] * s[1, 2] - s[0, 2] * s[1, 1]
    c11 = s[0, 0] * s[2, 2] - s[0, 2].square()
    c12 = s[0, 1] * s[0, 2] - s[0, 0] * s[1, 2]
    c22 = s[0, 0] * s[1, 1] - s[0, 1].square()
    determinant = s[0, 0] * c00 + s[0, 1] * c01 + s[0, 2] * c02
    rows = [torch.stack(row) for row in ((c00, c01, c02), (c01, c11, c12), (c02, c12, c22))]
    return torch.stack(rows) / determinant


def _box(x: Tensor) -> Tensor:
    """Mean over a box of radius 4 of every channel: (C, H, W) -> (C, H, W)."""
    wide = _mirrored(x, _RADIUS, repeat=True)
    side = 2 * _RADIUS + 1
    rows = torch.nn.functional.avg_pool2d(wide[None], (side, 1), stride=1)
    return torch.nn.functional.avg_pool2d(rows, (1, side), stride=1)[0]


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
