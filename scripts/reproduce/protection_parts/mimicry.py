"""A mimic: a LoRA trained on eight of the artist's pictures, and how well it draws in the style.

The feature network was trained without OpenMoji. Styles are compared in its style space: means of
all blocks, each scaled as the style head scales them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from runner.experiment import Cell
from runner.work import INTERRUPTED, Interrupted
from torch import Tensor

from diffkit.errors import RunFailed
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.kernel_distance import kernel_distance_weighted
from diffkit.evaluation.moments import Moments
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.models.sampling import sample
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.protection.budget import as_signed
from diffkit.randomness import normal
from diffkit.training.denoising import DenoisingTraining
from diffkit.training.launch import train
from protection_parts.artist import (
    LEARNT,
    caption,
    other_styles,
    pixels_of,
    protected,
    reference,
    write_folder,
)
from protection_parts.edits import decode

__all__ = ["draw_pictures", "learn", "learnt_pictures", "scores"]

BATCH = 32


def learnt_pictures(clean: Tensor, version: Tensor, share: float) -> Tensor:
    """The first eight pictures, of which `share` (1 or 0.5) are protected: two, then two not."""
    protected_ones = torch.arange(LEARNT) % 4 < round(4 * share)
    return torch.where(protected_ones.view(-1, 1, 1, 1), version[:LEARNT], clean[:LEARNT])


def learn(cell: Cell, pixels: Tensor) -> Path:
    """Folder of the LoRA; of one seed all mimics see the same order, noise, times and start."""
    settings = cell.settings
    captions = [caption(drawing) for drawing in protected()[:LEARNT]]
    config = DenoisingTraining(
        data=str(write_folder(cell.work / "pictures", pixels, captions)),
        output=cell.work / "run",
        model="embedded",
        seed=cell.seed,
        max_steps=settings["train_steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lora_rank=settings["rank"],
        lora_targets=tuple(settings["targets"]),
        cache_latents=True,
        cache_embeddings=True,
        workers=1,
        checkpoint_every=100,
        keep=1,
        tracker="none",
        denoising=DenoisingConfig(),
    )
    code = train(config)
    if code == INTERRUPTED:
        raise Interrupted
    if code:
        raise RunFailed(f"{config.output}: the training ended with code {code}.")
    return cell.work / "run" / "lora"


def draw_pictures(
    model: LatentDiffusion, settings: Mapping[str, Any], seed: int, lora: Path | None
) -> Tensor:
    """uint8 (samples, 3, H, W): one picture for each caption of the reference."""
    if lora is not None:
        load_lora(model, lora)
    size = (model.default_size,) * 2
    captions = [caption(drawing) for drawing in reference(settings["samples"])]
    null = model.conditioner.null(1, size)
    shape, pictures = model.latent_shape(*size), []
    for start in range(0, len(captions), BATCH):
        texts = captions[start : start + BATCH]
        noise = torch.stack([normal(shape, seed, start + i, "mimic") for i in range(len(texts))])
        z = sample(
            model.denoiser,
            noise,
            model.conditioner.encode(texts, size),
            null.expand(len(texts)),
            steps=settings["sample_steps"],
            guidance_scale=settings["guidance"],
        )
        pictures.append(decode(model, z))
    return torch.cat(pictures)


@torch.no_grad()
def style_features(network: FeatureNetwork, pixels: Tensor) -> Tensor:
    """(n, d): what the network's style head reads."""
    pooled = network.trunk.pooled(network.trunk.prepare(as_signed(pixels)))
    return network.style_norm(torch.cat(pooled, -1))


@torch.no_grad()
def scores(network: FeatureNetwork, pixels: Tensor) -> dict[str, float]:
    """How near pictures (n, 3, H, W), one a caption of the reference, are to the artist's own.

    "kernel" and "frechet": distances to the artist's drawings of the same captions on features;
    "kernel_style": the kernel distance in the style space; "style": share whose nearest of five
    styles' means (the artist's and the model's four, over the same captions) is the artist's.
    """
    drawings = reference(len(pixels))
    own = pixels_of(drawings)
    means = [style_features(network, own).mean(0)]
    means += [style_features(network, other).mean(0) for other in other_styles(drawings).values()]
    style, style_own = style_features(network, pixels), style_features(network, own)
    mine, theirs = (network.features(as_signed(p)) for p in (pixels, own))
    once = torch.ones(len(pixels))
    return {
        "kernel": float(kernel_distance_weighted(mine, theirs, once)),
        "kernel_style": float(kernel_distance_weighted(style, style_own, once)),
        "frechet": frechet_distance(Moments.of(mine), Moments.of(theirs)),
        "style": float((torch.cdist(style, torch.stack(means)).argmin(1) == 0).float().mean()),
    }
