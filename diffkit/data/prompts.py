"""Lists of prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffkit.data.metadata import read_table
from diffkit.errors import UserError

__all__ = ["read_prompts"]


def read_prompts(source: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """The prompts of a file, or of a list, in their order.

    A .txt file holds one prompt a line; empty lines and those that begin with # are left out. A
    .csv, .jsonl or .parquet file holds them in the column `prompt`. Raises `UserError` for a file
    that is missing or of another kind, has no such column, an entry that is no text, or no prompts.
    """
    if not isinstance(source, str | os.PathLike):
        return _checked(list(source), "the list of prompts")
    path = Path(source)
    if path.suffix.lower() != ".txt":
        return _checked([row.get("prompt") for row in read_table(path, ["prompt"])], str(path))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text.") from error
    texts = [line.strip() for line in lines]
    return _checked([text for text in texts if text and not text.startswith("#")], str(path))


def _checked(values: Sequence[object], place: str) -> list[str]:
    if not values:
        raise UserError(f"{place}: holds no prompts.")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place}: prompt {number} must be a text, not {value!r}.")
    return [str(value) for value in values]
