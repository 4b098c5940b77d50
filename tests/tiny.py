"""Tiny models of the true diffusers classes, randomly initialised from a fixed seed.

Every builder writes a plain diffusers folder, so that tests go through the same loading code as
users do. Pictures are 32x32: a VAE with factor 2 and a denoiser with two levels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MAX_LENGTH = 12


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the 256 bytes, alone and at the end of a word."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single letters."""
    letters = "▁abcdefghijklmnopqrstuvwxyz,.0123456789"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def t5_encoder() -> T5EncoderModel:
    """One layer of width 32."""
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def _clip_config(width: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """Factor 2, with the mid-block attention and quantization convolutions of SD unless told."""
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": latent_channels,
        "scaling_factor": 0.5,
        "sample_size": 32,
    }
    return AutoencoderKL(**(options | config))


def _unet(width: int = 16, **config: Any) -> UNet2DConditionModel:
    options = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(options | config))


def _ddim(prediction_type: str, zero_snr: bool) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def build_sd(
    folder: Path, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0
) -> Path:
    """Stable Diffusion 1 (epsilon) or 2 (v_prediction)."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=clip_tokenizer(),
        unet=_unet(),
        scheduler=_ddim(prediction_type, zero_snr),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def build_old_sd(folder: Path) -> Path:
    """Stable Diffusion 1 as its first folders on the hub are: a safety checker out of diffusers'
    own modules, beside an image processor by a name that transformers no longer has."""
    build_sd(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    eyes = tower | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=tower, vision_config=eyes, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    del index["requires_safety_checker"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def build_sdxl(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion XL with both text encoders and micro-conditioning."""
    torch.manual_seed(seed)
    unet = _unet(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


def build_sd3(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 3 with two CLIP encoders and T5."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=16,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_3=t5_encoder(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def build_flux(folder: Path, distilled: bool = True, seed: int = 0) -> Path:
    """Flux: dev, distilled to be told the guidance scale, or schnell."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if distilled else {"shift": 1.0}
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=t5_encoder(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def _build_pixart(folder: Path, pipeline_class: Any, seed: int, **config: Any) -> Path:
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=32,
        **config,
    )
    pipeline = pipeline_class(
        transformer=transformer,
        # diffusers' DDIM steps past the times that "linspace", the released models' spacing, gives.
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="trailing"),
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def build_pixart_alpha(folder: Path, seed: int = 0) -> Path:
    """PixArt-alpha as at 1024 pixels: it is told sizes, which its pipeline sees by the 128."""
    return _build_pixart(folder, PixArtAlphaPipeline, seed, sample_size=128)


def build_pixart_sigma(folder: Path, seed: int = 0) -> Path:
    """PixArt-Sigma, which is told no sizes."""
    return _build_pixart(folder, PixArtSigmaPipeline, seed, sample_size=16)


BUILDERS = {
    "sd": build_sd,
    "sd-old": build_old_sd,
    "sd-v": lambda folder: build_sd(folder, "v_prediction", zero_snr=True),
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "flux": build_flux,
    "flux-schnell": lambda folder: build_flux(folder, distilled=False),
    "pixart-alpha": build_pixart_alpha,
    "pixart-sigma": build_pixart_sigma,
}
