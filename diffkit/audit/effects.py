"""What a change of pictures does to edits of them: e_s = d(E_s(y), E_s(x)), the same noise s.

x is the clean picture, y another version of it, E_s an edit with the noise of seed s, d a distance.
Published tables give d(E_s(y), x) instead, which mixes in what the edit does to any picture; it is
kept beside the effect under its own name, `vs_original`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffkit.audit.distances import Ruler
from diffkit.audit.sdedit import Edit, Editor
from diffkit.audit.subjects import Subject, sdedit_versions
from diffkit.console import progress
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["DEFAULT_PROMPT", "Effects", "Measured", "compare", "sdedit_effects"]

DEFAULT_PROMPT = "a picture"


@dataclass(frozen=True)
class Measured:
    """One version of one picture under one edit; every value is (K,), one a seed.

    Attributes:
        effect: d(E_s(y), E_s(x)) by distance name.
        vs_original: d(E_s(y), x), x in its working view.
        scores: S(E_s(y)) by score name: "alignment", where there is a prompt.
    """

    effect: dict[str, Tensor]
    vs_original: dict[str, Tensor]
    scores: dict[str, Tensor] = field(default_factory=dict)


def compare(
    edits: Mapping[str, Sequence[Tensor]],
    originals: Sequence[Tensor],
    ruler: Ruler,
    prompt: str = "",
) -> dict[str, Measured]:
    """Distances of every version's edits from those of the version "clean", and from the original.

    Args:
        edits: version -> one (K, 3, h, w) uint8 a view, "clean" among them.
        originals: the clean picture in each view, (1, 3, h, w) float in [-1, 1].
        ruler: the distances.
        prompt: what the edits were asked to show; "" leaves the alignment with it out.

    Returns:
        version -> values (K,), the mean over the views. "clean" has no effect of its own.
    """
    totals: dict[str, tuple[list[dict[str, Tensor]], ...]] = {}
    for number, original in enumerate(originals):
        clean = ruler.see(edits["clean"][number])
        before = ruler.see_images(original.expand(len(clean), -1, -1, -1))
        for name, views in edits.items():
            seen = clean if name == "clean" else ruler.see(views[number])
            effects, distances, scores = totals.setdefault(name, ([], [], []))
            effects.append({} if name == "clean" else ruler.distances(seen, clean))
            distances.append(ruler.distances(seen, before))
            scores.append({"alignment": ruler.alignment(seen, prompt)} if prompt else {})
    return {name: Measured(*map(_mean, parts)) for name, parts in totals.items()}


def _mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]}


@dataclass(frozen=True)
class Effects:
    """The effect on every picture, strength and seed.

    Attributes:
        strengths, seeds: of the first and the last axis.
        effect: distance name -> (strengths, pictures, seeds) of d(E_s(y), E_s(x)).
        vs_original: the same of d(E_s(y), x).
        clean_vs_original: the same of d(E_s(x), x), to be read beside `vs_original`.
    """

    strengths: tuple[float, ...]
    seeds: tuple[int, ...]
    effect: dict[str, Tensor]
    vs_original: dict[str, Tensor]
    clean_vs_original: dict[str, Tensor]


def sdedit_effects(
    model: LatentDiffusion,
    clean: Sequence[Tensor],
    others: Mapping[str, Sequence[Tensor]],
    strengths: Sequence[float] = (0.3,),
    seeds: Sequence[int] = tuple(range(8)),
    prompt: str = DEFAULT_PROMPT,
    *,
    steps: int = 100,
    guidance: float = 1.0,
    ruler: Ruler | None = None,
    batch_size: int = 8,
) -> dict[str, Effects]:
    """Effects of several changes of the same pictures, such as a protection and random noise.

    Args:
        model: the editor.
        clean: n pictures (C, H, W) uint8, C 1 or 3, of any sizes.
        others: name -> n changed pictures, each of its clean one's size.
        strengths: of SDEdit, on a grid of `steps` (see `diffkit.audit.sdedit`).
        seeds: of the noises. Picture i of every version gets the same noise for a seed.
        prompt: what the editor asks for.
        guidance: scale of classifier-free guidance; 1 is none.
        ruler: the distances; by default those whose weights are here.
        batch_size: pictures at once.

    Returns:
        name -> `Effects`.
    """
    ruler = ruler or Ruler(model)
    editor = Editor(model, prompt)
    subjects = [Subject(pixels, model) for pixels in clean]
    edits = [Edit(strength, steps, guidance) for strength in strengths]
    jobs = [(edit, i) for edit in edits for i in range(len(subjects))]
    rows: list[dict[str, Measured]] = []
    for edit, i in progress(jobs, "editing"):
        versions = {"clean": clean[i], **{name: other[i] for name, other in others.items()}}
        made = sdedit_versions(editor, edit, subjects[i], versions, seeds, batch_size)
        rows.append(compare(made, subjects[i].clean, ruler))
    shape = (len(edits), len(subjects), len(seeds))

    def gather(name: str, field: str) -> dict[str, Tensor]:
        parts: list[dict[str, Tensor]] = [getattr(row[name], field) for row in rows]
        shared = [key for key in parts[0] if all(key in part for part in parts)]
        return {key: torch.stack([part[key] for part in parts]).reshape(shape) for key in shared}

    clean_distances = gather("clean", "vs_original")
    return {
        name: Effects(
            tuple(strengths),
            tuple(seeds),
            gather(name, "effect"),
            gather(name, "vs_original"),
            clean_distances,
        )
        for name in others
    }
