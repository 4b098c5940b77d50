"""Triton's form of `masked_distance`: each map is read once, and nothing map-sized is kept.

A program takes some channels of a sample and a part of their pixels. Sums are of what lies above a
first guess of the mean, so that large offsets do not cancel; parts are put together by Chan's
formula.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkit.kernels.masked_distance import Combination, Moments, Which
from diffkit.kernels.tiles import Tiles, flat_strides, flattenable

__all__ = ["combine", "kept_of", "load", "moments", "prepared"]

_TILES = 8  # of a program


def moments(predicted: Tensor, target: Tensor, keep: Tensor | None, which: Which) -> Moments:
    """As `masked_distance.moments`."""
    p, t, m = prepared(predicted, target, keep)
    tiles, pixels = Tiles.rows(p), p.shape[2] * p.shape[3]
    part = _TILES * tiles.pixels
    parts = triton.cdiv(pixels, part)
    sums = torch.empty(9, parts, *p.shape[:2], dtype=torch.float32, device=p.device)
    with torch.cuda.device_of(p):
        _moments[(parts, triton.cdiv(p.shape[1], tiles.channels), p.shape[0])](
            p,
            t,
            m,
            sums,
            *(p.shape[1], pixels, part),
            *(*flat_strides(p), *flat_strides(t), *flat_strides(m)),
            MASKED=m is not None,
            OF_P=which != "target",
            OF_T=which != "prediction",
            OF_D=which == "joint",
            TILE_C=tiles.channels,
            TILE_X=tiles.pixels,
            num_warps=tiles.warps,
        )
    return _joined(sums)


def combine(predicted: Tensor, target: Tensor, keep: Tensor | None, numbers: Combination) -> Tensor:
    """As `masked_distance.combine`."""
    p, t, m = prepared(predicted, target, keep)
    result = torch.empty_like(p)
    tiles, pixels = Tiles.rows(p), p.shape[2] * p.shape[3]
    grid = (triton.cdiv(pixels, tiles.pixels), triton.cdiv(p.shape[1], tiles.channels), p.shape[0])
    with torch.cuda.device_of(p):
        _combine[grid](
            p,
            t,
            m,
            _stacked(numbers),
            result,
            *(p.shape[1], pixels),
            *(*flat_strides(p), *flat_strides(t), *flat_strides(m), *flat_strides(result)),
            MASKED=m is not None,
            TILE_C=tiles.channels,
            TILE_X=tiles.pixels,
            num_warps=tiles.warps,
        )
    return result


def prepared(p: Tensor, t: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Maps and mask as the programs address them: pixels in one row, the mask in bytes."""
    mask = None if keep is None else flattenable(keep.view(torch.uint8))
    return flattenable(p), flattenable(t), mask


def _stacked(numbers: Combination) -> Tensor:
    """(6, B, C), zeros for what is not given."""
    none = torch.zeros_like(numbers.of_d)
    return torch.stack([none if number is None else number for number in numbers])


def _joined(sums: Tensor) -> Moments:
    """Moments of whole rows (B, C) from those of their parts (9, parts, B, C)."""
    n, square, mean_p, var_p, mean_t, var_t, mean_d, var_d, cov_dt = sums
    kept = n.sum(0).clamp_min_(1)
    whole_p, whole_t, whole_d = ((n * mean).sum(0) / kept for mean in (mean_p, mean_t, mean_d))
    off_p, off_t, off_d = mean_p - whole_p, mean_t - whole_t, mean_d - whole_d
    var_p, var_t, var_d, cov_dt = (
        (part + n * x * y).sum(0) / kept
        for part, x, y in (
            (var_p, off_p, off_p),
            (var_t, off_t, off_t),
            (var_d, off_d, off_d),
            (cov_dt, off_d, off_t),
        )
    )
    return Moments(kept, square.sum(0) / kept, whole_p, var_p, whole_t, var_t, var_d, cov_dt)


@triton.jit
def load(
    base: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    x: tl.tensor,
    s_b: tl.tensor,
    s_c: tl.tensor,
    s_x: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """A tile in float32, 0 outside the map."""
    place = base + b * s_b + c[:, None].to(tl.int64) * s_c + x[None, :].to(tl.int64) * s_x
    return tl.load(place, mask=inside, other=0).to(tl.float32)


@triton.jit
def kept_of(
    m_map: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    x: tl.tensor,
    m_b: tl.tensor,
    m_c: tl.tensor,
    m_x: tl.tensor,
    inside: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Which entries of a tile are in the map and kept.

    Maps are read wherever they are `inside`: a read that follows the mask would be a narrow one.
    """
    if MASKED:
        inside = inside & (load(m_map, b, c, x, m_b, m_c, m_x, inside) != 0)
    return inside


@triton.jit
def _guess(tile: tl.tensor, kept: tl.tensor) -> tl.tensor:
    """The mean of what is kept of a tile (TILE_C, 1), 0 where there is nothing."""
    count = tl.sum(kept.to(tl.float32), axis=1, keep_dims=True)
    total = tl.sum(tile * kept.to(tl.float32), axis=1, keep_dims=True)
    return total / tl.maximum(count, 1.0)


@triton.jit
def _store_spread(
    sums: tl.tensor,
    total: tl.tensor,
    square: tl.tensor,
    count: tl.tensor,
    guess: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """Store the mean at `sums`; give the sum of squares about it, of sums about `guess`."""
    total, square = tl.sum(total, axis=1), tl.sum(square, axis=1)
    mean = total / count
    tl.store(sums, tl.sum(guess, axis=1) + mean, mask=inside)
    return square - total * mean


@triton.jit
def _moments(
    p_map: tl.tensor,
    t_map: tl.tensor,
    m_map: tl.tensor,
    sums: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    part: tl.tensor,
    p_b: tl.tensor,
    p_c: tl.tensor,
    p_x: tl.tensor,
    t_b: tl.tensor,
    t_c: tl.tensor,
    t_x: tl.tensor,
    m_b: tl.tensor,
    m_c: tl.tensor,
    m_x: tl.tensor,
    MASKED: tl.constexpr,
    OF_P: tl.constexpr,
    OF_T: tl.constexpr,
    OF_D: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_X: tl.constexpr,
) -> None:
    """Nine numbers of a part of some rows, each to a (parts, B, C) of its own: see `_joined`."""
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * part
    end = tl.minimum(start + part, pixels)
    known = c[:, None] < channels
    x = start + tl.arange(0, TILE_X)
    inside = known & (x[None, :] < pixels)
    kept = kept_of(m_map, b, c, x, m_b, m_c, m_x, inside, MASKED)
    n = tl.zeros((TILE_C, TILE_X), tl.float32)
    square, sum_p, square_p, sum_t, square_t, sum_d, square_d, product = n, n, n, n, n, n, n, n
    guess_p = tl.zeros((TILE_C, 1), tl.float32)
    guess_t = guess_p
    if OF_P:
        guess_p = _guess(load(p_map, b, c, x, p_b, p_c, p_x, inside), kept)
    if OF_T:
        guess_t = _guess(load(t_map, b, c, x, t_b, t_c, t_x, inside), kept)
    for first in range(start, end, TILE_X):
        x = first + tl.arange(0, TILE_X)
        # Not x < end: that the pixels are a multiple of 16 is what lets reads be wide.
        inside = known & (x[None, :] < pixels)
        kept = kept_of(m_map, b, c, x, m_b, m_c, m_x, inside, MASKED)
        p = load(p_map, b, c, x, p_b, p_c, p_x, inside)
        t = load(t_map, b, c, x, t_b, t_c, t_x, inside)
        m = kept.to(tl.float32)
        d = (p - t) * m
        n += m
        square += d * d
        off_p, off_t = (p - guess_p) * m, (t - guess_t) * m
        if OF_P:
            sum_p += off_p
            square_p += off_p * off_p
        if OF_T:
            sum_t += off_t
            square_t += off_t * off_t
        if OF_D:
            off_d = (d - (guess_p - guess_t)) * m
            sum_d += off_d
            square_d += off_d * off_d
            product += off_d * off_t
    count = tl.sum(n, axis=1)
    shape = tl.num_programs(2) * channels
    sums += (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)) * channels + c
    step = tl.num_programs(0) * shape
    inside = c < channels
    tl.store(sums, count, mask=inside)
    tl.store(sums + step, tl.sum(square, axis=1), mask=inside)
    count = tl.maximum(count, 1.0)
    about_p = _store_spread(sums + 2 * step, sum_p, square_p, count, guess_p, inside)
    about_t = _store_spread(sums + 4 * step, sum_t, square_t, count, guess_t, inside)
    guess_d = guess_p - guess_t if OF_D else tl.zeros((TILE_C, 1), tl.float32)
    about_d = _store_spread(sums + 6 * step, sum_d, square_d, count, guess_d, inside)
    tl.store(sums + 3 * step, about_p, mask=inside)
    tl.store(sums + 5 * step, about_t, mask=inside)
    tl.store(sums + 7 * step, about_d, mask=inside)
    about_both = tl.sum(product, axis=1) - tl.sum(sum_d, axis=1) * tl.sum(sum_t, axis=1) / count
    tl.store(sums + 8 * step, about_both, mask=inside)


@triton.jit
def _combine(
    p_map: tl.tensor,
    t_map: tl.tensor,
    m_map: tl.tensor,
    numbers: tl.tensor,
    result: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    p_b: tl.tensor,
    p_c: tl.tensor,
    p_x: tl.tensor,
    t_b: tl.tensor,
    t_c: tl.tensor,
    t_x: tl.tensor,
    m_b: tl.tensor,
    m_c: tl.tensor,
    m_x: tl.tensor,
    r_b: tl.tensor,
    r_c: tl.tensor,
    r_x: tl.tensor,
    MASKED: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_X: tl.constexpr,
) -> None:
    """A tile of the combination, from its six numbers a row, (6, B, C)."""
    x = tl.program_id(0) * TILE_X + tl.arange(0, TILE_X)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    b = tl.program_id(2).to(tl.int64)
    inside = (c[:, None] < channels) & (x[None, :] < pixels)
    kept = kept_of(m_map, b, c, x, m_b, m_c, m_x, inside, MASKED)
    p = load(p_map, b, c, x, p_b, p_c, p_x, inside)
    t = load(t_map, b, c, x, t_b, t_c, t_x, inside)
    row = numbers + tl.program_id(2) * channels + c[:, None]
    step = tl.num_programs(2) * channels
    known = c[:, None] < channels
    of_d, of_p = tl.load(row, mask=known), tl.load(row + step, mask=known)
    of_t, mean_d = tl.load(row + 2 * step, mask=known), tl.load(row + 3 * step, mask=known)
    mean_p, mean_t = tl.load(row + 4 * step, mask=known), tl.load(row + 5 * step, mask=known)
    value = of_d * ((p - t) - mean_d) + of_p * (p - mean_p) + of_t * (t - mean_t)
    value = value * kept.to(tl.float32)
    place = result + b * r_b + c[:, None].to(tl.int64) * r_c + x[None, :].to(tl.int64) * r_x
    tl.store(place, value.to(result.dtype.element_ty), mask=inside)
