"""Published models in their true sizes, without weights: the networks on torch's meta device.

The configs are those of stable-diffusion-v1-5, stable-diffusion-xl-base-1.0 and
stable-diffusion-3-medium. Text encoders are left out; what they would give is an empty tensor of
the right shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["REAL_SIZES", "RealSize", "conditioning", "sd15", "sd3", "sdxl"]


def autoencoder(size: int, latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """The autoencoder that all three share, up to its latents."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=size,
        **config,
    )


def ddim() -> DDIMScheduler:
    """Stable Diffusion's noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5, without text encoder."""
    return StableDiffusionPipeline(
        vae=autoencoder(512, scaling_factor=0.18215),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        text_encoder=None,
        tokenizer=None,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL base 1.0, without text encoders."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(1024, scaling_factor=0.13025),
        unet=unet,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=ddim(),
    )


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 medium, without text encoders."""
    vae = autoencoder(
        1024,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        out_channels=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@dataclass(frozen=True)
class RealSize:
    """A published model: how to build it, its pictures' edge, and what its denoiser is told.

    `tokens` is the (length, width) of the text states, `pooled` the width of the pooled ones.
    """

    build: Callable[[], Any]
    size: int
    tokens: tuple[int, int]
    pooled: int | None = None
    sizes: bool = False

    def skeleton(self) -> LatentDiffusion:
        """The model on the meta device."""
        with torch.device("meta"):
            pipeline = self.build()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return LatentDiffusion(pipeline)


REAL_SIZES = {
    "SD1.5": RealSize(sd15, 512, (77, 768)),
    "SDXL": RealSize(sdxl, 1024, (77, 2048), pooled=1280, sizes=True),
    "SD3-medium": RealSize(sd3, 1024, (333, 4096), pooled=2048),
}


def conditioning(shape: RealSize, device: str = "meta") -> Conditioning:
    """What the text encoders would give for one prompt, zeros."""
    return Conditioning(
        tokens=torch.zeros(1, *shape.tokens, device=device),
        pooled=None if shape.pooled is None else torch.zeros(1, shape.pooled, device=device),
        time_ids=torch.zeros(1, 6, device=device) if shape.sizes else None,
    )
