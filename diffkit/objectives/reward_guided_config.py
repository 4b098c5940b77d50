"""Flags of reward-guided distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from diffkit.errors import UserError
from diffkit.objectives.base import check_finite
from diffkit.objectives.shares import Share
from diffkit.rewards.spec import parse_rewards

__all__ = ["RewardConfig", "RewardMode", "Weighting"]

RewardMode = Literal["none", "direct", "frozen_proxy", "proxy"]
Weighting = Literal["uniform", "alpha"]
Temperature = Literal["auto", "median"]

_SHARE = 0.3
_DECODED = ("decoder", "chunk", "checkpoint")
_REFIT = ("refit_rate", "refit_every", "refit_share", "refit_temperature", "smooth_real")


@dataclass
class RewardConfig:
    """Which reward pulls the student, how strongly, and by which way."""

    mode: RewardMode = "direct"
    """direct: the reward of the decoded estimate. proxy: a network that reads latents and is fitted
    to the reward along the way; frozen_proxy: the same as it was trained before. none: no reward,
    plain distillation."""
    rewards: str | None = None
    """What is rewarded: names, with weights if wanted, such as hpsv2:1,imagereward:0.1. For the
    embedded model its own scorer by default, which knows the pictures of that model alone."""
    share: float | None = None
    """Length of the reward's gradient at the student's estimate, in parts of the distillation
    loss's, which decides its weight; 0.3 by default. Several rewards share it by their weights."""
    beta: float | None = None
    """A fixed weight of the reward in place of a share; the paper's is 1 for HPSv2.1. At 0 the
    training is plain distillation, and nothing is decoded."""
    weighting: Weighting = "uniform"
    """How a sample's reward counts: alike at all times, or alpha_t, which takes back that the
    estimate of an eps-model moves with its output as sigma_t / alpha_t."""
    decoder: str | None = None
    """Folder or hub id of a tiny autoencoder that decodes in place of the model's own decoder."""
    chunk: int | None = None
    """Pictures that are decoded and rewarded at once; by default as many as 512x512 pixels hold,
    one at least and 4 at most."""
    checkpoint: Literal["none", "block", "resnet"] = "none"
    """Recompute the decoder's activations in its backward pass, which needs less memory."""
    proxy: Path | None = None
    """The proxy, as `diffkit train proxy_reward` writes it; without it a new head on the encoder of
    the teacher."""
    refit_rate: float | None = None
    """Peak learning rate of the proxy; by default 3.3e-6, and 1e-4 for a head on the teacher."""
    refit_every: int = 1
    """Training steps from one step of the proxy to the next."""
    refit_share: float = 1.0
    """Part of the samples, chosen at random, that the proxy is fitted on; fewer decodes."""
    refit_temperature: Temperature = "auto"
    """What makes preferences of differences of the reward. auto: its own scale, if it was trained
    with one. median: the usual difference of a pair, followed along the way; for a reward that sees
    so little difference that by its own scale it prefers hardly anything."""
    smooth_real: bool = False
    """Where the reward prefers a made picture to the real one, teach the proxy that they are as
    good as each other."""

    @property
    def active(self) -> bool:
        """Whether the student feels a reward at all."""
        return self.mode != "none" and self.beta != 0

    @property
    def proxied(self) -> bool:
        """Whether the student feels it through a proxy."""
        return self.mode in ("proxy", "frozen_proxy")

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "reward")
        self._check_ranges()
        if self.rewards is not None:
            parse_rewards(self.rewards)
        if not self.active:
            reason = "no reward is given (reward.mode none)"
            if self.mode != "none":
                reason = "the reward has no weight (reward.beta 0)"
            self._refuse(self._changed_but("mode", "beta"), reason)
            return
        if self.beta is not None and self.share is not None:
            raise UserError("reward.share: the weight is fixed by reward.beta; leave one out.")
        if self.mode == "direct":
            self._refuse(self._changed("proxy", *_REFIT), "it is for --reward.mode proxy")
        elif self.mode == "proxy":
            reason = "nothing is decoded with gradients for --reward.mode proxy"
            self._refuse(self._changed("checkpoint"), reason)
        elif self.mode == "frozen_proxy":
            if self.proxy is None:
                raise UserError(
                    "reward.proxy: --reward.mode frozen_proxy needs a trained proxy; make one with "
                    "diffkit train proxy_reward."
                )
            self._refuse(self._changed(*_DECODED), "a frozen proxy decodes nothing")
            self._refuse(self._changed("rewards", *_REFIT), "a frozen proxy is not fitted")

    def _check_ranges(self) -> None:
        for name in ("chunk", "refit_every", "refit_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"reward.{name}: {value} must be above 0.")
        for name in ("share", "beta"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"reward.{name}: {value} must not be negative.")
        if self.share == 0:
            raise UserError("reward.share: 0 is no reward; say so with --reward.mode none.")
        if not 0 < self.refit_share <= 1:
            raise UserError(f"reward.refit_share: {self.refit_share} is not in (0, 1].")

    def _changed(self, *names: str) -> list[str]:
        usual = type(self)()
        return [name for name in names if getattr(self, name) != getattr(usual, name)]

    def _changed_but(self, *names: str) -> list[str]:
        return self._changed(*(f.name for f in fields(self) if f.name not in names))

    def _refuse(self, names: list[str], reason: str) -> None:
        if names:
            raise UserError(f"reward.{names[0]}: would do nothing, as {reason}; leave it out.")

    def shares(self, weights: Mapping[str, float]) -> dict[str, Share]:
        """How strongly each reward counts, of their weights by name; a proxy is one reward.

        A fixed beta multiplies the weights. A share is divided by them, so that each reward's own
        scale does not matter.
        """
        if self.beta is not None:
            return {name: Share(weight=self.beta * weight) for name, weight in weights.items()}
        share, total = _SHARE if self.share is None else self.share, sum(weights.values())
        return {name: Share(share * weight / total) for name, weight in weights.items()}
