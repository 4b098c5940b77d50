"""Preference optimisation of a small MLP on 16 numbers, some of whose labels are wrong.

The data are normal, the reward is linear, labels are drawn by the Bradley-Terry model and then
flipped at a known rate. All but the network, its data and the loop is the method's own code.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from diffkit.models.conditioner import Conditioning
from diffkit.models.schedule import Schedule
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.denoising import denoising_loss
from diffkit.objectives.preference_config import PreferenceConfig
from diffkit.objectives.preference_player import Errors, Noisy, PairMaterial, PreferencePlayer
from diffkit.objectives.preference_state import PreferenceState
from diffkit.objectives.views import Ema

WIDTH, PAIRS, BATCH, KAPPA, SCALE = 16, 8000, 32, 200.0, 4.0


class ToyDenoiser(nn.Module):
    """A residual MLP that predicts the noise, called as a `Denoiser` is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.schedule = Schedule.from_scheduler(DDIMScheduler(**betas, clip_sample=False))
        self.first = nn.Linear(WIDTH + 16, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.last = nn.Linear(width, WIDTH)
        self.register_buffer("rates", torch.exp(torch.linspace(0, -math.log(1000), 8)))

    def forward(self, z_t, t, cond, told=None):
        angles = t.float()[:, None] * self.rates
        h = self.first(torch.cat([z_t, angles.sin(), angles.cos()], 1))
        for layer in self.middle:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))


class Toy:
    """Pairs with their labels, and the model that they are to improve.

    Arguments:
        seed: of data, labels, flips and the base model.
        flips: the share of labels that are turned round.
        width, base_steps: of the base model and its training.
    """

    def __init__(self, seed: int, flips: float, width: int = 128, base_steps: int = 1500) -> None:
        self.seed = seed
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.base = self._pretrained(width, base_steps)
        first, second = self.normal(PAIRS, WIDTH), self.normal(PAIRS, WIDTH)
        right = self.uniform(PAIRS) < torch.sigmoid(reward(first) - reward(second))
        self.flipped = self.uniform(PAIRS) < flips
        swap = (right == self.flipped)[:, None]
        self.winners = torch.where(swap, second, first)
        self.losers = torch.where(swap, first, second)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.draw)

    def _pretrained(self, width: int, steps: int) -> ToyDenoiser:
        model = ToyDenoiser(width)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            z0, eps = self.normal(128, WIDTH), self.normal(128, WIDTH)
            t = torch.randint(0, 1000, (128,), generator=self.draw)
            output = model(model.schedule.add_noise(z0, eps, t), t, None)
            (output - eps).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    def noisy(self, rows: torch.Tensor, draw: torch.Generator) -> Noisy:
        """These pairs at new times and noises, the same for both of a pair."""
        schedule, count = self.base.schedule, len(rows)
        z0 = torch.cat([self.winners[rows], self.losers[rows]])
        eps = torch.randn(count, WIDTH, generator=draw).repeat(2, 1)
        t = torch.randint(0, 1000, (count,), generator=draw).repeat(2)
        z_t, target = schedule.add_noise(z0, eps, t), schedule.target(z0, eps, t)
        return Noisy(z_t, t, Conditioning(), target)


def reward(x: torch.Tensor) -> torch.Tensor:
    """Linear, normal with mean 0 and standard deviation 4 on the data."""
    return SCALE * x.mean(1) * math.sqrt(WIDTH)


@torch.no_grad()
def sampled(model: ToyDenoiser, count: int = 2000, steps: int = 25) -> float:
    """The mean reward of DDIM's samples, always from the same noise."""
    schedule = model.schedule
    z = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))
    times = schedule.sampling_timesteps(steps)
    for t, s in zip(times[:-1], times[1:], strict=True):
        now = t.expand(count)
        z = schedule.step(schedule.prediction(model(z, now, None), z, now), s)
    return reward(z).mean().item()


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """The chance that a positive one scores higher than another."""
    ranks = scores.double().argsort().argsort().double()
    n = positive.sum()
    return float((ranks[positive].sum() - n * (n - 1) / 2) / (n * (len(scores) - n)))


def tune(
    toy: Toy, steps: int, rate: float, loss: str, flip_rate: float | None = None, **adaptive: Any
) -> tuple[float, float]:
    """(mean reward of samples, AUC of u for flipped labels in the second half of the steps)."""
    config = PreferenceConfig(loss=loss, kappa=KAPPA, flip_rate=flip_rate)
    config.check()
    judging = AdaptiveConfig(**adaptive)
    model = copy.deepcopy(toy.base)
    player = PreferencePlayer(model, None, config, judging, None)
    state = PreferenceState(config, judging, judging.warmup(steps), torch.device("cpu"))
    decays = (judging.slow, judging.fast) if config.adaptive else ()
    averages = [Ema(player, decay) for decay in decays]
    optimizer = torch.optim.AdamW(player.parameters(), rate, fused=True)
    draw = torch.Generator().manual_seed(toy.seed + 1)
    order = torch.cat([torch.randperm(PAIRS, generator=draw) for _ in range(2)])
    judged = []
    for step in range(steps):
        noisy = toy.noisy(order[step * BATCH :][:BATCH], draw)
        with torch.no_grad():
            reference = Errors(denoising_loss(toy.base(noisy.z_t, noisy.t, None), noisy.target))
            annotators = []
            for average in averages:
                with average.applied():
                    annotators.append(player("latent", None, noisy).latent)
        controls = state.controls(step)
        terms = player("preference", None, PairMaterial(noisy, reference, (*annotators,), controls))
        terms["loss"].mean().backward()
        nn.utils.clip_grad_norm_(player.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pairs = {name: torch.stack(v) for name, v in terms.items() if isinstance(v, tuple)}
        state.update(step, {k: v.detach().mean(-1) for k, v in (terms | pairs).items()})
        for average in averages:
            average.update(step)
        if averages and step >= steps // 2:
            judged.append(terms["minority"])
    rows = order[steps // 2 * BATCH : steps * BATCH]
    found = auc(torch.cat(judged), toy.flipped[rows]) if judged else math.nan
    return sampled(model), found
