"""One picture of many pictures, each above its prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet", "wrap"]

_CELL = 160  # pixels: the least width of a column, so that a caption line holds a few words
_LARGEST = 256  # larger pictures are scaled down to this
_GAP = 8
_FONT_SIZE = 12
_LINES = 4


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Lay pictures out in rows, captions wrapped to the column's width below each.

    Args:
        pictures: at least one, RGB; each is scaled to a common column width.
        captions: one a picture; what does not fit in four lines ends in an ellipsis.
        columns: pictures a row; default the square root of their number, at most 8.
    """
    columns = columns or min(8, math.ceil(math.sqrt(len(pictures))))
    columns = min(columns, len(pictures))
    font = ImageFont.load_default(_FONT_SIZE)
    thumbs = [_thumbnail(picture) for picture in pictures]
    width = max(_CELL, *(thumb.width for thumb in thumbs)) if thumbs else _CELL
    texts = ["\n".join(wrap(caption, width, font)) for caption in captions]
    rows = [slice(i, i + columns) for i in range(0, len(thumbs), columns)]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heights = [
        (
            max(thumb.height for thumb in thumbs[row]),
            max(_height(draw, text, font) for text in texts[row]),
        )
        for row in rows
    ]
    total = sum(picture + text + 2 * _GAP for picture, text in heights)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, total + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for row, (picture_height, text_height) in zip(rows, heights, strict=True):
        for column, (thumb, text) in enumerate(zip(thumbs[row], texts[row], strict=True)):
            x = _GAP + column * (width + _GAP)
            sheet.paste(thumb, (x + (width - thumb.width) // 2, y))
            draw.multiline_text((x, y + picture_height + 2), text, fill="black", font=font)
        y += picture_height + text_height + 2 * _GAP
    return sheet


def wrap(text: str, width: int, font: Any, lines: int = _LINES) -> list[str]:
    """Break `text` into at most `lines` lines of at most `width` pixels in `font`."""
    wrapped = list(_lines(text, width, font))
    if len(wrapped) <= lines:
        return wrapped
    last = wrapped[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*wrapped[: lines - 1], last + "…"]


def _lines(text: str, width: int, font: Any) -> Iterator[str]:
    line = ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        while font.getlength(word) > width:  # one word wider than the column
            fits = max(n for n in range(1, len(word)) if font.getlength(word[:n]) <= width)
            yield word[:fits]
            word = word[fits:]
        line = word
    if line:
        yield line


def _height(draw: ImageDraw.ImageDraw, text: str, font: Any) -> int:
    return math.ceil(draw.multiline_textbbox((0, 0), text or " ", font=font)[3])


def _thumbnail(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if side > _LARGEST:
        scale = _LARGEST / side
    else:
        scale = max(1, _CELL // side)  # whole factors keep small pictures crisp
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
