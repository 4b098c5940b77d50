"""The sheet's geometry and the wrapping of captions."""

from __future__ import annotations

from PIL import Image, ImageFont

from diffkit.generation.contact_sheet import contact_sheet, wrap

FONT = ImageFont.load_default(12)


def test_no_line_is_wider_than_its_column_and_no_word_is_lost() -> None:
    text = "a very long prompt about " + "x" * 90 + " and some more words after it"
    lines = wrap(text, 160, FONT, lines=99)
    assert all(FONT.getlength(line) <= 160 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_caption_that_does_not_fit_ends_in_an_ellipsis() -> None:
    lines = wrap("word " * 200, 160, FONT)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert FONT.getlength(lines[-1]) <= 160


def test_pictures_lie_in_rows_in_order_with_text_below() -> None:
    colours = ["red", "green", "blue"]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = contact_sheet(pictures, ["a red square", "", "blue"], columns=2)
    assert sheet.width == 2 * 160 + 3 * 8
    # 64 pixels are doubled and centred in a column of 160.
    assert sheet.getpixel((8 + 80, 8 + 64)) == (255, 0, 0)
    assert sheet.getpixel((8 + 168 + 80, 8 + 64)) == (0, 128, 0)
    below = sheet.crop((8, 8 + 128, 168, 8 + 128 + 20)).convert("L")
    assert below.getextrema()[0] < 100


def test_one_large_picture_is_scaled_down() -> None:
    sheet = contact_sheet([Image.new("RGB", (1024, 512))], ["wide"])
    assert sheet.width == 256 + 16
