"""Picture sizes, and the input pictures of image-to-image and inpainting."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from diffkit.errors import UserError

__all__ = ["Size", "area_size", "check_size", "fit", "parse_size", "read_mask", "read_picture"]


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(text: str) -> Size:
    """`"512"` is 512x512, `"768x512"` is width x height. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if match is None or not int(match[1]) or (match[2] and not int(match[2])):
        raise UserError(f"--size {text}: give N or WxH in pixels, for example 512 or 768x512.")
    return Size(int(match[1]), int(match[2] or match[1]))


def check_size(size: Size, multiple: int, largest: int | None = None) -> None:
    """Refuse a size that is no multiple of `multiple` or has a side above `largest` pixels.

    Raises:
        UserError: naming the nearest sizes that would do.
    """
    if size.width % multiple or size.height % multiple:
        down, up = _rounded(size, multiple, math.floor), _rounded(size, multiple, math.ceil)
        nearest = " or ".join(dict.fromkeys(str(near) for near in (down, up)))
        raise UserError(
            f"--size {size}: width and height must be multiples of {multiple} for this model; "
            f"the nearest sizes are {nearest}."
        )
    if largest is not None and max(size) > largest:
        raise UserError(f"--size {size}: this model makes at most {largest} pixels a side.")


def _rounded(size: Size, multiple: int, rounding: object) -> Size:
    assert callable(rounding)
    return Size(*(max(multiple, rounding(side / multiple) * multiple) for side in size))


def area_size(picture: Size, area: int, multiple: int) -> Size:
    """The size with the aspect of `picture`, about `area` square pixels, in whole multiples."""
    scale = math.sqrt(area / (picture.width * picture.height))
    scaled = Size(round(picture.width * scale), round(picture.height * scale))
    return _rounded(scaled, multiple, round)


def read_picture(path: str | os.PathLike[str], option: str = "--image") -> Image.Image:
    """An RGB picture, upright, transparency laid on white.

    Raises:
        UserError: the file is missing, not a picture, or torn.
    """
    image = _read(path, option)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def read_mask(path: str | os.PathLike[str]) -> Image.Image:
    """A mask of two levels, 255 where the picture is to be repainted; raises like a picture."""
    grey = _read(path, "--mask").convert("L")
    return grey.point([0] * 128 + [255] * 128)


def _read(path: str | os.PathLike[str], option: str) -> Image.Image:
    name = os.fspath(path)
    if not Path(path).is_file():
        raise UserError(f"{option} {name}: no such file; a picture (PNG, JPEG, WebP) is needed.")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{option} {name}: is not a whole picture ({error}).") from error


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Scale to cover `size`, then crop the middle; a mask stays two-valued."""
    method = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, method)
