"""The versions of one picture: clean, protected, and the controls of the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.pairs import Pair
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.audit.subjects import on_white
from diffkit.errors import UserError
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import to_float
from diffkit.perceptual.delta import delta_statistics
from diffkit.perceptual.pixels import ssim
from diffkit.protection.image_file import Picture, Unreadable, open_picture
from diffkit.protection.inputs import image_seed
from diffkit.protection.pgd import random_noise
from diffkit.protection.worker import read_mask

__all__ = ["AGAIN", "JPEG", "AuditPicture", "inspect", "mask_file", "open_versions"]

AGAIN, JPEG = "clean again", "jpeg95"
"""Further controls: the clean picture itself, and JPEG of quality 95 of it."""

LABELS = {
    CLEAN: "clean",
    PROTECTED: "protected",
    CONTROL: "random noise",
    JPEG: "JPEG 95",
    AGAIN: "clean again",
}
"""Versions as a person reads them, in the order of tables."""


@dataclass(frozen=True)
class AuditPicture:
    """A pair that can be measured, without its pixels.

    Attributes:
        pair: the files.
        size: (height, width).
        levels: budget of the random control: the record's, else the largest change there is.
        change: by version, what its change looks like (`DeltaStatistics`, SSIM and LPIPS).
        mask: a picture that is white where inpainting paints, or None.
    """

    pair: Pair
    size: tuple[int, int]
    levels: int
    change: dict[str, dict[str, float | None]]
    mask: Path | None = None

    @property
    def name(self) -> str:
        """Of the pair."""
        return self.pair.name

    def facts(self) -> dict[str, Any]:
        """As the report lists it."""
        record = self.pair.record
        return {
            "name": self.name,
            "clean_sha256": self.pair.clean_sha256,
            "protected_sha256": self.pair.protected_sha256,
            "height": self.size[0],
            "width": self.size[1],
            "method": None if record is None else record.method,
            "levels": None if record is None else record.levels,
            "attacked": None if record is None else record.model,
            "changed_since": self.pair.changed,
            "control_levels": self.levels,
            "change": self.change,
        }


def inspect(pair: Pair, seed: int, tools: Toolbox, perceptual: bool, mask: Path | None) -> Any:
    """The pair as an `AuditPicture`.

    Arguments:
        seed: of the random control.
        tools: gives LPIPS, where `perceptual` says that it is here.

    Raises `Unreadable` with a reason: a file that cannot be read, or sizes that differ.
    """
    clean, protected = _opened(pair)
    change = delta_statistics(_rgb(clean), _rgb(protected))
    levels = change.largest if pair.record is None else pair.record.levels
    versions = _versions(pair, clean, protected, levels, seed)
    found = {
        name: _change(versions[CLEAN], versions[name], tools if perceptual else None)
        for name in (PROTECTED, CONTROL, JPEG)
    }
    height, width = clean.pixels.shape[-2:]
    if mask is not None:
        read_mask(mask, clean.pixels)
    return AuditPicture(pair, (height, width), levels, found, mask)


def open_versions(picture: AuditPicture, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Every version, uint8 (3, H, W) on white, and the mask (1, H, W). Raises `Unreadable`."""
    clean, protected = _opened(picture.pair)
    versions = _versions(picture.pair, clean, protected, picture.levels, seed)
    mask = None if picture.mask is None else read_mask(picture.mask, clean.pixels)
    return versions, mask


def mask_file(place: Path | None, clean: Path) -> Path | None:
    """The mask of a picture: the file itself, or the one of its stem in a folder.

    Raises `Unreadable` where the folder has none, or several.
    """
    if place is None or not place.is_dir():
        return place
    found = [path for path in sorted(place.iterdir()) if path.stem == clean.stem]
    if len(found) != 1:
        count = "no mask" if not found else "several masks"
        raise Unreadable(f"{place} has {count} named {clean.stem}")
    return found[0]


def _opened(pair: Pair) -> tuple[Picture, Picture]:
    clean, protected = open_picture(pair.clean), open_picture(pair.protected)
    if clean.pixels.shape[-2:] != protected.pixels.shape[-2:]:
        sizes = [f"{p.pixels.shape[-1]}x{p.pixels.shape[-2]}" for p in (protected, clean)]
        raise Unreadable(f"has {sizes[0]} pixels and its clean picture {sizes[1]}")
    return clean, protected


def _versions(
    pair: Pair, clean: Picture, protected: Picture, levels: int, seed: int
) -> dict[str, Tensor]:
    own = image_seed(seed, pair.clean.read_bytes())
    noise = random_noise(clean.pixels[None], levels, [own])[0]
    x = on_white(clean.pixels, clean.alpha)
    jpeg = parse_purifiers("jpeg95")[0]
    return {
        CLEAN: x,
        PROTECTED: on_white(protected.pixels, protected.alpha),
        CONTROL: on_white(noise, clean.alpha),
        JPEG: jpeg(x, 0),
        AGAIN: x.clone(),
    }


def _rgb(picture: Picture) -> Tensor:
    return on_white(picture.pixels, picture.alpha)


def _change(clean: Tensor, other: Tensor, tools: Toolbox | None) -> dict[str, float | None]:
    found: dict[str, float | None] = dict(delta_statistics(clean, other).to_dict())
    try:
        found["ssim"] = float(ssim(clean[None], other[None]))
    except (UserError, ValueError, RuntimeError):
        found["ssim"] = None  # its package is missing, or the picture is smaller than its window
    found["lpips"] = None
    if tools is not None:
        pair = [to_float(x)[None].to(tools.device) for x in (clean, other)]
        with torch.no_grad():
            found["lpips"] = float(tools.lpips(*pair))
    return found


def attacked_names(pictures: Sequence[AuditPicture]) -> set[str]:
    """The attacked models that the records name."""
    return {p.pair.record.model for p in pictures if p.pair.record and p.pair.record.model}
