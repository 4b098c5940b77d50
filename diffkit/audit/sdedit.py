"""SDEdit (Meng et al. 2022, arXiv:2108.01073): noise a picture part of the way, then denoise it.

    z_{t_k} = alpha z_0 + sigma eps,    z_0 = encoder mean of the picture

The n + 1 times of an n-step sampler are the grid; strength s noises to the grid time that has
k = round(s n) steps left, and denoises from that same time, so strength .01 of 100 is one step.
Everything goes through `Denoiser` and `Schedule`, so it is DDIM with eta = 0 on a DDPM table and
Euler on a flow or for EDM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.surrogate import Surrogate

__all__ = ["Edit", "Editor", "edit_noise", "noise_seeds"]


@dataclass(frozen=True)
class Edit:
    """How a picture is edited.

    Attributes:
        strength: share of the grid that is run, in (0, 1].
        steps: n, the steps of the whole grid.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    strength: float
    steps: int = 100
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength {self.strength:g}: must be above 0 and at most 1.")
        if self.steps < 1:
            raise UserError(f"{self.steps} steps: at least one is needed.")
        if self.run < 1:
            raise UserError(
                f"strength {self.strength:g}: leaves none of {self.steps} steps; give "
                f"{round(0.5 / self.strength) + 1} steps or more."
            )

    @property
    def run(self) -> int:
        """k, the denoising steps that are made."""
        return round(self.strength * self.steps)

    @property
    def name(self) -> str:
        """As reports call it: "strength 0.3", with steps and guidance where they are unusual."""
        more = "" if self.steps == 100 else f", {self.steps} steps"
        more += "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        return f"strength {self.strength:g}{more}"


def noise_seeds(seed: int, count: int) -> tuple[int, ...]:
    """The seeds of so many noises, each an address of (seed, i): two runs share none of them."""
    from diffkit.randomness import address

    return tuple(address(seed, i, "audit", "noise") for i in range(count))


def edit_noise(shape: Sequence[int], picture: str, seed: int) -> Tensor:
    """eps (C, h, w) of one edit, float32 on the CPU: a function of the clean picture and the seed.

    Every version of a picture (protected, purified, with random noise) gets the clean one's, so
    that two edits differ only by what they were made from.

    Args:
        picture: names the clean picture, such as a digest of its pixels.
    """
    from diffkit.randomness import normal

    return normal(shape, seed, picture, "sdedit")


class Editor:
    """Edits pictures with one model and one prompt.

    Raises `UserError` for a model that cannot be told the prompt.
    """

    def __init__(self, model: LatentDiffusion, prompt: str) -> None:
        self.model = model
        self.prompt = prompt
        self.surrogate = Surrogate.of(model, prompt)

    @property
    def guided(self) -> bool:
        """Whether the model has classifier-free guidance."""
        return self.surrogate.null is not None

    @torch.no_grad()
    def __call__(self, images: Tensor, noise: Tensor, edit: Edit, sizes: Sequence[Sizes]) -> Tensor:
        """Edited pictures (B, 3, H, W), float32, not clamped.

        Args:
            images: (B, 3, H, W) float32 in [-1, 1]; sides as the model takes them.
            noise: (B, C, h, w) standard normal.
            edit: strength, grid and guidance.
            sizes: one a picture, for models with micro-conditioning.
        """
        device = self.model.device
        codec, denoiser = self.model.codec, self.model.denoiser
        z_0 = codec.encode(images.to(codec.device)).to(device)
        schedule = denoiser.schedule
        mu = (
            schedule.mu(denoiser.tokens(*z_0.shape[-2:])) if schedule.shifts_by_resolution else None
        )
        times = schedule.sampling_timesteps(edit.steps, mu)[-edit.run - 1 :].to(device)
        told = self.surrogate.told
        guidance = None if told is None else torch.full((len(z_0),), told, device=device)
        cond = self.surrogate.conditioning(sizes)
        guided = edit.guidance != 1.0
        null = self.surrogate.conditioning(sizes, empty=True) if guided else None
        z_t = schedule.add_noise(z_0, noise.to(device), times[0].expand(len(z_0)))
        for t, s in zip(times[:-1], times[1:], strict=True):
            batch = t.expand(len(z_t))
            if null is None:
                prediction = denoiser.predict(z_t, batch, cond, guidance)
            else:
                prediction = denoiser.guided(z_t, batch, cond, null, edit.guidance, guidance)
            z_t = schedule.step(prediction, s)
        return codec.decode(z_t.to(codec.device)).float()
