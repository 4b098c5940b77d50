"""Tiny models without text, and EDM ones: DiT, U-Nets of pixels and of latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    LDMPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
    VQModel,
)

from tests.tiny import build_sdxl, vae

NAMES = ("black cat", "golden retriever, retriever", "red fox", "snow owl")
CLASSES = len(NAMES)


def vqvae(**config: Any) -> VQModel:
    """Factor 2, three latent channels, sixteen codes."""
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "num_vq_embeddings": 16,
        "scaling_factor": 0.5,
    }
    return VQModel(**(options | config))


def unet2d(**config: Any) -> UNet2DModel:
    """Two levels, attention on the lower one."""
    options = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**(options | config))


def _card(folder: Path, null: bool) -> None:
    card: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(NAMES)}}
    if null:
        card["null_class"] = CLASSES
    (folder / "diffkit.json").write_text(json.dumps(card))


def build_dit(folder: Path) -> Path:
    """DiT with a learned variance, classes named in its index. Its pipeline knows no null class but
    1000, so the table has that many rows; only the first classes have names."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        num_embeds_ada_norm=1000,
    )
    DiTPipeline(transformer, vae(), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): name for i, name in enumerate(NAMES)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def build_pixel(
    folder: Path,
    classes: bool = False,
    null: bool = True,
    scheduler: Any = None,
    pipeline: Any = DDPMPipeline,
    **config: Any,
) -> Path:
    """A U-Net of pixels; its scheduler limits x0 to [-1, 1], as those of pixels do."""
    torch.manual_seed(0)
    if classes:
        config["num_class_embeds"] = CLASSES + null
    pipeline(unet2d(sample_size=32, **config), scheduler or DDPMScheduler()).save_pretrained(folder)
    if classes:
        _card(folder, null)
    return folder


def build_latent(folder: Path, classes: bool = False, kl: bool = False) -> Path:
    """A U-Net of the latents of a VQModel, or of an AutoencoderKL."""
    torch.manual_seed(0)
    channels = 4 if kl else 3
    config = {"num_class_embeds": CLASSES + 1} if classes else {}
    unet = unet2d(in_channels=channels, out_channels=channels, **config)
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    codec = vae(channels) if kl else vqvae()
    LDMPipeline(vqvae=codec, unet=unet, scheduler=scheduler).save_pretrained(folder)
    if classes:
        _card(folder, null=True)
    return folder


def build_sdxl_edm(folder: Path, **config: Any) -> Path:
    """Stable Diffusion XL with EDM's preconditioning and the latent statistics of Playground."""
    build_sdxl(folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    statistics = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 0.9, 1.1, 1.3]}
    pipeline.vae = vae(force_upcast=True, **statistics)
    pipeline.register_modules(scheduler=EDMDPMSolverMultistepScheduler(**config))
    pipeline.save_pretrained(folder)
    return folder


BUILDERS = {
    "dit": build_dit,
    "pixel": build_pixel,
    "pixel-ddim": lambda f: build_pixel(f, scheduler=DDIMScheduler(), pipeline=DDIMPipeline),
    "pixel-class": lambda f: build_pixel(f, classes=True),
    "pixel-class-no-null": lambda f: build_pixel(f, classes=True, null=False),
    "pixel-edm": lambda f: build_pixel(f, scheduler=EDMEulerScheduler()),
    "pixel-class-edm": lambda f: build_pixel(f, classes=True, scheduler=EDMEulerScheduler()),
    "pixel-grey": lambda f: build_pixel(f, in_channels=1, out_channels=1),
    "latent": build_latent,
    "latent-class": lambda f: build_latent(f, classes=True),
    "latent-kl": lambda f: build_latent(f, kl=True),
    "sdxl-edm": build_sdxl_edm,
    "sdxl-edm-v": lambda f: build_sdxl_edm(
        f, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    ),
}
