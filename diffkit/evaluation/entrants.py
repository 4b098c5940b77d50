"""The sets of an evaluation before they are drawn: what each will show, and how two are paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.evaluation.compare import Pairing
from diffkit.evaluation.pictures import PictureSet
from diffkit.evaluation.plan import PromptPlan, recipes
from diffkit.evaluation.request import EvaluationRequest, Side
from diffkit.generation.engine import DTYPES
from diffkit.generation.plan import open_model
from diffkit.generation.recipe import Recipe
from diffkit.generation.run import picture_name

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["PAIRING_NOTES", "Entrant", "common_size", "names_of", "open_entrants", "pair"]

PAIRING_NOTES: Mapping[Pairing, str] = {
    "noises": "paired: the same prompts and noises",
    "names": "paired: pictures of equal names",
    "prompts": "paired by prompt: the noises differ",
    "none": "unpaired: the sets do not answer the same requests",
}


@dataclass(frozen=True)
class Entrant:
    """One set: a loaded model with the recipes of its pictures, or a folder's pictures.

    Attributes:
        prompts: one a picture, "" where there is none.
        names: file names, one a picture.
        sizes: int (n, 2), height and width.
        latent: shape of the starting noise; None for a folder.
    """

    side: Side
    prompts: tuple[str, ...]
    names: tuple[str, ...]
    sizes: npt.NDArray[np.int32]
    model: LatentDiffusion | None = None
    recipes: tuple[Recipe, ...] = ()
    latent: tuple[int, ...] | None = None
    pictures: PictureSet | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def has_prompts(self) -> bool:
        """Whether every picture has a text."""
        return all(self.prompts)

    @property
    def groups(self) -> Tensor:
        """int64 (n,): pictures of one prompt share a number; without prompts each has its own."""
        if not self.has_prompts:
            return torch.arange(len(self))
        numbers = {text: i for i, text in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([numbers[text] for text in self.prompts])

    def drawn(self, output: Path) -> PictureSet:
        """The pictures, once they are there.

        Raises `UserError` when pictures of other runs lie among them.
        """
        if self.pictures is not None:
            return self.pictures
        found = PictureSet.open(output / self.side.name)
        if found.names != self.names:
            odd = sorted(set(found.names) ^ set(self.names))[0]
            raise UserError(
                f"{found.root / odd}: is no picture of this evaluation; move it away, or add "
                "--overwrite to begin anew."
            )
        return found

    def facts(self, name: str) -> dict[str, Any]:
        """What the report says of the set."""
        if self.model is None:
            folder = str(Path(self.side.source).expanduser())
            return {
                "name": name,
                "kind": "pictures",
                **dict.fromkeys(("family", "steps", "guidance", "scheduler", "weights")),
                "loras": [],
                "folder": folder,
            }
        first = self.recipes[0]
        own = type(self.model.pipeline().scheduler).__name__
        return {
            "name": name,
            "kind": "model",
            "family": self.model.family.name,
            "steps": first.steps,
            "guidance": first.guidance,
            "scheduler": first.scheduler or own,
            "loras": [list(lora) for lora in first.loras],
            "weights": first.weights,
            "folder": self.side.name,
        }


def open_entrants(request: EvaluationRequest, prompts: PromptPlan) -> dict[str, Entrant]:
    """Load every model onto the CPU, once where both sets use the same, and plan its pictures.

    Raises `UserError` for what cannot be loaded, drawn or read.
    """
    found: dict[str, Entrant] = {}
    loaded: dict[object, LatentDiffusion] = {}
    for side in request.sides:
        if side.kind == "pictures":
            found[side.name] = _of_folder(side, request.num)
            continue
        key = (side.source, side.loras)
        if key not in loaded:
            loaded[key] = open_model(side.source, side.loras, DTYPES[request.dtype], "cpu")
        planned = recipes(side, request, prompts, loaded[key])
        found[side.name] = _of_model(side, loaded[key], planned)
    for entrant in found.values():
        if len(entrant) < 2:
            raise UserError(f"{entrant.side.source}: has one picture only; nothing can be said.")
    return found


def common_size(entrants: Mapping[str, Entrant]) -> tuple[int, int] | None:
    """(height, width) that all pictures of all sets share; None when they differ."""
    distinct = np.unique(np.concatenate([entrant.sizes for entrant in entrants.values()]), axis=0)
    return (int(distinct[0, 0]), int(distinct[0, 1])) if len(distinct) == 1 else None


def _of_folder(side: Side, num: int | None) -> Entrant:
    pictures = PictureSet.open(Path(side.source).expanduser(), num=num)
    prompts = pictures.prompts if pictures.has_prompts else ("",) * len(pictures)
    return Entrant(side, prompts, pictures.names, pictures.sizes, pictures=pictures)


def _of_model(side: Side, model: LatentDiffusion, planned: Sequence[Recipe]) -> Entrant:
    first = planned[0]
    sizes = np.tile(np.array([first.height, first.width], np.int32), (len(planned), 1))
    return Entrant(
        side,
        tuple(recipe.prompt for recipe in planned),
        tuple(picture_name(recipe.index) for recipe in planned),
        sizes,
        model=model,
        recipes=tuple(planned),
        latent=tuple(model.latent_shape(first.height, first.width)),
    )


def pair(entrants: Mapping[str, Entrant]) -> tuple[Pairing, str]:
    """How two sets belong together, and why their pictures cannot be laid over each other or ""."""
    if len(entrants) < 2:
        return "none", "there is no second set to pair the pictures with; give --against"
    a, b = entrants.values()
    pairing = _pairing(a, b)
    if pairing in ("none", "prompts"):
        return pairing, "the sets have no pictures that start from the same noise"
    if not np.array_equal(a.sizes, b.sizes):
        return pairing, "the pictures of the two sets differ in size"
    return pairing, ""


def _pairing(a: Entrant, b: Entrant) -> Pairing:
    if a.prompts != b.prompts:
        return "none"
    if a.latent is not None and b.latent is not None:
        return "noises" if a.latent == b.latent else "prompts"
    if a.names == b.names:
        return "names"
    return "prompts" if a.has_prompts else "none"


def names_of(entrants: Mapping[str, Entrant]) -> dict[str, str]:
    """What the report calls each set: its model's or folder's name, and what tells two apart."""
    names = {key: _base_name(entrant.side.source) for key, entrant in entrants.items()}
    if len(set(names.values())) == len(names):
        return names
    told = {key: entrant.facts("") for key, entrant in entrants.items()}
    first, second = told.values()
    odd = [key for key in ("steps", "guidance", "scheduler", "loras") if first[key] != second[key]]
    if not odd:
        return {"model": names["model"], "against": f"{names['against']} (again)"}
    return {
        key: f"{names[key]} ({', '.join(f'{what} {facts[what]}' for what in odd)})"
        for key, facts in told.items()
    }


def _base_name(source: str) -> str:
    path = Path(source)
    return path.resolve().name if path.exists() else source
