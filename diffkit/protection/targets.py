"""Target pictures: what a targeted attack pulls the picture towards.

High contrast and hard edges work best (Mist, Liang and Wu 2023), so the generated targets are
black and white without any grey: a word tiled densely in rows of bold capitals, or a checkerboard.
They are drawn at the size of the view that is compared with them; a picture file is resized to it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffkit.data.images import BadImage, decode, describe
from diffkit.errors import UserError

__all__ = ["COVERAGE", "check_target", "draw_target", "target_digest"]

COVERAGE = 0.25
"""White share of a target of text, as far as whole pixels allow: between 0.2 and 0.3."""

ROWS = 16
"""Cap heights, or squares of the checkerboard, along the short side of a view."""

SMALLEST = 6
"""Smallest cap height in pixels; below it letters are no longer letters."""

OVERSAMPLING = 4
"""Letters are drawn this much larger and thresholded, which Pillow's strokes need to be sharp."""

GENERATOR = "1"
"""To be raised when the generated pictures change."""

_PREFIX = "text:"
_CHECKER = "checker"


def draw_target(spec: str, height: int, width: int) -> Tensor:
    """The target at one size: float32 (1, 3, height, width) in [-1, 1], always the same one.

    Args:
        spec: "text:WORD" for bold capitals of cap height min(height, width)/16 (at least 6 pixels),
            every other row shifted by half a word, white on black, about a quarter white;
            "checker" for squares of that side; otherwise a picture file, resized (bicubic).
        height, width: sides in pixels.

    Raises:
        UserError: what `check_target` raises.
    """
    check_target(spec)
    if spec.startswith(_PREFIX):
        white = _tiled(_word_cell(_word(spec), _unit(height, width, SMALLEST)), height, width)
    elif spec == _CHECKER:
        side = _unit(height, width, 1)
        white = (np.arange(height)[:, None] // side + np.arange(width)[None, :] // side) % 2 == 1
    else:
        picture = decode(Path(spec))[0].resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return (pixels.to(torch.float32) / 127.5 - 1)[None]
    signed = torch.from_numpy(white.astype(np.float32)) * 2 - 1
    return signed.expand(1, 3, height, width).contiguous()


def check_target(spec: str) -> None:
    """Raise `UserError` for a target that cannot be drawn.

    That is a word without letters, or with a character that Pillow's built-in font lacks, a name
    that is neither a generator nor a file, or a file that is not a readable picture.
    """
    if spec.startswith(_PREFIX):
        _check_word(_word(spec))
    elif spec != _CHECKER:
        if not Path(spec).is_file():
            raise UserError(
                f"target {spec!r} is no file; a target is text:WORD, checker or a picture file."
            )
        try:
            decode(Path(spec))
        except BadImage as error:
            raise UserError(f"target {spec}: {error}.") from error


def target_digest(spec: str) -> str:
    """A hexadecimal key that changes whenever the drawn target does; a file counts by its bytes.

    Raises `UserError` if the file cannot be read.
    """
    if spec.startswith(_PREFIX) or spec == _CHECKER:
        shown = _PREFIX + _word(spec) if spec != _CHECKER else spec
        return hashlib.sha256(f"{GENERATOR}:{shown}".encode()).hexdigest()
    try:
        return hashlib.sha256(Path(spec).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"target {spec}: {describe(error)}.") from error


def _word(spec: str) -> str:
    return " ".join(spec.removeprefix(_PREFIX).split()).upper()


def _check_word(word: str) -> None:
    if not word:
        raise UserError("target text: has no word; write for example text:MIST.")
    font = _font(32)
    missing = bytes(font.getmask("\uffff"))
    for letter in word.replace(" ", ""):
        if bytes(font.getmask(letter)) == missing:
            raise UserError(
                f"target text:{word}: the built-in font has no {letter!r}; choose another word, "
                "or give a picture file."
            )


def _unit(height: int, width: int, smallest: int) -> int:
    return max(smallest, round(min(height, width) / ROWS))


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise UserError("target text: needs a Pillow with FreeType; give checker or a picture.")
    return font


def _letters(word: str, cap: int) -> NDArray[np.bool_]:
    """The word in bold capitals, True where it is white, without a margin.

    A capital H is `cap` pixels high; letters with a mark or a tail stand out of that.
    """
    large = cap * OVERSAMPLING
    stroke = max(1, round(large / 14))
    _, top, _, bottom = _font(1000).getbbox("H")
    font = _font((large - 2 * stroke) * 1000 / (bottom - top))
    # Letters are set one by one, so that the stroke widens the gaps too.
    places = [stroke + 0.0]
    for letter in word:
        places.append(places[-1] + font.getlength(letter) + 2 * stroke)
    canvas = Image.new("L", (math.ceil(places[-1]) + 2 * large, 4 * large))
    pen = ImageDraw.Draw(canvas)
    for letter, place in zip(word, places[:-1], strict=True):
        pen.text(
            (round(place) + stroke, 3 * large), letter, 255, font, anchor="ls", stroke_width=stroke
        )
    left, high, right, low = canvas.getbbox() or (0, 0, 1, 1)
    # The baseline decides where the grid of target pixels lies, so that caps fill whole rows.
    base = 3 * large + stroke
    high = base - math.ceil((base - high) / OVERSAMPLING) * OVERSAMPLING
    small = np.asarray(canvas.crop((left, high, right, low)).reduce(OVERSAMPLING)) >= 128
    return small[np.ix_(small.any(1), np.arange(small.shape[1]))]


def _word_cell(word: str, cap: int) -> NDArray[np.bool_]:
    """The word with the space around it that belongs to it, chosen for the coverage."""
    letters = _letters(word, cap)
    gap = max(2, round(0.6 * cap))
    ink = int(letters.sum())
    height, width = letters.shape
    width += gap
    pitch = max(height + 1, round(ink / (COVERAGE * width)))
    # A thin word such as "I" would need rows closer than its height: close the gap instead, and a
    # cell of even width shifts by exactly half.
    if ink / (pitch * width) < COVERAGE - 0.04:
        width = max(letters.shape[1] + 2, round(ink / (COVERAGE * pitch)))
    width += width % 2
    cell = np.zeros((pitch, width), dtype=bool)
    cell[:height, : letters.shape[1]] = letters
    return cell


def _tiled(cell: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Rows of cells over the whole picture, every other row shifted by half a cell."""
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    shift = rows // cell.shape[0] % 2 * (cell.shape[1] // 2)
    return cell[rows % cell.shape[0], (columns + shift) % cell.shape[1]]
