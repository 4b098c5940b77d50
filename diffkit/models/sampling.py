"""Our own sampling loop, through `Denoiser` and `Schedule` alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffkit.console import progress
from diffkit.models.conditioner import Conditioning
from diffkit.models.consistency import consistency_function
from diffkit.models.denoiser import Denoiser
from diffkit.models.schedule import Prediction, Schedule

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
    true_cfg_scale: float = 1.0,
    mu: float | None = None,
    shown: bool = True,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from noise of the same shape, deterministically.

    z_s = alpha_s x0 + sigma_s eps from one time to the next: DDIM with eta = 0 (Song et al. 2021)
    on a DDPM table, Euler on a flow and for EDM. It equals the stock pipeline with DDIMScheduler,
    FlowMatchEulerDiscreteScheduler or EDMEulerScheduler; with DDIMScheduler where `steps` divides T
    for "trailing" spacing (otherwise diffusers' DDIM rounds the two ends of a step differently, and
    with "linspace" it steps to times that it then does not visit).

    A consistency model (`schedule.consistency`) goes to the clean end f(z, t) at every step, from
    there to z_s = alpha_s f + sigma_s eps_k with fresh noise, as with LCMScheduler or
    FlowMatchLCMScheduler (Luo et al. 2023, algorithm 3).

    Args:
        denoiser: the network and its schedule.
        noise: (B, C, h, w) standard normal draws.
        cond: B conditionings.
        uncond: B unconditional ones; needed for classifier-free guidance.
        steps: number of sampling steps.
        guidance_scale: diffusers' convention. A network with a guidance embedding is told the
            scale; for others it is that of classifier-free guidance, and 1 is none.
        true_cfg_scale: of classifier-free guidance besides, for a network with a guidance embedding
            that has both (Flux); 1 is none.
        mu: resolution shift of a flow schedule with dynamic shifting; by default the one that the
            stock pipelines find for this size.
        shown: whether progress is shown, step by step; for a caller that shows its own.
        fresh: k = 0, 1, ... -> eps_k (B, C, h, w) that step k adds; for consistency models in more
            than one step.
    """
    told = denoiser.family.takes_guidance
    if true_cfg_scale != 1.0 and not told:
        raise ValueError("true_cfg_scale is for a network with a guidance embedding")
    scale = true_cfg_scale if told else guidance_scale
    if scale != 1.0 and uncond is None:
        raise ValueError("guidance needs uncond")
    guidance = noise.new_full((len(noise),), guidance_scale) if told else None
    schedule = denoiser.schedule
    if mu is None and schedule.shifts_by_resolution:
        mu = schedule.mu(denoiser.tokens(*noise.shape[-2:]))
    times = schedule.sampling_timesteps(steps, mu).to(noise.device)
    z_t = schedule.init_noise_sigma * noise.float()
    if schedule.consistency and steps > 1 and fresh is None:
        raise ValueError("a consistency model needs fresh noise for each step but the last")
    pairs = list(zip(times[:-1], times[1:], strict=True))
    for k, (t, s) in enumerate(progress(pairs, "sampling") if shown else pairs):
        t_batch = t.expand(len(z_t))
        if scale == 1.0 or uncond is None:
            prediction = denoiser.predict(z_t, t_batch, cond, guidance)
        else:
            prediction = denoiser.guided(z_t, t_batch, cond, uncond, scale, guidance)
        if schedule.consistency:
            eps = None if fresh is None or k == steps - 1 else fresh(k).to(z_t)
            z_t = _renoised(schedule, prediction, t_batch, s, eps)
        else:
            z_t = schedule.step(prediction, s)
    return z_t


def _renoised(
    schedule: Schedule, prediction: Prediction, t: Tensor, s: Tensor, eps: Tensor | None
) -> Tensor:
    clean = consistency_function(schedule, prediction, t, torch.zeros_like(t))
    return clean if eps is None else schedule.add_noise(clean, eps, s.expand(len(t)))
