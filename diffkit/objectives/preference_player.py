"""The denoiser with the loss of preference pairs: winners and losers in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.objectives.adaptive_dpo import (
    AdaptiveConfig,
    Judgement,
    adaptive_dpo_loss,
    batch_statistics,
    judge,
)
from diffkit.objectives.denoising import denoising_loss
from diffkit.objectives.preference_config import PreferenceConfig
from diffkit.objectives.preference_losses import (
    alpha_dpo_loss,
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_accuracy,
    ipo_loss,
    loser_scale,
    preference_logit,
    rdpo_loss,
    scale_gradient,
)
from diffkit.objectives.preference_state import ANNOTATORS, Controls
from diffkit.perceptual.decoded import Decoder, LatentCrop, decoded_error, noisy_inputs

__all__ = ["Errors", "Noisy", "PairMaterial", "PreferencePlayer"]


@dataclass(frozen=True)
class Noisy:
    """N noisy pictures and what a network should make of them; of pairs, first all winners.

    Attributes:
        z_t, target: (N, C, h, w), at least float32.
        t: (N,).
        cond: of N.
        crop: of N, the window that is decoded; None for all.
    """

    z_t: Tensor
    t: Tensor
    cond: Conditioning
    target: Tensor
    crop: LatentCrop | None = None

    def first(self, count: int) -> Noisy:
        """The first pictures alone, whole."""
        rows = slice(count)
        return Noisy(self.z_t[rows], self.t[rows], self.cond.select(rows), self.target[rows])


@dataclass(frozen=True)
class Errors:
    """Mean squared errors of N pictures, (N,): of the output, and between decoded pictures."""

    latent: Tensor
    decoded: Tensor | None = None


@dataclass(frozen=True)
class PairMaterial:
    """What frozen weights say of B pairs, without gradients.

    Attributes:
        noisy: of 2B.
        reference: errors of the start model at all 2B; at the B winners where only their drift is
            looked at; None where it is not asked.
        annotators: latent errors of the other annotators, each (2B,).
        controls: see `Controls`.
    """

    noisy: Noisy
    reference: Errors | None
    annotators: tuple[Tensor, ...]
    controls: Controls


class PreferencePlayer(nn.Module):
    """forward("preference", draws, material) -> the loss of B pairs and what is logged, each (B,).

    The same module with other weights is the reference and the annotators:
    forward("latent" or "decoded", None, noisy) -> `Errors`, "decoded" with those of the pictures.

    Logged are:

    - "accuracy": implicit accuracy, 1 where the model prefers the winner (more than the reference
      does), 1/2 where it has no preference;
    - "margin": s, without kappa;
    - "logit": kappa |s|; means far above 5 say that kappa is too large: such pairs have no
      gradient, or the full one, whatever s is;
    - "winner_error", "loser_error", "reference_error": e_th(w), e_th(l), e_ref(w);
    - "winner_drift": ratio of the first to the last;
    - "win_rate": 1 where e_th(w) < e_ref(w), 1/2 where they are equal: the share of winners that
      the model denoises better than the reference;
    - "weight" and "minority": W and u of Adaptive-DPO.

    Arguments:
        denoiser: the network.
        guidance: scale told to a network with a guidance embedding.
        config, adaptive: of the loss; a kappa of None is measured.
        decoder: of the latents, for the loss of decoded pictures.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: float | None,
        config: PreferenceConfig,
        adaptive: AdaptiveConfig,
        decoder: Decoder,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance = guidance
        self.config = config
        self.adaptive = adaptive
        self.decoder = decoder

    def forward(self, phase: str, draws: Any, material: Any) -> Any:
        """The loss with what is logged, or the errors of one view of the network; see above."""
        if phase != "preference":
            return self._errors(material, self._output(material), decode=phase == "decoded")
        noisy: Noisy = material.noisy
        output = self._output(noisy)
        errors = self._errors(noisy, output, decode=self.config.pixel != "none")
        terms = self._latent_terms(errors.latent, output.detach() - noisy.target, material)
        if errors.decoded is not None:
            terms |= self._pixel_terms(terms["loss"], errors.decoded, material)
        time = self.denoiser.schedule.place(noisy.t).chunk(2)[0]
        return terms | {"time": time}

    def minority(self, material: PairMaterial) -> Tensor:
        """u of B pairs, as of a step after the warm-up; no gradient."""
        with torch.no_grad():
            latent = self._errors(material.noisy, self._output(material.noisy), False).latent
            return self._judge(self._annotated(latent, material), material.controls, False).u

    # -- errors -------------------------------------------------------------------------------

    def _output(self, noisy: Noisy) -> Tensor:
        told = None
        if self.guidance is not None:
            told = torch.full((len(noisy.z_t),), self.guidance, device=noisy.z_t.device)
        output: Tensor = self.denoiser(noisy.z_t, noisy.t, noisy.cond, told)
        return output.float() if output.dtype != torch.float64 else output

    def _errors(self, noisy: Noisy, output: Tensor, decode: bool) -> Errors:
        latent = denoising_loss(output, noisy.target)
        if not decode:
            return Errors(latent)
        said = noisy.z_t, output, noisy.target, noisy.t
        z, delta = noisy_inputs(self.denoiser.schedule, *said)
        decoded = decoded_error(
            self.decoder,
            z,
            delta,
            crop=noisy.crop,
            lean=True,
            relative=self.config.pixel_relative,
        )
        return Errors(latent, decoded)

    def _annotated(self, latent: Tensor, material: PairMaterial) -> Tensor:
        """s_m of all annotators, (M, B), without gradients."""
        assert material.reference is not None
        reference = _halves(material.reference.latent)
        each = (latent.detach(), *material.annotators)
        return torch.stack([preference_logit(*_halves(errors), reference) for errors in each])

    def _judge(self, s: Tensor, controls: Controls, warm: bool) -> Judgement:
        norm, mean = controls.norm, controls.mean
        if self.adaptive.normalization == "batch":
            norm, mean = batch_statistics(s)
        return judge(self.adaptive, s, norm, controls.kappa * mean, warm)

    # -- terms --------------------------------------------------------------------------------

    def _latent_terms(
        self, latent: Tensor, residual: Tensor, material: PairMaterial
    ) -> dict[str, Any]:
        config, controls = self.config, material.controls
        winner, loser = _halves(latent)
        terms = {"winner_error": winner.detach(), "loser_error": loser.detach()}
        if config.referenced or config.drift_limit is not None:
            terms |= _drift(winner.detach(), material.reference)
        if config.sdpo:
            loser = scale_gradient(loser, loser_scale(*_halves(residual)))
        s = preference_logit(winner, loser, self._reference(material))
        judgement = None
        if config.adaptive:
            each = self._annotated(latent, material)
            judgement = self._judge(each, controls, controls.warm)
            terms |= {"weight": judgement.weight, "minority": judgement.u}
            squares = zip(ANNOTATORS, each.square(), strict=True)
            terms |= {f"square_{name}": square for name, square in squares}
        loss = self._loss(s, controls, judgement)
        if config.anchor:
            loss = loss + config.anchor * controls.kappa * winner
        s = s.detach()
        terms |= {"accuracy": implicit_accuracy(s), "margin": s}
        if config.loss == "alpha_dpo":
            terms["probability"] = torch.sigmoid(controls.kappa * s)
        terms["logit"] = controls.kappa * s.abs()
        if config.kappa is None:
            terms |= {"difference": s.abs(), "kappa": controls.kappa.expand_as(s)}
        return {"loss": loss, **terms}

    def _reference(self, material: PairMaterial) -> tuple[Tensor, Tensor] | None:
        if not self.config.referenced:
            return None
        assert material.reference is not None
        return _halves(material.reference.latent)

    def _loss(self, s: Tensor, controls: Controls, judgement: Judgement | None) -> Tensor:
        config, kappa = self.config, controls.kappa
        if judgement is not None and config.loss == "adaptive_dpo":
            return adaptive_dpo_loss(s, kappa, judgement.weight, judgement.margin)
        if config.loss in ("cdpo", "rdpo"):
            assert config.flip_rate is not None  # checked
            smoothed = cdpo_loss if config.loss == "cdpo" else rdpo_loss
            return smoothed(s, kappa, config.flip_rate)
        if config.loss == "hinge":
            return hinge_loss(s, kappa)
        if config.loss == "alpha_dpo":
            return alpha_dpo_loss(s, kappa, controls.alpha)
        if config.loss.endswith("ipo"):
            # DPO's slope at s = 0, for what is added, for clipping and for Adam.
            beta = config.used_ipo_beta
            loss = kappa * beta / 2 * ipo_loss(s, beta)
            return loss if judgement is None else judgement.weight * loss
        return dpo_loss(s, kappa)

    def _pixel_terms(
        self, loss: Tensor, decoded: Tensor, material: PairMaterial
    ) -> dict[str, Tensor]:
        config, kappa = self.config, material.controls.pixel_kappa
        reference = None
        if config.pixel == "dpo":
            assert material.reference is not None and material.reference.decoded is not None
            reference = _halves(material.reference.decoded)
        winner, loser = _halves(decoded)
        s = preference_logit(winner, loser, reference)
        pixel = dpo_loss(s, kappa)
        terms = {"loss": loss + config.used_pixel_weight * pixel, "pixel_loss": pixel.detach()}
        terms |= {"pixel_winner_error": winner.detach(), "pixel_loser_error": loser.detach()}
        terms["pixel_margin"] = s.detach()
        if config.pixel_kappa is None:
            terms["pixel_kappa"] = kappa.expand_as(s)
        if config.pixel == "simpo" and config.pixel_kappa is None:
            terms["pixel_difference"] = s.detach().abs()
        return terms


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Winners and losers, (B, ...) each, of (2B, ...)."""
    winner, loser = rows.chunk(2)
    return winner, loser


def _drift(winner: Tensor, start: Errors | None) -> dict[str, Any]:
    """What is logged of the winners beside the start model; nulls where it was not asked."""
    if start is None:
        nothing = torch.zeros_like(winner)
        return dict.fromkeys(("reference_error", "winner_drift", "win_rate"), (nothing, nothing))
    reference, one = start.latent[: len(winner)], torch.ones_like(winner)
    return {
        "reference_error": (reference, one),
        "winner_drift": (winner, reference),
        "win_rate": (implicit_accuracy(reference - winner), one),
    }
