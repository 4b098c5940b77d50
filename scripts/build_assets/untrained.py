"""Assemble the text-to-image model before its training: `python scripts/build_assets/untrained.py`.

A stock `StableDiffusionPipeline` of the trained autoencoder, the frozen text tower of the
text-image scorer, and a U-Net at its random start; v-prediction with zero terminal SNR (Salimans &
Ho 2022; Lin et al. 2023). `diffkit train denoising --model OUTPUT` trains it like any other model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffkit.models.latent_diffusion import LatentDiffusion


def unet(latent_channels: int, text_width: int) -> UNet2DConditionModel:
    """5.6M parameters: 16x16, 8x8 and 4x4, attention to the text at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=32,
        norm_num_groups=32,
    )


def scheduler() -> DDIMScheduler:
    """SD's beta table rescaled to zero terminal SNR; sampling starts from pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(vae: Path, scorer: Path, seed: int) -> StableDiffusionPipeline:
    """The pipeline; `scorer` holds `text_encoder/` and `tokenizer/`."""
    autoencoder = AutoencoderKL.from_pretrained(vae)
    text_encoder = CLIPTextModel.from_pretrained(scorer / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(scorer / "tokenizer")
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet(autoencoder.config.latent_channels, text_encoder.config.hidden_size),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path(".build/vae"))
    parser.add_argument("--scorer", type=Path, default=Path(".build/scorer"))
    parser.add_argument("--output", type=Path, default=Path(".build/init"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = LatentDiffusion(assemble(args.vae, args.scorer, args.seed))
    model.save(args.output, overwrite=True)
    parts = {k: sum(p.numel() for p in m.parameters()) for k, m in model.networks.items()}
    print(parts)


if __name__ == "__main__":
    main()
