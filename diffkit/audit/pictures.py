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
from diffkit.files import sha256
from diffkit.perceptual.delta import delta_statistics
from diffkit.perceptual.pixels import ssim
from diffkit.protection.contrast import contrast_weight
from diffkit.protection.image_file import Picture, Unreadable, open_picture
from diffkit.protection.inputs import image_seed
from diffkit.protection.pgd import random_noise
from diffkit.protection.sidecar import Sidecar
from diffkit.protection.worker import read_mask

__all__ = [
    "AGAIN",
    "JPEG",
    "AuditPicture",
    "Control",
    "attacked_names",
    "change_of",
    "inspect",
    "is_attacked",
    "open_versions",
]

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

_QUANTILE = 0.995


@dataclass(frozen=True)
class Control:
    """The random noise that stands beside a protection, which respects what that respected.

    Attributes:
        levels: its budget: the record's; without one the 99.5 % quantile of |change|, which a few
            pixels that another tool moved further do not decide.
        recorded: whether a record says so.
        contrast: local contrast shares out the budget, as the record says of the protection.
        masked: only the white part of the mask changes; the mask given is the protection's own.
        unmasked: the protection had a mask that is not given: the noise lies everywhere.
    """

    levels: int
    recorded: bool = False
    contrast: bool = False
    masked: bool = False
    unmasked: bool = False

    @classmethod
    def of(
        cls, record: Sidecar | None, clean: Tensor, protected: Tensor, mask: Path | None
    ) -> Control:
        """Beside a pair, both uint8 (3, H, W); `mask` is the file that is given, if any."""
        if record is None:
            change = (protected.short() - clean.short()).abs().flatten()
            share = change.bincount(minlength=256).double().cumsum(0) / change.numel()
            return cls(int((share < _QUANTILE).sum()))
        used = record.mask_sha256
        masked = used is not None and mask is not None and sha256(mask) == used
        return cls(record.levels, True, record.contrast, masked, used is not None and not masked)

    def noise(self, clean: Tensor, seed: int, mask: Tensor | None) -> Tensor:
        """The noisy picture, uint8 as `clean` (C, H, W); `mask` (1, H, W) in [0, 1]."""
        weight = None
        if self.contrast:
            weight = contrast_weight(clean[None])
        if self.masked and mask is not None:
            weight = mask[None] if weight is None else weight * mask[None]
        return random_noise(clean[None], self.levels, [seed], weight)[0]


@dataclass(frozen=True)
class AuditPicture:
    """A pair that can be measured, without its pixels.

    Attributes:
        pair: the files.
        size: (height, width).
        control: the random noise.
        mask: a picture that is white where inpainting paints, or None.
    """

    pair: Pair
    size: tuple[int, int]
    control: Control
    mask: Path | None = None

    @property
    def name(self) -> str:
        """Of the pair."""
        return self.pair.name

    def identity(self, seed: int) -> dict[str, Any]:
        """All that decides the versions' pixels; `seed` is that of the audit."""
        masked = self.mask is not None and self.control.masked
        return {
            "clean": self.pair.clean_sha256,
            "protected": self.pair.protected_sha256,
            "control": {**vars(self.control), "seed": seed},
            "control mask": sha256(self.mask) if masked and self.mask is not None else None,
        }

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
            "ensemble": [] if record is None else list(record.ensemble),
            "changed_since": self.pair.changed,
            "control": vars(self.control),
        }


def inspect(pair: Pair, mask: Path | None, paints: bool = False) -> AuditPicture:
    """The pair as an `AuditPicture`.

    Arguments:
        mask: a picture of what is painted or was protected, or None.
        paints: the mask is used for inpainting, so it must be neither empty nor full.

    Raises `Unreadable` with a reason: a file that cannot be read, or sizes that differ.
    """
    clean, protected = _opened(pair)
    height, width = clean.pixels.shape[-2:]
    if mask is not None:
        white = _mask(mask, clean.pixels) > 0.5
        if paints and not bool(white.any()):
            raise Unreadable(f"its mask {mask.name} is black: nothing would be painted")
        if paints and bool(white.all()):
            raise Unreadable(f"its mask {mask.name} is white: nothing of the picture would be left")
    control = Control.of(pair.record, _seen(clean), _seen(protected), mask)
    return AuditPicture(pair, (height, width), control, mask)


def change_of(
    picture: AuditPicture, seed: int, tools: Toolbox | None
) -> dict[str, dict[str, float | None]]:
    """What the change of each version looks like: `DeltaStatistics`, SSIM and LPIPS.

    `tools` gives LPIPS, None where it is not here. Raises `Unreadable`.
    """
    versions, _ = open_versions(picture, seed)
    return {
        name: _change(versions[CLEAN], versions[name], tools) for name in (PROTECTED, CONTROL, JPEG)
    }


def open_versions(picture: AuditPicture, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Every version, uint8 (3, H, W) on white, and the mask (1, H, W). Raises `Unreadable`."""
    clean, protected = _opened(picture.pair)
    mask = None if picture.mask is None else _mask(picture.mask, clean.pixels)
    own = image_seed(seed, picture.pair.clean.read_bytes())
    noise = picture.control.noise(clean.pixels, own, mask)
    x = _seen(clean)
    versions = {
        CLEAN: x,
        PROTECTED: _seen(protected),
        CONTROL: on_white(noise, clean.alpha),
        JPEG: parse_purifiers("jpeg95")[0](x, 0),
        AGAIN: x.clone(),
    }
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
        raise Unreadable(f"{place.name} has {count} named {clean.stem}")
    return found[0]


def _opened(pair: Pair) -> tuple[Picture, Picture]:
    clean, protected = open_picture(pair.clean), open_picture(pair.protected)
    if clean.pixels.shape[-2:] != protected.pixels.shape[-2:]:
        sizes = [f"{p.pixels.shape[-1]}x{p.pixels.shape[-2]}" for p in (protected, clean)]
        raise Unreadable(f"has {sizes[0]} pixels and its clean picture {sizes[1]}")
    return clean, protected


def _mask(path: Path, pixels: Tensor) -> Tensor:
    try:
        return read_mask(path, pixels)
    except Unreadable as error:  # whose words hold the whole path, which reports do not
        raise Unreadable(f"its mask {path.name} cannot be read") from error


def _seen(picture: Picture) -> Tensor:
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


def is_attacked(pictures: Sequence[AuditPicture], name: str, weights: str) -> bool | None:
    """Whether records name a model, or one with the same weights; None without records."""
    names = attacked_names(pictures)
    records = [p.pair.record for p in pictures if p.pair.record is not None]
    known = {digest for record in records for digest in record.model_weights}
    return (name in names or weights in known) if names else None


def attacked_names(pictures: Sequence[AuditPicture]) -> set[str]:
    """The attacked models that the records name, those of ensembles among them."""
    records = [p.pair.record for p in pictures if p.pair.record is not None]
    return {name for r in records for name in (r.model, *r.ensemble) if name}
