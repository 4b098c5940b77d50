"""Pairs and triples that a distance of latents is calibrated and judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffkit.data.images import decode
from diffkit.data.transforms import to_float
from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.perceptual.calibration import channel_distances, two_afc_score
from diffkit.perceptual.latent_lpips import LatentLpips
from latent_metric.corruptions import LATENT_KINDS, PICTURE_KINDS
from latent_metric.pictures import Pictures

__all__ = ["Pairs", "Triples", "correlation", "people", "spoilt"]

Target = Callable[[Tensor, Tensor], Tensor]
"""Distance (B,) of two batches of pictures in [-1, 1]."""


@dataclass(frozen=True)
class Pairs:
    """`channel_distances` (N, K) of pairs of latents, with what else is known of each.

    Attributes:
        rows: of the network.
        target: distance of the decoded pictures, (N,).
        square: mean squared difference of the latents, (N,).
    """

    rows: Tensor
    target: Tensor
    square: Tensor


@dataclass(frozen=True)
class Triples:
    """A reference beside two others: `channel_distances` to both, and h, who finds p1 nearer."""

    m0: Tensor
    m1: Tensor
    judge: Tensor

    def score(self, weights: Tensor) -> float:
        """The mean of `two_afc_score` with these heads."""
        d0, d1 = (m.double() @ weights.double() for m in (self.m0, self.m1))
        return round(two_afc_score(d0, d1, self.judge).mean().item(), 4)


@torch.no_grad()
def spoilt(
    pictures: Pictures,
    codec: Codec,
    network: LatentLpips,
    target: Target,
    count: int,
    seed: int,
    batch: int = 16,
) -> tuple[Pairs, Triples]:
    """Pictures beside spoilt ones: to the weaker of two strengths (a pair), and to both (a triple).

    The kinds of `corruptions` take turns, batch by batch. The weaker one is judged the nearer.
    """
    device, found = codec.device, []
    kinds = [(f, False) for f in PICTURE_KINDS.values()]
    kinds += [(f, True) for f in LATENT_KINDS.values()]
    for number, images in enumerate(_passes(pictures, count, seed, batch)):
        corrupt, latent = kinds[number % len(kinds)]
        g = torch.Generator().manual_seed(seed * 1_000_003 + number)
        strengths = torch.rand((2, len(images)), generator=g).sort(0).values
        clean = codec.encode(images.to(device)).cpu()
        others = []
        for strength in strengths:
            again = torch.Generator().manual_seed(number)
            spoiled = corrupt(clean if latent else images, strength, again)
            others.append(spoiled if latent else codec.encode(spoiled.clamp(-1, 1).to(device)))
        latents = [x.to(device).float() for x in (clean, *others)]
        weak, strong = (channel_distances(network, latents[0], x) for x in latents[1:])
        decoded = [codec.decode(x).clamp(-1, 1) for x in latents[:2]]
        square = (latents[0] - latents[1]).square().flatten(1).mean(1)
        turned = torch.rand(len(images), generator=g) < 0.5
        found.append([x.cpu() for x in (weak, strong, target(*decoded), square, turned)])
    weak, strong, wanted, square, turned = (
        torch.cat(column)[:count] for column in zip(*found, strict=True)
    )
    side = turned[:, None]
    triples = Triples(
        torch.where(side, strong, weak), torch.where(side, weak, strong), turned.float()
    )
    return Pairs(weak, wanted, square), triples


def _passes(pictures: Pictures, count: int, seed: int, batch: int) -> Iterator[Tensor]:
    """Batches of at least `count` pictures: views 1, 2, ... of the folder, shuffled."""
    number = made = 0
    while made < count:
        number += 1
        g = torch.Generator().manual_seed(seed + number)
        for rows in torch.randperm(len(pictures), generator=g).split(batch):
            if made >= count:
                return
            made += len(rows)
            yield to_float([pictures.view(int(row), number, seed) for row in rows])


@torch.no_grad()
def people(folder: Path, codec: Codec, network: LatentLpips, size: int, batch: int = 16) -> Triples:
    """Triples of people's judgements as BAPPS lays them out: ref, p0, p1 (png) and judge (npy).

    The patches are enlarged to `size` pixels (bicubic). Raises `UserError` for another layout.
    """
    names = sorted(file.stem for file in (folder / "ref").glob("*.png"))
    if not names:
        raise UserError(f"{folder}: has no ref/*.png; give a folder of BAPPS's 2AFC triples.")
    found = []
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        ref, p0, p1 = (
            codec.encode(_enlarged([folder / side / f"{name}.png" for name in part], size, codec))
            for side in ("ref", "p0", "p1")
        )
        found.append([channel_distances(network, ref, p).cpu() for p in (p0, p1)])
    try:
        judge = [float(np.load(folder / "judge" / f"{name}.npy").item()) for name in names]
    except OSError as error:
        raise UserError(f"{folder}: a triple has no judge/*.npy ({error}).") from error
    m0, m1 = (torch.cat(column) for column in zip(*found, strict=True))
    return Triples(m0, m1, torch.tensor(judge))


def _enlarged(files: list[Path], size: int, codec: Codec) -> Tensor:
    try:
        pixels = [np.array(decode(file)[0].convert("RGB")) for file in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: a triple of BAPPS lacks this picture.") from error
    images = to_float(pixels).to(codec.device)
    return torch.nn.functional.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)


def correlation(x: Tensor, y: Tensor, ranks: bool = False) -> float:
    """Pearson's correlation of (N,) and (N,), or Spearman's."""
    pair = torch.stack([x.double(), y.double()])
    if ranks:
        pair = pair.argsort(1).argsort(1).double()
    return round(torch.corrcoef(pair)[0, 1].item(), 4)
