"""Reading picture files: headers, and pixels as upright RGB."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffkit.data.records import Encoded, Size

__all__ = ["EXTENSIONS", "BadImage", "decode", "describe", "read_header", "to_rgb"]

EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of each EXIF orientation upright; 5 to 8 exchange height and width."""


class BadImage(Exception):
    """A picture that cannot be read; the text is the reason, without the picture's name."""


def read_header(encoded: Encoded) -> Size:
    """(height, width) of the upright picture, from the file's header alone.

    Raises `BadImage` for a missing, empty, unknown or oversized picture. A file that breaks off
    after its header is found only by `decode`.
    """
    with _open(encoded) as image:
        width, height = image.size
        return (width, height) if _orientation(image) > 4 else (height, width)


def decode(encoded: Encoded, at_least: Size | None = None) -> tuple[Image.Image, Size]:
    """The upright RGB picture and the (height, width) it has in storage.

    With `at_least`, a (height, width), a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, never
    smaller than twice `at_least`: several times faster, and after the final resize the same picture
    to within JPEG's own error. Transparency is laid over white, 16-bit grey is scaled to 8 bits,
    CMYK and palettes are converted; of an animation the first frame is taken. Raises `BadImage`.
    """
    with _open(encoded) as image:
        try:
            orientation = _orientation(image)
            width, height = image.size
            if at_least is not None and image.format == "JPEG":
                tall, wide = at_least if orientation <= 4 else at_least[::-1]
                image.draft(None, (2 * wide, 2 * tall))
            rgb = to_rgb(image)
        except Exception as error:  # Pillow's decoders raise a dozen types on broken files
            raise BadImage(describe(error)) from error
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb, ((height, width) if orientation <= 4 else (width, height))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB; transparency over white. Raises ValueError for float pixels."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range, not 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its 32-bit pixels do not fit the 16-bit range")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def describe(error: BaseException) -> str:
    """One short line on why a picture could not be read."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "the file may not be read (permission denied)"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    return " ".join(str(error).split()) or type(error).__name__


def _open(encoded: Encoded) -> Image.Image:
    try:
        if (len(encoded) if isinstance(encoded, bytes) else os.path.getsize(encoded)) == 0:
            raise ValueError("it is empty, 0 bytes")
        return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    except Exception as error:  # broken headers too
        raise BadImage(describe(error)) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, as far as the header tells; 1 when it is damaged.

    Pillow turns TIFF by itself. For a PNG whose EXIF block stands behind the pixels Pillow would
    decode the whole file; such a block is not looked for.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # as for broken pixels; the picture itself may be whole
        return 1
    return value if value in _UPRIGHT else 1
