"""Pixel-space post-training: the denoising loss once more, as the decoder shows it (Zhang et al.
2024, arXiv:2409.17565, section 3.1).

    L = L_lat + lambda L_pix,    L_pix = mean (D(z_t) - D(alpha_t z_0 + sigma_t eps_theta))^2

L_lat is the denoising loss of the model's parametrisation, D the frozen decoder of the codec, or a
tiny one. Both decodes are of noisy latents: only the noise is replaced by the predicted one. (EDM's
are brought to the scale of the others first: `decoded.noisy_inputs`.) Beside it stand what it is
compared with: the clean estimate, whose loss weighs high noise without bound unless it is gated;
pixels alone; and the same weight in time without a decoder. lambda is chosen from the first
batches, so that both terms count alike.

min-SNR weights and the like belong to L_lat. L_pix has its own weight in time, which comes with
what it compares, and is not multiplied by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffkit.console import warn
from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.tiny_decoder import load_tiny_decoder
from diffkit.objectives.base import Phase, check_finite
from diffkit.objectives.denoising import (
    Denoised,
    DenoisingConfig,
    DenoisingObjective,
    DenoisingPlayer,
    Draws,
    Shared,
)
from diffkit.perceptual.decoded import (
    Decoder,
    LatentCrop,
    check_crop,
    check_decoder,
    decoded_error,
    draw_crop,
    noise_only_delta,
    noisy_inputs,
)

__all__ = [
    "PixelConfig",
    "PixelObjective",
    "PixelPlayer",
    "balanced_weight",
    "clean_delta",
    "clean_factor",
    "flow_emphasis",
]


# -- mathematics --------------------------------------------------------------------------------


def flow_emphasis(place: Tensor) -> Tensor:
    """1 / (1 - t)^2 up to t = 0.9, and 100 from there: any shape, t in [0, 1] with 1 the noise.

    A flow's pixel loss weighs t^2 (1 - t)^2 against its latent loss, the noise share squared of
    eps-prediction times (1 - t)^2; this takes the second factor away.
    """
    return (1 - place).clamp_min(0.1) ** -2


def clean_delta(delta: Tensor, alpha: Tensor) -> Tensor:
    """x0_theta - z_0 = -sigma_t (eps_theta - eps) / alpha_t, (B, ...); 0 where alpha_t is 0.

    Arguments:
        delta: sigma_t (eps_theta - eps), (B, ...).
        alpha: alpha_t, (B,).
    """
    known = alpha > 0
    inverse = torch.where(known, 1 / torch.where(known, alpha, 1), 0)
    return -delta * inverse.view(-1, *(1 for _ in delta.shape[1:]))


def clean_factor(snr: Tensor, weight: Tensor, min_snr: float, max_weight: float) -> Tensor:
    """What the clean estimate's loss is multiplied by: min(1, max_weight / weight), gated by SNR.

    Arguments:
        snr: alpha_t^2 / sigma_t^2, (B,).
        weight: |x0_theta - z_0|^2 over |output - target|^2, (B,): 1 / snr for eps-prediction.
        min_snr: the factor is 0 below it.
        max_weight: what weight times factor does not exceed.
    """
    clamped = (max_weight / weight).clamp_max(1.0)
    return torch.where(snr >= min_snr, clamped, torch.zeros_like(clamped))


BOUNDS = (0.5, 32.0)
"""Of a lambda that is chosen by itself."""


def balanced_weight(latent: Tensor, pixel: Tensor) -> Tensor:
    """lambda with lambda pixel = latent, within `BOUNDS`; of the shape of both."""
    return (latent / pixel.clamp_min(torch.finfo(pixel.dtype).tiny)).clamp(*BOUNDS)


# -- objective ----------------------------------------------------------------------------------

_CROP = 32
_CROPPED_FROM = 64


@dataclass
class PixelConfig:
    """The pixel-space term: what it compares, how it is weighed, what it may cost."""

    weight: float | None = None
    """lambda; without it, the mean latent loss over the mean pixel loss of the first batches, in
    [0.5, 32]. The paper has 2 for a U-Net and 8 for a transformer."""
    calibration: int = 50
    """Decoded batches over which lambda is found; the estimate so far serves meanwhile, and the
    first batch goes without."""
    latent_weight: float = 1.0
    """Weight of the latent loss; 0 trains on pixels alone, which blurs backgrounds."""
    target: Literal["noisy", "clean"] = "noisy"
    """What is decoded: the noisy latents with the true and the predicted noise, or, to compare, the
    clean latents and their estimate, which the paper rejects as blurry."""
    clean_min_snr: float = 0.1
    """Signal-to-noise ratio below which a clean estimate is not compared. It is decoded all the
    same, so that a batch takes the same time whatever is in it."""
    clean_max_weight: float = 1.0
    """Largest weight of the clean estimate's error beside that of the latent loss."""
    emphasis: bool = False
    """For flow models: weigh high noise as eps-prediction would, 1 / (1 - t)^2 up to t = 0.9."""
    control: bool = False
    """Train without a decoder, with the same weight in time added to the latent loss: what pixels
    themselves bring is the difference to this. The first batches are decoded to find the weight."""
    decoder: str | None = None
    """A tiny decoder (AutoencoderTiny) in place of the model's: folder or hub id."""
    crop_latent: int | None = None
    """Edge in latent pixels of a random window that is decoded, 0 for all; 32 where the latents are
    64 or more, else all of them."""
    every: int = 1
    """Decode at each step of so many, with as many times the weight."""
    memory: Literal["plain", "low"] = "plain"
    """low: decode one sample at a time, forwards and backwards at once, and keep nothing of the
    decoder beside the denoiser's activations; slower, with the same losses."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "pixel")
        for name in ("weight", "clean_max_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(
                    f"pixel.{name}: {value} must be above 0; `diffkit train denoising` trains "
                    "without the pixel term."
                )
        for name in ("calibration", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"pixel.{name}: {getattr(self, name)} must be at least 1.")
        for name in ("latent_weight", "clean_min_snr", "crop_latent"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"pixel.{name}: {getattr(self, name)} must not be negative.")
        if self.latent_weight == 0 and self.every > 1:
            raise UserError(
                "pixel.every: with --pixel.latent-weight 0 the steps between would train nothing; "
                "leave one of them out."
            )
        self._check_idle()

    def _check_idle(self) -> None:
        usual = PixelConfig()
        if self.target == "noisy":
            for name in ("clean_min_snr", "clean_max_weight"):
                if getattr(self, name) != getattr(usual, name):
                    raise UserError(f"pixel.{name}: belongs to --pixel.target clean.")
        elif self.emphasis:
            raise UserError("pixel.emphasis: belongs to --pixel.target noisy; leave it out.")
        if self.calibration != usual.calibration and self.weight is not None and not self.control:
            raise UserError("pixel.calibration: --pixel.weight is given; leave one of them out.")
        if self.control and self.every != 1:
            raise UserError(
                "pixel.every: --pixel.control decodes in the calibration only; leave it out."
            )


@dataclass(frozen=True)
class PixelDraws(Draws):
    """`Draws`, with the window of the latents that is decoded; None for all."""

    crop: LatentCrop | None


@dataclass(frozen=True)
class PixelShared(Shared):
    """`Shared`, with what holds for the whole step.

    Attributes:
        decodes: whether the pictures are decoded.
        weight: lambda, 0 while unknown, ().
        gain: g, the pixel loss over the same without a decoder, 0 while unknown, ().
    """

    decodes: bool
    weight: Tensor
    gain: Tensor


class PixelPlayer(DenoisingPlayer):
    """The denoiser with both losses.

    forward(phase, draws, shared) -> {"loss", "time", "latent_loss", "weighted_error",
    "pixel_weight", "pixel_ratio"} and where it decodes {"pixel_loss", "decoder_gain"}.
    """

    def __init__(self, base: DenoisingPlayer, config: PixelConfig, decoder: Decoder) -> None:
        super().__init__(base.denoiser, base.min_snr, base.guidance)
        self.config = config
        self.decoder = decoder

    def forward(self, phase: str, draws: Draws, shared: Shared) -> dict[str, Any]:
        """The terms, each (B,); ratios are pairs of them."""
        assert isinstance(draws, PixelDraws) and isinstance(shared, PixelShared)
        config, denoised = self.config, self.denoise(draws, shared)
        latent = self.loss(denoised, draws.t)
        z, delta, factor = self._compared(denoised, draws, shared)
        error = factor * delta.square().flatten(1).mean(1)
        terms: dict[str, Any] = {
            "time": self.denoiser.schedule.place(draws.t),
            "latent_loss": latent.detach(),
            "weighted_error": error.detach(),
            "pixel_weight": shared.weight.expand_as(error),
        }
        extra = shared.gain * error if config.control else torch.zeros_like(error)
        if shared.decodes:
            lean = config.memory == "low"
            with torch.set_grad_enabled(torch.is_grad_enabled() and not config.control):
                pixel = factor * decoded_error(
                    self.decoder,
                    z,
                    delta,
                    crop=draws.crop,
                    checkpoint="resnet" if lean else None,
                    lean=lean,
                )
            if not config.control:
                extra = config.every * pixel
            terms["pixel_loss"] = pixel.detach()
            terms["decoder_gain"] = (terms["pixel_loss"], terms["weighted_error"])
        terms["loss"] = config.latent_weight * latent + shared.weight * extra
        terms["pixel_ratio"] = (shared.weight * extra.detach(), terms["latent_loss"])
        return terms

    def _compared(
        self, denoised: Denoised, draws: PixelDraws, shared: Shared
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z, delta, factor): the loss is factor (D(z) - D(z + delta))^2; factor is (B,)."""
        schedule, config, t = self.denoiser.schedule, self.config, draws.t
        if config.target == "noisy":
            said = denoised.z_t, denoised.output, denoised.target, t
            z, delta = noisy_inputs(schedule, *said)
            place = schedule.place(t).to(delta)
            factor = flow_emphasis(place) if config.emphasis else torch.ones_like(place)
            return z, delta, factor
        delta = noise_only_delta(schedule, denoised.output, denoised.target, t)
        alpha, sigma = schedule.alpha_sigma(t, delta.dtype)
        weight = clean_delta(schedule.noise_gain(t, delta.dtype), alpha).square()
        gate = clean_factor(
            (alpha / sigma).square(), weight, config.clean_min_snr, config.clean_max_weight
        )
        return shared.z0, clean_delta(delta, alpha), gate


class PixelObjective(DenoisingObjective):
    """Pixel-space post-training of all weights, or of the LoRA that the model carries.

    Arguments:
        model: what to train; parameters of its denoiser with `requires_grad` are trained.
        config: see `PixelConfig`.
        denoising: noise, times, weights and dropout of the latent loss.
        lora: name of the LoRA that is trained, None when all weights are.
        size: edge of the training pictures in pixels, the model's own by default; a given window
            must be smaller.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: PixelConfig,
        denoising: DenoisingConfig,
        lora: str | None = None,
        size: int | None = None,
    ) -> None:
        config.check()
        super().__init__(model, denoising, lora)
        if config.emphasis and model.schedule.kind != "flow":
            raise UserError("pixel.emphasis: is for flow models; leave it out.")
        self.pixel = config
        codec, source = model.codec, config.decoder
        self._decoder = codec if source is None else load_tiny_decoder(source, codec)
        check_decoder(self._decoder, model.family.name)
        edge = size or model.default_size
        check_crop(config.crop_latent, *model.latent_shape(edge, edge)[1:], "pixel.crop_latent")
        self._player = PixelPlayer(self._player, config, self._decoder)
        self._step = 0
        self._warned = False
        self._sums = {name: torch.zeros(()) for name in ("latent", "pixel", "error")}

    def phases(self) -> Sequence[Phase]:
        """One step of the denoiser."""
        return (Phase("pixel", "denoiser"),)

    def place(self, device: torch.device) -> None:
        """Make the null conditioning and the sums there; networks follow when they are needed."""
        super().place(device)
        self._sums = {name: total.to(self._device) for name, total in self._sums.items()}

    def begin(self, step: int) -> None:
        """Which steps decode, and which calibrate, follows from their number."""
        self._step = step

    @property
    def _calibrates(self) -> bool:
        return self._step // self.pixel.every < self.pixel.calibration

    @property
    def _decodes(self) -> bool:
        due = self._step % self.pixel.every == 0
        return due and (self._calibrates or not self.pixel.control)

    def draw(self, batch: Batch, repeat: int) -> PixelDraws:
        """`Draws`, and a window by address."""
        draws = super().draw(batch, repeat)
        height, width = self._latent_shape(batch)[-2:]
        size = self.pixel.crop_latent
        if size is None and min(height, width) >= _CROPPED_FROM:
            size = _CROP
        purpose = f"pixel crop/{repeat}" if repeat else "pixel crop"
        crop = draw_crop(batch.keys, height, width, size or None, purpose)
        return PixelDraws(**vars(draws), crop=None if crop is None else crop.to(self._device))

    def shared(self, draws: Draws) -> PixelShared:
        """Latents, conditioning, and the weights of this step."""
        both = super().shared(draws)
        if self._decodes and self._decoder.device != self._device:
            self._decoder.to(self._device)
        return PixelShared(**vars(both), decodes=self._decodes, weight=self.weight, gain=self.gain)

    @property
    def weight(self) -> Tensor:
        """lambda, (): as given, or from the batches so far; 0 before the first one."""
        latent, pixel = self._sums["latent"], self._sums["pixel"]
        if self.pixel.weight is not None:
            return torch.full_like(pixel, self.pixel.weight)
        return torch.where(pixel > 0, balanced_weight(latent, pixel), 0)

    @property
    def gain(self) -> Tensor:
        """g, (): pixel loss over the same of the latents; 0 before the first batch."""
        pixel, error = self._sums["pixel"], self._sums["error"]
        return torch.where(error > 0, pixel / error, 0)

    def shown(self) -> Sequence[str]:
        """The pixel term beside the latent one, and lambda."""
        return ("pixel_ratio", "pixel_weight")

    def watched(self) -> Sequence[str]:
        """What lambda and g are made of; there is no pixel loss in a step that does not decode."""
        return ("latent_loss", "pixel_loss", "weighted_error")

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """Add a decoded batch up, until there are enough of them."""
        if self._decodes and self._calibrates:
            terms = ("latent_loss", "pixel_loss", "weighted_error")
            for total, term in zip(self._sums.values(), terms, strict=True):
                total += means[term]

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The sums of the calibration."""
        return {"calibration": self._sums}

    def inspect(self) -> None:
        """Warn, once, of a calibrated lambda that does not make both terms count alike."""
        decoded = self._step // self.pixel.every + 1
        if self._warned or self.pixel.weight is not None or decoded < self.pixel.calibration:
            return
        latent, pixel = self._sums["latent"].item(), self._sums["pixel"].item()
        low, high = BOUNDS
        if pixel > 0 and low <= latent / pixel <= high:
            return
        self._warned = True
        if pixel == 0:
            told = "no pixel loss was found to calibrate lambda by, so that it stays 0"
            right = "give --pixel.weight, or lower --pixel.clean-min-snr"
            warn(f"pixel: {told}; {right}.")
            return
        bound = low if latent / pixel < low else high
        warn(
            f"pixel: lambda lies at its bound {bound:g}; the two losses would count alike at "
            f"{latent / pixel:.3g}, to be had with --pixel.weight {latent / pixel:.3g}."
        )
