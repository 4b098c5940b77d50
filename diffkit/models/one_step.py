"""The stock scheduler of a model that makes pictures of pure noise in one call at a fixed time."""

from __future__ import annotations

from typing import Any

from diffkit.models.few_step import consistency_scheduler
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["one_step_scheduler"]

_GRID = 50
"""Most times of the grid that a consistency scheduler samples at; one step takes the last."""


def one_step_scheduler(model: LatentDiffusion, time: int) -> Any:
    """A scheduler whose single step is x0_hat(z, time) of noise z of unit variance.

    `LCMScheduler` for DDPM tables. It begins at its last training time, so that for an earlier one
    it has the table up to there alone. For flows the model's own, whose single step is the Euler
    step z - v from the noisiest time.

    Arguments:
        time: a training time; of flows the last one, 1000.

    Raises `UserError` for an EDM model.
    """
    if model.schedule.kind == "flow":
        return model.scheduler
    count = time + 1
    steps = max(n for n in range(1, min(_GRID, count) + 1) if count % n == 0)
    scheduler = consistency_scheduler(model, steps)
    if count == scheduler.config.num_train_timesteps:
        return scheduler
    from diffusers import LCMScheduler

    return LCMScheduler.from_config(
        scheduler.config,
        num_train_timesteps=count,
        trained_betas=scheduler.betas[:count].tolist(),
        rescale_betas_zero_snr=False,
    )
