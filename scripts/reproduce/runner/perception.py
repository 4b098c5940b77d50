"""What a denoiser's estimates look like to the decoder, and how much detail its pictures have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from gates import generate, read_pairs, read_pictures
from torch import Tensor

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.perceptual.decoder_features import FeatureLoss, latent_perceptual_loss
from diffkit.randomness import normal

__all__ = ["estimate_errors", "laplacian_energy", "sample_detail"]

BATCH = 32


@torch.no_grad()
def estimate_errors(
    model: LatentDiffusion, data: Path, times: Sequence[int], noises: int
) -> dict[str, list[float]]:
    """Of the one-step estimates of z_0 for all pictures of `data`, a list over the times.

    `latent_error` is mean (z0_hat - z_0)^2, `feature_error` the latent perceptual loss divided by
    the true features' deviation, `relative` the second over the first, and `variance` the variance
    of the estimates' features over that of the true ones, all blocks together. The noises are at
    addresses that no training uses, the same for every model.
    """
    images, rows = read_pictures(data)
    size = images.shape[-1]
    sums = torch.zeros(len(times), 4, dtype=torch.float64)
    for part in torch.arange(len(images)).split(BATCH):
        captions = [rows[i]["text"][0] for i in part.tolist()]
        cond = model.conditioner.encode(captions, (size, size))
        z0 = model.codec.mean(model.codec.encode_moments(images[part]))
        for place, time in enumerate(times):
            t = torch.full((len(z0),), time)
            for number in range(noises):
                eps = normal(z0.shape, "held-out estimate", int(part[0]), time, number)
                estimate = model.denoiser.predict(model.schedule.add_noise(z0, eps, t), t, cond).x0
                found = latent_perceptual_loss(
                    model.codec, estimate, z0, FeatureLoss(stats="target")
                )
                columns = (
                    (estimate - z0).square().flatten(1).mean(1),
                    found.value,
                    found.predicted_variance,
                    found.target_variance,
                )
                sums[place] += torch.stack([column.double().sum() for column in columns])
    latent, feature, predicted, true = sums.unbind(1)
    count = len(images) * noises
    return {
        "latent_error": (latent / count).tolist(),
        "feature_error": (feature / count).tolist(),
        "relative": (feature / latent).tolist(),
        "variance": (predicted / true).tolist(),
    }


def laplacian_energy(images: Tensor) -> Tensor:
    """mean (4 x - its four neighbours)^2 of images (B, C, H, W), borders left out: (B,)."""
    x = images.double()
    inner = 4 * x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return (inner - around).square().flatten(1).mean(1)


@torch.no_grad()
def sample_detail(
    model: LatentDiffusion, data: Path, *, samples: int, steps: int, guidance: float
) -> float:
    """Laplacian energy of `samples` pictures over that of as many decoded real ones of `data`.

    Each is of another pair of concept and style; picture i starts from the same noise for every
    model.
    """
    pairs = read_pairs(data, False)
    pairs = pairs[:: max(1, len(pairs) // samples)][:samples]
    drawn = generate(model, pairs, 1, steps, guidance, BATCH)
    images, _ = read_pictures(data)
    images = images[:: max(1, len(images) // samples)][:samples]
    real = [
        model.codec.decode(model.codec.mean(model.codec.encode_moments(part))).clamp(-1, 1)
        for part in images.split(BATCH)
    ]
    return float(laplacian_energy(drawn).mean() / laplacian_energy(torch.cat(real)).mean())
