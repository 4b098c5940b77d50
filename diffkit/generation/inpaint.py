"""Inpainting with any text-to-image model: after every step the known part is put back, noised.

    z_s <- m z_s + (1 - m) (alpha_s z_known + sigma_s eps),    m = 1 where the picture is repainted

(RePaint without its resampling, Lugmayr et al. 2022; what diffusers' inpainting pipelines do with
networks that take no mask. Those pipelines refuse other latent channel numbers than 4 or 16.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffkit.randomness import normal

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["keep_known", "takes_masks"]

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def takes_masks(model: LatentDiffusion) -> bool:
    """True for a network that was trained to inpaint, with extra channels for mask and picture."""
    return model.denoiser.geometry.channels > model.codec.channels


@torch.no_grad()
def keep_known(
    model: LatentDiffusion, picture: Image.Image, mask: Image.Image, seeds: Sequence[int]
) -> StepEnd:
    """A diffusers `callback_on_step_end` that keeps the latents outside the mask.

    Args:
        model: gives the codec.
        picture: RGB.
        mask: 255 where the picture is repainted, of the picture's size.
        seeds: one a picture of the batch; each draws its eps from its own address.
    """
    device = model.device
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    known = model.codec.encode((pixels.float() / 127.5 - 1).to(device))
    levels = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)[None, None].to(device)
    repainted = F.interpolate(levels, size=known.shape[-2:])
    noise = torch.stack([normal(known.shape[1:], seed, "inpaint") for seed in seeds]).to(known)
    pack = model.family.pack
    repainted = pack(repainted.expand_as(noise))
    known, noise = pack(known.expand_as(noise)), pack(noise)

    def step_end(pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        left = pipeline.num_timesteps - step - 1
        target = known
        if left > 0:
            target = _noised(pipeline.scheduler, known, noise, pipeline.scheduler.timesteps[-left])
        latents = tensors["latents"]
        mixed = repainted * latents.float() + (1 - repainted) * target
        return {"latents": mixed.to(latents.dtype)}

    return step_end


def _noised(scheduler: Any, known: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The known latents at time t in the scheduler's own scaling."""
    times = t.reshape(1)
    noised: Tensor
    if hasattr(scheduler, "scale_noise"):  # flow matching
        noised = scheduler.scale_noise(known, times, noise)
    else:
        noised = scheduler.add_noise(known, noise, times)
    return noised
