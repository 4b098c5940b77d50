"""Our own sampling loop, through `Denoiser` and `Schedule` alone."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.console import progress
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser

__all__ = ["sample"]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    *,
    steps: int = 25,
    guidance_scale: float = 1.0,
    mu: float | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from noise of the same shape, deterministically.

    z_s = alpha_s x0 + sigma_s eps from one time to the next: DDIM with eta = 0 (Song et al. 2021)
    on a DDPM table, Euler on a flow. It equals the stock pipeline with DDIMScheduler or
    FlowMatchEulerDiscreteScheduler, where `steps` divides T for "trailing" and "linspace" spacing
    (otherwise diffusers' DDIM rounds the two ends of a step differently).

    Args:
        denoiser: the network and its schedule.
        noise: (B, C, h, w) standard normal draws.
        cond: B conditionings.
        uncond: B unconditional ones; needed when `guidance_scale` is not 1.
        steps: number of network calls.
        guidance_scale: diffusers' convention, 1 is no guidance.
        mu: resolution shift of a flow schedule with dynamic shifting.
    """
    if guidance_scale != 1.0 and uncond is None:
        raise ValueError("guidance needs uncond")
    schedule = denoiser.schedule
    times = schedule.sampling_timesteps(steps, mu).to(noise.device)
    z_t = noise.float()
    pairs = list(zip(times[:-1], times[1:], strict=True))
    for t, s in progress(pairs, "sampling"):
        t_batch = t.expand(len(z_t))
        if guidance_scale == 1.0 or uncond is None:
            prediction = denoiser.predict(z_t, t_batch, cond)
        else:
            prediction = denoiser.guided(z_t, t_batch, cond, uncond, guidance_scale)
        z_t = schedule.step(prediction, s)
    return z_t
