"""Random views of the rendered emoji: moved, recoloured, degraded, over random backgrounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import BACKGROUNDS
from torch import Tensor

PALETTE = torch.tensor(list(BACKGROUNDS.values())) / 255
GRAY = 0.08


@dataclass(frozen=True)
class Augmentation:
    """How far pictures are moved and recoloured; probabilities and half-ranges."""

    flip: float
    degrees: float
    scale: tuple[float, float]
    shift: float
    colour: float
    blur: float
    noise: float
    shear: float = 0.0
    erase: float = 0.0


def uniform(shape: tuple[int, ...], low: float, high: float, g: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=g)


def affine(mirrored: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Matrices (B, 2, 3) for `affine_grid`; one picture in five stays where it is.

    Arguments:
        mirrored: booleans (B,), whether a picture may be mirrored.
    """
    count = len(mirrored)
    angle = uniform((count,), -how.degrees, how.degrees, generator) * math.pi / 180
    scale = uniform((count,), *how.scale, generator)
    flipped = (torch.rand(count, generator=generator) < how.flip) & mirrored
    shift = uniform((count, 2), -how.shift, how.shift, generator) * 2
    still = torch.rand(count, generator=generator) < 0.2
    mirror = 1 - 2 * flipped.float()
    angle, scale = angle.masked_fill(still, 0), scale.masked_fill(still, 1)
    mirror, shift = mirror.masked_fill(still, 1), shift.masked_fill(still[:, None], 0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack(
        [torch.stack([cos * mirror, -sin], -1), torch.stack([sin * mirror, cos], -1)], 1
    )
    if how.shear:
        # A symmetric matrix near the identity: another aspect ratio and a shear in one.
        bend = uniform((count, 2, 2), -how.shear, how.shear, generator)
        bend = bend.masked_fill(still[:, None, None], 0)
        rows = rows @ (torch.eye(2) + (bend + bend.mT) / 2)
    return torch.cat([rows, shift[..., None]], -1)


def recolour(colour: Tensor, alpha: Tensor, strength: float, g: torch.Generator) -> Tensor:
    """Random contrast, saturation and tint of premultiplied colours (B, 3, H, W)."""
    if strength == 0:
        return colour
    count = len(colour)
    shape = (count, 1, 1, 1)
    gray = colour.mean(1, keepdim=True)
    saturation = uniform(shape, 1 - strength, 1 + strength, g)
    gain = uniform(shape, 1 - strength, 1 + strength, g)
    tint = uniform((count, 3, 1, 1), -strength / 3, strength / 3, g)
    saturation = saturation.masked_fill(torch.rand(shape, generator=g) < GRAY, 0)
    changed = (gray + (colour - gray) * saturation) * gain + tint * alpha
    kept = torch.rand(shape, generator=g) < 0.3
    return torch.where(kept, colour, changed.clamp_min(0).minimum(alpha))


def erase(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Paint a rectangle of one random colour over a share of the pictures (B, 3, H, W)."""
    count, edge = len(images), images.shape[-1]
    size = uniform((count, 2), 0.15, 0.45, generator)
    first = torch.rand(count, 2, generator=generator) * (1 - size)
    at = (torch.arange(edge) + 0.5) / edge
    inside = (at >= first[..., None]) & (at < (first + size)[..., None])
    chosen = (torch.rand(count, generator=generator) < how.erase)[:, None, None]
    covered = inside[:, 0, :, None] & inside[:, 1, None, :] & chosen
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return torch.where(covered[:, None], colour, images)


def degrade(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Blur the first share of the batch by resizing, and add noise to another share."""
    blurred, edge = int(len(images) * how.blur), images.shape[-1]
    size = int(torch.randint(edge // 2, edge * 7 // 8, (1,), generator=generator))
    small = F.interpolate(images[:blurred], size, mode="bilinear", antialias=True)
    back = F.interpolate(small, edge, mode="bilinear")
    images = torch.cat([back, images[blurred:]])
    level = uniform((len(images), 1, 1, 1), -how.noise, how.noise, generator).clamp_min(0)
    return images + level * torch.randn(images.shape, generator=generator)


def backgrounds(count: int, edge: int, generator: torch.Generator) -> Tensor:
    """Palette colours, any colours and gradients, (B, 3, edge, edge), around [0, 1]."""
    palette = PALETTE[torch.randint(len(PALETTE), (count,), generator=generator)]
    anything = torch.rand(count, 3, generator=generator)
    named = torch.rand(count, 1, generator=generator) < 0.6
    first = torch.where(named, palette, anything)[..., None, None]
    first = first + 0.03 * torch.randn(first.shape, generator=generator)
    second = torch.rand(count, 3, 1, 1, generator=generator)
    direction = uniform((count, 2, 1, 1), -1, 1, generator)
    line = torch.linspace(-0.5, 0.5, edge)
    ramp = (0.5 + direction[:, :1] * line[:, None] + direction[:, 1:] * line).clamp(0, 1)
    graded = (torch.rand(count, 1, 1, 1, generator=generator) < 0.25).float()
    return first + graded * ramp * (second - first)
