"""Randomly smaller masks: an editor's mask is not known, so each step sees another outline.

DiffusionGuard (Choi et al. 2024, arXiv:2410.05694, section 4.3) as its code does it: several passes
over the outline of the kept region, in each of which the vertices are jittered, smoothed along the
outline, and put back where they leave the region.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffkit.protection.scene import Address
from diffkit.randomness import integers, uniform

__all__ = ["shrink_outline"]

Points = npt.NDArray[np.float64]

_MOST_PASSES = 15
_JITTER = 1.1
_SMOOTHING = 0.1


def shrink_outline(keep: Tensor, address: Address) -> Tensor:
    """A random region inside the kept one: (1, h, w) of 0 and 1 -> the same.

    With A its area, rho = sqrt(pi A / 2) and r ~ U(0, rho): floor(U(1, 15)) passes; in each the
    vertices move by U{-e..e} pixels with e = floor(1.1 r), are smoothed by a Gaussian of 0.1 rho
    vertices, and the region is filled again. Outlines of fewer than three vertices stay.

    Arguments:
        keep: 1 where the editor keeps the picture.
        address: of the draws.
    """
    region = keep[0].cpu().numpy() > 0.5
    passes = int(1 + (_MOST_PASSES - 1) * float(uniform((), *address, "passes")))
    for number in range(passes):
        rho = math.sqrt(math.pi * region.sum() / 2)
        if rho == 0:
            break
        reach = int(_JITTER * rho * float(uniform((), *address, number, "reach")))
        region = _one_pass(region, reach, _SMOOTHING * rho, (*address, number))
    return torch.from_numpy(region.astype(np.float32)).to(keep)[None]


def _one_pass(
    region: npt.NDArray[np.bool_], reach: int, sigma: float, address: Address
) -> npt.NDArray[np.bool_]:
    canvas = Image.new("1", region.shape[::-1])
    draw = ImageDraw.Draw(canvas)
    for number, outline in enumerate(_outlines(region)):
        shape = (len(outline), 2)
        moved = outline + integers(-reach, reach + 1, shape, *address, number, "jitter").numpy()
        moved = _smoothed(moved, sigma)
        moved = np.where(_inside(region, moved)[:, None], moved, outline)
        draw.polygon([(float(x), float(y)) for x, y in moved], fill=1)
    # Smoothing may leave a filled corner outside of the region; a kept mask only shrinks.
    return np.asarray(canvas, dtype=bool) & region


def _outlines(region: npt.NDArray[np.bool_]) -> list[Points]:
    """The closed outer outlines, (n, 2) of x, y, in a fixed order."""
    from contourpy import contour_generator

    padded = np.pad(region.astype(np.float64), 1)
    lines = contour_generator(z=padded).lines(0.5)
    return [np.asarray(line, dtype=np.float64)[:-1] - 1 for line in lines if len(line) > 3]


def _smoothed(points: Points, sigma: float) -> Points:
    """A Gaussian of `sigma` vertices along the closed outline."""
    if sigma <= 0:
        return points
    distance = np.minimum(np.arange(len(points)), len(points) - np.arange(len(points)))
    kernel = np.exp(-0.5 * (distance / sigma) ** 2)
    spectrum = np.fft.rfft(kernel / kernel.sum())[:, None]
    return np.fft.irfft(np.fft.rfft(points, axis=0) * spectrum, len(points), axis=0)


def _inside(region: npt.NDArray[np.bool_], points: Points) -> npt.NDArray[np.bool_]:
    columns, rows = np.round(points).astype(int).T
    within = (rows >= 0) & (rows < region.shape[0]) & (columns >= 0) & (columns < region.shape[1])
    rows, columns = rows.clip(0, region.shape[0] - 1), columns.clip(0, region.shape[1] - 1)
    found: npt.NDArray[np.bool_] = within & region[rows, columns]
    return found
