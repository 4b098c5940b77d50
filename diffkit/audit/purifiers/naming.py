"""How a purifier's model is called in a report: never by a path of this machine."""

from __future__ import annotations

from pathlib import Path

__all__ = ["short_source"]


def short_source(source: str) -> str:
    """The last name of a path on this machine; a hub id or "embedded" as it is."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else source
