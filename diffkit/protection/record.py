"""What is measured of a finished picture and put on record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffkit.errors import RunFailed, UserError
from diffkit.files import sha256
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.model_card import public_name
from diffkit.perceptual.pixels import psnr, ssim
from diffkit.protection.amplification import amplification_ratio
from diffkit.protection.budget import as_signed
from diffkit.protection.image_file import Encoded, Picture
from diffkit.protection.job import Item
from diffkit.protection.memory import is_out_of_memory
from diffkit.protection.protect import plan_for
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import Sidecar

__all__ = ["SMALLEST", "Extra", "Finished", "Recorder"]

SMALLEST = 32
"""Sides below this are too small for the networks of LPIPS."""

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A picture whose result is encoded.

    Attributes:
        item: what and where.
        picture: as it was read.
        encoded: as it is written; its pixels are those that count.
        stats: of the attack.
        control: random noise of the same budget on the same picture, uint8 (C, H, W).
    """

    item: Item
    picture: Picture
    encoded: Encoded
    stats: Mapping[str, Any]
    control: Tensor


Extra = Callable[[Finished], Mapping[str, Any]]
"""What else is to be put on record of a finished picture: entries of its `Sidecar`."""


@dataclass
class Recorder:
    """Measures finished pictures of one job.

    A measure for which memory does not suffice is None and named in the notices: a picture that is
    protected is worth more than a number about it.

    Arguments:
        settings: of the job.
        model: the attacked model; None for the random control.
        ensemble: further models whose autoencoders are attacked.
        extras: what else is measured, see `more`.
        perceptual: an LPIPS network, or None.
        weights: digests of the model's weights and of the ensemble's.
    """

    settings: Settings
    model: LatentDiffusion | None
    ensemble: Sequence[LatentDiffusion] = ()
    extras: Sequence[Extra] = ()
    perceptual: Any = None
    weights: Sequence[str] = ()

    def record(self, done: Finished, levels: int) -> Sidecar:
        """The record of a picture, the extras left out."""
        settings, clean, q = self.settings, done.picture.pixels, done.encoded.pixels
        notices = list(done.encoded.notices)
        delta = (q.short() - clean.short()).abs().float()
        effect: dict[str, Any] = {"random_control": self._distances(clean, done.control, notices)}
        sizes: tuple[tuple[int, int], ...] = ()
        if self.model is not None and settings.row.loss is not None:
            sizes = tuple(plan_for(self.model, settings, *clean.shape[-2:]).shapes)
            effect["encoder_amplification_over_random"] = self._gain(done, notices)
        distances = self._distances(clean, q, notices)
        model, mask = self.model, done.item.mask
        return Sidecar(
            method=settings.method,
            levels=levels,
            steps=settings.rule().steps if settings.row.loss is not None else 0,
            model=None if model is None else public_name(model.source),
            model_revision=None if model is None else model.revision,
            target=settings.shown_target or None,
            prompt=None if model is None else settings.prompt_for(model) or None,
            seed=settings.seed,
            input_sha256=done.item.digest,
            output_sha256=done.encoded.digest,
            parameter_sha256=done.item.parameters,
            views=len(sizes),
            working_sizes=sizes,
            max_delta=float(delta.max()),
            mean_delta=float(delta.mean()),
            ssim=_finite(float(ssim(clean[None], q[None]))),
            skipped_steps=int(done.stats.get("skipped_steps", 0)),
            loss_first=done.stats.get("score_first"),
            loss_last=done.stats.get("score_last"),
            surrogate_change=done.stats.get("surrogate_change"),
            model_weights=tuple(self.weights),
            ensemble=tuple(public_name(other.source) for other in self.ensemble),
            contrast=settings.contrast,
            mask_sha256=None if mask is None else sha256(mask),
            effect=effect,
            psnr=distances["psnr"],
            lpips=distances["lpips"],
            notices=tuple(notices),
        )

    def more(self, done: Finished, record: Sidecar) -> Sidecar:
        """The record with what the extras measure.

        Raises `RunFailed` or `UserError` where an extra cannot measure this picture.
        """
        entries: dict[str, Any] = {}
        for extra in self.extras:
            try:
                entries |= extra(done)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise RunFailed("out of memory") from error
        effect = dict(record.effect or {}) | entries.pop("effect", {})
        return dataclasses.replace(record, effect=effect, **entries)

    def lpips(self, clean: Tensor, other: Tensor) -> float:
        """LPIPS of two pictures uint8 (C, H, W) on any device. Raises `UserError` below 32 pixels.

        Needs the network.
        """
        if min(clean.shape[-2:]) < SMALLEST:
            height, width = clean.shape[-2:]
            raise UserError(
                f"{width}x{height} pixels are too few for LPIPS, which needs {SMALLEST} a side."
            )
        device = next(self.perceptual.parameters()).device
        pair = [as_signed(x[None].expand(-1, 3, -1, -1).to(device)) for x in (clean, other)]
        with torch.no_grad():
            return float(self.perceptual(*pair))

    def _distances(
        self, clean: Tensor, other: Tensor, notices: list[str]
    ) -> dict[str, float | None]:
        """PSNR, None for equal pictures, and LPIPS, None where it cannot be had."""
        found: float | None = None
        if self.perceptual is not None and min(clean.shape[-2:]) >= SMALLEST:
            found = _or_none(lambda: self.lpips(clean, other), "LPIPS", notices)
        return {
            "psnr": None if torch.equal(clean, other) else float(psnr(clean[None], other[None])),
            "lpips": found,
        }

    def _gain(self, done: Finished, notices: list[str]) -> float | None:
        assert self.model is not None
        codec, clean = self.model.codec, done.picture.pixels
        view = plan_for(self.model, self.settings, *clean.shape[-2:]).whole[0]
        rows = clean, done.encoded.pixels, done.control, view, done.picture.alpha
        return _or_none(
            lambda: amplification_ratio(codec, *rows), "the change of encodings", notices
        )


def _or_none(measure: Callable[[], T], name: str, notices: list[str]) -> T | None:
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    notice = f"{name} was not measured: out of memory"
    if notice not in notices:
        notices.append(notice)
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
