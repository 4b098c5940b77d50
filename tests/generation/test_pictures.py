"""Sizes and input pictures: known answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffkit.errors import UserError
from diffkit.generation.pictures import (
    Size,
    area_size,
    check_size,
    fit,
    parse_size,
    read_mask,
    read_picture,
)


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("768x512", (768, 512)), ("40X80", (40, 80))]
)
def test_sizes_are_width_by_height(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "64x", "64x0", "-64", "6.4", "64*64", "a"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="N or WxH"):
        parse_size(text)


def test_a_size_that_is_not_divisible_names_the_nearest() -> None:
    check_size(Size(64, 72), 8)
    with pytest.raises(UserError, match="multiples of 8.*nearest sizes are 96x64 or 104x64"):
        check_size(Size(100, 64), 8)
    with pytest.raises(UserError, match="are 8x8"):
        check_size(Size(5, 8), 8)
    with pytest.raises(UserError, match="at most 64"):
        check_size(Size(72, 64), 8, largest=64)


def test_a_picture_keeps_its_aspect_at_the_models_area() -> None:
    assert area_size(Size(1500, 1000), 1024 * 1024, 8) == (1256, 832)
    assert area_size(Size(10, 1000), 64 * 64, 8) == (8, 640)


def test_transparency_is_laid_on_white_and_rotation_is_undone(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (2, 4)


def test_a_mask_has_two_levels_after_fitting_too(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    mask = fit(read_mask(tmp_path / "mask.png"), Size(33, 17))
    assert {level for _, level in mask.getcolors() or []} == {0, 255}


def test_a_torn_or_missing_picture_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
    torn = tmp_path / "torn.png"
    torn.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(UserError, match="torn.png: is not a whole picture"):
        read_picture(torn)
    with pytest.raises(UserError, match="absent.png: no such file"):
        read_picture(tmp_path / "absent.png")
