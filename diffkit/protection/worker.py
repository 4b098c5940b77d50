"""Doing the units of a job: read, protect, measure, write; a bad picture is named and left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffkit.console import warn
from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.model_card import public_name
from diffkit.perceptual.pixels import psnr, ssim
from diffkit.protection.amplification import amplification_ratio
from diffkit.protection.image_file import Encoded, Picture, Unreadable, encode_picture, read_picture
from diffkit.protection.image_pixels import refusals
from diffkit.protection.inputs import image_seed
from diffkit.protection.job import Item, Request, Unit
from diffkit.protection.joint import protect_set
from diffkit.protection.memory import Effort, with_fallback, with_less
from diffkit.protection.pgd import random_noise
from diffkit.protection.protect import ProtectionResult, budget_weight, plan_for, protect
from diffkit.protection.sidecar import Sidecar, publish

__all__ = ["Extra", "Finished", "Worker"]

Extra = Callable[["Finished"], Mapping[str, Any]]
"""What else is to be put on record of a finished picture: entries of its `Sidecar`."""


@dataclass(frozen=True)
class Finished:
    """A picture whose result is encoded, about to be written.

    Attributes:
        item: what and where.
        picture: as it was read.
        encoded: as it will be written; its pixels are those that count.
        stats: of the attack.
        control: random noise of the same budget on the same picture, uint8 (C, H, W).
    """

    item: Item
    picture: Picture
    encoded: Encoded
    stats: Mapping[str, Any]
    control: Tensor


@dataclass
class _Opened:
    item: Item
    picture: Picture
    seed: int
    mask: Tensor | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Pictures with equal keys can be protected at once."""
        return (self.picture.pixels.shape, self.picture.alpha is None, self.mask is None)


@dataclass
class Worker:
    """Protects pictures with one model.

    Arguments:
        request: what was asked for.
        model: the attacked model; None for the random control.
        ensemble: further models whose autoencoders are attacked.
        extras: what else is measured of each finished picture.
        each: called after every finished step, with the number of pictures in it.
        failed: source -> reason, filled while it runs.
        made: results written by this worker.
        perceptual: an LPIPS network, or None.
        clean, class_images: of a method that trains a surrogate, see `protect_set`.
    """

    request: Request
    model: LatentDiffusion | None
    ensemble: Sequence[LatentDiffusion] = ()
    extras: Sequence[Extra] = ()
    each: Callable[[int], None] = lambda pictures: None
    failed: dict[str, str] = field(default_factory=dict)
    made: list[Path] = field(default_factory=list)
    perceptual: Any = None
    clean: Sequence[Tensor] | None = None
    class_images: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        self.effort = Effort(self.request.batch_size, self.request.lean)

    def run(self, units: Sequence[Unit]) -> None:
        """All units in order; failures are kept in `failed`."""
        if self.request.settings.row.joint is not None:
            for unit in units:
                self._run_set(unit)
            return
        waiting: list[_Opened] = []
        items = [item for unit in units for item in unit.items if not item.done]
        if self.effort.batch_size > 1:
            items.sort(key=lambda item: item.source.header.size)  # so that batches fill
        for item in items:
            opened = self._open(item)
            if opened is None:
                continue
            if waiting and (opened.key != waiting[0].key or len(waiting) == self._together):
                self._protect(waiting)
                waiting = []
            waiting.append(opened)
        if waiting:
            self._protect(waiting)

    def _run_set(self, unit: Unit) -> None:
        """A unit that is protected as one: what can be read of it, and all of that is written."""
        rows = [(item, self._open(item)) for item in unit.items]
        good = [row for _, row in rows if row is not None]
        if all(row.item.done for row in good):
            return  # what is missing cannot be read
        name = str(unit.items[0].source.root)
        try:
            results = with_less(self.effort, lambda: self._attack_set(good), name, len(good))
        except (RunFailed, UserError) as error:
            for row in good:
                self.fail(row.item, str(error))
            return
        for row, result in zip(good, results, strict=True):
            self.finish(row, result)

    def _attack_set(self, rows: Sequence[_Opened]) -> list[ProtectionResult]:
        assert self.model is not None
        return protect_set(
            [row.picture.pixels for row in rows],
            self.model,
            self.request.settings,
            seeds=[row.seed for row in rows],
            alphas=[row.picture.alpha for row in rows],
            masks=[row.mask for row in rows],
            clean=self.clean,
            class_images=self.class_images,
            lean=self.effort.lean,
            batch_size=self.effort.batch_size,
            each=self.each,
        )

    @property
    def _together(self) -> int:
        return 1 if self.request.max_lpips is not None else self.effort.batch_size

    # -- reading ------------------------------------------------------------------------------

    def _open(self, item: Item) -> _Opened | None:
        path = item.source.path
        try:
            with refusals():
                data = path.read_bytes()
            picture = read_picture(data, path.suffix)
            if picture.digest != item.digest:
                raise Unreadable("it was changed while the job ran; start the job again")
            mask = None if item.mask is None else read_mask(item.mask, picture.pixels)
        except Unreadable as error:
            self.fail(item, error.reason)
            return None
        seed = image_seed(self.request.settings.seed, data)
        return _Opened(item, picture, seed, mask)

    def fail(self, item: Item, reason: str) -> None:
        """Name a picture that could not be done."""
        self.failed[str(item.source.path)] = reason
        warn(f"{item.source.path}: {reason}", anywhere=True)

    # -- protecting ---------------------------------------------------------------------------

    def _protect(self, rows: Sequence[_Opened]) -> None:
        names = ", ".join(str(row.item.source.path) for row in rows[:3])
        try:
            results = with_fallback(rows, self.effort, self._attack, names)
        except (RunFailed, UserError) as error:
            for row in rows:
                self.fail(row.item, str(error))
            return
        for row, result in zip(rows, results, strict=True):
            self.finish(row, result)

    def _attack(self, rows: Sequence[_Opened], lean: bool) -> list[ProtectionResult]:
        if self.request.max_lpips is not None:
            return [self._within_lpips(row, lean) for row in rows]
        return self._at_levels(rows, lean, None)

    def _at_levels(
        self, rows: Sequence[_Opened], lean: bool, levels: int | None
    ) -> list[ProtectionResult]:
        import dataclasses

        settings = self.request.settings
        if levels is not None:
            settings = dataclasses.replace(settings, levels=levels)
        return protect(
            torch.stack([row.picture.pixels for row in rows]),
            self.model,
            settings,
            seeds=[row.seed for row in rows],
            alpha=_stacked([row.picture.alpha for row in rows]),
            mask=_stacked([row.mask for row in rows]),
            ensemble=self.ensemble,
            lean=lean,
            each=lambda step: self.each(len(rows)),
        )

    def _within_lpips(self, row: _Opened, lean: bool) -> ProtectionResult:
        """The largest budget up to the asked one whose LPIPS is small enough, by bisection."""
        limit = self.request.max_lpips
        assert limit is not None
        clean = row.picture.pixels

        def attempt(levels: int) -> tuple[ProtectionResult, bool]:
            result = self._at_levels([row], lean, levels)[0]
            return result, self._lpips(clean, result.pixels) <= limit

        asked = self.request.settings.rule().levels
        levels, found = largest_passing(attempt, asked)
        if found is None:
            warn(f"{row.item.source.path}: no budget keeps LPIPS within {limit:g}; left as it is.")
            found = ProtectionResult(clean, {"steps": 0, "max_change": 0.0, "mean_change": 0.0})
        return ProtectionResult(found.pixels, {**found.stats, "levels": levels})

    # -- measuring and writing ----------------------------------------------------------------

    def finish(self, row: _Opened, result: ProtectionResult) -> None:
        """Encode, measure and write one picture."""
        item, picture = row.item, row.picture
        try:
            name = str(item.source.path)
            encoded = encode_picture(picture, result.pixels, self.request.keep_jpeg, name)
            levels = result.stats.get("levels", self.request.settings.rule().levels)
            control = self._control(row, levels)
            done = Finished(item, picture, encoded, result.stats, control)
            item.output.parent.mkdir(parents=True, exist_ok=True)
            publish(item.output, encoded.data, self._record(done, levels))
        except RunFailed as error:
            self.fail(item, str(error))
            return
        self.made.append(item.output)

    def _control(self, row: _Opened, levels: int) -> Tensor:
        """Random noise of the same budget, in the same pixels."""
        rows = [None if x is None else x[None] for x in (row.picture.alpha, row.mask)]
        pixels = row.picture.pixels[None]
        weight = budget_weight(pixels, self.request.settings, *rows)
        return random_noise(pixels, levels, [row.seed], weight)[0]

    def _record(self, done: Finished, levels: int) -> Sidecar:
        settings, clean, q = self.request.settings, done.picture.pixels, done.encoded.pixels
        delta = (q.short() - clean.short()).abs().float()
        sizes: list[tuple[int, int]] = []
        effect: dict[str, Any] = {"random_control": self._distances(clean, done.control)}
        if self.model is not None and settings.row.loss is not None:
            plan = plan_for(self.model, settings, *clean.shape[-2:])
            sizes = list(plan.shapes)
            gain = amplification_ratio(self.model.codec, clean, q, done.control, plan.whole[0])
            effect["encoder_amplification_over_random"] = gain
        more: dict[str, Any] = dict(self._distances(clean, q))
        for extra in self.extras:
            more |= extra(done)
        effect |= more.pop("effect", {})
        return Sidecar(
            method=settings.method,
            levels=levels,
            steps=settings.rule().steps if settings.row.loss is not None else 0,
            model=None if self.model is None else public_name(self.model.source),
            model_revision=None if self.model is None else self.model.revision,
            target=settings.shown_target or None,
            prompt=None if self.model is None else settings.prompt_for(self.model) or None,
            seed=settings.seed,
            input_sha256=done.item.digest,
            output_sha256=done.encoded.digest,
            parameter_sha256=done.item.parameters,
            views=len(sizes),
            working_sizes=tuple(sizes),
            max_delta=float(delta.max()),
            mean_delta=float(delta.mean()),
            ssim=_finite(float(ssim(clean[None], q[None]))),
            skipped_steps=int(done.stats.get("skipped_steps", 0)),
            loss_first=done.stats.get("score_first"),
            loss_last=done.stats.get("score_last"),
            surrogate_change=done.stats.get("surrogate_change"),
            effect=effect,
            notices=done.encoded.notices,
            **more,
        )

    def _distances(self, clean: Tensor, other: Tensor) -> dict[str, float | None]:
        """PSNR, None for equal pictures, and LPIPS, None without its network."""
        return {
            "psnr": None if torch.equal(clean, other) else float(psnr(clean[None], other[None])),
            "lpips": None if self.perceptual is None else self._lpips(clean, other),
        }

    def _lpips(self, clean: Tensor, other: Tensor) -> float:
        from diffkit.protection.budget import as_signed

        pair = [as_signed(x[None].expand(-1, 3, -1, -1)) for x in (clean, other.cpu())]
        with torch.no_grad():
            return float(self.perceptual(*pair))


def largest_passing(
    attempt: Callable[[int], tuple[ProtectionResult, bool]], asked: int
) -> tuple[int, ProtectionResult | None]:
    """The largest k in 1..asked that passes, by bisection from the top; (0, None) if none does.

    Taken to be monotone: what passes at k passes below it.
    """
    result, passes = attempt(asked)
    if passes:
        return asked, result
    low, high, best = 0, asked, None
    while high - low > 1:
        middle = (low + high) // 2
        result, passes = attempt(middle)
        if passes:
            low, best = middle, result
        else:
            high = middle
    return low, best


def read_mask(path: Any, pixels: Tensor) -> Tensor:
    """A mask's brightness at the picture's size, by the nearest pixel: (1, H, W) in [0, 1].

    Raises `Unreadable`.
    """
    height, width = pixels.shape[-2:]
    try:
        with Image.open(path) as image:
            grey = image.convert("L").resize((width, height), Image.Resampling.NEAREST)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise Unreadable(f"its mask {path} cannot be read ({error})") from error
    return torch.from_numpy(np.array(grey, dtype=np.float32) / 255)[None]


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
