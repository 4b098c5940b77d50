"""What the LoRA tests share: predictions, adapters that matter, pictures of stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.models import lora
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora_keys import LoraWeights
from diffkit.models.lora_layers import inject, new_layer, plain_modules

EVERY_KIND = (
    "to_q",
    "to_out.0",
    "ff.net.2",
    "proj_in",
    "conv1",
    "time_emb_proj",
    "conv_in",
    "conv",
)


def load(folder: Path, **options: Any) -> LatentDiffusion:
    return LatentDiffusion.load(folder, **options)


def predict(model: LatentDiffusion, dtype: torch.dtype = torch.float32) -> Tensor:
    cond = model.conditioner.encode(["a red apple"], (32, 32))
    channels, h, w = model.latent_shape(32, 32)
    z_t = torch.randn(1, channels, h, w, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.denoiser(z_t.to(dtype), torch.tensor([500]), cond).float()


def randomise(model: LatentDiffusion, name: str = "default", size: float = 0.3) -> None:
    """Adapters begin at zero; give B values that matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in lora.lora_parameters(model, name).items():
            if key.endswith("lora_B"):
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def whole_adapter(model: LatentDiffusion, name: str = "default") -> LoraWeights:
    """An adapter on the denoiser and on the text encoders, ranks and alphas differing."""
    lora.add_lora(model, rank=4, alpha=6.0, name=name, targets=EVERY_KIND)
    for number, network in enumerate(model.conditioner.encoders.values()):
        paths = {
            p: m
            for p, m in plain_modules(network).items()
            if p.endswith(("q_proj", "out_proj", "fc1"))
        }
        layers = {p: new_layer(m, 2 + number, 1.0, 0, p) for p, m in paths.items()}
        inject(network, name, layers)
    randomise(model, name)
    return lora.lora_weights(model, name)


def stock_images(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipeline(
        "a red apple",
        num_inference_steps=2,
        height=32,
        width=32,
        generator=generator,
        output_type="pt",
    )
    return out.images
