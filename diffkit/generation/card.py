"""A model folder's own defaults for generation, in an optional `diffkit.json`.

The same file names the classes of a model that has any: see `diffkit.models.classes`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from diffkit.errors import UserError
from diffkit.files import read_json
from diffkit.models.classes import CARD_NAME, CLASS_KEYS
from diffkit.models.loading import resolve

__all__ = ["CARD_NAME", "Card", "read_card"]


@dataclass(frozen=True)
class Card:
    """What a model is best used with.

    Attributes:
        guidance_scale: diffusers' convention; None leaves it to the model family.
        steps: of its own scheduler.
        example_prompts: captions that it can draw, for the demo page.
    """

    guidance_scale: float | None = None
    steps: int = 25
    example_prompts: tuple[str, ...] = ()

    def guidance(self, usual: float) -> float:
        """The card's guidance scale, else `usual`, the model family's."""
        return usual if self.guidance_scale is None else self.guidance_scale


def read_card(source: str) -> Card:
    """The card in the model folder `source` (or "embedded"); the plain `Card()` where none is.

    Raises:
        UserError: the file is not JSON, or has an unknown key.
    """
    path = Path(resolve(source)) / CARD_NAME
    if not path.is_file():
        return Card()
    values = {k: v for k, v in read_json(path).items() if k not in CLASS_KEYS}
    known = [field.name for field in fields(Card)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}. Known: {', '.join(known)}.")
    values["example_prompts"] = tuple(values.get("example_prompts", ()))
    return Card(**values)
