"""Opening and saving pictures so that nothing but the protection changes.

A picture is read as upright 8-bit pixels with one or three channels and, apart from them, its
alpha. Colour and alpha are straight: the colour under a transparent pixel is kept. Lossless files
come back in their own format; JPEG and lossy WebP become PNG, because encoding them again would
change every pixel after it was protected.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from diffkit.errors import RunFailed
from diffkit.files import atomic_write
from diffkit.protection.image_metadata import (
    ORIENTATION,
    Metadata,
    for_jpeg,
    for_png,
    for_tiff,
    for_webp,
    read_metadata,
)
from diffkit.protection.image_pixels import (
    FORMATS,
    Unreadable,
    check_kind,
    format_of,
    in_words,
    is_lossless,
    note_origin,
    opened,
    refusals,
    to_plain,
    to_tensors,
)

__all__ = [
    "FORMATS",
    "JPEG_QUALITY",
    "Encoded",
    "Header",
    "Picture",
    "Unreadable",
    "encode_picture",
    "open_picture",
    "probe",
    "read_picture",
    "saved_format",
    "write_picture",
]

JPEG_QUALITY = 95

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Header:
    """What the start of a file tells.

    Attributes:
        format: a key of `FORMATS`.
        lossless: whether the file is.
        size: (height, width) in pixels, before it is turned upright.
    """

    format: str
    lossless: bool
    size: tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """A picture as it is protected.

    Attributes:
        pixels: uint8 (C, H, W), C 1 for greyscale and 3 for RGB, upright, straight colour.
        alpha: uint8 (1, H, W), or None for a picture without transparency.
        format: that of the file, a key of `FORMATS`.
        lossless: whether the file is; decides what the picture is saved as.
        metadata: what is kept beside the pixels.
        notices: what was changed on the way, in words.
        digest: hexadecimal SHA-256 of the file's bytes.
    """

    pixels: Tensor
    alpha: Tensor | None
    format: str
    lossless: bool
    metadata: Metadata
    notices: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Encoded:
    """A picture ready to be written.

    Attributes:
        data: the file's bytes.
        pixels: uint8 (C, H, W) as decoded from `data`; they differ from what was to be written only
            for JPEG.
        digest: hexadecimal SHA-256 of `data`.
        notices: those of the picture, and what the format could not hold.
    """

    data: bytes
    pixels: Tensor
    digest: str
    notices: tuple[str, ...]


def saved_format(header: Header | Picture, keep_jpeg: bool = False) -> str:
    """The format that a picture is saved in: its own when lossless, else PNG.

    With `keep_jpeg` a JPEG file stays one.
    """
    if header.lossless or (keep_jpeg and header.format == "JPEG"):
        return header.format
    return "PNG"


def probe(path: str | os.PathLike[str]) -> Header:
    """Format and losslessness by the file's content, without decoding its pixels.

    Raises `Unreadable` for what `open_picture` refuses, as far as the header tells.
    """
    suffix = Path(path).suffix.lower()
    with refusals(), open(path, "rb") as file, opened(file) as image:
        check_kind(image, suffix)
        file.seek(0)
        data = file.read() if image.format == "WEBP" else b""
        return Header(format_of(image), is_lossless(image, data), image.size[::-1])


def open_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a picture file; see `read_picture`. Raises `Unreadable`."""
    with refusals():
        data = Path(path).read_bytes()
    return read_picture(data, Path(path).suffix)


def read_picture(data: bytes, suffix: str = "") -> Picture:
    """Decode the bytes of a PNG, JPEG, WebP, TIFF or BMP file.

    16-bit grey becomes round(v / 257), 16-bit colour v // 256 (all that Pillow gives). Palettes,
    CMYK and YCbCr become RGB, one to four bits become eight; each with a notice.

    Arguments:
        data: the whole file.
        suffix: the ending of its name; only tells a TIFF file from a camera's raw file.

    Raises `Unreadable` for another kind of file, an animation, several pages, floating-point
    pixels, a damaged or cut-off file, and more than 178 million pixels.
    """
    notices: list[str] = []
    with refusals(), opened(io.BytesIO(data)) as image:
        check_kind(image, suffix.lower())
        # Pillow turns a TIFF picture while loading it, and forgets its tag.
        turned = int(getattr(image, "tag_v2", {}).get(ORIENTATION, 1))
        image.load()
        metadata, orientation = read_metadata(image, data, turned)
        if image.mode in ("CMYK", "LAB"):
            metadata = metadata.without_icc("its colour profile is for other colours, left out")
        note_origin(image, data, notices)
        kind, lossless = format_of(image), is_lossless(image, data)
        plain = to_plain(image, data, notices)
        if orientation in _TURNS:
            plain = plain.transpose(_TURNS[orientation])
        if orientation in _TURNS or turned in _TURNS:
            notices.append("turned upright as its EXIF orientation says")
        pixels, alpha = to_tensors(plain)
    notices.extend(metadata.notices)
    digest = hashlib.sha256(data).hexdigest()
    return Picture(pixels, alpha, kind, lossless, metadata, tuple(notices), digest)


def encode_picture(
    picture: Picture, pixels: Tensor, keep_jpeg: bool = False, name: str = "the picture"
) -> Encoded:
    """Encode new pixels with the alpha and metadata of `picture`, in `saved_format`.

    What is lossless is decoded again and compared. JPEG is written at quality 95 without colour
    subsampling; measure `Encoded.pixels`, not what was passed in.

    Arguments:
        pixels: uint8, of the shape of `picture.pixels`.
        name: what errors call the picture.

    Raises ValueError for another shape or type, `RunFailed` when the format cannot hold the picture
    or does not give back what was put in.
    """
    if pixels.shape != picture.pixels.shape or pixels.dtype != torch.uint8:
        raise ValueError(f"{tuple(pixels.shape)} {pixels.dtype} for {tuple(picture.pixels.shape)}")
    pixels = pixels.cpu()
    kind = saved_format(picture, keep_jpeg)
    notices = list(picture.notices)
    if kind != picture.format:
        old = "JPEG" if picture.format == "JPEG" else "lossy WebP"
        notices.append(f"saved as PNG, because saving {old} again would weaken the protection")
    elif kind == "JPEG":
        notices.append("saved as JPEG again: pixels may differ by more than the budget")
    try:
        data = _encode(kind, picture, pixels, notices)
        decoded, alpha = _decode(data)
    except (OSError, ValueError, RuntimeError, struct.error) as error:
        raise RunFailed(f"{name}: cannot be saved as {kind} ({in_words(error)}).") from error
    if kind != "JPEG":
        _compare(name, (pixels, picture.alpha), (decoded, alpha))
    digest = hashlib.sha256(data).hexdigest()
    return Encoded(data, decoded, digest, tuple(notices))


def write_picture(
    path: str | os.PathLike[str], picture: Picture, pixels: Tensor, keep_jpeg: bool = False
) -> Encoded:
    """`encode_picture`, then write the bytes to `path` atomically.

    Raises what `encode_picture` and `diffkit.files.atomic_write` raise.
    """
    encoded = encode_picture(picture, pixels, keep_jpeg, name=os.fspath(path))
    with atomic_write(path) as file:
        file.write(encoded.data)
    return encoded


def _array(pixels: Tensor, alpha: Tensor | None) -> npt.NDArray[np.uint8]:
    planes = pixels if alpha is None else torch.cat([pixels, alpha])
    values: npt.NDArray[np.uint8] = planes.permute(1, 2, 0).contiguous().numpy()
    return values[..., 0] if values.shape[-1] == 1 else values


def _image(pixels: Tensor, alpha: Tensor | None) -> Image.Image:
    if pixels.shape[0] == 1 and alpha is not None:
        bands = [Image.fromarray(_array(plane, None)) for plane in (pixels, alpha)]
        return Image.merge("LA", bands)
    return Image.fromarray(_array(pixels, alpha))


def _encode(kind: str, picture: Picture, pixels: Tensor, notices: list[str]) -> bytes:
    buffer, metadata = io.BytesIO(), picture.metadata
    if kind == "BMP" and picture.alpha is not None:
        return _bmp_with_alpha(pixels, picture.alpha, metadata)
    image = _image(pixels, picture.alpha)
    if kind == "PNG":
        image.save(buffer, "PNG", **for_png(metadata))
    elif kind == "WEBP":
        # Without `exact` the encoder changes the colour of transparent pixels.
        image.save(buffer, "WEBP", lossless=True, exact=True, **for_webp(metadata))
    elif kind == "TIFF":
        image.save(buffer, "TIFF", **for_tiff(metadata))
    elif kind == "BMP":
        image.save(buffer, "BMP", **({"dpi": metadata.dpi} if metadata.dpi else {}))
    else:
        options, lost = for_jpeg(metadata)
        notices.extend(lost)
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, **options)
    return buffer.getvalue()


def _bmp_with_alpha(pixels: Tensor, alpha: Tensor, metadata: Metadata) -> bytes:
    """A 32-bit bitmap with a version 4 header, whose masks name the alpha; Pillow writes none."""
    colour = pixels.expand(3, -1, -1).flip(0)
    rows = torch.cat([colour, alpha]).flip(1).permute(1, 2, 0).contiguous()
    body = rows.numpy().tobytes()
    height, width = pixels.shape[1:]
    across, down = (round(value / 0.0254) for value in metadata.dpi or (96.0, 96.0))
    head = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(body), across, down, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head += masks + b"BGRs" + bytes(48)  # sRGB; the end points are then not read
    return struct.pack("<2sIHHI", b"BM", 122 + len(body), 0, 0, 122) + head + body


def _decode(data: bytes) -> tuple[Tensor, Tensor | None]:
    with opened(io.BytesIO(data)) as image:
        image.load()
        return to_tensors(image)


def _compare(
    name: str,
    wanted: tuple[Tensor, Tensor | None],
    found: tuple[Tensor, Tensor | None],
) -> None:
    """Raise `RunFailed` unless the decoded picture is what was to be written."""
    opaque = torch.full_like(wanted[0][:1], 255)
    # WebP drops an alpha channel that is opaque everywhere.
    alphas = [opaque if alpha is None else alpha for alpha in (wanted[1], found[1])]
    if not (torch.equal(wanted[0], found[0]) and torch.equal(*alphas)):
        raise RunFailed(
            f"{name}: the saved picture does not decode to what was written. Nothing was kept of "
            "it; report this with the file."
        )
