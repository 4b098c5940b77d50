"""Models of random weights and pictures of noise: speed does not depend on the values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffkit.files import append_jsonl

__all__ = ["SHAPES", "Shape", "build", "random_model", "random_pictures"]

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclass(frozen=True)
class Shape:
    """The size of a Stable Diffusion model.

    `vae` and `unet` are channels by level, `attention` says which U-Net levels attend, `text` is
    (width, layers, heads), `size` the pictures' edge in pixels.
    """

    size: int
    tokens: int
    text: tuple[int, int, int]
    vae: tuple[int, ...]
    vae_layers: int
    unet: tuple[int, ...]
    attention: tuple[bool, ...]
    unet_layers: int
    heads: int
    groups: int


SHAPES = {
    "tiny": Shape(32, 16, (16, 1, 2), (8, 16), 1, (8, 16), (False, True), 1, 2, 4),
    "small": Shape(
        64, 24, (128, 3, 4), (32, 64, 96), 1, (64, 128, 128), (False, True, True), 2, 8, 32
    ),
    # half the channels of Stable Diffusion: a step is seconds on a CPU, and mostly arithmetic
    "half": Shape(
        192,
        77,
        (384, 2, 6),
        (64, 128, 256, 256),
        2,
        (160, 320, 640, 640),
        (True, True, True, False),
        2,
        8,
        32,
    ),
    "sd": Shape(
        512,
        77,
        (768, 12, 12),
        (128, 256, 512, 512),
        2,
        (320, 640, 1280, 1280),
        (True, True, True, False),
        2,
        8,
        32,
    ),
}


def tokenizer(length: int) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the 256 bytes, alone and at the end of a word."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def text_encoder(shape: Shape) -> CLIPTextModel:
    """The text encoder of a shape."""
    width, layers, heads = shape.text
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=shape.tokens,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModel(config)


def autoencoder(shape: Shape) -> AutoencoderKL:
    """The autoencoder of a shape, with 4 latent channels."""
    levels = len(shape.vae)
    return AutoencoderKL(
        block_out_channels=shape.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=shape.vae_layers,
        norm_num_groups=shape.groups,
        latent_channels=4,
        sample_size=shape.size,
    )


def unet(shape: Shape) -> UNet2DConditionModel:
    """The U-Net of a shape."""
    down = tuple(CROSS[0] if on else PLAIN[0] for on in shape.attention)
    up = tuple(CROSS[1] if on else PLAIN[1] for on in reversed(shape.attention))
    return UNet2DConditionModel(
        sample_size=shape.size // 2 ** (len(shape.vae) - 1),
        block_out_channels=shape.unet,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=shape.unet_layers,
        attention_head_dim=shape.heads,
        cross_attention_dim=shape.text[0],
        norm_num_groups=shape.groups,
    )


def build(shape: Shape, seed: int = 0) -> StableDiffusionPipeline:
    """A stock pipeline of random float32 weights."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=autoencoder(shape),
        text_encoder=text_encoder(shape),
        tokenizer=tokenizer(shape.tokens),
        unet=unet(shape),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def random_model(folder: Path, shape: str) -> Path:
    """Write a model of a named shape as a diffusers folder."""
    build(SHAPES[shape]).save_pretrained(folder)
    return folder


def random_pictures(folder: Path, count: int, edge: int, seed: int = 0) -> Path:
    """Write `count` square PNGs of noise with captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(count):
        pixels = draw.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05}.png")
        row = {"file_name": f"{i:05}.png", "text": f"noise {i}"}
        append_jsonl(folder / "metadata.jsonl", row)
    return folder
