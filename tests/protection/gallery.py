"""A folder tree of small pictures of every kind that people have, broken ones among them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["Gallery", "encoded", "exif_block", "make_gallery", "noise"]


@dataclass
class Gallery:
    """`good`: pictures that can be protected; `bad`: others, with a part of the reason."""

    root: Path
    good: list[Path] = field(default_factory=list)
    bad: dict[Path, str] = field(default_factory=dict)


def noise(index: int, size: int, channels: int = 3, wide: bool = False) -> np.ndarray:
    """Smooth uint8 pixels (size, size or 3/2 size, channels), different for every index."""
    draw = np.random.default_rng(index)
    coarse = draw.integers(0, 256, (4, 4, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((size * 3 // 2 if wide else size, size))
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def exif_block(orientation: int = 1, text: str = "diffkit tests") -> bytes:
    """An EXIF block with an orientation and a description."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, text
    return exif.tobytes()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _rgb(index: int, size: int, wide: bool = False) -> Image.Image:
    return Image.fromarray(noise(index, size, 3, wide))


def _rgba(index: int, size: int) -> Image.Image:
    pixels = noise(index, size, 4)
    pixels[: size // 3, :, 3] = 0
    return Image.fromarray(pixels)


def _grey(index: int, size: int) -> Image.Image:
    return Image.fromarray(noise(index, size, 1)[..., 0])


def _grey_alpha(index: int, size: int) -> Image.Image:
    return Image.merge("LA", [_grey(index, size), _grey(index + 1, size)])


def _deep(index: int, size: int) -> Image.Image:
    return Image.fromarray(noise(index, size, 1)[..., 0].astype(np.uint16) * 257)


def _moving(index: int, size: int, kind: str) -> bytes:
    second = _rgb(index + 1, size)
    return encoded(_rgb(index, size), kind, save_all=True, append_images=[second])


Maker = Callable[[int, int], bytes]
# (name with {i}, bytes of picture i at a size, None or a part of the reason why it is refused)
_KINDS: tuple[tuple[str, Maker, str | None], ...] = (
    ("plain {i}.png", lambda i, s: encoded(_rgb(i, s), "PNG"), None),
    ("twin {j}.jpg", lambda i, s: encoded(_rgb(i, s), "JPEG", quality=92), None),
    ("twin {j}.png", lambda i, s: encoded(_rgb(i, s), "PNG"), None),
    ("version 1.2.{i}.PNG", lambda i, s: encoded(_rgb(i, s, wide=True), "PNG"), None),
    ("straße – 猫 {i}.webp", lambda i, s: encoded(_rgb(i, s), "WEBP", lossless=True), None),
    ("lossy_{i}.webp", lambda i, s: encoded(_rgb(i, s), "WEBP"), None),
    ("scan{i}.tif", lambda i, s: encoded(_rgb(i, s), "TIFF"), None),
    ("bitmap{i}.bmp", lambda i, s: encoded(_rgb(i, s), "BMP"), None),
    ("cut off {i}.png", lambda i, s: encoded(_rgb(i, s), "PNG")[: 40 + 4 * s], "cut off"),
    (
        "turned {i}.jpeg",
        lambda i, s: encoded(_rgb(i, s, wide=True), "JPEG", exif=exif_block(6)),
        None,
    ),
    ("grey{i}.png", lambda i, s: encoded(_grey(i, s), "PNG"), None),
    ("grey{i}.jpg", lambda i, s: encoded(_grey(i, s), "JPEG"), None),
    ("grey alpha{i}.png", lambda i, s: encoded(_grey_alpha(i, s), "PNG"), None),
    ("clear{i}.png", lambda i, s: encoded(_rgba(i, s), "PNG"), None),
    ("clear{i}.webp", lambda i, s: encoded(_rgba(i, s), "WEBP", lossless=True, exact=True), None),
    ("palette{i}.png", lambda i, s: encoded(_rgb(i, s).quantize(16), "PNG"), None),
    ("print{i}.jpg", lambda i, s: encoded(_rgb(i, s).convert("CMYK"), "JPEG"), None),
    ("deep{i}.png", lambda i, s: encoded(_deep(i, s), "PNG"), None),
    ("line art{i}.png", lambda i, s: encoded(_grey(i, s).convert("1"), "PNG"), None),
    ("dot{i}.png", lambda i, s: encoded(_rgb(i, 1), "PNG"), None),
    ("wrong ending {i}.png", lambda i, s: encoded(_rgb(i, s), "JPEG"), None),
    ("moving{i}.png", lambda i, s: _moving(i, s, "PNG"), "animation"),
    ("moving{i}.webp", lambda i, s: _moving(i, s, "WEBP"), "animation"),
    ("not what it says {i}.png", lambda i, s: _moving(i, s, "GIF"), "GIF"),
    ("pages{i}.tiff", lambda i, s: _moving(i, s, "TIFF"), "2 pages"),
    ("notes{i}.txt", lambda i, s: b"no picture at all", "no picture"),
    ("empty{i}.jpg", lambda i, s: b"", "empty"),
)


def make_gallery(folder: Path, n: int, size: int = 32) -> Gallery:
    """Write n files into `folder` and some folders below it; the same ones at every call.

    The kinds take turns, and every nine files the folder changes. Pictures are size x size, some
    half as wide again, some 1 x 1. Refused files are about a quarter.
    """
    gallery = Gallery(folder)
    for index in range(n):
        name, make, reason = _KINDS[index % len(_KINDS)]
        place = folder if index // 9 % 3 == 0 else folder / f"set {index // 9 % 3}" / "deep.er"
        place.mkdir(parents=True, exist_ok=True)
        path = place / name.format(i=index, j=index // len(_KINDS))
        path.write_bytes(make(index, size))
        if reason is None:
            gallery.good.append(path)
        else:
            gallery.bad[path] = reason
    return gallery
