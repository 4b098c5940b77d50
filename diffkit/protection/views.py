"""Differentiable views: a picture of any size as the model sees it, and back to its own pixels.

Protection changes the pixels of the picture at its own size. A model reads pictures whose sides
are multiples of m and near its own resolution R, so every step reads the picture through views.
With f = min(H, W)/R:

- the whole view, in every step: short side R, long side round(R max/min) to a multiple of m. That
  is what editing tools and trainers do to a picture. Beyond an aspect of 2 it is cut into evenly
  spaced windows of length 2R, and a model of square pictures sees square windows;
- detail views, for f > 1.25: square crops of side R f^u, u ~ U[0, 1), resized to R x R. Their
  places come from a shuffled grid with a random offset, used up before it is drawn again;
- tiles, for encoder losses at f > 2, in place of detail views: overlapping R x R tiles at native
  size, with raised-cosine weights that sum to one.

Resizing is bilinear with antialias, so every native pixel has a part in the whole view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkit.errors import UserError
from diffkit.models.conditioner import Sizes
from diffkit.randomness import permutation, uniform

__all__ = ["DETAIL_FROM", "TILES_FROM", "View", "ViewPlan", "plan_views", "usual_views"]

DETAIL_FROM = 1.25
"""Detail views exist above this ratio f of the short side to R."""

TILES_FROM = 2.0
"""Tiles exist above this ratio f of the short side to R."""

TILE_STRIDE = 0.75
"""Largest distance between tiles, in units of R."""


@dataclass(frozen=True)
class View:
    """A rectangle of the picture, resized to a working size. All in pixels, rows before columns.

    Attributes:
        name: "whole", "whole 0" ... for windows, "detail 0" ..., "tile 0" ...
        top, left, height, width: the rectangle in the picture, whole pixels.
        size: (h, w) of the working picture.
        windowed: the gradient of this view is to be weighted by `window()`.
        fades: rows and columns over which the window rises or falls: (top, bottom, left, right),
            in pixels of the working picture.
    """

    name: str
    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    windowed: bool = False
    fades: tuple[int, int, int, int] = (0, 0, 0, 0)

    def crop(self, x: Tensor) -> Tensor:
        """The rectangle (B, C, height, width) of `x` (B, C, H, W); `x` itself if it is all of it.

        Raises `ValueError` if the rectangle is not inside the picture.
        """
        height, width = x.shape[-2:]
        if self.top + self.height > height or self.left + self.width > width:
            raise ValueError(f"{self} is not inside a picture of {height} x {width}")
        if (self.height, self.width) == (height, width):
            return x
        rows = slice(self.top, self.top + self.height)
        return x[..., rows, self.left : self.left + self.width]

    def apply(self, x: Tensor) -> Tensor:
        """The view of a picture: (B, C, H, W) -> (B, C, h, w), differentiable.

        Cut, then resized in float32 (bilinear, antialias, align_corners=False). Nothing is resized
        where the rectangle has the working size already, and where it is the whole picture too the
        very same tensor is returned.
        """
        cut = self.crop(x)
        if (self.height, self.width) == self.size:
            return cut
        return F.interpolate(
            cut.float(), self.size, mode="bilinear", align_corners=False, antialias=True
        )

    def mask(self, mask: Tensor) -> Tensor:
        """A mask (B, 1, H, W) at the size of the view (B, 1, h, w), by the nearest pixel."""
        cut = self.crop(mask)
        if (self.height, self.width) == self.size:
            return cut
        return F.interpolate(cut, self.size, mode="nearest-exact")

    def sizes(self, height: int, width: int) -> Sizes:
        """The micro-conditioning of SDXL for this view of a picture of height x width.

        The original size is the picture's own, the crop corner is in pixels of the resized picture
        of which the view is a part, and the target is the size of the view (Podell et al. 2023,
        section 2.2).
        """
        corner = (
            round(self.top * self.size[0] / self.height),
            round(self.left * self.size[1] / self.width),
        )
        return Sizes((height, width), corner, self.size)

    def window(self) -> Tensor:
        """Weights (h, w) in (0, 1] of the gradient of this view, float32.

        w(p) = sin^2(pi/2 (p + 1/2)/n) over the n pixels shared with the neighbour on that side, 1
        elsewhere. The weights of all tiles sum to one at every pixel.
        """
        top, bottom, left, right = self.fades
        rows = _fade(self.size[0], top) * _fade(self.size[0], bottom).flip(0)
        columns = _fade(self.size[1], left) * _fade(self.size[1], right).flip(0)
        return rows[:, None] * columns[None, :]


@dataclass(frozen=True)
class ViewPlan:
    """The views of a picture in every step of one run; made by `plan_views`.

    Attributes:
        height, width: sides of the picture in pixels.
        resolution: R, short side of the whole view, a multiple of `multiple`.
        multiple: m, of which both sides of every view are multiples.
        square: the model takes only pictures of R x R.
        details: detail views a step.
        tiles: whether all tiles are read in every step.
    """

    height: int
    width: int
    resolution: int
    multiple: int
    square: bool = False
    details: int = 0
    tiles: bool = False

    @property
    def scale(self) -> float:
        """f, the short side of the picture over R."""
        return min(self.height, self.width) / self.resolution

    @cached_property
    def whole(self) -> list[View]:
        """The view, or the windows, that cover the picture; the same in every step."""
        short, long = sorted((self.height, self.width))
        full = self.resolution * long / short
        full = max(self.multiple, self.multiple * round(full / self.multiple))
        limit = self.resolution if self.square else 2 * self.resolution
        upright = self.height > self.width
        if full <= limit:
            size = (full, self.resolution) if upright else (self.resolution, full)
            return [View("whole", 0, 0, self.height, self.width, size)]
        # Rounded up, so that neighbours always meet.
        length = -(-long * limit // full)
        count = -(-full // limit)
        views = []
        for i, start in enumerate(_starts(long, length, count)):
            if upright:
                size, box = (limit, self.resolution), (start, 0, length, short)
            else:
                size, box = (self.resolution, limit), (0, start, short, length)
            views.append(View(f"whole {i}", *box, size))
        return views

    @cached_property
    def tiling(self) -> list[View]:
        """The tiles, row by row; none where the plan has no tiles."""
        side = self.resolution
        if not self.tiles:
            return []
        rows, columns = (_tile_axis(length, side) for length in (self.height, self.width))
        return [
            View(f"tile {i * len(columns) + j}", top, left, side, side, (side, side), True,
                 (*vertical, *horizontal))
            for i, (top, vertical) in enumerate(rows)
            for j, (left, horizontal) in enumerate(columns)
        ]  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of places of detail views.

        As many as crops of side R, the smallest, need to reach every pixel in one pass.
        """
        return (
            math.ceil(self.height / self.resolution) + 1,
            math.ceil(self.width / self.resolution) + 1,
        )

    @property
    def count(self) -> int:
        """Views read in one step."""
        return len(self.whole) + self.details + len(self.tiling)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(h, w) of the views of a step, in the order of `at`; the same in every step."""
        side = self.resolution
        fixed = [view.size for view in self.whole]
        return fixed + [(side, side)] * self.details + [view.size for view in self.tiling]

    def at(self, step: int, seed: int) -> list[View]:
        """The views of one step: the whole view or its windows, then details, then tiles.

        Depends on nothing but the plan, `step` and `seed`.
        """
        visits = range(step * self.details, (step + 1) * self.details)
        details = [self._detail(f"detail {i}", visit, seed) for i, visit in enumerate(visits)]
        return self.whole + details + self.tiling

    def _detail(self, name: str, visit: int, seed: int) -> View:
        """Square crop number `visit` of a run.

        Its corner is spread evenly over [-side, length) and then moved inside the picture. So a
        pixel at the border is visited as often as one in the middle, and none more than twice as
        often along one axis; corners spread over [0, length - side] would hardly reach the border.
        """
        rows, columns = self.grid
        turn, place = divmod(visit, rows * columns)
        cell = int(permutation(rows * columns, seed, turn, "detail order")[place])
        offset = uniform((2,), seed, turn, "detail offset").tolist()
        power = float(uniform((), seed, visit, "detail side"))
        short = min(self.height, self.width)
        side = min(short, round(self.resolution * self.scale**power))

        def start(index: int, count: int, length: int, shift: float) -> int:
            place = round((index + shift) / count * (length + side) - side)
            return min(max(place, 0), length - side)

        top = start(cell // columns, rows, self.height, offset[0])
        left = start(cell % columns, columns, self.width, offset[1])
        return View(name, top, left, side, side, (self.resolution, self.resolution))


def plan_views(
    height: int,
    width: int,
    resolution: int,
    multiple: int,
    square: bool = False,
    views: int | None = None,
    tiles: bool = False,
    encoder_only: bool = False,
    on_cpu: bool = True,
) -> ViewPlan:
    """How a picture of height x width is read by a model.

    Args:
        height, width: sides of the picture in pixels.
        resolution: the model's own side in pixels, R; rounded to a multiple of `multiple`.
        multiple: m, the model's pixel multiple.
        square: the model takes only square pictures of side R (DiT, unconditional U-Nets).
        views: 1 for the whole view alone, n for n - 1 detail views beside it wherever f > 1.25.
            None is 1 for an encoder loss on a CPU and where there are tiles, otherwise 2.
        tiles: read all R x R tiles in every step where f > 2, in place of detail views.
        encoder_only: the loss reads the encoder alone.
        on_cpu: the run is on a CPU.

    Raises:
        UserError: `views` below 1, tiles for a loss that reads the denoiser, or tiles together
            with detail views.
    """
    if min(height, width, resolution, multiple) < 1:
        raise ValueError(f"no views of {height} x {width} at R = {resolution}, m = {multiple}")
    if views is not None and views < 1:
        raise UserError(f"views is {views}; it counts the whole view, so it is at least 1.")
    if tiles and not encoder_only:
        raise UserError("tiles are for losses of the encoder alone; leave them out, or use views.")
    if tiles and views is not None and views > 1:
        raise UserError(f"tiles take the place of detail views: give tiles or views {views}.")
    if views is None:
        views = usual_views(tiles, encoder_only, on_cpu)
    resolution = multiple * max(1, round(resolution / multiple))
    scale = min(height, width) / resolution
    details = views - 1 if scale > DETAIL_FROM else 0
    return ViewPlan(
        height, width, resolution, multiple, square, details, tiles and scale > TILES_FROM
    )


def usual_views(tiles: bool, encoder_only: bool, on_cpu: bool) -> int:
    """Views of a step where nobody says: 1 with tiles and for the encoder on a CPU, otherwise 2."""
    return 1 if tiles or (encoder_only and on_cpu) else 2


def _starts(length: int, part: int, count: int) -> list[int]:
    """Starts of `count` > 1 evenly spaced parts, from 0 to length - part."""
    return [round(i * (length - part) / (count - 1)) for i in range(count)]


def _tile_axis(length: int, side: int) -> list[tuple[int, tuple[int, int]]]:
    """Start and (before, after) overlap of every tile along one axis of length > side."""
    count = math.ceil((length - side) / (TILE_STRIDE * side)) + 1
    starts = _starts(length, side, count)
    shared = [0, *(first + side - second for first, second in pairwise(starts)), 0]
    return [(start, (shared[i], shared[i + 1])) for i, start in enumerate(starts)]


def _fade(length: int, rise: int) -> Tensor:
    """Weights (length,): a raised cosine over the first `rise` pixels, then 1."""
    place = (torch.arange(length) + 0.5) / max(rise, 1)
    weight = torch.sin(math.pi / 2 * place.clamp(max=1.0)).square()
    return weight if rise else torch.ones(length)
