"""Latent perceptual loss: denoising training that also sees what the decoder sees (LPL).

Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives" (ICLR 2025, 2411.04873). For
the last part of training, with z0_hat the one-step estimate of z_0 and LPL the distance of the
decoder's features of both (`diffkit.perceptual.decoder_features`),

    loss(b) = L_diff(b) + w gate(t_b) LPL(b),    gate(t) = 1 if SNR(t) >= tau else 0

averaged over the whole batch, samples outside the gate included: w multiplies an expectation over
all times. Weights of L_diff such as min-SNR's do not multiply LPL. Published implementations read
tau in two ways, as a bound of alpha^2 / sigma^2 or of sigma / alpha; the author's code has the
former (its SNR of 3 is t < 203 on Stable Diffusion's schedule, t <= 0.366 of a straight flow).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffkit.console import warn
from diffkit.data.batch import Batch
from diffkit.models.codec import Codec
from diffkit.models.eager import uncompiled
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import Phase
from diffkit.objectives.denoising import (
    Denoised,
    DenoisingConfig,
    DenoisingObjective,
    DenoisingPlayer,
    Draws,
    Shared,
)
from diffkit.objectives.latent_perceptual_config import GateReading, LatentPerceptualConfig
from diffkit.perceptual.decoded import check_decoder
from diffkit.perceptual.decoder_features import PerceptualTerms, latent_perceptual_loss

__all__ = [
    "GatedDraws",
    "LatentPerceptualObjective",
    "LatentPerceptualPlayer",
    "ShareControl",
    "share_weight",
    "snr_gate",
    "whole_batch",
]

FIRST_WEIGHT = 3.0
"""The paper's weight: of a share's first step, and as long as no sample was gated. This and
`BOUNDS` are of the spatial norm; with another they are multiplied by `FeatureLoss.unit`."""

BOUNDS = (0.1, 100.0)
"""Of a weight that follows from a share."""

DECAY = 0.99
FROZEN_AFTER = 200
INFLATED = 1.02
"""Ratio of predicted to true variance above which a run is warned about."""
WATCHED = 100
"""Steps after which the averages tell more than the luck of a few samples."""


# -- mathematics --------------------------------------------------------------------------------


def snr_gate(snr: Tensor, threshold: float, reading: GateReading = "snr") -> Tensor:
    """Which samples have the loss, bool of snr's shape: a hard threshold.

    Arguments:
        snr: alpha_t^2 / sigma_t^2.
        threshold: tau, above 0.
        reading: "snr": snr >= tau; "noise_to_signal": sigma_t / alpha_t <= tau, snr >= 1 / tau^2.
    """
    return snr >= (threshold if reading == "snr" else 1 / threshold**2)


def whole_batch(values: Tensor, gated: Tensor, count: int) -> Tensor:
    """gate(t_b) LPL(b), (B,): the values (n,) at the places `gated` (n,), 0 elsewhere."""
    return values.new_zeros(count).index_copy(0, gated, values)


def share_weight(denoising: Tensor, perceptual: Tensor, share: float, unit: float = 1.0) -> Tensor:
    """w = s / (1 - s) L / G, at which w G is the part s of L + w G; within unit [0.1, 100].

    Arguments:
        denoising: L, an average of the denoising loss, ().
        perceptual: G, that of the gated loss over the whole batch; 3 unit is the weight where it is
            0.
        share: s, in (0, 1).
        unit: `FeatureLoss.unit`.
    """
    wanted = share / (1 - share) * denoising / perceptual
    low, high = (unit * bound for bound in BOUNDS)
    return torch.where(perceptual > 0, wanted.clamp(low, high), unit * FIRST_WEIGHT)


class ShareControl:
    """The weight that keeps the perceptual loss at a share, from moving averages (0.99) of both.

    Both averages start at 0 and so lack the same factor of bias, which their ratio does not have. A
    step without gated samples enters as 0. After 200 steps with the loss the weight is frozen.

    Arguments:
        share: None for a weight that stays.
        weight: at the start.
        unit: of the bounds of the weight, see `share_weight`.
    """

    def __init__(self, share: float | None, weight: float, unit: float = 1.0) -> None:
        self.share = share
        self.unit = unit
        self.tensors = {
            name: torch.tensor(value)
            for name, value in {
                "weight": weight,
                "denoising": 0.0,
                "perceptual": 0.0,
                "steps": 0.0,
            }.items()
        }

    @property
    def weight(self) -> Tensor:
        """w, ()."""
        return self.tensors["weight"]

    def place(self, device: torch.device) -> None:
        """Move the numbers there."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def update(self, denoising: Tensor, perceptual: Tensor) -> None:
        """Take in the means of one step over the global batch, each ()."""
        averages = self.tensors["denoising"], self.tensors["perceptual"]
        for average, mean in zip(averages, (denoising, perceptual), strict=True):
            average.lerp_(mean.to(average), 1 - DECAY)
        self.tensors["steps"].add_(1)
        if self.share is None:
            return
        found = share_weight(*averages, self.share, self.unit)
        moving = self.tensors["steps"] <= FROZEN_AFTER
        self.weight.copy_(torch.where(moving, found, self.weight))

    def bounded(self) -> float | None:
        """The bound at which the weight was frozen; None while it moves and for one in between."""
        if self.share is None or self.tensors["steps"] < FROZEN_AFTER:
            return None
        weight = self.weight.item() / self.unit
        return next((self.unit * b for b in BOUNDS if abs(weight / b - 1) < 1e-5), None)


# -- objective ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatedDraws(Draws):
    """One micro-batch, with `gated` (n,): the places of the samples that have the loss."""

    gated: Tensor


class LatentPerceptualPlayer(DenoisingPlayer):
    """The denoiser with both losses.

    forward(phase, draws, shared) -> "loss", "time", "denoising_loss", "lpl" (gate LPL), "lpl_gated"
    and "lpl_weight", each (B,); "lpl_share", "lpl_largest" and "lpl_variance_BLOCK" as pairs.
    """

    def __init__(
        self,
        denoising: DenoisingPlayer,
        codec: Codec,
        config: LatentPerceptualConfig,
        control: ShareControl,
    ) -> None:
        super().__init__(denoising.denoiser, denoising.min_snr, denoising.guidance)
        self.codec = codec
        self.features = config.features()
        self.lean = config.memory == "low"
        self.silent = config.weight == 0
        self.names = self.features.names(codec)
        self.control = control
        self.active = True
        # The number of gated samples changes from step to step: this part is not compiled.
        self._terms: Callable[..., PerceptualTerms] = uncompiled(self._compare)

    def forward(self, phase: str, draws: Draws, shared: Shared) -> dict[str, Any]:
        """The losses of each sample and what is logged of them."""
        assert isinstance(draws, GatedDraws)
        denoised = self.denoise(draws, shared)
        loss = self.loss(denoised, draws.t)
        terms = {"loss": loss, "time": self.denoiser.schedule.place(draws.t)}
        terms["denoising_loss"] = loss.detach()
        ones = torch.ones_like(loss)
        terms["lpl_gated"] = whole_batch(ones[: len(draws.gated)], draws.gated, len(loss))
        terms["lpl_weight"] = ones * self.control.weight * self.active
        if self.active and len(draws.gated):
            return terms | self._perceptual(denoised, draws, shared, terms)
        none = torch.zeros_like(loss), torch.zeros_like(loss)
        pairs = ("lpl_largest", *(f"lpl_variance_{name}" for name in self.names))
        return (
            terms
            | {"lpl": none[0], "lpl_share": (none[0], loss.detach())}
            | dict.fromkeys(pairs, none)
        )

    def _perceptual(
        self, denoised: Denoised, draws: GatedDraws, shared: Shared, terms: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        found = self._terms(denoised, draws, shared)
        lpl = whole_batch(found.value, draws.gated, len(terms["loss"]))
        added = terms["lpl_weight"] * lpl
        # A weight of 0 would turn infinite features into NaN.
        loss = terms["loss"] if self.silent else terms["loss"] + added
        variances = zip(
            found.predicted_variance.unbind(1), found.target_variance.unbind(1), strict=True
        )
        return {
            "loss": loss,
            "lpl": lpl.detach(),
            "lpl_share": (added.detach(), loss.detach()),
            "lpl_largest": (found.largest, torch.ones_like(found.largest)),
            **{f"lpl_variance_{n}": pair for n, pair in zip(self.names, variances, strict=True)},
        }

    def _compare(self, denoised: Denoised, draws: GatedDraws, shared: Shared) -> PerceptualTerms:
        """LPL of the gated samples, which are chosen first: others may have no finite estimate."""
        rows = draws.gated
        output = denoised.output.detach() if self.silent else denoised.output
        predicted = self.denoiser.schedule.prediction(
            output[rows], denoised.z_t[rows], draws.t[rows]
        )
        return latent_perceptual_loss(
            self.codec, predicted.x0, shared.z0[rows], self.features, lean=self.lean
        )


class LatentPerceptualObjective(DenoisingObjective):
    """Denoising training with the latent perceptual loss, of all weights or of a LoRA.

    Arguments:
        model: what to train; its autoencoder is frozen.
        config: see `LatentPerceptualConfig`.
        denoising: see `DenoisingConfig`.
        lora: name of the LoRA that is trained, None when all weights are.

    Raises `UserError` for a model without a decoder and for configs that it cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: LatentPerceptualConfig,
        denoising: DenoisingConfig,
        lora: str | None = None,
    ) -> None:
        config.check()
        super().__init__(model, denoising, lora)
        self.lpl = config
        check_decoder(model.codec, model.family.name)
        unit = config.features().unit(model.codec)
        first = unit * FIRST_WEIGHT if config.weight is None else config.weight
        self._control = ShareControl(config.target_share(), first, unit)
        self._perceptual = LatentPerceptualPlayer(self._player, model.codec, config, self._control)
        self._player = self._perceptual
        self._variances = torch.zeros(len(self._perceptual.names), 2)
        self._warned: set[str] = set()

    def phases(self) -> Sequence[Phase]:
        """One step of the denoiser."""
        return (Phase("lpl", "denoiser"),)

    def place(self, device: torch.device) -> None:
        """Move the decoder and the controller's numbers there."""
        super().place(device)
        self.model.codec.to(device)
        self._control.place(device)
        self._variances = self._variances.to(device)

    def begin(self, step: int) -> None:
        """Switch the loss on at its first step."""
        self._perceptual.active = step >= self.lpl.start

    def draw(self, batch: Batch, repeat: int) -> GatedDraws:
        """Those of denoising, and the gate, which the device is not waited for."""
        draws = super().draw(batch, repeat)
        snr = self.model.schedule.snr(self.times(batch.keys, repeat))
        gate = snr_gate(snr, self.lpl.threshold, self.lpl.gate)
        gated = gate.nonzero().flatten().to(self._device, non_blocking=True)
        return GatedDraws(**{f.name: getattr(draws, f.name) for f in fields(draws)}, gated=gated)

    def shown(self) -> Sequence[str]:
        """The part that the perceptual loss has, and its weight."""
        return ("lpl_share", "lpl_weight")

    def watched(self) -> Sequence[str]:
        """Both losses and the variances."""
        return ("denoising_loss", "lpl", *(f"lpl_variance_{n}" for n in self._perceptual.names))

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """Move the averages, and the weight by them."""
        if not self._perceptual.active:
            return
        self._control.update(means["denoising_loss"], means["lpl"])
        step = torch.stack([means[f"lpl_variance_{name}"] for name in self._perceptual.names])
        self._variances.lerp_(step, 1 - DECAY)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The weight and the averages."""
        return {"lpl": {**self._control.tensors, "variances": self._variances}}

    def inspect(self) -> None:
        """Warn, each once, of a gate that never opens, of a share that is not reached, and of
        features whose variance is inflated."""
        if self._control.tensors["steps"] < WATCHED:
            return
        if self._control.tensors["perceptual"] == 0:
            self._warn_once(
                "gate",
                f"no sample was inside the gate in {WATCHED} steps or more; lower "
                "--lpl.threshold, or train more at clean times.",
            )
            return
        self._inspect_weight()
        if self.lpl.weight != 0:
            self._inspect_variances()

    def _inspect_weight(self) -> None:
        control, bound = self._control, self._control.bounded()
        if bound is None or control.share is None:
            return
        averages = control.tensors["denoising"].item(), control.tensors["perceptual"].item()
        wanted = control.share / (1 - control.share) * averages[0] / averages[1]
        self._warn_once(
            "weight",
            f"the weight was frozen at its bound {bound:g}; a share of {control.share:g} would "
            f"need {wanted:.4g}, to be had with --lpl.weight {wanted:.4g}.",
        )

    def _inspect_variances(self) -> None:
        ratios = (self._variances[:, 0] / self._variances[:, 1]).tolist()
        high = {
            name: ratio
            for name, ratio in zip(self._perceptual.names, ratios, strict=True)
            if ratio > INFLATED
        }
        if not high:
            return
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in high.items())
        cause, advice = self.lpl.against_inflation()
        self._warn_once(
            "variance",
            f"predicted features vary more than true ones ({told}; 1 is right){cause}. Compare "
            f"pictures with and without guidance; {advice} holds against it.",
        )

    def _warn_once(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warn(f"lpl: {text}")
