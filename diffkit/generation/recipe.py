"""What a picture was made from, carried inside its PNG file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from diffkit.errors import UserError
from diffkit.files import atomic_write

__all__ = ["RECIPE_KEY", "Recipe", "differing_keys", "read_recipe", "write_png"]

RECIPE_KEY = "diffkit"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides one picture's pixels.

    Attributes:
        version: of diffkit.
        model, loras: as given (absolute path, hub id or "embedded"); a LoRA is (path, weight).
        weights: a digest of the loaded weights, LoRAs included.
        prompt, negative: the texts; negative may be empty.
        steps, guidance, scheduler: the sampler; scheduler None is the model's own.
        width, height: pixels.
        index, seed: the picture's number in its run and its own seed (run seed + index).
        image, image_sha256, strength: the picture started from, its bytes, how much is redone.
        mask, mask_sha256: white where the picture is repainted.
        dtype, attention: the arithmetic.
    """

    version: str
    model: str
    weights: str
    loras: tuple[tuple[str, float], ...]
    prompt: str
    negative: str
    steps: int
    guidance: float
    scheduler: str | None
    width: int
    height: int
    index: int
    seed: int
    image: str | None
    image_sha256: str | None
    strength: float | None
    mask: str | None
    mask_sha256: str | None
    dtype: str
    attention: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read `to_json`'s line; raises `ValueError` when a key is missing or unknown."""
        values: dict[str, Any] = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise ValueError(f"written by diffkit {values.get('version', '?')}; differs in {odd}")
        values["loras"] = tuple((path, weight) for path, weight in values["loras"])
        return cls(**values)


# Moving a file or the model changes no pixel; digests of the contents stand for them.
_PLACES = {"model", "image", "mask", "version"}


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """The recipe keys that could make another picture, with both values; empty when none."""
    before, after = (_contents(recipe) for recipe in (old, new))
    return [
        f"{key} ({before[key]!r} there, {after[key]!r} now)"
        for key in before
        if before[key] != after[key]
    ]


def _contents(recipe: Recipe) -> dict[str, Any]:
    values = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in _PLACES}
    values["loras"] = tuple(weight for _, weight in recipe.loras)
    return values


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe inside a PNG, whose pixels are read too, so that a torn file is noticed.

    Raises:
        UserError: no such file, a torn or foreign picture, or a recipe of another version.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise UserError(f"{name}: no such file; a PNG made by diffkit generate is needed.")
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(RECIPE_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: is not a whole picture ({error}).") from error
    if not isinstance(text, str):
        raise UserError(f"{name}: carries no diffkit recipe; only diffkit generate's PNGs do.")
    try:
        return Recipe.from_json(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: its recipe cannot be read: {error}.") from error


def write_png(path: str | os.PathLike[str], image: Image.Image, recipe: Recipe) -> None:
    """Write the picture with its recipe as a PNG text chunk, atomically."""
    chunk = PngImagePlugin.PngInfo()
    # iTXt holds any script; tEXt is Latin-1 only.
    chunk.add_itxt(RECIPE_KEY, recipe.to_json())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunk)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
