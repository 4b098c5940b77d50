"""What the experiments measure of a text-to-image model that is trained on the emoji pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gates import generate, read_pairs, read_pictures, score
from torch import Tensor

from diffkit.evaluation.kernel_distance import kernel_distance_weighted
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import denoising_loss
from diffkit.perceptual.spectra import power_spectrum, ring_frequencies
from diffkit.randomness import normal, uniform

__all__ = [
    "BATCH",
    "BINS",
    "SHADED",
    "HeldOut",
    "detail",
    "features_of",
    "generate",
    "held_out_draws",
    "loss_by_time",
    "picture_scores",
    "read_pairs",
]

BINS = 10
"""Equal parts of the training times in which the loss is measured."""

BATCH = 32

SHADED = "fluent 3d"
"""The one style of soft shades, for which the feature network takes blurred pictures."""


def detail(images: Tensor) -> float:
    """Mean power of pictures (n, C, H, W) over the rings from half Nyquist on.

    Not its share of all power: a picture that is a mean of several loses contrast at every scale,
    and its share of high frequencies may even grow.
    """
    high = ring_frequencies(*images.shape[-2:]) >= 0.5
    return float(power_spectrum(images).mean(0).cpu()[high].mean())


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


@dataclass(frozen=True)
class HeldOut:
    """Pictures at one part of the training times, with noise and time that no training uses.

    Attributes:
        part: 0 .. `BINS` - 1.
        z0, eps: (n, C, h, w).
        t: (n,).
        cond: of the pictures' first captions.
    """

    part: int
    z0: Tensor
    eps: Tensor
    t: Tensor
    cond: Conditioning


@torch.no_grad()
def held_out_draws(model: LatentDiffusion, data: Path, limit: int) -> Iterator[HeldOut]:
    """The first `limit` pictures of `data` in the order of a stride that spans it.

    Each comes once in every one of `BINS` equal parts of the training times; addresses do not
    depend on the model.
    """
    images, rows = read_pictures(data)
    chosen = torch.arange(min(limit, len(images))) * max(1, len(images) // limit)
    size = images.shape[-1]
    for part in chosen.split(BATCH):
        captions = [rows[i]["text"][0] for i in part.tolist()]
        cond = model.conditioner.encode(captions, (size, size))
        z0 = model.codec.mean(model.codec.encode_moments(images[part]))
        for k in range(BINS):
            address = ("held-out draw", int(part[0]), k)
            eps = normal(z0.shape, *address, "noise")
            u = (uniform((len(part),), *address, "time") + k) / BINS
            yield HeldOut(k, z0, eps, model.schedule.train_timesteps(u, "uniform"), cond)


@torch.no_grad()
def loss_by_time(model: LatentDiffusion, data: Path, limit: int) -> list[float]:
    """The mean unweighted loss of the network's own target over `held_out_draws`, part by part."""
    sums, counts = torch.zeros(BINS), torch.zeros(BINS)
    for draw in held_out_draws(model, data, limit):
        sums[draw.part] += _loss(model.denoiser, draw).sum()
        counts[draw.part] += len(draw.t)
    return (sums / counts).tolist()


def _loss(denoiser: Denoiser, draw: HeldOut) -> Tensor:
    schedule = denoiser.schedule
    output = denoiser(schedule.add_noise(draw.z0, draw.eps, draw.t), draw.t, draw.cond)
    return denoising_loss(output, schedule.target(draw.z0, draw.eps, draw.t))
