"""A model folder's own defaults for generation, in an optional `diffkit.json`.

The same file names the classes of a model that has any: see `diffkit.models.classes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.errors import UserError
from diffkit.files import read_json, write_json
from diffkit.models.classes import CARD_NAME, CLASS_KEYS, hub_file
from diffkit.models.loading import is_hub_id, resolve

if TYPE_CHECKING:
    from diffkit.models.families import Family
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["Card", "add_to_card", "is_student", "read_card"]


@dataclass(frozen=True)
class Card:
    """What a model is best used with.

    Attributes:
        guidance_scale: diffusers' convention; None leaves it to the model family.
        steps: of its own scheduler; None leaves them to the model family.
        example_prompts: captions that it can draw, for the demo page.
        distilled: it is a few-step student, which is nobody's teacher.
    """

    guidance_scale: float | None = None
    steps: int | None = None
    example_prompts: tuple[str, ...] = ()
    distilled: bool = False

    def guidance(self, usual: float) -> float:
        """The card's guidance scale, else `usual`, the model family's."""
        return usual if self.guidance_scale is None else self.guidance_scale

    def step_count(self, usual: int) -> int:
        """The card's number of steps, else `usual`, the model family's."""
        return usual if self.steps is None else self.steps

    def filled(self, family: Family) -> Card:
        """The same with the family's defaults where the card says nothing."""
        scale, steps = self.guidance(family.guidance_scale), self.step_count(family.steps)
        return replace(self, guidance_scale=scale, steps=steps)


def read_card(source: str, revision: str | None = None) -> Card:
    """The card of "embedded", a model folder or a hub id; the plain `Card()` where none is.

    Raises:
        UserError: the file is not JSON, has an unknown key, or the hub cannot be asked for it.
    """
    path: Path | None = Path(resolve(source)).expanduser() / CARD_NAME
    if is_hub_id(source):
        path = hub_file(source, CARD_NAME, revision)
    if path is None or not path.is_file():
        return Card()
    values = {k: v for k, v in read_json(path).items() if k not in CLASS_KEYS}
    known = [field.name for field in fields(Card)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}. Known: {', '.join(known)}.")
    values["example_prompts"] = tuple(values.get("example_prompts", ()))
    return Card(**values)


def is_student(model: LatentDiffusion) -> bool:
    """Whether a model was distilled to few steps: by its scheduler, or by its card where that is
    a stock one (one-step students of flows, and those that go from edge to edge by DDIM)."""
    card = read_card(model.source, model.revision) if model.source else Card()
    return model.schedule.consistency or card.distilled


def add_to_card(folder: Path, values: Mapping[str, Any]) -> None:
    """Write values into the card of a saved model; what else it says, such as names, stays."""
    path = folder / CARD_NAME
    kept: dict[str, Any] = read_json(path) if path.exists() else {}
    write_json(path, kept | dict(values))
