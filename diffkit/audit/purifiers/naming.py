"""How files and models of this machine are called in a report: never by their paths."""

from __future__ import annotations

import re
from pathlib import Path

from diffkit.protection.sidecar import without_folders

__all__ = ["public_text", "short_source"]

_BEHIND_COLON = re.compile(r":(?!//)~?/(?:[^,\s]*/)?")


def short_source(source: str) -> str:
    """The last name of a path on this machine; a hub id or "embedded" as it is."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else source


def public_text(text: str) -> str:
    """Text in which absolute paths have lost their folders, those behind a colon too:
    "sdedit0.2:/drive/mine/model" -> "sdedit0.2:model"."""
    return without_folders(_BEHIND_COLON.sub(":", text))
