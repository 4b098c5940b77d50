"""Random maps of latents for an ensemble of latent distances: one draw T a sample, for both sides.

Kang et al., "Distilling Diffusion Models into Conditional GANs" (ECCV 2024, 2405.05967), take the
expectation of a latent perceptual distance over T, which closes its null directions; the maps are
those of Karras et al. 2020 ("Training Generative Adversarial Networks with Limited Data", appendix
B) with every probability 1, and DiffAugment's colours (Zhao et al. 2020):

    b  mirror left to right with probability 1/2; quarter turns 0..3 (half turns where the sides
       differ); a shift by whole pixels, uniform in +-1/8 of each side
    g  isotropic scale 2^N(0, 0.2^2); a rotation, uniform over the circle, before and after an
       anisotropic scale (s, 1/s), s = 2^N(0, 0.2^2); a shift N(0, (side / 8)^2)
    c  brightness + U(-1/2, 1/2); contrast times U(1/2, 3/2) about the mean; saturation times
       U(0, 2) about the mean of the channels
    o  a rectangle of half the sides, its centre uniform, set to 0

Everything is linear in the latents but c. Maps of b alone move entries without arithmetic; with g
both become one affine map through the sym6 wavelet (`diffkit.perceptual.wavelet`). The means of c
are those of both sides together, without a gradient, so that T is one map for both and the distance
stays symmetric. Beyond the border lies the mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkit.errors import UserError
from diffkit.perceptual.wavelet import MARGIN, resamplers
from diffkit.randomness import SampleKeys

__all__ = ["KINDS", "Augmentation", "check_kinds", "draw", "identity"]

KINDS = "bgco"

COLUMNS = (
    *("flip", "turns", "right", "down"),
    *("xx", "xy", "x", "yx", "yy", "y"),
    *("brightness", "contrast", "saturation"),
    *("cut_x", "cut_y"),
)
_AT = {name: i for i, name in enumerate(COLUMNS)}
_IDENTITY = (0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0)

SHIFT = 0.125
SCALE = 0.2
CUTOUT = 0.5


def check_kinds(kinds: str) -> None:
    """Raise `UserError` unless `kinds` has each of the letters b, g, c, o at most once."""
    if len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        raise UserError(
            f"augmentation {kinds!r}: give some of the letters b (mirror, quarter turn, shift), g "
            "(scale, rotation), c (colour) and o (cutout), each once, such as 'bg'; '' is none."
        )


@dataclass(frozen=True)
class Augmentation:
    """One draw of T for each sample of a batch.

    Attributes:
        kinds: letters of `KINDS`, see the module.
        parameters: (B, 15) float32, a row a sample, by `COLUMNS`: mirrored (0 or 1); quarter turns;
            shift in pixels; the affine map from pixels of the result to pixels of the latents, both
            from the centre, of b and g together; what c adds and multiplies; the centre of the
            cutout as a share of the sides. A row does not depend on the other samples, so rows may
            be taken apart and brought together at will.
    """

    kinds: str
    parameters: Tensor

    def __len__(self) -> int:
        return len(self.parameters)

    def select(self, rows: slice) -> Augmentation:
        """The draws of some samples, for a part of a batch."""
        return replace(self, parameters=self.parameters[rows])

    def to(self, device: torch.device | str) -> Augmentation:
        """The same on `device`."""
        return replace(self, parameters=self.parameters.to(device, non_blocking=True))

    def apply(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(T a, T b) of latents (B, C, h, w) in float32 or float64; gradients flow in both."""
        pair = [a, b]
        if "g" in self.kinds:
            pair = self._warped(pair)
        elif "b" in self.kinds:
            pair = self._moved(pair)
        if "c" in self.kinds:
            pair = self._recoloured(pair)
        if "o" in self.kinds:
            pair = self._cut(pair)
        return pair[0], pair[1]

    def _column(self, name: str) -> Tensor:
        """(B, 1, 1)"""
        return self.parameters[:, _AT[name], None, None]

    def _moved(self, pair: list[Tensor]) -> list[Tensor]:
        """Shifted <- turned <- mirrored, by the index that each entry of the result comes from."""
        height, width = pair[0].shape[-2:]
        device = pair[0].device
        y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
        y = _reflected(y - self._column("down").long(), height)
        x = _reflected(x - self._column("right").long(), width)
        # Twice the distances from the centre, which are whole numbers; (x, y) turns to (-y, x).
        y, x = 2 * y - (height - 1), 2 * x - (width - 1)
        turns = self._column("turns").long()
        cos, sin = (1 - turns) * (1 - turns % 2), (2 - turns) * (turns % 2)
        y, x = cos * y + sin * x, cos * x - sin * y
        x = x * (1 - 2 * self._column("flip").long())
        index = (y + height - 1) // 2 * width + (x + width - 1) // 2
        return [
            maps.flatten(2)
            .gather(2, index.flatten(1)[:, None].expand(-1, maps.shape[1], -1))
            .view_as(maps)
            for maps in pair
        ]

    def _warped(self, pair: list[Tensor]) -> list[Tensor]:
        """Mirrored beyond the border, doubled, sampled bilinearly along the map, halved.

        The border is n - 1 wide whatever the draws, so that no sample sees the others'.
        """
        height, width = pair[0].shape[-2:]
        like = pair[0]
        grid = self._grid(height, width).to(like.dtype)
        (up_y, down_y), (up_x, down_x) = (
            resamplers(n, like.dtype, like.device) for n in (height, width)
        )
        results = []
        for maps in pair:
            doubled = up_y @ maps @ up_x.mT
            warped = F.grid_sample(doubled, grid, padding_mode="zeros", align_corners=False)
            results.append(down_y @ warped @ down_x.mT)
        return results

    def _grid(self, height: int, width: int) -> Tensor:
        """Where to sample the doubled maps, (B, 2 (h + 6), 2 (w + 6), 2), for `grid_sample`.

        p = 2 G((o + 1/2) / 2) - 1/2 for the place o in the doubled result, G the map; the value of
        an entry sits half a doubled pixel off the centre of its two.
        """
        device = self.parameters.device
        y, x = (
            (torch.arange(2 * (n + MARGIN), device=device) - (n + MARGIN) + 1) / 2
            for n in (height, width)
        )
        y = y[:, None]
        column = self._column
        from_x = column("xx") * x + column("xy") * y + column("x")
        from_y = column("yx") * x + column("yy") * y + column("y")
        places = [
            (2 * place - 0.5) / (3 * n - 2) for place, n in ((from_x, width), (from_y, height))
        ]
        return torch.stack(places, -1)

    def _recoloured(self, pair: list[Tensor]) -> list[Tensor]:
        brightness, contrast, saturation = (
            self._column(name)[..., None] for name in ("brightness", "contrast", "saturation")
        )
        pair = [maps + brightness for maps in pair]
        mean = _together(pair).mean((1, 2, 3), keepdim=True)
        pair = [(maps - mean) * contrast + mean for maps in pair]
        mean = _together(pair).mean(1, keepdim=True)
        return [(maps - mean) * saturation + mean for maps in pair]

    def _cut(self, pair: list[Tensor]) -> list[Tensor]:
        height, width = pair[0].shape[-2:]
        y, x = ((torch.arange(n, device=pair[0].device) + 0.5) / n for n in (height, width))
        far_x = (x - self._column("cut_x")).abs() >= CUTOUT / 2
        far_y = (y[:, None] - self._column("cut_y")).abs() >= CUTOUT / 2
        return [maps * (far_x | far_y)[:, None] for maps in pair]


def identity(count: int, kinds: str = "bg") -> Augmentation:
    """The draw that leaves `count` samples as they are; a cutout has no such draw.

    Raises `UserError` for unknown kinds and for "o".
    """
    check_kinds(kinds)
    if "o" in kinds:
        raise UserError("augmentation 'o': a cutout always changes latents; leave out the letter.")
    return Augmentation(kinds, torch.tensor(_IDENTITY, dtype=torch.float32).repeat(count, 1))


def draw(
    source: SampleKeys | torch.Generator,
    shape: Sequence[int],
    kinds: str = "bg",
    purpose: str = "latent augmentation",
) -> Augmentation:
    """One T a sample, on the CPU; the same numbers of a draw whatever the kinds.

    Arguments:
        source: the addresses of the samples, which alone decide their draws; or a CPU generator.
        shape: (B, C, h, w) of the latents.
        kinds: see the module.
        purpose: part of the address; draws of one sample that must differ need different ones.

    Raises:
        UserError: unknown kinds.
    """
    check_kinds(kinds)
    count, _, height, width = shape
    if isinstance(source, SampleKeys):
        uniform = source.uniform(f"{purpose}/uniform", (11,))
        normal = source.normal((4,), f"{purpose}/normal")
    else:
        uniform = torch.rand((count, 11), generator=source)
        normal = torch.randn((count, 4), generator=source)
    return _drawn(uniform.double(), normal.double(), (height, width), kinds)


def _drawn(uniform: Tensor, normal: Tensor, sides: tuple[int, int], kinds: str) -> Augmentation:
    """The parameters from uniform (B, 11) and normal (B, 4) numbers, float64."""
    height, width = sides
    flip, turns, *shift, before, after = uniform[:, :6].unbind(1)
    rows = torch.tensor(_IDENTITY, dtype=torch.float64).repeat(len(uniform), 1)
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(uniform), 1, 1)
    if "b" in kinds:
        turns = (4 * turns).floor() if height == width else 2 * (2 * turns).floor()
        right, down = (
            (SHIFT * (2 * u - 1) * n).round() for u, n in zip(shift, (width, height), strict=True)
        )
        flip = (2 * flip).floor()
        rows[:, :4] = torch.stack([flip, turns, right, down], 1)
        mirror = _scale(1 - 2 * flip, torch.ones_like(flip))
        matrix = mirror @ _rotate(turns * math.pi / 2) @ _move(right, down)
    if "g" in kinds:
        scale, aniso = (2 ** (SCALE * normal[:, i]) for i in (0, 1))
        before, after = ((2 * u - 1) * math.pi for u in (before, after))
        size = _scale(1 / scale, 1 / scale) @ _rotate(before) @ _scale(1 / aniso, aniso)
        step = _move(normal[:, 2] * SHIFT * width, normal[:, 3] * SHIFT * height)
        matrix = matrix @ size @ _rotate(after) @ step
        rows[:, 4:10] = matrix[:, :2].flatten(1)
    if "c" in kinds:
        rows[:, 10:13] = uniform[:, 6:9] * torch.tensor([1.0, 1, 2]) + torch.tensor([-0.5, 0.5, 0])
    if "o" in kinds:
        rows[:, 13:] = uniform[:, 9:]
    return Augmentation(kinds, rows.float())


# Maps from the result to the latents: (B, 3, 3) for (x, y, 1), y downwards.


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], -1))


def _rotate(angle: Tensor) -> Tensor:
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).view(-1, 3, 3)


def _move(x: Tensor, y: Tensor) -> Tensor:
    result = torch.eye(3, dtype=x.dtype).repeat(len(x), 1, 1)
    result[:, 0, 2], result[:, 1, 2] = -x, -y
    return result


def _reflected(index: Tensor, n: int) -> Tensor:
    """Indices in 0..n-1 of a map that goes on as its mirror image without the border doubled."""
    index = index.abs()
    return torch.where(index < n, index, 2 * (n - 1) - index)


def _together(pair: list[Tensor]) -> Tensor:
    """The mean of both sides, without a gradient."""
    return ((pair[0] + pair[1]) / 2).detach()
