"""What one-step students are worth beside their teacher, from the same noises and captions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gates import read_pictures
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffkit.data.trajectories import TrajectoryBatch
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.objectives.collapse import within_prompt_diversity
from diffkit.perceptual.unit_distance import unit_distance
from runner.judge import Asked, Distances, Judge, scorer_features
from runner.scores import BATCH, detail

__all__ = ["Comparison", "decoded", "encoded_strip", "few_step_latents", "strip"]


@torch.no_grad()
def few_step_latents(
    model: LatentDiffusion, held: TrajectoryBatch, steps: int = 1, guidance: float = 1.0
) -> Tensor:
    """Latents (n, C, h, w) of the noises and captions of `held`, float32 on the CPU."""
    conditioner, size = model.conditioner, held.sizes[0].target
    model.denoiser.eval()
    parts = []
    for rows in torch.arange(len(held)).split(BATCH):
        cond = conditioner.encode([held.captions[i] for i in rows.tolist()], size)
        null = None if guidance == 1 else conditioner.null(len(rows), size)
        noise = held.noise[rows].to(model.device)
        words = {"steps": steps, "guidance_scale": guidance, "shown": False}
        parts.append(sample(model.denoiser, noise, cond, null, **words).cpu())
    return torch.cat(parts)


@torch.no_grad()
def decoded(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] on the CPU."""
    parts = [model.codec.decode(part.to(model.device)) for part in latents.split(BATCH)]
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts])


class Comparison:
    """Measures latents beside the teacher's end points of the same noises.

    Arguments:
        held: P captions in turn, n noises of each, at least 2.
        asked: what each of the P captions asks for.
        taught: latents (k, C, h, w) of the teacher's end points from other noises, of the P
            captions in turn.
        data: folder of the pictures that the teacher was trained on.
        model: any with the teacher's autoencoder.
        network: features, and the gates' classifier.
        scorer: features of other kind.
    """

    def __init__(
        self,
        held: TrajectoryBatch,
        asked: Sequence[Asked],
        taught: Tensor,
        data: Path,
        model: LatentDiffusion,
        network: FeatureNetwork,
        scorer: TextImageScorer,
    ) -> None:
        self.held, self.network = held, network
        self._captions = len(asked)
        known = read_pictures(data)[0], self._by_caption(decoded(model, taught))
        self._judge = Judge(network, asked, *known)
        self._scorer = Distances(partial(scorer_features, scorer), asked, *known, "scorer")
        self.pictures = decoded(model, held.latents)

    @torch.no_grad()
    def scores(self, latents: Tensor, images: Tensor) -> dict[str, float]:
        """The numbers of latents (n, C, h, w), float32 on the CPU, and their decoded pictures.

        Those of `Judge`, `diversity` over the teacher's, and the distances in the scorer's features
        as `scorer`, `scorer_taught`, `scorer_looks`. `detail`: power from half Nyquist on, over
        the teacher's. `latent_error` and `perceptual`: mean squared distance of latents, and unit
        distance of the feature network's maps, summed over the maps, to the teacher's end point of
        the same noise.
        """
        found = self._judge.scores(self._by_caption(latents), self._by_caption(images))
        found |= self._scorer.of(self._by_caption(images))
        teacher = float(within_prompt_diversity(self._by_caption(self.held.latents)))
        return {
            "n": len(images),
            **found,
            "diversity": found["diversity"] / teacher,
            "detail": detail(images) / detail(self.pictures),
            "latent_error": float((latents - self.held.latents).square().mean()),
            "perceptual": self._perceptual(images),
        }

    def _by_caption(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, self._captions)).transpose(0, 1)

    def _perceptual(self, images: Tensor) -> float:
        total, trunk = 0.0, self.network.trunk
        for own, other in zip(images.split(BATCH), self.pictures.split(BATCH), strict=True):
            maps = zip(*(trunk.maps(trunk.prepare(x)) for x in (own, other)), strict=True)
            total += sum(float(unit_distance(x, y, x.new_ones(x.shape[1])).sum()) for x, y in maps)
        return total / len(images)


def encoded_strip(images: Tensor) -> str:
    """Pictures (n, 3, H, W) in [-1, 1] beside one another, a JPEG in base64."""
    pixels = ((torch.cat(list(images), -1) + 1) * 127.5).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(buffer, "JPEG", quality=90, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


def strip(text: str) -> NDArray[np.uint8]:
    """The pixels (H, n W, 3) of an `encoded_strip`."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
