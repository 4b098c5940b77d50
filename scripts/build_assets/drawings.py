"""What the feature network learns from and is tested on: drawings, and which are held out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from augmentation import PALETTE, Augmentation, affine, degrade, erase, recolour
from captions import heldout_pairs, read_concepts
from common import SIZE, STYLES, read_json, stable_fraction
from torch import Tensor

SHIPPED_WEIGHT = 4
FURTHER_HELDOUT = 150
NEAR = 0.12
"""Distance in pixels under which two drawings are near-copies: see `distance`."""
SIDED = re.compile(r"\b(left|right|quarter|crescent|gibbous|clock|thirty|forward|back|ON!)\b")


class Pictures:
    """All rendered pictures, and which (concept, style) pairs no network is trained on."""

    def __init__(self, emoji: Path) -> None:
        rgba = torch.from_numpy(np.load(emoji / "rgba.npy"))
        self.concepts: list[dict[str, Any]] = read_json(emoji / "concepts.json")
        self.rgba = premultiplied(rgba.flatten(0, 1))
        self.mirrored = torch.ones(len(self.rgba), dtype=torch.bool)
        self.position = {concept["id"]: index for index, concept in enumerate(self.concepts)}
        self.words = read_concepts()
        self.heldout = torch.zeros(len(self.concepts), len(STYLES), dtype=torch.bool)
        for concept, style in heldout_pairs(list(self.words)):
            self.heldout[self.position[concept], STYLES.index(style)] = True
        self.shipped = torch.tensor([self.position[concept] for concept in self.words])

    def weights(self) -> Tensor:
        """How often each pair is drawn (C * S,): zero held out, more for shipped concepts."""
        weights = torch.ones(self.heldout.shape)
        weights[self.shipped] = SHIPPED_WEIGHT
        weights[self.heldout] = 0
        return weights.flatten()

    def draw(
        self,
        rows: Tensor,
        background: Tensor,
        how: Augmentation,
        generator: torch.Generator,
        edge: int = SIZE,
    ) -> Tensor:
        """Augmented pictures (B, 3, edge, edge) in [-1, 1] over backgrounds.

        Arguments:
            rows: int64 (B,), which drawings; concept * S + style for those of the four styles.
            background: colours in [0, 1], (B, 3, 1, 1) or (B, 3, edge, edge).
        """
        rgba = self.rgba[rows].float() / 255
        theta = affine(self.mirrored[rows], how, generator)
        grid = F.affine_grid(theta, [len(rows), 4, edge, edge], False)
        rgba = F.grid_sample(rgba, grid, align_corners=False)
        colour = recolour(rgba[:, :3], rgba[:, 3:], how.colour, generator)
        images = colour + (1 - rgba[:, 3:]) * background
        if how.erase:
            images = erase(images, how, generator)
        return degrade(images, how, generator).clamp(0, 1) * 2 - 1

    def plain(self, rows: Tensor, colours: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1] as the data set holds them, over palette colours."""
        rgba = self.rgba[rows].float() / 255
        return (rgba[:, :3] + (1 - rgba[:, 3:]) * PALETTE[colours][..., None, None]) * 2 - 1


class Drawings(Pictures):
    """The pictures, then the further drawings of their concepts, which have no style (-1).

    Held out of training are the pairs of `Pictures`, one further drawing of each of
    `FURTHER_HELDOUT` concepts, the noto v1 drawing where the noto one is held out, and every
    further drawing that is a near-copy of a held-out one.
    """

    def __init__(self, emoji: Path) -> None:
        super().__init__(emoji)
        rows = read_json(emoji / "more.json")
        more = premultiplied(torch.from_numpy(np.load(emoji / "more.npy")))
        base = len(self.rgba)
        self.rgba = torch.cat([self.rgba, more])
        further = torch.tensor([self.position[row["concept"]] for row in rows])
        self.concept = torch.cat([torch.arange(base) // len(STYLES), further])
        self.style = torch.cat([torch.arange(base) % len(STYLES), torch.full_like(further, -1)])
        sided = [is_sided(concept) for concept in self.concepts]
        self.mirrored = ~torch.tensor(sided)[self.concept]
        self.tested = torch.zeros(len(self.rgba), dtype=torch.bool)
        self.tested[:base] = self.heldout.flatten()
        self.tested[base + torch.tensor(further_heldout(rows))] = True
        self.left_out = self.tested.clone()
        v1 = torch.tensor([row["set"] == "noto v1" for row in rows])
        self.left_out[base:] |= v1 & self.heldout[further, STYLES.index("noto")]
        self.nearest = self._leave_out_near_copies()

    def _leave_out_near_copies(self) -> Tensor:
        """Distance (H,) of each tested drawing to the nearest trained one of its concept."""
        nearest = []
        for row in self.tested.nonzero()[:, 0].tolist():
            same = ((self.concept == self.concept[row]) & ~self.left_out).nonzero()[:, 0]
            apart = distance(self.rgba[row], self.rgba[same])
            copy = (self.style[same] < 0) & (apart < NEAR)
            self.left_out[same[copy]] = True
            nearest.append(apart[~copy].min())
        return torch.stack(nearest)

    def concept_weights(self, further: bool) -> Tensor:
        """How often each drawing is drawn (N,); shipped concepts `SHIPPED_WEIGHT` times as often.

        Arguments:
            further: draw the further drawings too, all of a concept's as often as another's.
        """
        if not further:
            return F.pad(self.weights(), (0, len(self.rgba) - self.heldout.numel()))
        each = (~self.left_out).float()
        total = torch.zeros(len(self.concepts)).index_add(0, self.concept, each)
        weight = torch.ones(len(self.concepts))
        weight[self.shipped] = SHIPPED_WEIGHT
        return each * (weight / total)[self.concept]


def premultiplied(rgba: Tensor) -> Tensor:
    """uint8 (N, H, W, 4) of straight alpha -> uint8 (N, 4, H, W) of premultiplied alpha."""
    alpha = rgba[..., 3:].float() / 255
    parts = torch.cat([(rgba[..., :3] * alpha).round(), rgba[..., 3:].float()], -1)
    return parts.to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def distance(first: Tensor, others: Tensor) -> Tensor:
    """Root mean square difference (N,) of pictures in [0, 1] on white; uint8 premultiplied.

    The two fluent drawings of a concept are 0.113 apart in the median; of other two styles 0.25,
    and 0.12 or less in one case of fifty.
    """
    on_white = [
        x.float()[..., :3, :, :] / 255 + 1 - x.float()[..., 3:, :, :] / 255 for x in (first, others)
    ]
    return (on_white[0] - on_white[1]).square().mean((-1, -2, -3)).sqrt()


def is_sided(concept: dict[str, Any]) -> bool:
    """Whether a mirrored drawing would show something else, as for arrows, letters, clocks."""
    return concept["group"] == "Symbols" or SIDED.search(concept["name"]) is not None


def further_heldout(rows: list[dict[str, Any]]) -> list[int]:
    """Indices of one drawing of each of `FURTHER_HELDOUT` concepts, both chosen by hashes."""
    order = sorted(
        range(len(rows)), key=lambda i: stable_fraction(f"{rows[i]['concept']} {rows[i]['set']}")
    )
    first = {rows[i]["concept"]: i for i in reversed(order)}
    chosen = sorted(first, key=lambda concept: stable_fraction(f"test {concept}"))
    return [first[concept] for concept in chosen[:FURTHER_HELDOUT]]
