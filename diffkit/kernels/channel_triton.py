"""Triton's form of `channel_distance`: a program goes through all channels of some pixels, twice.

The second time the pixels' channels come from the cache of the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkit.kernels.channel_distance import Normed
from diffkit.kernels.masked_triton import kept_of, load, prepared
from diffkit.kernels.tiles import Tiles, flat_strides

__all__ = ["normed", "normed_slope"]


def normed(predicted: Tensor, target: Tensor, keep: Tensor | None, eps: float, own: bool) -> Normed:
    """As `channel_distance.normed`."""
    p, t, m = prepared(predicted, target, keep)
    b, c, h, w = p.shape
    tiles = Tiles.columns(p)
    parts = triton.cdiv(h * w, tiles.pixels)
    norm_t = torch.empty(b, 1, h, w, dtype=torch.float32, device=p.device)
    norm_p = torch.empty_like(norm_t) if own else None
    sums = torch.empty(2, parts, b, c, dtype=torch.float32, device=p.device)
    with torch.cuda.device_of(p):
        _normed[(parts, b)](
            *(p, t, m, norm_p, norm_t, sums, c, h * w, eps),
            *(*flat_strides(p), *flat_strides(t), *flat_strides(m)),
            MASKED=m is not None,
            OWN=own,
            TILE_C=tiles.channels,
            TILE_X=tiles.pixels,
            num_warps=tiles.warps,
        )
    total, kept = sums.sum(1)
    kept = kept.clamp_min_(1)
    return Normed(total / kept, kept, norm_p, norm_t)


def normed_slope(
    predicted: Tensor,
    target: Tensor,
    keep: Tensor | None,
    norms: tuple[Tensor | None, Tensor],
    scale: Tensor,
    eps: float,
) -> Tensor:
    """As `channel_distance.normed_slope`."""
    p, t, m = prepared(predicted, target, keep)
    b, c, h, w = p.shape
    tiles = Tiles.columns(p)
    result = torch.empty_like(p)
    with torch.cuda.device_of(p):
        _slope[(triton.cdiv(h * w, tiles.pixels), b)](
            *(p, t, m, *norms, scale.contiguous(), result, c, h * w, eps),
            *(*flat_strides(p), *flat_strides(t), *flat_strides(m), *flat_strides(result)),
            MASKED=m is not None,
            OWN=norms[0] is not None,
            TILE_C=tiles.channels,
            TILE_X=tiles.pixels,
            num_warps=tiles.warps,
        )
    return result


@triton.jit
def _normed(
    p_map: tl.tensor,
    t_map: tl.tensor,
    m_map: tl.tensor,
    norm_p: tl.tensor,
    norm_t: tl.tensor,
    sums: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
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
    OWN: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_X: tl.constexpr,
) -> None:
    """Norms of some pixels, and of each channel the sum of squares and the count over them."""
    x = tl.program_id(0) * TILE_X + tl.arange(0, TILE_X)
    b = tl.program_id(1).to(tl.int64)
    there = x < pixels
    total_p, total_t = (
        tl.zeros((TILE_C, TILE_X), tl.float32),
        tl.zeros((TILE_C, TILE_X), tl.float32),
    )
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        inside = (c[:, None] < channels) & there[None, :]
        t = load(t_map, b, c, x, t_b, t_c, t_x, inside)
        total_t += t * t
        if OWN:
            p = load(p_map, b, c, x, p_b, p_c, p_x, inside)
            total_p += p * p
    length = tl.sqrt(tl.sum(total_t, axis=0))
    tl.store(norm_t + b * pixels + x, length, mask=there)
    n_t = (length + eps)[None, :]
    n_p = n_t
    if OWN:
        length = tl.sqrt(tl.sum(total_p, axis=0))
        tl.store(norm_p + b * pixels + x, length, mask=there)
        n_p = (length + eps)[None, :]
    sums += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * channels
    step = tl.num_programs(0) * tl.num_programs(1) * channels
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        inside = (c[:, None] < channels) & there[None, :]
        kept = kept_of(m_map, b, c, x, m_b, m_c, m_x, inside, MASKED)
        p = load(p_map, b, c, x, p_b, p_c, p_x, inside)
        t = load(t_map, b, c, x, t_b, t_c, t_x, inside)
        # Two quotients, not products with reciprocals: a fused multiply-add of two equal maps
        # would leave a rounding error where there must be 0.
        change = (p - t) / n_t
        if OWN:
            change = p / n_p - t / n_t
        m = kept.to(tl.float32)
        change = change * m
        tl.store(sums + c, tl.sum(change * change, axis=1), mask=c < channels)
        tl.store(sums + step + c, tl.sum(m, axis=1), mask=c < channels)


@triton.jit
def _slope(
    p_map: tl.tensor,
    t_map: tl.tensor,
    m_map: tl.tensor,
    norm_p: tl.tensor,
    norm_t: tl.tensor,
    scale: tl.tensor,
    result: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
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
    OWN: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_X: tl.constexpr,
) -> None:
    """The gradient at some pixels."""
    x = tl.program_id(0) * TILE_X + tl.arange(0, TILE_X)
    b = tl.program_id(1).to(tl.int64)
    there = x < pixels
    n_t = (tl.load(norm_t + b * pixels + x, mask=there, other=1.0) + eps)[None, :]
    n_p, along = n_t, n_t
    scale += tl.program_id(1) * channels
    if OWN:
        length = tl.load(norm_p + b * pixels + x, mask=there, other=1.0)
        n_p = (length + eps)[None, :]
        dots = tl.zeros((TILE_C, TILE_X), tl.float32)
        for first in range(0, channels, TILE_C):
            c = first + tl.arange(0, TILE_C)
            inside = (c[:, None] < channels) & there[None, :]
            kept = kept_of(m_map, b, c, x, m_b, m_c, m_x, inside, MASKED)
            p = load(p_map, b, c, x, p_b, p_c, p_x, inside)
            t = load(t_map, b, c, x, t_b, t_c, t_x, inside)
            weight = tl.load(scale + c, mask=c < channels, other=0.0)[:, None]
            dots += weight * (p / n_p - t / n_t) * p * kept.to(tl.float32)
        along = (tl.sum(dots, axis=0) / tl.where(length == 0, 1.0, length))[None, :] / (n_p * n_p)
        there_p = (length != 0)[None, :]
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        inside = (c[:, None] < channels) & there[None, :]
        kept = kept_of(m_map, b, c, x, m_b, m_c, m_x, inside, MASKED)
        p = load(p_map, b, c, x, p_b, p_c, p_x, inside)
        t = load(t_map, b, c, x, t_b, t_c, t_x, inside)
        m = kept.to(tl.float32)
        weight = tl.load(scale + c, mask=c < channels, other=0.0)[:, None]
        if OWN:
            value = m * weight * (p / n_p - t / n_t) / n_p - along * p
            value = tl.where(there_p, value, 0.0)
        else:
            value = m * weight * (p - t) / (n_t * n_t)
        place = result + b * r_b + c[:, None].to(tl.int64) * r_c + x[None, :].to(tl.int64) * r_x
        tl.store(place, value.to(result.dtype.element_ty), mask=inside)
