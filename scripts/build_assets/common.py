"""What every script of this folder shares: styles, the background palette, and compositing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffkit.evaluation.metrics.captions import BACKGROUNDS

__all__ = ["BACKGROUNDS", "SIZE", "STYLES", "composite", "read_json", "stable_fraction"]

SIZE = 64
"""Edge of every picture, in pixels."""

STYLES = ("noto", "twemoji", "fluent flat", "fluent 3d")
"""Caption names of the four emoji sets, in the order of the style axis of `rgba.npy`."""


def composite(rgba: NDArray[np.uint8], rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Lay pictures over one opaque colour: `a c + (1 - a) b` in sRGB, rounded to nearest.

    Arguments:
        rgba: straight (not premultiplied) alpha pictures, shape (..., H, W, 4).
        rgb: the background colour b, each channel in 0..255.

    Returns:
        Opaque pictures, shape (..., H, W, 3).
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    colour = rgba[..., :3].astype(np.float32)
    mixed = alpha * colour + (1 - alpha) * np.asarray(rgb, dtype=np.float32)
    return np.rint(mixed).astype(np.uint8)


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, for splits that never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_json(path: Path) -> Any:
    """Parse one UTF-8 JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
