"""Reward-guided latent consistency distillation: few steps, towards what a reward prefers.

Li et al. 2024 (arXiv:2403.11027). To the distillation loss of the student's estimate f (see
`diffkit.objectives.consistency`) comes the reward of the same tensor, at all times,

    loss = d(f, f') - sum_k w_k a_t R_k(clamp(D(f), -1, 1), c)

directly, or through a proxy S that reads latents, which costs no decode and lets no gradient of the
pixels through. The proxy is a player of its own: after the student's step it is fitted to what the
reward says of the student's estimate, the target and the real picture (`diffkit.rewards.refit`).

The weights w_k keep each reward's gradient at f at a share of the distance's, or are constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.models.classes import Classes
from diffkit.models.codec import Codec
from diffkit.models.decode import Checkpoint
from diffkit.models.denoiser import Denoiser
from diffkit.models.few_step import frozen_teacher
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from diffkit.objectives.base import Phase
from diffkit.objectives.consistency import ConsistencyObjective
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.denoising import Draws
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.objectives.reward_player import (
    MAIN,
    ProxyPlayer,
    RewardDraws,
    RewardedPlayer,
    RewardShared,
    median_means,
)
from diffkit.objectives.reward_terms import PictureRewards, WeightedReward
from diffkit.objectives.shares import GradientShare
from diffkit.perceptual.decoded import check_decoder
from diffkit.randomness import SampleKeys
from diffkit.rewards.latent_clip import LatentClip
from diffkit.rewards.proxies import load_proxy, new_tap_proxy
from diffkit.rewards.proxy import LatentProxy, Told
from diffkit.rewards.refit import RunningMedian
from diffkit.rewards.tap_proxy import TapProxy, keep_until

__all__ = ["RewardGuidedObjective", "distinct_names", "prompts_of"]

_CLIP_RATE = 3.3e-6
"""Of the paper, for the last layers of a trained network."""

_HEAD_RATE = 1e-4


def distinct_names(names: Sequence[str]) -> list[str]:
    """The names, later ones of the same word with a number: clip, clip_2, ..."""
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{n}_{k + 1}" if k else n for n, k in zip(names, earlier, strict=True)]


def prompts_of(batch: Batch, classes: Classes | None) -> list[str]:
    """Captions, or names of the classes, of B samples; their tensors lie on the CPU."""
    if classes is None:
        return batch.captions
    if batch.labels is None:
        return [""] * len(batch)
    return [classes.name(number) for number in batch.labels.tolist()]


def _check_weighting(reward: RewardConfig, model: LatentDiffusion) -> None:
    if reward.weighting == "alpha" and model.schedule.prediction_type != "epsilon":
        raise UserError(
            f"reward.weighting: alpha takes back what an eps-model amplifies; this model predicts "
            f"{model.schedule.prediction_type}, whose estimates are not amplified, and would get "
            "no reward at the noisiest times; leave it out."
        )


def _check_latents(proxy: LatentClip, codec: Codec, place: Path) -> None:
    """Raise `UserError` for a proxy of another autoencoder's latents, as far as can be told."""
    config, (scale, shift) = proxy.config, codec.space()
    if config.channels != codec.channels or not codec.has_space(config.scale, config.shift):
        raise UserError(
            f"{place}: reads latents of {config.channels} channels, scaled by {config.scale} after "
            f"a shift by {config.shift}; this model's have {codec.channels}, {scale} and {shift}. "
            "Give one that was made for this model."
        )


def fitted_rows(keys: SampleKeys, share: float, repeat: int) -> tuple[Tensor, Tensor]:
    """(rows (n,), weights (n,)) of the samples that a part `share` of all is drawn of, by address.

    n is at least 1: where none was drawn, the first row comes with the weight 0.
    """
    chosen = keys.uniform(f"refit/{repeat}" if repeat else "refit") < share
    rows = chosen.nonzero().flatten()
    if len(rows):
        return rows, torch.full((len(rows),), 1 / share)
    return torch.zeros(1, dtype=torch.int64), torch.zeros(1)


class RewardGuidedObjective(ConsistencyObjective):
    """Reward-guided distillation of all weights, or of the LoRA that the model carries.

    Arguments:
        model: of `prepare_student`, see `ConsistencyObjective`.
        config: see `ConsistencyConfig`.
        reward: see `RewardConfig`.
        rewards: those that `reward` names, with their weights; none for a frozen proxy.
        lora: name of the LoRA that is trained, None when all weights are.
        dtype: of the teacher's copy.
        learning_rate: of the run, which the proxy's is told in parts of.
        seed: of the weights of a proxy that is made anew.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: ConsistencyConfig,
        reward: RewardConfig,
        rewards: Sequence[WeightedReward] = (),
        lora: str | None = None,
        dtype: torch.dtype = torch.float32,
        learning_rate: float = 1e-4,
        seed: int = 0,
    ) -> None:
        reward.check()
        super().__init__(model, config, lora, dtype)
        self.reward = reward
        self.pictures: PictureRewards | None = None
        self.proxy: LatentProxy | None = None
        self._read: Denoiser | None = None  # by a proxy
        self.median = RunningMedian()
        self._weights: GradientShare | None = None
        self._refit: ProxyPlayer | None = None
        self._learning_rate = learning_rate
        if reward.active:
            _check_weighting(reward, model)
            self._guide(rewards, dtype, seed)

    def _guide(self, rewards: Sequence[WeightedReward], dtype: torch.dtype, seed: int) -> None:
        """Make the rewards, their weights and the players that know of them."""
        config, reward, model = self.consistency, self.reward, self.model
        if config.segments > 1:
            raise UserError(
                "lcd.segments: a student of several segments ends in noisy latents, which no "
                "reward can judge; use --lcd.segments 1, or --reward.mode none."
            )
        if rewards:
            self.pictures = self._picture_rewards(rewards)
        if reward.proxied:
            self.proxy = self._open_proxy(dtype, seed).requires_grad_(False)
        weights = {"proxy": 1.0}
        if self.pictures is not None and not reward.proxied:
            weights = {name: weight for name, (_, weight) in self.pictures.rewards.items()}
        self._weights = GradientShare(MAIN, reward.shares(weights))
        if reward.mode == "proxy":
            assert self.proxy is not None and self.pictures is not None
            self.proxy.lock()
            own = self.pictures.logit_scale
            scale = own if reward.refit_temperature == "auto" else None
            options = self.median, scale, reward.smooth_real
            self._refit = ProxyPlayer(self.proxy, self.pictures, *options)
        score = None if self.proxy is None else self._scored
        given = model.denoiser, config, self._perceptual
        self._student = RewardedPlayer(*given, self._weights, self.pictures, score)

    def _picture_rewards(self, rewards: Sequence[WeightedReward]) -> PictureRewards:
        config, codec = self.reward, self.model.codec
        self._decoder: Codec | TinyDecoder = codec
        if config.decoder is not None:
            self._decoder = load_tiny_decoder(config.decoder, codec)
        check_decoder(self._decoder, self.model.family.name)
        names = distinct_names([reward.name for reward, _ in rewards])
        checkpoint: Checkpoint = None if config.checkpoint == "none" else config.checkpoint
        named = dict(zip(names, rewards, strict=True))
        return PictureRewards(named, self._decoder, config.chunk, checkpoint)

    def _open_proxy(self, dtype: torch.dtype, seed: int) -> LatentProxy:
        model, place = self.model, self.reward.proxy

        def teacher() -> Denoiser:
            # A head reads features of weights that stay: the student's own are no measure of it.
            self._read = self._teacher or frozen_teacher(model, dtype)
            return self._read

        proxy = None if place is None else load_proxy(place, teacher)
        if isinstance(proxy, LatentClip):
            assert place is not None
            _check_latents(proxy, model.codec, place)
            return proxy
        size, conditioner = model.default_size, model.conditioner
        cond = conditioner.encode([conditioner.example], (size, size))
        cond = cond.to(model.denoiser.device)
        if isinstance(proxy, TapProxy):
            proxy.check(cond)
        else:
            proxy = new_tap_proxy(teacher(), cond, seed)
        assert self._read is not None
        if self._read is not self._teacher:  # which would be asked for no more than this
            keep_until(self._read, proxy.config.taps[-1])
        return proxy

    def players(self) -> Mapping[str, nn.Module]:
        """The student, and the proxy that is fitted."""
        found = dict(super().players())
        return found if self._refit is None else found | {"proxy": self._refit}

    def phases(self) -> Sequence[Phase]:
        """A step of the student, then one of the proxy."""
        student = tuple(super().phases())
        if self._refit is None:
            return student
        usual = _CLIP_RATE if isinstance(self.proxy, LatentClip) else _HEAD_RATE
        rate = (self.reward.refit_rate or usual) / self._learning_rate
        return (*student, Phase("refit", "proxy", every=self.reward.refit_every, rate=rate))

    def place(self, device: torch.device) -> None:
        """Move decoder, rewards and proxy."""
        super().place(device)
        self.median.place(self._device)
        if self._weights is not None:
            self._weights.place(self._device)
        if self.pictures is not None:
            self._decoder.to(self._device)
            self.pictures.to(self._device)
        if self.proxy is not None:
            self.proxy.to(self._device)
        if self._read is not None:
            self._read.to(self._device)

    # -- what lasts ---------------------------------------------------------------------------

    def shown(self) -> Sequence[str]:
        """The rewards; how well a fitted proxy agrees with them."""
        if self._refit is not None:
            return ("refit/reward", "refit/accuracy", "refit/gap_accuracy")
        return () if self._weights is None else self._weights.names[1:]

    def watched(self) -> Sequence[str]:
        """Lengths of gradients, and the gaps that the temperature follows."""
        weights = () if self._weights is None else self._weights.watched()
        return (*weights, *self.median.watched()) if self._tempered else weights

    @property
    def _tempered(self) -> bool:
        return self._refit is not None and self._refit.scale is None

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """Let the weights and the temperature follow."""
        super().stepped(phase, means)
        if phase == "refit":
            if self._tempered:
                self.median.update(median_means(self.median, means))
        elif self._weights is not None:
            self._weights.update(means)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Besides that of distillation the gradients' lengths, and the temperature."""
        found = dict(super().state())
        if self._weights is not None:
            found["shares"] = self._weights.tensors
        return found | {"temperature": self.median.tensors} if self._tempered else found

    # -- a step -------------------------------------------------------------------------------

    def draw(self, batch: Batch, repeat: int) -> Any:
        """Those of distillation, the prompts, and which samples the proxy is fitted on."""
        draws = super().draw(batch, repeat)
        if self._weights is None:
            return draws
        prompts = prompts_of(batch, self.model.conditioner.classes)
        chosen = fitted_rows(batch.keys, self.reward.refit_share, repeat)
        rows, weight = (x.to(self._device, non_blocking=True) for x in chosen)
        named = {f.name: getattr(draws, f.name) for f in fields(draws)}
        return RewardDraws(**named, prompts=prompts, fitted=rows, fit_weight=weight)

    def shared(self, draws: Draws) -> Any:
        """What teacher and target say, and the prompts as rewards and proxy read them."""
        shared = super().shared(draws)
        if self._weights is None:
            return shared
        assert isinstance(draws, RewardDraws)
        named: dict[str, Any] = {f.name: getattr(shared, f.name) for f in fields(shared)}
        named["factor"] = torch.ones(len(shared.z0), device=shared.z0.device)
        if self.reward.weighting == "alpha":
            named["factor"] = self.model.schedule.alpha_sigma(draws.t)[0]
        if self.pictures is not None:
            named["embedded"] = self.pictures.embed(draws.prompts)
        if self.proxy is not None:
            named["told"] = told = self.proxy.told(draws.prompts, shared.cond)
            named["text"] = self._text(told)
        return RewardShared(**named)

    def _text(self, told: Told) -> Tensor:
        assert self.proxy is not None
        if self._refit is None:
            return self.proxy.embed_text(told)
        features: Tensor = self._refit("text", None, told)
        return features

    def _scored(self, latents: Tensor, told: Told, text: Tensor | None) -> Tensor:
        """S (B,) of latents, see `LatentProxy.forward`."""
        assert self.proxy is not None
        given = latents, told, text
        value: Tensor
        value = self.proxy(*given) if self._refit is None else self._refit("value", None, given)
        return value
