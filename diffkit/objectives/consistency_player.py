"""The student of latent consistency distillation, with its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffkit.models.conditioner import Conditioning
from diffkit.models.consistency import Interval, consistency_function, pseudo_huber
from diffkit.models.denoiser import Denoiser
from diffkit.objectives.collapse import DiversityGuard
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.denoising import Draws, Shared, denoising_loss

__all__ = ["ConsistencyDraws", "ConsistencyPlayer", "ConsistencyShared", "Point"]


@dataclass(frozen=True)
class Point:
    """What a network is asked about: B points of trajectories.

    Attributes:
        z: (B, C, h, w), at least float32.
        t: (B,).
        edge: (B,), see `Interval`.
        cond: of B.
        guidance: (B,) scales that it is told, diffusers' convention; None for a network that is
            not told any.
    """

    z: Tensor
    t: Tensor
    edge: Tensor
    cond: Conditioning
    guidance: Tensor | None


@dataclass(frozen=True)
class ConsistencyDraws(Draws):
    """One micro-batch with all its randomness; `t` are the starts of the intervals.

    Attributes:
        interval: of each sample.
        guidance: (B,) scales w + 1.
        augmentation: of E-LatentLPIPS; None for other distances.
    """

    interval: Interval
    guidance: Tensor
    augmentation: Any = None


@dataclass(frozen=True)
class ConsistencyShared(Shared):
    """What teacher and target make of the draws, without gradients.

    Attributes:
        start: z_t at t.
        target: f_theta'(z_t', t'), (B, C, h, w), at least float32.
    """

    start: Point
    target: Tensor


class ConsistencyPlayer(nn.Module):
    """The student with its loss: forward("lcd", draws, shared) -> {"loss", "time", ...}, each (B,).

    forward("output" or "end", None, point) -> what the network says at points, (B, C, h, w): its
    raw output, or f. Both are for views of the network, the teacher's or the target's.

    Methods that add terms of the same estimate override `losses`.

    Arguments:
        denoiser: the network.
        config: resolved.
        perceptual: the E-LatentLPIPS network, where that is the distance.
    """

    def __init__(
        self, denoiser: Denoiser, config: ConsistencyConfig, perceptual: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        # Frozen, in float32 and no part of what is trained, wrapped or saved.
        self._perceptual = [perceptual]
        self.guard: DiversityGuard | None = None

    def forward(self, phase: str, draws: Any, shared: Any) -> Any:
        """The terms of a training step, or what the network says at points; see above."""
        if phase == "output":
            return self._output(shared)
        if phase == "end":
            return self.end(shared)
        estimate = self.end(shared.start)
        terms = self.losses(estimate, shared.target, draws, shared)
        if self.guard is not None:
            terms["diversity"] = self.guard.value.expand_as(terms["loss"])
        return terms | {"time": self.denoiser.schedule.place(draws.t)}

    def losses(
        self, estimate: Tensor, target: Tensor, draws: ConsistencyDraws, shared: ConsistencyShared
    ) -> dict[str, Any]:
        """ "loss" (B,), and what is logged, each (B,).

        Arguments:
            estimate: f_theta(z_t, t), (B, C, h, w), at least float32, with its gradient. With one
                segment these are clean latents, scaled as the denoiser sees them.
            target: f_theta'(z_t', t'), without.
        """
        return {"loss": self.distance(estimate, target, draws)}

    def distance(self, estimate: Tensor, target: Tensor, draws: ConsistencyDraws) -> Tensor:
        """d(estimate, target), (B,)."""
        if self.config.distance == "huber":
            return pseudo_huber(estimate, target, self.config.huber)
        if self.config.distance == "l2":
            return denoising_loss(estimate, target)
        from diffkit.perceptual.latent_lpips import e_latentlpips

        network: Any = self._perceptual[0]
        return e_latentlpips(network, estimate, target, draws.augmentation)

    def end(self, point: Point) -> Tensor:
        """f(z, t), (B, C, h, w), at least float32."""
        schedule = self.denoiser.schedule
        prediction = schedule.prediction(self._output(point), point.z, point.t)
        return consistency_function(schedule, prediction, point.t, point.edge)

    def _output(self, point: Point) -> Tensor:
        output: Tensor = self.denoiser(point.z, point.t, point.cond, point.guidance)
        return output
