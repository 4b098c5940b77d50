"""Where training pictures come from: a folder here, or a data set on the hub."""

from __future__ import annotations

from pathlib import Path

from diffkit.data.folder import ImageFolder
from diffkit.data.records import ImageSource
from diffkit.errors import UserError

__all__ = ["open_source"]


def open_source(name: str) -> ImageSource:
    """The pictures called `name`; raises `UserError` when there are none."""
    path = Path(name)
    if path.exists():
        return ImageFolder(path)
    raise UserError(f"{name}: no such folder.")
