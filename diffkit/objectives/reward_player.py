"""The two players of reward-guided distillation: the student, and the proxy that is fitted.

    student: d(f, f') - sum_k w_k a_t R_k(D(f), c)    or    d(f, f') - w a_t S(f, c)
    proxy:   sum over pairs of KL( expert || proxy ),  of candidates f, f' and z_0

f is the student's estimate, which the distance computes anyway, f' its target. Neither player has
a gradient in what the other trains: the proxy's step takes candidates without a graph, and the
student's takes the gradient of a loss in f alone (`diffkit.models.eager`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.eager import eager_sum, uncompiled
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.consistency_player import (
    ConsistencyDraws,
    ConsistencyPlayer,
    ConsistencyShared,
)
from diffkit.objectives.reward_terms import Found, PictureRewards
from diffkit.objectives.shares import GradientShare
from diffkit.rewards.proxy import LatentProxy, Told
from diffkit.rewards.refit import (
    RunningMedian,
    expert_logits,
    gap_accuracy,
    pair_accuracy,
    pair_kl,
    proxy_logits,
)

__all__ = [
    "MAIN",
    "Candidates",
    "ProxyPlayer",
    "RewardDraws",
    "RewardShared",
    "RewardedPlayer",
    "rows_of",
]

MAIN = "lcd"
"""Name of the distillation loss among the losses of the estimate."""

Score = Callable[[Tensor, Told, Tensor | None], Tensor]

_REAL = 2
"""Place of the real picture among the candidates."""


@dataclass(frozen=True)
class RewardDraws(ConsistencyDraws):
    """One micro-batch with all its randomness.

    Attributes:
        prompts: B captions, or names of classes.
        fitted: (n,) rows that the proxy is fitted on, at least one.
        fit_weight: (n,) what each counts, so that the mean over the batch is right on average; 0
            where no row was drawn and the first one stands in.
    """

    prompts: list[str] = field(default_factory=list)
    fitted: Tensor = field(default_factory=lambda: torch.zeros(0))
    fit_weight: Tensor = field(default_factory=lambda: torch.zeros(0))


class Candidates:
    """What the student's step leaves for the proxy's: its estimate and target, without graphs."""

    def __init__(self) -> None:
        self.latents: tuple[Tensor, Tensor] | None = None

    def keep(self, estimate: Tensor, target: Tensor) -> None:
        """Take both, (B, C, h, w)."""
        self.latents = estimate.detach(), target.detach()

    def stacked(self, real: Tensor, rows: Tensor) -> Tensor:
        """(n, 3, C, h, w): estimate, target and the real latents (B, C, h, w) of these rows."""
        assert self.latents is not None  # the student's phase comes first
        return torch.stack([x[rows].float() for x in (*self.latents, real)], 1)


@dataclass(frozen=True)
class RewardShared(ConsistencyShared):
    """What frozen networks make of the draws, without gradients.

    Attributes:
        factor: a_t (B,), what each sample's reward counts.
        embedded: the prompts as each reward reads them, (B, ...) each.
        told, text: the prompts as the proxy reads them, and its features of them (B, D) before its
            step; None without a proxy.
        candidates: filled in by the student's step.
    """

    factor: Tensor
    embedded: tuple[Tensor, ...] = ()
    told: Told | None = None
    text: Tensor | None = None
    candidates: Candidates = field(default_factory=Candidates)


def rows_of(told: Told, rows: Tensor) -> Told:
    """Some prompts of a batch."""
    return told.select(rows) if isinstance(told, Conditioning) else told[rows]


class RewardedPlayer(ConsistencyPlayer):
    """The student with the distillation loss and the reward of its estimate.

    forward("lcd", draws, shared) -> besides those of plain distillation, each (B,):

    - "lcd_loss": the distillation loss;
    - "NAME" of each reward, or "proxy" for S, without weights, and "NAME_weight";
    - "saturated": part of the decoded values that lie beyond what rewards see;
    - "lcd_square", "NAME_square": |d loss_b / d f_b|^2 of each loss without its weight.

    Arguments:
        denoiser, config, perceptual: see `ConsistencyPlayer`.
        weights: of the losses; None for plain distillation.
        pictures: rewards of decoded estimates, or else
        score: S of latents, what the proxy is told, and text features.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: ConsistencyConfig,
        perceptual: nn.Module | None,
        weights: GradientShare | None,
        pictures: PictureRewards | None,
        score: Score | None,
    ) -> None:
        super().__init__(denoiser, config, perceptual)
        self.weights = weights
        self.pictures = pictures
        self._score = (score,)  # in a tuple: the other player's, not a part of this one
        self._rewarded: Callable[..., dict[str, Any]] = uncompiled(self._with_rewards)

    def losses(
        self, estimate: Tensor, target: Tensor, draws: ConsistencyDraws, shared: ConsistencyShared
    ) -> dict[str, Any]:
        """Those of plain distillation, and the reward's; see above."""
        terms = super().losses(estimate, target, draws, shared)
        if self.weights is None:
            return terms
        assert isinstance(shared, RewardShared)
        shared.candidates.keep(estimate, target)
        return terms | self._rewarded(terms["loss"], estimate, shared)

    def _with_rewards(
        self, distance: Tensor, estimate: Tensor, shared: RewardShared
    ) -> dict[str, Any]:
        assert self.weights is not None
        found = Found()
        functions, chunk = self._functions(estimate, shared, found)
        weights = self.weights.weights[1:]
        total, _, squares = eager_sum(
            functions,
            weights,
            estimate,
            shared.factor,
            *shared.embedded,
            chunks=[chunk] * len(functions),
        )
        terms = {"loss": distance + total, "lcd_loss": distance.detach(), **found.terms()}
        terms[f"{MAIN}_square"] = _square(distance, estimate)
        for name, weight, square in zip(self.weights.names[1:], weights, squares, strict=True):
            terms[f"{name}_square"] = square
            terms[f"{name}_weight"] = weight.expand_as(square)
        return terms

    def _functions(
        self, estimate: Tensor, shared: RewardShared, found: Found
    ) -> tuple[list[Callable[..., Tensor]], int | None]:
        """The losses -a R of the estimate, and how many samples of them run at once."""
        score = self._score[0]
        if score is None:
            assert self.pictures is not None
            return [*self.pictures.losses(found)], self.pictures.chunk(estimate)
        return [partial(_by_proxy, score, shared, found)], None


def _by_proxy(
    score: Score, shared: RewardShared, found: Found, z: Tensor, factor: Tensor, *_: Tensor
) -> Tensor:
    assert shared.told is not None
    value = score(z, shared.told, shared.text)
    found.note("proxy", value)
    return -factor * value


def _square(loss: Tensor, x: Tensor) -> Tensor:
    """|d loss_b / d x_b|^2, (B,); 0 where no gradient is asked for."""
    if not loss.requires_grad:
        return torch.zeros_like(loss)
    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    return gradient.float().flatten(1).square().sum(1)


class ProxyPlayer(nn.Module):
    """A proxy with the loss of its refit; the student's step of the same samples comes before.

    forward("text", None, told) -> its features of prompts, (B, D);
    forward("value", None, (z, told, text)) -> S (B,);
    forward("refit", draws, shared) -> each (B,), or a pair of which the ratio of sums counts:

    - "loss": the KL of all pairs of candidates, see `pair_kl`;
    - "accuracy": share of the pairs that the proxy orders as the reward does; "gap_accuracy" the
      same with each pair counted by how far the reward tells it apart;
    - "reward", "reward_target", "reward_real": the expert's word of the candidates;
    - "temperature": what the expert's differences are divided by, "scale" the proxy's own;
    - "gap", "gap_above": what the temperature follows.

    Arguments:
        proxy: S; its unlocked parameters are trained.
        pictures: the expert.
        median: the temperature of an expert without a scale.
        scale: what makes logits of the expert's rewards; None for the median.
        smooth_real: see `pair_kl`.
    """

    def __init__(
        self,
        proxy: LatentProxy,
        pictures: PictureRewards,
        median: RunningMedian,
        scale: float | None,
        smooth_real: bool,
    ) -> None:
        super().__init__()
        self.proxy = proxy
        self.pictures = pictures
        self.median = median
        self.scale = scale
        self.real = _REAL if smooth_real else None
        self._judged: Callable[..., Tensor] = uncompiled(self._judge)

    def forward(self, phase: str, draws: Any, shared: Any) -> Any:
        """What is asked of the proxy; see above. It has to be asked here where it is sharded."""
        if phase == "text":
            return self.proxy.embed_text(shared)
        if phase == "value":
            return self.proxy(*shared)
        return self._fitted(draws, shared)

    def _fitted(self, draws: RewardDraws, shared: RewardShared) -> dict[str, Any]:
        """The loss of the fitted rows and what is logged of them."""
        rows, count = draws.fitted, len(shared.z0)
        assert shared.told is not None
        candidates = shared.candidates.stacked(shared.z0, rows)
        rewards = self._judged(candidates, [embedded[rows] for embedded in shared.embedded])
        expert = expert_logits(rewards, self.scale, self.median)
        own = proxy_logits(self.proxy, candidates, rows_of(shared.told, rows))
        known = self.median.known if self.scale is None else 1.0
        loss = pair_kl(expert, own, self.real) * draws.fit_weight * known
        spread = partial(_spread, rows=rows, count=count, weight=draws.fit_weight)
        terms: dict[str, Any] = {"loss": _whole(loss, rows, count)}
        terms["accuracy"] = spread(pair_accuracy(expert, own.detach()))
        right = gap_accuracy(rewards, own.detach())
        terms["gap_accuracy"] = tuple(
            _whole(x * (draws.fit_weight > 0), rows, count) for x in right
        )
        names = ("reward", "reward_target", "reward_real")
        terms |= {n: spread(column) for n, column in zip(names, rewards.unbind(1), strict=True)}
        if self.scale is None:
            terms |= {name: spread(x) for name, x in self.median.terms(rewards).items()}
            terms["temperature"] = self.median.value.expand(count)
        terms["scale"] = self.proxy.logit_scale.detach().expand(count)
        return terms

    def _judge(self, candidates: Tensor, embedded: list[Tensor]) -> Tensor:
        """The expert's rewards (n, J) of candidates (n, J, C, h, w), without gradient."""
        each = [self.pictures.judge(z, embedded) for z in candidates.unbind(1)]
        return torch.stack(each, 1)


def _whole(values: Tensor, rows: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_copy(0, rows, values)


def _spread(values: Tensor, *, rows: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A pair whose ratio of sums is the mean of the values (n,) over the fitted rows."""
    taken = (weight > 0).to(values)
    return _whole(values * taken, rows, count), _whole(taken, rows, count)


def mean_of(pair: Tensor, without: Tensor | float) -> Tensor:
    """The ratio of a pair's sums (2,), `without` where there was nothing."""
    return torch.where(pair[1] > 0, pair[0] / pair[1].clamp_min(1e-12), without)


def median_means(median: RunningMedian, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means that move the median, of pairs; those that leave it where there was nothing."""
    gap, above = (means[name] for name in median.watched())
    names = median.watched()
    return {names[0]: mean_of(gap, median.value), names[1]: mean_of(above, 0.5)}
