"""What a picture file carries beside its pixels, and how each format holds it.

EXIF blocks stay as they are, byte for byte, but for two places: the orientation becomes 1, since
the pixels are turned upright, and the embedded preview goes, since it is a small picture that
nothing protects. ICC profiles are kept unread; pixels are not colour-converted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, PngImagePlugin, TiffImagePlugin

__all__ = [
    "ORIENTATION",
    "Metadata",
    "for_jpeg",
    "for_png",
    "for_tiff",
    "for_webp",
    "read_metadata",
    "settle_exif",
]

ORIENTATION = 0x0112
_EXIF_HEAD = b"Exif\x00\x00"
_XMP_KEY = b"XML:com.adobe.xmp"
_MARKER = 65400
"""Bytes of metadata that one JPEG segment surely holds."""

_PNG_KEPT = frozenset((b"cHRM", b"cICP", b"gAMA", b"iTXt", b"sRGB", b"tEXt", b"tIME", b"zTXt"))
_EXIF_IFD, _GPS_IFD = 34665, 34853
_TIFF_TEXT = frozenset((269, 270, 271, 272, 285, 305, 306, 315, 316, 33432))
_TIFF_KEPT = _TIFF_TEXT | {282, 283, 296, 700, 33723}
# Layout of the pixels, orientation and profile: written anew, or handled elsewhere.
_TIFF_LAYOUT = frozenset((254, 255, *range(256, 267), 273, 274, 277, 278, 279, 284, 317, 320))
_TIFF_LAYOUT |= {266, 280, 281, 297, 318, 319, 322, 323, 324, 325, 338, 339, 347, 34675}
_TIFF_LAYOUT |= {*range(529, 533), _EXIF_IFD, _GPS_IFD}


@dataclass(frozen=True)
class Metadata:
    """What is kept beside the pixels.

    Attributes:
        exif: an EXIF block from its byte order mark on, upright and without preview.
        icc: the colour profile's bytes.
        xmp: an XMP packet.
        comment: the comment of a JPEG file.
        dpi: (horizontal, vertical) pixels an inch.
        chunks: (name, data) of a PNG file's own chunks: texts, time and colour space.
        tags: descriptive tags of a TIFF file; the EXIF and GPS tables are dictionaries among them.
        notices: what could not be kept, in words.
    """

    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    comment: bytes | None = None
    dpi: tuple[float, float] | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    tags: dict[int, Any] | None = None
    notices: tuple[str, ...] = ()

    def without_icc(self, why: str) -> Metadata:
        """The same without the colour profile, with a notice; unchanged when there is none."""
        if self.icc is None:
            return self
        return replace(self, icc=None, notices=(*self.notices, why))


def read_metadata(image: Image.Image, data: bytes, turned: int) -> tuple[Metadata, int]:
    """The metadata of a loaded picture with file bytes `data`, and the orientation to apply.

    The orientation is that of the EXIF block, 1 to 8; for TIFF it is 1, since Pillow turned it
    already, from `turned`.
    """
    info, notices = image.info, list[str]()
    if image.format == "TIFF":
        tags = _read_tags(image, notices)
        if isinstance(tags.get(700), bytes):
            tags[700] = _settle_xmp(tags[700], turned)
        return Metadata(icc=info.get("icc_profile"), tags=tags, notices=tuple(notices)), 1
    exif, orientation = _read_exif(info), 1
    if exif is not None:
        exif, orientation, preview = settle_exif(exif)
        if preview:
            notices.append("the preview inside the EXIF block is left out, it would be unprotected")
    if info.get("photoshop"):
        notices.append("IPTC and Photoshop blocks are not kept; EXIF and XMP are")
    xmp = info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    if xmp is not None:
        settled = _settle_xmp(xmp, orientation)
        if settled.count(b"xmpGImg:image") != xmp.count(b"xmpGImg:image"):
            notices.append("the preview inside the XMP block is left out, it would be unprotected")
        xmp = settled
    chunks = tuple(_png_chunks(data)) if image.format == "PNG" else ()
    dpi = info.get("dpi")
    return Metadata(
        exif=exif,
        icc=info.get("icc_profile") or None,
        xmp=xmp,
        comment=info.get("comment"),
        dpi=(float(dpi[0]), float(dpi[1])) if dpi else None,
        chunks=chunks,
        notices=tuple(notices),
    ), orientation


def _read_exif(info: dict[Any, Any]) -> bytes | None:
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:  # how ImageMagick wrote it before PNG 1.5
        lines = str(info["Raw profile type exif"]).split("\n")[3:]
        try:
            exif = bytes.fromhex("".join(lines))
        except ValueError:
            return None
    return exif.removeprefix(_EXIF_HEAD) or None if isinstance(exif, bytes) else None


def settle_exif(exif: bytes) -> tuple[bytes, int, bool]:
    """(block, orientation, had a preview): the block with orientation 1 and its preview cut off.

    All other bytes and all offsets stay, so maker notes remain readable. The preview is the second
    directory of the block (EXIF 2.32, section 4.5.8); its JPEG data become zeros. A damaged block
    comes back unchanged, with orientation 1.
    """
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(exif[:4])
    block = bytearray(exif)
    orientation, preview = 1, False
    try:
        if order is None:
            return exif, 1, False
        start = struct.unpack_from(order + "I", block, 4)[0]
        entries, link = _directory(block, start, order)
        for tag, kind, place in entries:
            if tag == ORIENTATION and kind == 3:
                value = struct.unpack_from(order + "H", block, place)[0]
                orientation = value if 1 <= value <= 8 else 1
                struct.pack_into(order + "H", block, place, 1)
        after = struct.unpack_from(order + "I", block, link)[0]
        if after:
            preview = True
            struct.pack_into(order + "I", block, link, 0)
            _erase_preview(block, after, order)
    except struct.error:
        # The directory breaks off: what was read before that point stands.
        return (bytes(block) if orientation != 1 else exif), orientation, preview
    return bytes(block), orientation, preview


def _directory(block: bytearray, start: int, order: str) -> tuple[list[tuple[int, int, int]], int]:
    """[(tag, type, place of the value)] of the directory at `start`, and the place of its link."""
    count = struct.unpack_from(order + "H", block, start)[0]
    entries = []
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", block, place)
        entries.append((tag, kind, place + 8))
    return entries, start + 2 + 12 * count


def _erase_preview(block: bytearray, start: int, order: str) -> None:
    entries, _ = _directory(block, start, order)
    values = {tag: struct.unpack_from(order + "I", block, place)[0] for tag, _, place in entries}
    first, size = values.get(0x0201, 0), values.get(0x0202, 0)
    last = min(first + size, len(block))
    if first:
        block[first:last] = bytes(max(last - first, 0))


def _settle_xmp(xmp: bytes, orientation: int) -> bytes:
    """The packet without base64 previews, and upright when the pixels were turned."""
    xmp = re.sub(rb"<xmpGImg:image>.*?</xmpGImg:image>", b"", xmp, flags=re.DOTALL)
    xmp = re.sub(rb"""xmpGImg:image=(["']).*?\1""", b"", xmp, flags=re.DOTALL)
    if orientation == 1:
        return xmp
    return re.sub(rb"""(tiff:Orientation(?:=["']|>))[2-8]""", rb"\g<1>1", xmp)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, data) of the chunks that are kept as they are; EXIF, profile and XMP go elsewhere."""
    place = 8
    while place + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        place += 12 + size
        special = name == b"iTXt" and body.startswith(_XMP_KEY + b"\x00")
        raw_exif = body.startswith(b"Raw profile type exif\x00")
        if name in _PNG_KEPT and not special and not raw_exif:
            yield name, body


def _read_tags(image: Image.Image, notices: list[str]) -> dict[int, Any]:
    """The descriptive tags of a TIFF file; what is left out is named in `notices`."""
    found: Any = getattr(image, "tag_v2", {})
    tags: dict[int, Any] = {}
    for tag in found:
        if tag in _TIFF_KEPT:
            tags[tag] = _as_bytes(found[tag]) if tag in _TIFF_TEXT else found[tag]
    exif = image.getexif()
    for table in (_EXIF_IFD, _GPS_IFD):
        if table in found and (entries := exif.get_ifd(table)):
            # 40965 points into the file as it was
            tags[table] = {tag: value for tag, value in entries.items() if tag != 40965}
    lost = sorted(set(found) - _TIFF_KEPT - _TIFF_LAYOUT)
    if lost:
        notices.append(f"TIFF tags not kept: {', '.join(map(str, lost))}")
    return tags


def _as_bytes(value: Any) -> Any:
    # Pillow reads text as Latin-1 and writes ASCII; bytes pass unchanged.
    return value.encode("latin-1", "replace") if isinstance(value, str) else value


def for_png(metadata: Metadata) -> dict[str, Any]:
    """Pillow's `save` arguments that put the metadata into a PNG file."""
    texts = PngImagePlugin.PngInfo()
    for name, body in metadata.chunks:
        texts.add(name, body)
    if metadata.xmp is not None:
        texts.add_itxt(_XMP_KEY.decode(), metadata.xmp.decode("utf-8", "replace"))
    if metadata.comment is not None:
        comment = metadata.comment
        try:
            texts.add_itxt("Comment", comment.decode("utf-8"))
        except UnicodeDecodeError:
            texts.add_text("Comment", comment.decode("latin-1"))
    options: dict[str, Any] = {"pnginfo": texts}
    if metadata.dpi is not None:
        options["dpi"] = metadata.dpi
    return options | _blocks(metadata, prefix=True)


def for_webp(metadata: Metadata) -> dict[str, Any]:
    """Pillow's `save` arguments that put the metadata into a WebP file."""
    options = _blocks(metadata, prefix=False)
    return options | ({"xmp": metadata.xmp} if metadata.xmp is not None else {})


def for_jpeg(metadata: Metadata) -> tuple[dict[str, Any], list[str]]:
    """Pillow's `save` arguments that put the metadata into a JPEG file, and notices on the rest."""
    options = _blocks(metadata, prefix=True)
    options |= {"xmp": metadata.xmp} if metadata.xmp is not None else {}
    options |= {"comment": metadata.comment} if metadata.comment is not None else {}
    options |= {"dpi": metadata.dpi} if metadata.dpi is not None else {}
    large = [name for name in ("exif", "xmp", "comment") if len(options.get(name, b"")) > _MARKER]
    for name in large:
        del options[name]
    return options, [f"{name.upper()} is too large for a JPEG file, left out" for name in large]


def for_tiff(metadata: Metadata) -> dict[str, Any]:
    """Pillow's `save` arguments that put the metadata into a TIFF file."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (metadata.tags or {}).items():
        if tag in _TIFF_TEXT:
            directory.tagtype[tag] = 2
        directory[tag] = value
    options: dict[str, Any] = {"tiffinfo": directory, "compression": "raw"}
    return options | ({"icc_profile": metadata.icc} if metadata.icc else {})


def _blocks(metadata: Metadata, *, prefix: bool) -> dict[str, Any]:
    # An empty profile keeps Pillow from taking one from elsewhere.
    options: dict[str, Any] = {"icc_profile": metadata.icc} if metadata.icc else {}
    if metadata.exif is not None:
        options["exif"] = (_EXIF_HEAD if prefix else b"") + metadata.exif
    return options
