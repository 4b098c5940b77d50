"""Pictures of every kind become the upright 8-bit RGB that a person sees."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffkit.data.images import BadImage, decode, read_header
from tests.data.pictures import encoded, noise


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data)[0]).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    """A picture stored in any of the eight orientations comes out as the upright one."""
    upright = noise(24, 40)
    stored = {
        1: lambda im: im,
        2: lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda im: im.transpose(Image.Transpose.ROTATE_180),
        4: lambda im: im.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda im: im.transpose(Image.Transpose.TRANSPOSE),
        6: lambda im: im.transpose(Image.Transpose.ROTATE_90),
        7: lambda im: im.transpose(Image.Transpose.TRANSVERSE),
        8: lambda im: im.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(stored, kind, exif=exif, **options)
    assert read_header(data) == (24, 40)
    image, size = decode(data)
    assert size == (24, 40)
    assert image.size == (40, 24)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 6


@pytest.mark.parametrize("block", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_picture(kind, block):
    data = encoded(noise(24, 40), kind, exif=block)
    assert read_header(data) == (24, 40) and decode(data)[1] == (24, 40)


def test_unknown_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 99
    data = encoded(noise(24, 40), "JPEG", exif=exif)
    assert read_header(data) == (24, 40) and decode(data)[1] == (24, 40)


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (4, 4), (200, 100, 0, 0))
    image.putpixel((0, 0), (200, 100, 0, 255))
    image.putpixel((1, 0), (200, 100, 0, 51))
    out = pixels(encoded(image))
    assert out[0, 0].tolist() == [200, 100, 0]
    assert out[0, 1].tolist() == [244, 224, 204]  # 255 + 0.2 (c - 255)
    assert out[1, 1].tolist() == [255, 255, 255]


def test_transparent_palette_and_grey():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    out = pixels(encoded(palette, "PNG", transparency=1))
    assert out[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encoded(grey))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind, value, expected):
    image = Image.fromarray(np.full((3, 3), value, dtype=np.uint16))
    assert (pixels(encoded(image, kind)) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes(mode):
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    assert pixels(encoded(white, kind)).min() >= 254


def test_cmyk_jpeg_keeps_its_colours():
    image = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    out = pixels(encoded(image, "JPEG", quality=98))
    assert np.abs(out - [200, 30, 60]).max() < 8


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_jpeg_is_decoded_smaller_but_never_below_twice_the_need():
    data = encoded(noise(800, 1600), "JPEG", quality=95)
    image, size = decode(data, at_least=(64, 100))
    assert size == (800, 1600)
    assert image.size == (400, 200)  # a quarter; an eighth would be below 128 rows
    full = decode(data)[0].resize((100, 64), Image.Resampling.LANCZOS)
    small = image.resize((100, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(full).astype(int) - np.asarray(small)).mean() < 1.5


def test_turned_jpeg_is_decoded_large_enough():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(1600, 400), "JPEG", exif=exif, quality=90)  # upright: 400 x 1600
    image, size = decode(data, at_least=(100, 400))
    assert size == (400, 1600)
    assert image.height >= 200 and image.width >= 800


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_file_has_a_header_but_no_pixels(kind):
    whole = encoded(noise(64, 64), kind)
    torn = whole[: len(whole) * 2 // 3]
    if kind != "WEBP":
        assert read_header(torn) == (64, 64)
    with pytest.raises(BadImage):
        decode(torn)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_garbage_is_refused_from_its_header(data):
    with pytest.raises(BadImage):
        read_header(data)


def test_reasons_are_plain(tmp_path):
    with pytest.raises(BadImage, match="does not exist"):
        read_header(tmp_path / "none.png")
    with pytest.raises(BadImage, match="0 bytes"):
        read_header(b"")
    with pytest.raises(BadImage, match="not a picture in a known format"):
        read_header(b"hello")


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_header(encoded(noise(64, 64)))


def test_float_pixels_are_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(buffer, "TIFF")
    with pytest.raises(BadImage, match="floating-point"):
        decode(buffer.getvalue())
