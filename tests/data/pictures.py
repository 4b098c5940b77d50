"""Small picture folders made on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture: a magnified 4x4 noise, so that resizing keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def picture_folder(
    folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((48, 48),), captions: int = 1
) -> Path:
    """`count` PNGs of the (height, width) `sizes` in turn, with `captions` texts each, tabled."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        noise(height, width, number).save(folder / f"{number:03}.png")
        texts = [f"picture {number} text {k}" for k in range(captions)]
        rows.append({"file_name": f"{number:03}.png", "text": texts})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder
