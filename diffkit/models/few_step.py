"""What makes a model a few-step one: scheduler, guidance embedding, teacher, a single step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.loading import quiet_libraries

__all__ = [
    "consistency_scheduler",
    "frozen_teacher",
    "one_step",
    "phased_scheduler",
    "scheduler_options",
    "with_guidance_embedding",
]

# The student is trained without limits of x0, which a base model's config may have.
_UNLIMITED = {"clip_sample": False, "thresholding": False}
_PHASED = {"timestep_spacing": "trailing", "set_alpha_to_one": True} | _UNLIMITED


def consistency_scheduler(model: LatentDiffusion, original_steps: int) -> Any:
    """The stock scheduler of a consistency model made from `model`, with the same noise schedule.

    `LCMScheduler` for DDPM tables: x0 is not clipped, times are scaled by 10 in its boundary
    scalings. `FlowMatchLCMScheduler` for flows; pipelines have to be given its times, as
    `sigmas=[1 - i / n for i in range(n)]`, for its own ones are shifted twice.

    Arguments:
        original_steps: N of the solver's grid, of which the sampling times are a part; unused by
            flows, whose network knows all times.

    Raises `UserError` for an EDM model.
    """
    from diffusers import FlowMatchLCMScheduler, LCMScheduler

    kind, config = model.schedule.kind, model.scheduler.config
    if kind == "edm":
        raise UserError("model: diffusers has no consistency scheduler that reads an EDM model.")
    with quiet_libraries():
        if kind == "flow":
            return FlowMatchLCMScheduler.from_config(config)
        return LCMScheduler.from_config(
            config, original_inference_steps=original_steps, **_UNLIMITED
        )


def phased_scheduler(model: LatentDiffusion) -> Any:
    """The stock scheduler that leads from segment edge to segment edge, in as many steps as there
    are segments: DDIM with "trailing" spacing, ending at x0; the model's own for flows."""
    from diffusers import DDIMScheduler

    if model.schedule.kind == "flow":
        return model.scheduler
    with quiet_libraries():
        return DDIMScheduler.from_config(model.scheduler.config, **_PHASED)


def scheduler_options(scheduler: Any) -> dict[str, Any] | None:
    """What a scheduler of this module has other than the config that it was made from.

    `type(scheduler).from_config(config, **options)` makes it again, in stock diffusers. None for
    one of another class, which is a model's own.
    """
    steps = scheduler.config.get("original_inference_steps")
    made = {
        "LCMScheduler": {"original_inference_steps": steps} | _UNLIMITED,
        "DDIMScheduler": _PHASED,
        "FlowMatchLCMScheduler": {},
    }
    return made.get(type(scheduler).__name__)


def with_guidance_embedding(
    model: LatentDiffusion, dim: int = 256, zero: bool = True
) -> LatentDiffusion:
    """A model whose U-Net, a copy, is told the guidance scale; everything else is shared.

    The scale's embedding goes through a new linear map without bias to the embedding of the time
    (Meng et al. 2023, arXiv:2210.03142). With `zero` the map starts at 0, so that the U-Net's
    output is that of the model, whatever scale it is told; without, as torch initialises it.

    Raises `UserError` for a denoiser that has no such input, and for a U-Net that has it already.
    """
    network: Any = model.denoiser.model
    if "time_cond_proj_dim" not in network.config:
        raise UserError(f"model: {model.family.name} networks have no input for an embedded scale.")
    if network.config.time_cond_proj_dim is not None:
        raise UserError("model: its U-Net has a guidance embedding already.")
    network = copy.deepcopy(network)
    first = network.time_embedding.linear_1.weight
    new = nn.Linear(dim, first.shape[1], bias=False, device=first.device, dtype=first.dtype)
    if zero:
        nn.init.zeros_(new.weight)
    network.time_embedding.cond_proj = new
    network.register_to_config(time_cond_proj_dim=dim)
    return model.with_denoiser(network)


def frozen_teacher(
    model: LatentDiffusion, dtype: torch.dtype, drop_embedding: bool = False
) -> Denoiser:
    """A frozen copy of the denoiser with its weights of now.

    Arguments:
        drop_embedding: leave out the guidance embedding that `with_guidance_embedding` put in.
    """
    network: Any = copy.deepcopy(model.denoiser.model)
    if getattr(network, "is_gradient_checkpointing", False):
        network.disable_gradient_checkpointing()  # without gradients there is nothing to spare
    family = model.family
    if drop_embedding:
        network.time_embedding.cond_proj = None
        network.register_to_config(time_cond_proj_dim=None)
        family = replace(family, capabilities=family.capabilities | {"cfg"})  # it comes back
    teacher = Denoiser(network, family, model.schedule)
    return teacher.to(dtype).requires_grad_(False).eval()


def one_step(
    denoiser: Denoiser, noise: Tensor, cond: Conditioning, t: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """x0_hat (B, C, h, w) of pure noise in one call, at least float32.

    Arguments:
        noise: (B, C, h, w).
        t: (B,), the model's noisiest time.
        guidance: (B,) scales for a network that is told them.
    """
    return denoiser.predict(noise, t, cond, guidance).x0
