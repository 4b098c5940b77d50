"""Pictures come back as they were, but for the pixels that were changed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

from diffkit.errors import RunFailed
from diffkit.protection.image_file import (
    Picture,
    Unreadable,
    _compare,
    encode_picture,
    open_picture,
    probe,
    read_picture,
    saved_format,
    write_picture,
)
from tests.protection.gallery import encoded, exif_block, noise

ICC = bytes(16) + b"RGB " + bytes(range(108))
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="1"/></x:xmpmeta>'
LOSSLESS: dict[str, dict[str, object]] = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {},
    "BMP": {},
}


def rgb(index: int = 0) -> Image.Image:
    return Image.fromarray(noise(index, 24, 3, wide=True))


def moved(picture: Picture, levels: int) -> torch.Tensor:
    return (picture.pixels.int() + levels).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_levels_alpha_size_and_channels_survive(tmp_path: Path, kind: str, mode: str) -> None:
    values = torch.from_numpy(noise(3, 24, 4, wide=True)).permute(2, 0, 1)
    values[3, :8] = 0  # transparent, with colours of their own
    source = values if mode in ("RGBA", "LA") else values[:3]
    image = Image.fromarray(source.permute(1, 2, 0).contiguous().numpy())
    if mode in ("L", "LA"):
        image = Image.merge(mode, [image.getchannel(place) for place in (0, 3)[: len(mode)]])
    if kind == "BMP" and "A" in mode:
        plain = read_picture(encoded(rgb(), "BMP"))
        channels = Picture(values[:3], values[3:], "BMP", True, plain.metadata, (), "")
        data = encode_picture(channels, values[:3]).data
    else:
        data = encoded(image, kind, **LOSSLESS[kind])
    path = tmp_path / "in put.v1"
    path.write_bytes(data)
    picture = open_picture(path)
    grey = mode in ("L", "LA") and kind in ("PNG", "TIFF")
    grey |= mode == "L" and kind == "BMP"
    assert picture.pixels.shape == (1 if grey else 3, 24, 36)
    assert (picture.alpha is not None) == ("A" in mode)
    assert (picture.format, picture.lossless, picture.notices) == (kind, True, ())
    assert torch.equal(picture.pixels[:1], values[:1])  # even below alpha 0
    wanted = moved(picture, 5)
    written = write_picture(tmp_path / "out", picture, wanted)
    again = open_picture(tmp_path / "out")
    assert torch.equal(again.pixels, wanted) and torch.equal(written.pixels, wanted)
    assert again.format == kind and again.digest == written.digest
    if picture.alpha is not None:
        assert again.alpha is not None
        assert torch.equal(again.alpha, values[3:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "WEBP lossy"])
def test_exif_profile_xmp_and_texts_survive(kind: str) -> None:
    options: dict[str, object] = {"exif": exif_block(), "icc_profile": ICC}
    kind, _, lossy = kind.partition(" ")
    texts = PngImagePlugin.PngInfo()
    if kind == "PNG":
        texts.add_text("Author", "Jörg")
        texts.add_itxt("Title", "猫", lang="ja", tkey="名")
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        texts.add(b"gAMA", (45455).to_bytes(4, "big"))
        options |= {"pnginfo": texts, "dpi": (300, 300)}
    elif kind == "JPEG":
        options |= {"xmp": XMP, "comment": "größe".encode(), "dpi": (300, 300)}
    else:
        options |= {"xmp": XMP, "lossless": not lossy}
    picture = read_picture(encoded(rgb(), kind, **options))
    data = encode_picture(picture, moved(picture, 1)).data
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == ("PNG" if kind == "JPEG" or lossy else kind)
        assert image.info["icc_profile"] == ICC
        assert image.getexif()[0x010E] == "diffkit tests"
        found = image.info["xmp"]
        assert (found.encode() if isinstance(found, str) else found) == XMP
        if kind != "WEBP":
            assert image.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
        if kind == "PNG":
            assert image.info["Author"] == "Jörg" and image.info["gamma"] == 0.45455
            assert (image.info["Title"], image.info["Title"].tkey) == ("猫", "名")
        if kind == "JPEG":
            assert image.info["Comment"] == "größe"


def test_tiff_tags_survive_and_lost_ones_are_named() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[270] = 2
    tags[270], tags[315], tags[700] = "größe".encode(), "me", XMP
    tags[282] = tags[283] = TiffImagePlugin.IFDRational(300)
    tags[34665] = {33434: TiffImagePlugin.IFDRational(1, 50), 36867: "2020:01:01 00:00:00"}
    tags[34853] = {1: "N"}
    tags.tagtype[65000] = 3
    tags[65000] = 7
    source = encoded(rgb(), "TIFF", tiffinfo=tags, icc_profile=ICC)
    picture = read_picture(source)
    assert picture.notices == ("TIFF tags not kept: 65000",)
    with Image.open(io.BytesIO(encode_picture(picture, moved(picture, 2)).data)) as image:
        found: Any = getattr(image, "tag_v2", None)
        assert found[270].encode("latin-1").decode() == "größe" and found[315] == "me"
        assert (found[700], found[34675], found[282]) == (XMP, ICC, 300)
        exif = image.getexif()
        assert exif.get_ifd(34665) == {33434: 0.02, 36867: "2020:01:01 00:00:00"}
        assert exif.get_ifd(34853) == {1: "N"}


def test_compressed_tiff_is_saved_without_and_says_so() -> None:
    picture = read_picture(encoded(rgb(), "TIFF", compression="tiff_lzw"))
    assert picture.notices == ("TIFF with tiff_lzw compression, saved without",)
    assert torch.equal(encode_picture(picture, picture.pixels).pixels, picture.pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_once(kind: str, orientation: int) -> None:
    image = rgb(orientation)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = orientation
    options: dict[str, object] = (
        {"tiffinfo": tags} if kind == "TIFF" else {"exif": exif_block(orientation)}
    )
    options |= {"lossless": True} if kind == "WEBP" else {}
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode().replace('"1"', f'"{orientation}"'))
    xmp = XMP.replace(b'"1"', f'"{orientation}"'.encode())
    tags[700] = xmp
    options |= {"pnginfo": texts} if kind == "PNG" else {"xmp": xmp}
    data = encoded(image, kind, **options)
    with Image.open(io.BytesIO(data)) as opened:
        plain = np.asarray(opened.convert("RGB") if kind != "TIFF" else image)
    # EXIF 2.32, table 6: where row 0 and column 0 of the stored picture belong
    upright = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: plain[::-1].transpose(1, 0, 2),
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: plain[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    picture = read_picture(data)
    assert np.array_equal(picture.pixels.permute(1, 2, 0).numpy(), upright)
    assert any("upright" in notice for notice in picture.notices) == (orientation > 1)
    result = encode_picture(picture, picture.pixels)
    assert torch.equal(read_picture(result.data).pixels, picture.pixels)
    with Image.open(io.BytesIO(result.data)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert 'Orientation="1"' in str(image.info["xmp"])


@pytest.mark.parametrize(
    ("source", "kind", "channels", "alpha", "notice"),
    [
        (rgb().quantize(8), "PNG", 3, False, "palette"),
        (rgb().convert("CMYK"), "JPEG", 3, False, "CMYK"),
        (rgb().convert("CMYK"), "TIFF", 3, False, "CMYK"),
        (rgb().convert("1"), "PNG", 1, False, "1 bit"),
        (rgb().convert("1"), "BMP", 1, False, "1 bit"),
        (Image.fromarray(noise(1, 9, 1)[..., 0].astype(np.uint16) * 257), "PNG", 1, False, "16"),
        (Image.fromarray(noise(1, 9, 1)[..., 0].astype(np.uint16) * 257), "TIFF", 1, False, "16"),
    ],
)
def test_other_pixels_become_eight_bits_with_a_notice(
    source: Image.Image, kind: str, channels: int, alpha: bool, notice: str
) -> None:
    picture = read_picture(encoded(source, kind))
    assert picture.pixels.shape[0] == channels and (picture.alpha is not None) == alpha
    assert any(notice in text for text in picture.notices)
    if source.mode == "I;16":
        assert torch.equal(picture.pixels[0], torch.from_numpy(noise(1, 9, 1)[..., 0]))
    result = encode_picture(picture, moved(picture, 3))
    assert torch.equal(read_picture(result.data).pixels, moved(picture, 3))


def test_transparent_palettes_and_colour_keys_get_an_alpha_channel() -> None:
    palette = rgb().quantize(8)
    key = encoded(rgb(), "PNG", transparency=tuple(noise(0, 24, 3, wide=True)[0, 0].tolist()))
    for data in (encoded(palette, "PNG", transparency=0), key):
        picture = read_picture(data)
        assert picture.alpha is not None and set(picture.alpha.unique().tolist()) == {0, 255}
        assert any("transparent" in text for text in picture.notices)
        again = read_picture(encode_picture(picture, moved(picture, 1)).data)
        assert again.alpha is not None and torch.equal(again.alpha, picture.alpha)


def test_profile_of_cmyk_goes_and_previews_go() -> None:
    data = encoded(rgb().convert("CMYK"), "JPEG", icc_profile=ICC)
    picture = read_picture(data)
    assert picture.metadata.icc is None and any("profile" in text for text in picture.notices)
    preview = encoded(rgb(), "JPEG")
    small = Image.Exif()
    small[0x010E] = "kept"
    block = bytearray(small.tobytes()[6:])
    link = 8 + 2 + 12 * int.from_bytes(block[8:10], "big")
    block[link : link + 4] = len(block).to_bytes(4, "big")
    start = len(block) + 2 + 24 + 4
    entries = b"".join(
        tag.to_bytes(2, "big") + b"\x00\x04" + (1).to_bytes(4, "big") + v.to_bytes(4, "big")
        for tag, v in ((0x0201, start), (0x0202, len(preview)))
    )
    block += b"\x00\x02" + entries + bytes(4) + preview
    picture = read_picture(encoded(rgb(), "JPEG", exif=b"Exif\x00\x00" + bytes(block)))
    assert any("preview" in text for text in picture.notices)
    kept = picture.metadata.exif
    assert kept is not None and len(kept) == len(block) and preview[:64] not in kept
    with Image.open(io.BytesIO(encode_picture(picture, picture.pixels).data)) as image:
        assert image.getexif()[0x010E] == "kept"


def test_damaged_exif_is_kept_as_it_is() -> None:
    for block in (b"II*\x00\x08\x00\x00\x00\xff\xff", b"garbage"):
        picture = read_picture(encoded(rgb(), "PNG", exif=b"Exif\x00\x00" + block))
        assert picture.metadata.exif == block
        encode_picture(picture, picture.pixels)


def test_lossy_files_become_png_and_jpeg_may_stay() -> None:
    jpeg = read_picture(encoded(rgb(), "JPEG", exif=exif_block(), icc_profile=ICC, xmp=XMP))
    webp = read_picture(encoded(rgb(), "WEBP"))
    assert not jpeg.lossless and not webp.lossless
    for picture in (jpeg, webp):
        result = encode_picture(picture, moved(picture, 2))
        assert result.data.startswith(b"\x89PNG") and "saved as PNG" in result.notices[-1]
    assert saved_format(webp, keep_jpeg=True) == "PNG"
    result = encode_picture(jpeg, moved(jpeg, 2), keep_jpeg=True)
    assert "more than the budget" in result.notices[-1]
    again = read_picture(result.data)
    assert again.format == "JPEG" and torch.equal(again.pixels, result.pixels)
    assert (again.pixels.int() - moved(jpeg, 2).int()).abs().float().mean() < 3
    assert again.metadata.icc == ICC and again.metadata.xmp == XMP
    with Image.open(io.BytesIO(result.data)) as image:
        layers: Any = getattr(image, "layer", ())
        assert [part[1:3] for part in layers] == [(1, 1)] * 3  # 4:4:4


def test_large_metadata_that_jpeg_cannot_hold_is_named() -> None:
    picture = read_picture(encoded(rgb(), "JPEG", xmp=XMP))
    large = picture.metadata.__class__(xmp=XMP + b" " * 70000)
    picture = Picture(picture.pixels, None, "JPEG", False, large, (), "")
    notices = encode_picture(picture, picture.pixels, keep_jpeg=True).notices
    assert any("XMP is too large" in text for text in notices)


def test_cameras_jpeg_with_a_preview_behind_it_is_a_jpeg() -> None:
    data = encoded(rgb(), "MPO", save_all=True, append_images=[rgb(1)])
    picture = read_picture(data)
    assert picture.format == "JPEG" and any("further" in text for text in picture.notices)


@pytest.mark.parametrize(
    ("data", "suffix", "reason"),
    [
        (b"", ".png", "empty"),
        (b"hello, world", ".png", "no picture"),
        (b"\x89PNG\r\n\x1a\n", ".png", "cut off"),
        (encoded(rgb(), "PNG")[:600], ".png", "cut off"),
        (encoded(rgb(), "JPEG")[:600], ".jpg", "cut off"),
        (encoded(rgb(), "WEBP")[:100], ".webp", "cut off"),
        (encoded(rgb(), "TIFF")[:900], ".tif", "cut off"),
        (encoded(rgb(), "BMP")[:900], ".bmp", "cut off"),
        (encoded(rgb(), "GIF"), ".png", "GIF"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(40), ".jpg", "AVIF"),
        (encoded(rgb(), "PNG", save_all=True, append_images=[rgb(1)]), "", "2 frames"),
        (encoded(rgb(), "WEBP", save_all=True, append_images=[rgb(1)]), "", "2 frames"),
        (encoded(rgb(), "TIFF", save_all=True, append_images=[rgb(1)]), ".tif", "2 pages"),
        (encoded(rgb(), "TIFF"), ".nef", "raw"),
        (encoded(Image.new("F", (3, 3)), "TIFF"), ".tif", "floating"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, suffix: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason) as caught:
        read_picture(data, suffix)
    assert "\n" not in caught.value.reason


def test_oversized_and_missing_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(encoded(rgb(), "PNG"))
    assert probe(path).format == "PNG"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (probe, open_picture):
        with pytest.raises(Unreadable, match="million pixels"):
            read(path)
        with pytest.raises(Unreadable, match="does not exist"):
            read(tmp_path / "none.png")


def test_one_pixel_is_a_picture() -> None:
    picture = read_picture(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))
    assert picture.pixels.flatten().tolist() == [1, 2, 3]
    assert torch.equal(encode_picture(picture, picture.pixels).pixels, picture.pixels)


def test_wrong_pixels_and_wrong_files_are_refused(tmp_path: Path) -> None:
    picture = read_picture(encoded(rgb(), "PNG"))
    with pytest.raises(ValueError, match="for"):
        encode_picture(picture, picture.pixels[:, 1:])
    with pytest.raises(ValueError, match="float"):
        encode_picture(picture, picture.pixels.float())
    with pytest.raises(RunFailed, match="some name"):
        _compare("some name", (picture.pixels, None), (moved(picture, 1), None))
