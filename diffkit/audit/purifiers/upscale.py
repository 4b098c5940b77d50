"""Noisy upscaling (Honig et al. 2024, arXiv:2406.12027): noise, a x4 upscaler, back to size.

The picture with Gaussian noise of sigma 0.1 on [0, 1] goes through Stable Diffusion's x4 upscaler,
told the prompt and a noise level of 320 of its 350; the large picture is brought back, bicubic.
A picture with a side above 768 pixels is seen at a short side of 512, as the authors' pictures have
it, long ones in windows; four times 12 megapixels would fit no memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit import randomness
from diffkit.audit.purifiers.base import Amount, Kind, Models, Work
from diffkit.audit.purifiers.latent import resized, through_views
from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_float, to_uint8
from diffkit.models.weights import refuse_pickles
from diffkit.protection.views import plan_views

__all__ = ["UPSCALE"]

_CLASS = "StableDiffusionUpscalePipeline"
_SIGMA = 0.1
_LARGEST, _SIDE, _MULTIPLE = 768, 512, 8
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

    def make(images: Tensor, seed: int, name: str) -> Tensor:
        """(1, 3, h, w) in [-1, 1] -> the same, of another size."""
        draw = randomness.normal(images.shape, seed, "purify", "upscale", name)
        noisy = ((images + 1) / 2 + _SIGMA * draw).clamp(0, 1)
        large: Tensor = pipeline(
            prompt=[models.prompt],
            image=noisy,
            noise_level=int(level),
            num_inference_steps=_STEPS,
            guidance_scale=_GUIDANCE,
            generator=randomness.generator(seed, "purify", "upscale", "pipeline", name),
            output_type="pt",
        ).images
        return torch.as_tensor(large).float().cpu() * 2 - 1

    def work(pixels: Tensor, seed: int) -> Tensor:
        height, width = pixels.shape[-2:]
        if max(height, width) <= _LARGEST:
            return to_uint8(resized(make(to_float(pixels)[None], seed, "whole"), (height, width)))[
                0
            ]
        views = plan_views(height, width, _SIDE, _MULTIPLE, views=1).whole
        return through_views(
            pixels,
            views,
            lambda images, view: resized(make(images, seed, view.name), images.shape[-2:]),
        )

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
