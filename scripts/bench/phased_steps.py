"""Training steps of objectives with several players, one call a step, as the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffkit.data.trajectories import TrajectoryBatch
from diffkit.models.conditioner import Conditioning, Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import Objective, Phase
from diffkit.randomness import SampleKeys, normal

__all__ = ["PhasedSteps", "trajectory_batches"]


class PhasedSteps:
    """All phases that are due of one training step after another, from step 0 on.

    Logs, averages and checkpoints are left out.

    Arguments:
        objective: its players are on the device.
        batches: step -> batch.
        autocast: compute in bfloat16.
    """

    def __init__(
        self,
        objective: Objective,
        device: torch.device,
        batches: Callable[[int], Any],
        autocast: bool,
    ) -> None:
        self.objective, self.device, self.batches = objective, device, batches
        self.autocast = autocast
        self.players = objective.players()
        self.weights, self.optimizers = {}, {}
        for name, player in self.players.items():
            player.to(device).train()
            self.weights[name] = [p for p in player.parameters() if p.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(self.weights[name], lr=1e-6)
        self.made = 0
        objective.place(device)

    def __call__(self) -> dict[str, Tensor]:
        """One training step; the mean loss of every phase that was due."""
        step, objective = self.made, self.objective
        self.made += 1
        with self._precision():
            objective.begin(step)
        batch = self.batches(step)
        due = [phase for phase in objective.phases() if phase.due(step)]
        material: dict[int, tuple[Any, Any]] = {}
        losses = {}
        for phase in due:
            for name, weights in self.weights.items():
                for weight in weights:
                    weight.requires_grad_(name == phase.player)
            for repeat in range(phase.repeats):
                if repeat not in material:
                    material[repeat] = self._material(batch, repeat)
                losses[phase.name] = self._phase(phase, *material[repeat])
        return losses

    def _material(self, batch: Any, repeat: int) -> tuple[Any, Any]:
        draws = self.objective.draw(batch, repeat)
        with self._precision(), torch.no_grad():
            return draws, self.objective.shared(draws)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def _phase(self, phase: Phase, draws: Any, shared: Any) -> Tensor:
        objective = self.objective
        with self._precision():
            terms = self.players[phase.player](phase.name, draws, shared)
        terms["loss"].mean().backward()
        optimizer = self.optimizers[phase.player]
        torch.nn.utils.clip_grad_norm_(self.weights[phase.player], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        means = {name: _mean(terms[name]) for name in objective.watched() if name in terms}
        objective.stepped(phase.name, means)
        return terms["loss"].detach().mean()


def _mean(term: Any) -> Tensor:
    if isinstance(term, Tensor):
        return term.detach().float().mean()
    return torch.stack([part.detach().float().mean() for part in term])


def trajectory_batches(
    model: LatentDiffusion, conditioning: Conditioning, count: int
) -> Callable[[int], TrajectoryBatch]:
    """step -> `count` pairs of noise and noise, for rows of a cached conditioning."""
    side = model.default_size
    shape = (count, *model.latent_shape(side, side))
    words = ["a picture"] * count
    sizes = [Sizes((side, side), (0, 0), (side, side))] * count

    def batch(step: int) -> TrajectoryBatch:
        noise, latents, unrelated = (
            normal(shape, "pairs", step, name) for name in ("noise", "latents", "unrelated")
        )
        keys = SampleKeys(0, (step,) * count, tuple(range(count)))
        cond = conditioning.select(slice(0, count))
        places = tuple(range(count))
        return TrajectoryBatch(keys, noise, latents, words, cond, None, sizes, places, unrelated)

    return batch
