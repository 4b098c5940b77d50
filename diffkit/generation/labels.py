"""Pictures of models without text, with diffusers' samplers in a loop of our own.

Stock pipelines of these models lack what is needed: `DDPMPipeline` and `LDMPipeline` pass no labels
and the first scales no noise, `DiTPipeline` takes 1000 for the null class of every network. What
they can make is made here from the same noise, so the pictures are theirs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.generation.recipe import Recipe
from diffkit.models.conditioner import Conditioning

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["sample_labels"]


@torch.no_grad()
def sample_labels(
    model: LatentDiffusion, recipes: Sequence[Recipe], scheduler: Any | None = None
) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [0, 1], of one batch of recipes.

    output = o_null + guidance (o_class - o_null) where the guidance is above 1, o_class elsewhere.

    Args:
        model: one whose conditioner has `classes`.
        recipes: alike in everything but prompt, index and seed; each picture draws all its noise
            from a CPU generator of its own seed.
        scheduler: diffusers' sampler, not changed; the model's own by default.

    Raises:
        UserError: an unknown class, guidance without a null class, or a sampler that needs the
            network's variance.
    """
    first = recipes[0]
    scheduler = copy.deepcopy(model.pipeline().scheduler if scheduler is None else scheduler)
    if str(scheduler.config.get("variance_type", "")).startswith("learned"):
        raise UserError(
            f"{type(scheduler).__name__}: draws with the variance that the network learned, which "
            "diffkit does not read; use --scheduler ddim."
        )
    generators = [torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes]
    shape = model.latent_shape(first.height, first.width)
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    call = _guided(model, [recipe.prompt for recipe in recipes], first.guidance)
    scheduler.set_timesteps(first.steps, device=model.device)
    accepted = inspect.signature(scheduler.step).parameters
    drawing = {"generator": generators} if "generator" in accepted else {}
    # Flow-matching schedulers have neither a scale of the noise nor one of the input.
    latents = torch.stack(noise).to(model.device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = latents
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latents, t)
        output = call(scaled, t)
        latents = scheduler.step(output, t, latents, **drawing).prev_sample
    return (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


def _guided(
    model: LatentDiffusion, prompts: list[str], guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """(scaled latents (B, C, h, w), t) -> the output that the sampler is given, float32."""
    network, family = model.denoiser.model, model.family
    cond = model.conditioner.encode(prompts)

    def raw(z: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        return family.call(network, z.to(model.dtype), t.expand(len(z)), told, None).float()

    if guidance <= 1:
        return lambda z, t: raw(z, t, cond)
    both = Conditioning.cat([model.conditioner.null(len(prompts)), cond])

    def mixed(z: Tensor, t: Tensor) -> Tensor:
        without, given = raw(torch.cat([z, z]), t, both).chunk(2)
        return without + guidance * (given - without)

    return mixed
