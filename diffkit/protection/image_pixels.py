"""What a picture file is, by its content, and its pixels as 8-bit grey or RGB with alpha."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

__all__ = [
    "FORMATS",
    "Unreadable",
    "check_kind",
    "format_of",
    "in_words",
    "is_lossless",
    "note_origin",
    "opened",
    "refusals",
    "to_plain",
    "to_tensors",
]

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
}
"""The formats that are opened, with the endings of their names; the first is given to new names."""

_OTHERS = {b"GIF8": "a GIF picture", b"%PDF": "a PDF document", b"8BPS": "a Photoshop document"}
_RAW_CAMERA = 50706  # the tag that makes a TIFF file a DNG file
# Raw files are TIFF inside, with a preview where the picture should be.
_RAW_ENDINGS = frozenset((".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".iiq", ".kdc"))
_RAW_ENDINGS |= {".nef", ".nrw", ".pef", ".sr2", ".srw"}


class Unreadable(Exception):
    """A file that is not taken as a picture; the text is the reason, without the file's name."""

    @property
    def reason(self) -> str:
        """Why, in a few words."""
        return str(self)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn whatever reading a file raises into `Unreadable`."""
    try:
        yield
    except Unreadable:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise Unreadable(f"more than {limit} million pixels, make it smaller first") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        raise Unreadable(in_words(error)) from error


def in_words(error: BaseException) -> str:
    """Why a file could not be read or written, in one line."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "the file may not be read (permission denied)"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return f"damaged or cut off: {' '.join(str(error).split()) or type(error).__name__}"


@contextmanager
def opened(file: Any) -> Iterator[Image.Image]:
    """Open a binary file as one of `FORMATS`; raises `Unreadable` when it is another kind."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise Unreadable("it is empty, 0 bytes")
    with warnings.catch_warnings():
        # Pillow warns at half of its limit, and of harmless faults in metadata.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=list(FORMATS))
        except UnidentifiedImageError as error:
            raise Unreadable(_stranger(head)) from error
        with image:
            yield image


def _stranger(head: bytes) -> str:
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II*\x00", b"MM\x00*", b"BM")):
        return "damaged or cut off: its header cannot be read"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "damaged or cut off: its header cannot be read"
    what = _OTHERS.get(head[:4], "no picture")
    if head[4:8] == b"ftyp":
        what = "an AVIF, HEIC or video file"
    return f"{what}; PNG, JPEG, WebP, TIFF and BMP are opened"


def format_of(image: Image.Image) -> str:
    """The key of `FORMATS`."""
    # Cameras append previews to a JPEG file, which Pillow then calls MPO.
    return "JPEG" if image.format == "MPO" else str(image.format)


def check_kind(image: Image.Image, suffix: str) -> None:
    """Raise `Unreadable` for animations, pages, raw files and pixels of unknown meaning."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        pages = image.format == "TIFF"
        raise Unreadable(f"it has {frames} pages" if pages else f"an animation of {frames} frames")
    tags: Any = getattr(image, "tag_v2", {})
    if _RAW_CAMERA in tags or (image.format == "TIFF" and suffix in _RAW_ENDINGS):
        raise Unreadable("a camera's raw file; export it as a picture")
    if image.mode == "F":
        raise Unreadable("its pixels are floating-point numbers, not 8 or 16 bits")
    if image.mode in ("LAB", "HSV"):
        raise Unreadable(f"its colours are {image.mode}; save it as RGB")


def is_lossless(image: Image.Image, data: bytes) -> bool:
    """Whether the file keeps pixels exactly; `data`, its bytes, is read for WebP only."""
    if image.format == "WEBP":
        return b"VP8L" in _webp_chunks(data)
    return image.format not in ("JPEG", "MPO")


def _webp_chunks(data: bytes) -> list[bytes]:
    """Names of the chunks of a WebP file: "VP8L" is lossless, "VP8 " is lossy."""
    names, place = [], 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        names.append(name)
        place += 8 + size + size % 2
    return names


def _depth(image: Image.Image, data: bytes) -> int:
    """Bits of a channel in the file."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(258, (1,))
        return int(max(bits if isinstance(bits, tuple) else (bits,)))
    return 1 if image.mode == "1" else 8


def note_origin(image: Image.Image, data: bytes, notices: list[str]) -> None:
    """Say how the file's pixels differ from 8-bit grey or RGB."""
    depth, mode = _depth(image, data), image.mode
    if mode in ("P", "PA"):
        notices.append("palette picture, saved as full colour")
    elif mode in ("CMYK", "YCbCr"):
        notices.append(f"{mode} colours, converted to RGB")
    elif depth > 8:
        notices.append(f"{depth} bits a channel, saved with 8")
    elif depth < 8:
        notices.append(f"{depth} bit{'s' if depth > 1 else ''} a pixel, saved with 8")
    if image.format == "MPO":
        notices.append("further pictures inside the JPEG file are left out")
    packing = image.info.get("compression", "raw")
    if image.format == "TIFF" and packing != "raw":
        notices.append(f"TIFF with {packing} compression, saved without")


def to_plain(image: Image.Image, data: bytes, notices: list[str]) -> Image.Image:
    """The picture in mode L, LA, RGB or RGBA."""
    if image.mode.startswith("I"):
        if "transparency" in image.info:
            raise Unreadable("a 16-bit picture with a transparent colour; save it with 8 bits")
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("its 32-bit pixels do not fit the 16-bit range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info and image.mode in ("1", "L", "RGB", "P"):
        if _depth(image, data) > 8:
            raise Unreadable("a 16-bit picture with a transparent colour; save it with 8 bits")
        notices.append("a transparent colour, saved as an alpha channel")
        return image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode == "RGBA" and image.format == "PNG" and data[25] == 4:
        return image.convert("LA")  # 16-bit grey with alpha, which Pillow opens as RGBA
    straight = {"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
    kept = image.mode in ("L", "LA", "RGB", "RGBA")
    return image if kept else image.convert(straight.get(image.mode, "RGB"))


def to_tensors(image: Image.Image) -> tuple[Tensor, Tensor | None]:
    """uint8 (C, H, W) and alpha (1, H, W) of a picture in mode L, LA, RGB or RGBA."""
    values = np.array(image).reshape(image.height, image.width, -1)
    planes = torch.from_numpy(values).permute(2, 0, 1).contiguous()
    if image.mode in ("LA", "RGBA"):
        return planes[:-1].clone(), planes[-1:].clone()
    return planes, None
