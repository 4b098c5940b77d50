"""Preference optimisation: a model learns from pairs which of two pictures people chose.

    loss(i) = f(kappa s_i) + anchor kappa e_th(w_i) + mu f_pixel(kappa_pixel S_i)

s is what the model's squared errors say of a pair beyond those of the reference
(`preference_losses`), S the same of errors between decoded pictures (`perceptual.decoded`; Zhang et
al. 2024, arXiv:2409.17565), f one of Diffusion-DPO and its relatives, weighed pair by pair in
Adaptive-DPO (`adaptive_dpo`). Winner and loser have the same prompt, time and noise.

Reference and annotators are views of the one denoiser: the LoRA switched off, the start weights or
moving averages in place of the trained ones. They run before the model itself, without gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.data.preferences import PreferenceBatch
from diffkit.errors import RunFailed, UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.base import Objective, Phase
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective, DenoisingPlayer, Draws
from diffkit.objectives.preference_config import PreferenceConfig, check_draws
from diffkit.objectives.preference_player import Errors, Noisy, PairMaterial, PreferencePlayer
from diffkit.objectives.preference_state import ANNOTATORS, PreferenceState
from diffkit.objectives.views import Ema, snapshot, weights_exchanged
from diffkit.perceptual.decoded import LatentCrop, check_crop, check_decoder, draw_crop

__all__ = ["PairDraws", "PreferenceConfig", "PreferenceObjective"]

_LOOK = 10
"""Steps from one look at the start model to the next, where the loss itself has no reference."""


@dataclass(frozen=True)
class PairDraws:
    """B pairs on the device, with the randomness that winner and loser share.

    Attributes:
        winners: the winners with posterior noise, noise, time and dropped captions of each pair.
        losers: the other picture of each pair.
        crop: window of all 2B pictures that is decoded, winners first; None for all.
    """

    winners: Draws
    losers: Batch
    crop: LatentCrop | None


class PreferenceObjective(Objective):
    """Preference optimisation of all weights, or of the LoRA that the model carries.

    Arguments:
        model: what to train; parameters of its denoiser with `requires_grad` are trained. As it is
            when `place` is called, it is the reference.
        config: see `PreferenceConfig`.
        adaptive: see `AdaptiveConfig`; read where the loss is adaptive.
        denoising: noise, times and dropout.
        max_steps: of the run, a part of which is Adaptive-DPO's warm-up.
        lora: name of the LoRA that is trained, None when all weights are.
        size: edge of the training pictures in pixels, the model's own by default; the usual kappa
            goes by it.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: PreferenceConfig,
        adaptive: AdaptiveConfig,
        denoising: DenoisingConfig,
        max_steps: int,
        lora: str | None = None,
        size: int | None = None,
    ) -> None:
        config.check()
        adaptive.check()
        check_draws(config, denoising)
        self.model = model
        edge = size or model.default_size
        latents = model.latent_shape(edge, edge)
        config = self.config = config.resolved(math.prod(latents))
        self._base = DenoisingObjective(model, denoising, lora)
        self._times = _listed_times(config, model)
        if config.pixel != "none":
            check_decoder(model.codec, model.family.name)
            check_crop(config.pixel_crop, *latents[1:], "preference.pixel_crop")
        player = self._base.players()["denoiser"]
        assert isinstance(player, DenoisingPlayer)
        self._player = PreferencePlayer(
            model.denoiser, player.guidance, config, adaptive, model.codec
        )
        self._lora = lora
        self._adaptive = adaptive
        self._warmup = adaptive.warmup(max_steps)
        self._step = 0
        self._start: dict[str, Tensor] = {}
        self._annotators: dict[str, Ema] = {}
        self._state = PreferenceState(config, adaptive, self._warmup, torch.device("cpu"))

    def players(self) -> Mapping[str, nn.Module]:
        """One: the denoiser."""
        return {"denoiser": self._player}

    def phases(self) -> Sequence[Phase]:
        """One step of the denoiser."""
        return (Phase("preference", "denoiser"),)

    def averaged(self) -> Sequence[str]:
        """The denoiser."""
        return ("denoiser",)

    def place(self, device: torch.device) -> None:
        """Take the model as it is for the reference and the annotators; move what draws need."""
        self._base.place(device)
        config = self.config
        self._state = PreferenceState(config, self._adaptive, self._warmup, device)
        if self._lora is None and (config.referenced or config.drift_limit is not None):
            self._start = snapshot(self._player)
        if config.adaptive:
            decays = self._adaptive.slow, self._adaptive.fast
            names = ANNOTATORS[1:]
            self._annotators = {n: Ema(self._player, d) for n, d in zip(names, decays, strict=True)}
        if config.pixel != "none":
            self.model.codec.to(device)

    # -- what lasts ---------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Training step `step` = 0, 1, ... is about to run."""
        self._step = step

    def shown(self) -> Sequence[str]:
        """How many pairs are told apart, and whether winners get worse."""
        return ("accuracy", "winner_drift")

    def watched(self) -> Sequence[str]:
        """Errors, margins and squares, as far as something follows from them."""
        return self._state.watched()

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """Let the averages of the weights and of the terms follow."""
        self._state.update(self._step, means)
        for average in self._annotators.values():
            average.update(self._step)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The running means, and the annotators' weights."""
        annotators = {f"annotator_{n}": ema.weights for n, ema in self._annotators.items()}
        means = self._state.tensors()
        return annotators | ({"preference": means} if means else {})

    def inspect(self) -> None:
        """Raise `RunFailed` where the winners are denoised much worse than at the start."""
        limit, drift = self.config.drift_limit, self._state.drift()
        if limit is None or drift is None or drift <= limit:
            return
        raise RunFailed(
            f"step {self._step + 1}: the error of the winners has grown to {drift:.3f} times the "
            f"start model's, beyond preference.drift_limit = {limit:g}: the model prefers them by "
            "making the losers still worse. The last checkpoint is kept: the same command with "
            f"--max-steps set to its step {self._same_weights()}writes its result, and a higher "
            "--preference.drift-limit goes on from it. A new run may do better with a lower "
            "--learning-rate, --preference.anchor 0.05, --preference.sdpo, or a larger "
            "--preference.kappa."
        )

    def _same_weights(self) -> str:
        """The flag that lets a shorter run weigh its pairs as this one does."""
        if not self.config.adaptive:
            return ""
        return f"and --adaptive.warmup-steps {self._warmup} "

    # -- a step -------------------------------------------------------------------------------

    def draw(self, batch: PreferenceBatch, repeat: int) -> PairDraws:
        """The randomness of each pair, by address, once for its two pictures."""
        winners = self._base.draw(batch.winners, repeat)
        if self._times:
            place = (batch.keys.uniform("listed time") * len(self._times)).long()
            times = torch.tensor(self._times, dtype=winners.t.dtype)
            winners = replace(winners, t=times[place].to(winners.t.device, non_blocking=True))
        height, width = winners.eps.shape[-2:]
        crop = draw_crop(batch.keys, height, width, self.config.pixel_crop, "decoded window")
        if crop is not None:
            top, left = (torch.cat([side, side]) for side in (crop.top, crop.left))
            crop = LatentCrop(top, left, crop.height, crop.width).to(winners.t.device)
        return PairDraws(winners, batch.losers.to(winners.t.device), crop)

    def shared(self, draws: PairDraws) -> PairMaterial:
        """Noisy pictures, and what the reference and the annotators make of them.

        A pair has one conditioning. Where it tells sizes they are the winner's, so that they are no
        way to tell the two apart.
        """
        noisy = self._noisy(draws)
        reference = None
        if self.config.referenced:
            reference = self._ask_start(noisy, decode=self.config.pixel == "dpo")
        elif self.config.drift_limit is not None and self._step % _LOOK == 0:
            reference = self._ask_start(noisy.first(len(draws.losers)), decode=False)
        annotators = []
        for average in self._annotators.values():
            with average.applied():
                annotators.append(self._player("latent", None, noisy).latent)
        controls = self._state.controls(self._step)
        return PairMaterial(noisy, reference, tuple(annotators), controls)

    def minority(self, batch: PreferenceBatch) -> Tensor:
        """u of each pair, (B,), as the annotators judge it now; for losses with annotators.

        Large for pairs whose label the models contradict: what a test of known wrong labels reads.
        With the running mean square it needs a step to have been made.
        """
        with torch.no_grad():
            return self._player.minority(self.shared(self.draw(batch, 0)))

    def save(self, folder: Path) -> None:
        """Write a plain diffusers folder, or the LoRA in diffusers' layout."""
        self._base.save(folder)

    def _noisy(self, draws: PairDraws) -> Noisy:
        winners, schedule = draws.winners, self.model.schedule
        halves = (winners, replace(winners, batch=draws.losers))
        z0 = torch.cat([self._base.latents(half) for half in halves])
        cond = self._base.condition(winners)
        eps, t = torch.cat([winners.eps] * 2), torch.cat([winners.t] * 2)
        z_t, target = schedule.add_noise(z0, eps, t), schedule.target(z0, eps, t)
        return Noisy(z_t, t, Conditioning.cat([cond, cond]), target, draws.crop)

    def _ask_start(self, noisy: Noisy, decode: bool) -> Errors:
        with self._as_start():
            errors: Errors = self._player("decoded" if decode else "latent", None, noisy)
        return errors

    @contextlib.contextmanager
    def _as_start(self) -> Iterator[None]:
        """Inside the block the denoiser is the start model."""
        if self._lora is None:
            with weights_exchanged(self._player, self._start):
                yield
        else:
            from diffkit.models.lora import disable_lora

            with disable_lora(self.model):
                yield


def _listed_times(config: PreferenceConfig, model: LatentDiffusion) -> tuple[int, ...]:
    """The times of the config; `UserError` for those that the model does not have."""
    schedule = model.schedule
    if not config.timesteps:
        return ()
    if schedule.kind == "edm":
        raise UserError("preference.timesteps: EDM models have no numbered times; leave it out.")
    last = schedule.num_train_timesteps - (schedule.kind == "ddpm")
    first = 0 if schedule.kind == "ddpm" else 1
    for t in config.timesteps:
        if not first <= t <= last:
            raise UserError(
                f"preference.timesteps: {t} is not one of this model's times, {first} to {last}."
            )
    return config.timesteps
