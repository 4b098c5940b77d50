"""LPL's mechanism on a toy: 64 latent numbers, a frozen random decoder, an MLP that predicts noise.

Both arms go on from one trained model with the same data, times and noises. What a run of seconds
can show is where the loss pushes, and by about a percent: the error that the decoder sees falls
against the error of latents, and the variance of its features grows. It does not stop at the true
one: the paper's loss lets its gradient through the deviation that divides, and falls by inflating
it; only the loss of latents holds against that.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from diffkit.models.codec import Codec
from diffkit.models.schedule import Schedule
from diffkit.objectives.denoising import denoising_loss
from diffkit.perceptual.decoder_features import FeatureLoss, latent_perceptual_loss
from diffkit.randomness import normal, uniform

BATCH = 64
SIDE = 4


def decoder(seed: int) -> Codec:
    """Factor 4: 4 x 4 x 4 latents to 16 pixels, three up blocks of random weights."""
    torch.manual_seed(seed)
    network = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.0,
    )
    return Codec(network.eval().requires_grad_(False))


class Toy(nn.Module):
    """eps(z_t, t)."""

    def __init__(self) -> None:
        super().__init__()
        width = 4 * SIDE * SIDE
        self.layers = nn.Sequential(
            nn.Linear(width + 2, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU()
        )
        self.out = nn.Linear(192, width)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        place = t[:, None] / 1000
        x = torch.cat([z_t.flatten(1), place, place.sqrt()], 1)
        return self.out(self.layers(x)).view_as(z_t)


class World:
    """Latents on a random 12-dimensional surface, and the schedule."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.codec = decoder(seed)
        self.schedule = Schedule.from_scheduler(DDPMScheduler(beta_schedule="linear"))
        self.mixing = normal((12, 4 * SIDE * SIDE), seed, "mixing")

    def latents(self, *address: object) -> Tensor:
        factors = normal((BATCH, 12), self.seed, *address, "factors")
        return torch.tanh(factors @ self.mixing / 2).view(BATCH, 4, SIDE, SIDE) * 1.5

    def train(self, model: Toy, steps: int, name: str, highest: int, weight: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 5e-4 if weight >= 0 else 2e-3)
        for step in range(steps):
            z0, eps = self.latents(name, step), normal((BATCH, 4, SIDE, SIDE), name, step, "noise")
            t = (uniform((BATCH,), self.seed, name, step, "time") * highest).long()
            z_t = self.schedule.add_noise(z0, eps, t)
            output = model(z_t, t)
            loss = denoising_loss(output, eps).mean()
            if weight > 0:
                estimate = self.schedule.prediction(output, z_t, t).x0
                lpl = latent_perceptual_loss(self.codec, estimate, z0, FeatureLoss())
                loss = loss + weight * lpl.value.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def measure(self, model: Toy) -> tuple[float, float, float]:
        """Latent error, feature error, and variance ratio of estimates at t = 100."""
        sums = torch.zeros(4)
        for number in range(8):
            z0, eps = self.latents("test", number), normal((BATCH, 4, SIDE, SIDE), "test", number)
            t = torch.full((BATCH,), 100)
            z_t = self.schedule.add_noise(z0, eps, t)
            estimate = self.schedule.prediction(model(z_t, t), z_t, t).x0
            found = latent_perceptual_loss(self.codec, estimate, z0, FeatureLoss(stats="target"))
            error = (estimate - z0).square().mean()
            sums += torch.stack([error, found.value.mean(), *(v.sum() for v in found[1:3])])
        latent, feature, predicted, true = sums.tolist()
        return latent, feature, predicted / true


@pytest.mark.slow
def test_feature_error_falls_against_latent_error() -> None:
    """Paired over seeds: the sign counts, not the size."""
    for seed in (0, 1):
        world = World(seed)
        torch.manual_seed(seed)
        start = Toy()
        world.train(start, 800, "before", 1000, weight=-1)
        arms = []
        for weight in (0.0, 10.0):
            model = copy.deepcopy(start)
            world.train(model, 120, "after", 150, weight)
            arms.append(world.measure(model))
        (latent, feature, variance), (with_latent, with_feature, with_variance) = arms
        print(
            f"seed {seed}: latent error {with_latent / latent:.4f}, "
            f"feature error {with_feature / feature:.4f}, "
            f"variance ratio {variance:.4f} -> {with_variance:.4f}"
        )
        assert with_feature / feature < with_latent / latent
        assert with_variance > variance
