"""What the experiments measure of a text-to-image model that is trained on the emoji pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from gates import generate, read_pairs, read_pictures, score
from torch import Tensor

from diffkit.evaluation.kernel_distance import kernel_distance_weighted
from diffkit.models.denoiser import Denoiser
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import denoising_loss
from diffkit.randomness import normal, uniform

__all__ = ["BINS", "features_of", "loss_by_time", "picture_scores"]

BINS = 10
"""Equal parts of the training times in which the loss is measured."""

BATCH = 32


def picture_scores(
    model: LatentDiffusion,
    data: Path,
    network: FeatureNetwork,
    *,
    samples: int,
    steps: int,
    guidance: float,
) -> dict[str, float]:
    """The scores of `gates.py` for `samples` pictures of each (concept, style) pair of `data`.

    Picture i starts from the same noise for every model. `kernel` is the kernel distance, with the
    feature network's features, to all pictures of `data`: the U-statistic over all pairs.
    """
    pairs, real = read_pairs(data, False), read_pictures(data)
    images = generate(model, pairs, samples, steps, guidance, BATCH)
    scores = score(images, pairs, samples, network, real)
    drawn = features_of(network, images)
    once = torch.ones(len(drawn))
    distance = kernel_distance_weighted(drawn, features_of(network, real[0]), once)
    return {**scores, "kernel": float(distance)}


@torch.no_grad()
def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    """(n, d) features of images (n, 3, H, W) in [-1, 1]."""
    return torch.cat([network.features(part) for part in images.split(BATCH)])


@torch.no_grad()
def loss_by_time(model: LatentDiffusion, data: Path, limit: int) -> list[float]:
    """The unweighted loss of the network's own target in `BINS` equal parts of the training times.

    Over the first `limit` pictures of `data` in the order of a stride that spans it, each once in
    every part, with noise and time at addresses that no training uses.
    """
    images, rows = read_pictures(data)
    chosen = torch.arange(min(limit, len(images))) * max(1, len(images) // limit)
    size = images.shape[-1]
    sums = torch.zeros(BINS)
    for part in chosen.split(BATCH):
        captions = [rows[i]["text"][0] for i in part.tolist()]
        cond = model.conditioner.encode(captions, (size, size))
        z0 = model.codec.mean(model.codec.encode_moments(images[part]))
        for k in range(BINS):
            address = ("held-out draw", int(part[0]), k)
            eps = normal(z0.shape, *address, "noise")
            u = (uniform((len(part),), *address, "time") + k) / BINS
            t = model.schedule.train_timesteps(u, "uniform")
            sums[k] += _loss(model.denoiser, z0, eps, t, cond).sum()
    return (sums / len(chosen)).tolist()


def _loss(denoiser: Denoiser, z0: Tensor, eps: Tensor, t: Tensor, cond: object) -> Tensor:
    schedule = denoiser.schedule
    output = denoiser(schedule.add_noise(z0, eps, t), t, cond)
    return denoising_loss(output, schedule.target(z0, eps, t))
