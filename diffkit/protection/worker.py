"""Doing the units of a job: read, protect, measure, write; a bad picture is named and left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffkit.console import warn
from diffkit.errors import RunFailed, UserError
from diffkit.files import storage_errors, write_json
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.image_file import Picture, Unreadable, encode_picture, read_picture
from diffkit.protection.image_pixels import refusals
from diffkit.protection.inputs import image_seed
from diffkit.protection.job import Item, Request, Unit
from diffkit.protection.joint import protect_set
from diffkit.protection.memory import Effort, with_fallback, with_less
from diffkit.protection.pgd import random_noise
from diffkit.protection.protect import ProtectionResult, budget_weight, prepared, protect
from diffkit.protection.record import Extra, Finished, Recorder
from diffkit.protection.sidecar import Sidecar, publish, sidecar_path
from diffkit.protection.surrogate import Surrogate

__all__ = ["Worker", "largest_passing", "read_mask"]


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
        weights: digests of the weights of the attacked models, for the records.
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
    weights: Sequence[str] = ()
    clean: Sequence[Tensor] | None = None
    class_images: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        self.effort = Effort(self.request.batch_size, self.request.lean)
        self._surrogates: list[Surrogate] = []
        self.recorder = Recorder(
            self.request.settings,
            self.model,
            self.ensemble,
            self.extras,
            self.perceptual,
            self.weights,
        )

    def run(self, units: Sequence[Unit]) -> None:
        """All units in order; failures are kept in `failed`."""
        if self.request.settings.row.joint is not None:
            for unit in units:
                self._run_set(unit)
            return
        items = [item for unit in units for item in unit.items if not item.done]
        if self.effort.batch_size > 1:
            items.sort(key=lambda item: item.source.header.size)  # so that batches fill
        if not items:
            return
        with prepared(self.model, self.request.settings, self.ensemble) as self._surrogates:
            self._run_each(items)

    def _run_each(self, items: Sequence[Item]) -> None:
        """One after the other, pictures of one size together."""
        waiting: list[_Opened] = []
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
            if len(rows) == 1:
                self.fail(rows[0].item, str(error))
                return
            for row in rows:  # one of them spoiled it for all
                self._protect([row])
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
        settings = self.request.settings
        if levels is not None:
            settings = replace(settings, levels=levels)
        return protect(
            torch.stack([row.picture.pixels for row in rows]),
            self.model,
            settings,
            seeds=[row.seed for row in rows],
            alpha=_stacked([row.picture.alpha for row in rows]),
            mask=_stacked([row.mask for row in rows]),
            ensemble=self.ensemble,
            lean=lean,
            surrogates=self._surrogates,
            each=lambda step: self.each(len(rows)),
        )

    def _within_lpips(self, row: _Opened, lean: bool) -> ProtectionResult:
        """The largest budget up to the asked one whose LPIPS is small enough, by bisection."""
        limit = self.request.max_lpips
        assert limit is not None
        clean = row.picture.pixels

        def attempt(levels: int) -> tuple[ProtectionResult, bool]:
            result = self._at_levels([row], lean, levels)[0]
            return result, self.recorder.lpips(clean, result.pixels) <= limit

        asked = self.request.settings.rule().levels
        levels, found = largest_passing(attempt, asked)
        if found is None:
            warn(f"{row.item.source.path}: no budget keeps LPIPS within {limit:g}; left as it is.")
            found = ProtectionResult(clean, {"steps": 0, "max_change": 0.0, "mean_change": 0.0})
        return ProtectionResult(found.pixels, {**found.stats, "levels": levels})

    # -- measuring and writing ----------------------------------------------------------------

    def finish(self, row: _Opened, result: ProtectionResult) -> None:
        """Encode, measure and write one picture; then what the extras measure of it.

        Raises `RunFailed` when the disk is full: nothing that follows could be saved either.
        """
        item, picture = row.item, row.picture
        levels = result.stats.get("levels", self.request.settings.rule().levels)
        try:
            name = str(item.source.path)
            encoded = encode_picture(picture, result.pixels, self.request.keep_jpeg, name)
            done = Finished(item, picture, encoded, result.stats, self._control(row, levels))
            record = self.recorder.record(done, levels)
        except (RunFailed, UserError) as error:
            self.fail(item, str(error))
            return
        try:
            with storage_errors(item.output):
                item.output.parent.mkdir(parents=True, exist_ok=True)
                publish(item.output, encoded.data, record)
        except UserError as error:
            self.fail(item, str(error))
            return
        self.made.append(item.output)
        if self.extras:
            self._measure_more(done, record)

    def _measure_more(self, done: Finished, record: Sidecar) -> None:
        try:
            record = self.recorder.more(done, record)
        except (RunFailed, UserError) as error:
            warn(f"{done.item.source.path}: saved, but not measured further: {error}")
            record = replace(record, notices=(*record.notices, f"not measured further: {error}"))
        write_json(sidecar_path(done.item.output), record.as_json())

    def _control(self, row: _Opened, levels: int) -> Tensor:
        """Random noise of the same budget, in the same pixels."""
        rows = [None if x is None else x[None] for x in (row.picture.alpha, row.mask)]
        pixels = row.picture.pixels[None]
        weight = budget_weight(pixels, self.request.settings, *rows)
        return random_noise(pixels, levels, [row.seed], weight)[0]


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
