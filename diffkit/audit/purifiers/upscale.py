"""Noisy upscaling (Honig et al. 2024, arXiv:2406.12027): noise, a x4 upscaler, back to size.

The picture with Gaussian noise of sigma 0.1 on [0, 1] goes through Stable Diffusion's x4 upscaler,
told the prompt and a noise level of 320 of its 350; the large picture is brought back, bicubic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit import randomness
from diffkit.audit.purifiers.base import Amount, Kind, Models, Work
from diffkit.audit.purifiers.latent import resized
from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_uint8
from diffkit.models.weights import refuse_pickles

__all__ = ["UPSCALE"]

_CLASS = "StableDiffusionUpscalePipeline"
_SIGMA = 0.1
_STEPS, _GUIDANCE = 75, 9.0  # the pipeline's own


def _load(source: str, models: Models) -> Any:
    from diffusers import StableDiffusionUpscalePipeline

    folder = Path(source).expanduser()
    index = folder / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--purify upscale:{source}: is no folder of a {_CLASS} ({error}); give the folder "
            "that holds its model_index.json."
        ) from error
    if found != _CLASS:
        raise UserError(f"--purify upscale:{source}: is a {found}; a {_CLASS} is needed.")
    refuse_pickles(folder)
    options = {"dtype": models.dtype, "use_safetensors": True, "local_files_only": True}
    try:
        pipeline: Any = StableDiffusionUpscalePipeline.from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--purify upscale:{source}: cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(models.device)


def _upscale(level: float, models: Models, source: str | None) -> Work:
    assert source is not None  # its model is always given
    pipeline = models.keep(f"upscale:{source}", lambda: _load(source, models))
    largest = pipeline.config.max_noise_level
    if level > largest:
        raise UserError(
            f"--purify upscale{level:g}:{source}: this upscaler takes noise levels up to {largest}."
        )

    def work(pixels: Tensor, seed: int) -> Tensor:
        draw = randomness.normal(pixels.shape, seed, "purify", "upscale")
        noisy = (pixels / 255 + _SIGMA * draw).clamp(0, 1)[None]
        large: Tensor = pipeline(
            prompt=[models.prompt],
            image=noisy,
            noise_level=int(level),
            num_inference_steps=_STEPS,
            guidance_scale=_GUIDANCE,
            generator=randomness.generator(seed, "purify", "upscale", "pipeline"),
            output_type="pt",
        ).images
        images = torch.as_tensor(large).float().cpu() * 2 - 1
        return to_uint8(resized(images, pixels.shape[-2:]))[0]

    return work


UPSCALE = (
    Kind(
        "upscale",
        "noisy upscaling, noise level {amount}",
        _upscale,
        Amount("noise level", 320, 0, 1000, whole=True),
        random=True,
        model="given",
        more={"sigma": _SIGMA, "steps": _STEPS, "guidance": _GUIDANCE},
    ),
)
