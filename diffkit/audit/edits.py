"""Threats that edit one picture at a time, and the measuring of what they make.

A threat knows how to make edits; `Measurer` makes those of every version of a picture and compares
them. A new threat is a dataclass with `EditThreat`'s members and a line in `threats.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffkit.audit.distances import DISTANCES, Ruler
from diffkit.audit.effects import DEFAULT_PROMPT, Measured, compare
from diffkit.audit.inpaint import Inpainter, inpaint_versions
from diffkit.audit.measures import CLEAN, Values, stacked
from diffkit.audit.purifiers.base import Purifier
from diffkit.audit.sdedit import Edit, Editor
from diffkit.audit.subjects import Subject, Version, sdedit_versions
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = [
    "DEFAULT_PROMPT",
    "EditThreat",
    "Edited",
    "InpaintThreat",
    "Measurer",
    "SdeditThreat",
    "gather",
    "purified_versions",
]


@dataclass(frozen=True)
class Edited:
    """Edits of one picture's versions.

    Attributes:
        edits: version -> what is measured of each view, (K, 3, h, w) uint8.
        originals: the clean picture at the same places, (1, 3, h, w) float in [-1, 1].
        shown: version -> the first view whole, (K, 3, h, w) uint8.
    """

    edits: dict[str, list[Tensor]]
    originals: list[Tensor]
    shown: dict[str, Tensor]


class EditThreat(Protocol):
    """What an editor does to a picture.

    Attributes:
        name: as the command line has it.
        setting: as a table calls it.
        honest: True for a row that shows where a protection cannot work.
    """

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> str: ...

    @property
    def honest(self) -> bool: ...

    @property
    def parameters(self) -> dict[str, Any]:
        """Every number that decides the edits."""

    def refusal(self, model: LatentDiffusion) -> str | None:
        """Why this model cannot be used so, None where it can."""

    def editor(self, model: LatentDiffusion, prompt: str) -> Any:
        """What `make` edits with; kept for all pictures of one prompt."""

    def make(
        self,
        editor: Any,
        subject: Subject,
        versions: Mapping[str, Version],
        seeds: Sequence[int],
        batch_size: int,
        mask: Tensor | None,
    ) -> Edited:
        """Edits of every version, the same noises for all."""


@dataclass(frozen=True)
class SdeditThreat:
    """SDEdit: the picture is noised part of the way and denoised."""

    edit: Edit
    name: str = "sdedit"
    honest: bool = False

    @property
    def setting(self) -> str:
        """Strength, and steps and guidance where they are unusual."""
        return self.edit.name

    @property
    def parameters(self) -> dict[str, Any]:
        """Of `Edit`."""
        edit = self.edit
        return {"strength": edit.strength, "steps": edit.steps, "guidance": edit.guidance}

    def refusal(self, model: LatentDiffusion) -> str | None:
        """The denoiser must take latents and nothing else; guidance needs a model that has it."""
        if model.denoiser.geometry.channels != model.codec.channels:
            return (
                "its denoiser takes a mask or a further picture beside the latents, as inpainting "
                "models do, and SDEdit has none; use --threats inpaint with --mask"
            )
        if self.edit.guidance != 1 and "cfg" not in model.family.capabilities:
            return f"{model.family.name} models have no classifier-free guidance"
        return None

    def editor(self, model: LatentDiffusion, prompt: str) -> Editor:
        """An `Editor`."""
        return Editor(model, prompt)

    def make(
        self,
        editor: Any,
        subject: Subject,
        versions: Mapping[str, Version],
        seeds: Sequence[int],
        batch_size: int,
        mask: Tensor | None,
    ) -> Edited:
        """See `sdedit_versions`."""
        made = sdedit_versions(editor, self.edit, subject, versions, seeds, batch_size)
        return Edited(made, subject.clean, {name: views[0] for name, views in made.items()})


@dataclass(frozen=True)
class InpaintThreat:
    """Inpainting from pure noise; measured in the box around the painted region."""

    steps: int = 100
    guidance: float = 7.5
    name: str = "inpaint"
    honest: bool = False

    @property
    def setting(self) -> str:
        """Steps and guidance."""
        return f"{self.steps} steps, guidance {self.guidance:g}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the sampler."""
        return {"steps": self.steps, "guidance": self.guidance, "strength": 1.0}

    def refusal(self, model: LatentDiffusion) -> str | None:
        """Every model can."""
        return None

    def editor(self, model: LatentDiffusion, prompt: str) -> Inpainter:
        """An `Inpainter`."""
        return Inpainter(model, prompt)

    def make(
        self,
        editor: Any,
        subject: Subject,
        versions: Mapping[str, Version],
        seeds: Sequence[int],
        batch_size: int,
        mask: Tensor | None,
    ) -> Edited:
        """See `inpaint_versions`; `mask` (1, H, W) is needed."""
        assert mask is not None
        how = self.steps, self.guidance, batch_size
        made, regions = inpaint_versions(editor, subject, mask, versions, seeds, *how)
        cut = {
            name: [region.cut(part) for region, part in zip(regions.values(), parts, strict=True)]
            for name, parts in made.items()
        }
        originals = [region.cut(subject.clean[view]) for view, region in regions.items()]
        return Edited(cut, originals, {name: parts[0] for name, parts in made.items()})


class Measurer:
    """Edits the versions of pictures with one model, and measures the edits.

    Editors are kept by threat and prompt, so that the prompt is encoded once.
    """

    def __init__(self, model: LatentDiffusion, ruler: Ruler, batch_size: int = 8) -> None:
        self.model = model
        self.ruler = ruler
        self.batch_size = batch_size
        self._editors: dict[tuple[str, str], Any] = {}

    def __call__(
        self,
        threat: EditThreat,
        subject: Subject,
        versions: Mapping[str, Version],
        seeds: Sequence[int],
        prompt: str,
        mask: Tensor | None = None,
    ) -> Result:
        """Everything measured of one picture, "clean" among the versions."""
        key = threat.name, prompt
        if key not in self._editors:
            self._editors[key] = threat.editor(self.model, prompt)
        made = threat.make(self._editors[key], subject, versions, seeds, self.batch_size, mask)
        measured = compare(made.edits, made.originals, self.ruler, prompt)
        return Result(measured, {name: edits[0] for name, edits in made.shown.items()})

    def purified(
        self,
        threat: EditThreat,
        subject: Subject,
        versions: Mapping[str, Tensor],
        seeds: Sequence[int],
        prompt: str,
        purifier: Purifier,
        mask: Tensor | None = None,
    ) -> Result:
        """The same of every version behind a purifier, compared with the purified clean one."""
        behind = purified_versions(purifier, versions, seeds)
        return self(threat, subject, behind, seeds, prompt, mask)


@dataclass(frozen=True)
class Result:
    """One picture under one threat: what was measured of each version, and its first edit."""

    measured: dict[str, Measured]
    shown: dict[str, Tensor]

    def values(self) -> dict[str, Values]:
        """As `gather` has it, of this picture alone."""
        return gather([self.measured])


def gather(rows: Sequence[Mapping[str, Measured]]) -> dict[str, Values]:
    """Numbers by name, (seeds, pictures), of several pictures under one threat.

    Distances and scores that not every picture has (MS-SSIM of small ones) are left out.
    """
    found: dict[str, Values] = {}
    others = [name for name in rows[0] if name != CLEAN]
    clean = [row[CLEAN] for row in rows]
    for name in clean[0].vs_original:
        if not all(name in row.vs_original for row in clean):
            continue
        found[name] = Values(
            {v: stacked([row[v].effect[name] for row in rows]) for v in others},
            {v: stacked([row[v].vs_original[name] for row in rows]) for v in rows[0]},
            DISTANCES[name].information,
        )
    for name in clean[0].scores:
        if not all(name in row.scores for row in clean):
            continue
        scores = {v: stacked([row[v].scores[name] for row in rows]) for v in rows[0]}
        effect = {v: scores[v] - scores[CLEAN] for v in others}
        found[name] = Values(effect, scores, score=True)
    return found


def purified_versions(
    purifier: Purifier, versions: Mapping[str, Tensor], seeds: Sequence[int]
) -> dict[str, Version]:
    """Every version behind a purifier; a random one draws anew for each seed, alike for all.

    Arguments:
        versions: name -> (3, H, W) uint8.
    """
    found: dict[str, Version] = {}
    for name, pixels in versions.items():
        if purifier.deterministic:
            found[name] = purifier(pixels, 0)
        else:
            found[name] = [purifier(pixels, seed) for seed in seeds]
    return found


def purifying_cost(
    ruler: Ruler, subject: Subject, purified: Version, seeds: Sequence[int]
) -> dict[str, Tensor]:
    """d(P(x), x) (K,) by distance, both in the model's working views: the quality it costs."""
    pictures = [purified] if isinstance(purified, Tensor) else list(purified)
    rows = []
    for pixels in pictures:
        parts = [
            ruler.distances(ruler.see_images(mine), ruler.see_images(clean))
            for mine, clean in zip(subject.working(pixels), subject.clean, strict=True)
        ]
        rows.append({name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]})
    return {name: torch.cat([row[name] for row in rows]).expand(len(seeds)) for name in rows[0]}
