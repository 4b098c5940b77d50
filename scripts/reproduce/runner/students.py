"""What one-step students are worth beside their teacher, from the same noises and captions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
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
from diffkit.objectives.collapse import within_prompt_diversity
from diffkit.perceptual.unit_distance import unit_distance
from runner.distances import caption_distance
from runner.scores import BATCH, SHADED, detail, features_of

__all__ = ["Asked", "Judge", "decoded", "encoded_strip", "few_step_latents", "strip"]


@dataclass(frozen=True)
class Asked:
    """A caption, and the concept or the style that it names."""

    caption: str
    concept: str | None = None
    style: str | None = None


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


class Judge:
    """Measures latents beside the teacher's end points of the same noises.

    Arguments:
        held: P captions in turn, n noises of each, at least 2.
        asked: what each of the P captions asks for.
        taught: latents (k, C, h, w) of the teacher's end points from other noises, of the P
            captions in turn.
        data: folder of the pictures that the teacher was trained on.
        model: any with the teacher's autoencoder.
        network: features, and the gates' classifier.
    """

    def __init__(
        self,
        held: TrajectoryBatch,
        asked: Sequence[Asked],
        taught: Tensor,
        data: Path,
        model: LatentDiffusion,
        network: FeatureNetwork,
    ) -> None:
        self.held, self.asked = held, list(asked)
        self.network, self.model = network, model
        self.real = features_of(network, read_pictures(data)[0])
        self.taught = features_of(network, decoded(model, taught))
        self.pictures = decoded(model, held.latents)

    @torch.no_grad()
    def scores(self, latents: Tensor, images: Tensor) -> dict[str, float]:
        """The numbers of latents (n, C, h, w), float32 on the CPU, and their decoded pictures.

        `kernel`, `kernel_taught`: `caption_distance` of the features to those of all real pictures,
        and to those of the teacher's end points from other noises. `concept`, `style`: parts of
        those pictures whose caption names one, in which the classifier finds it among all that are
        asked for. `shaded`: the part of those that name no style which it takes for the shaded one.
        `detail`: their power from half Nyquist on, over the teacher's.
        `latent_error` and `perceptual`: mean squared distance of latents, and unit distance of the
        feature network's maps, summed over the maps, to the teacher's end point of the same noise.
        `diversity`: how much pictures of one caption differ, over the teacher's.
        """
        logits = self.network.classify(images)
        drawn = features_of(self.network, images)
        diversity, teacher = (self._diversity(x) for x in (latents, self.held.latents))
        return {
            "n": len(images),
            "kernel": caption_distance(self._by_caption(drawn), self.real[None]),
            "kernel_taught": caption_distance(
                self._by_caption(drawn), self._by_caption(self.taught)
            ),
            "concept": self._told("concept", logits["concept"]),
            "style": self._told("style", logits["style"]),
            "shaded": self._shaded(logits["style"]),
            "detail": detail(images) / detail(self.pictures),
            "latent_error": float((latents - self.held.latents).square().mean()),
            "perceptual": self._perceptual(images),
            "diversity": diversity / teacher,
        }

    def _told(self, kind: str, logits: Tensor) -> float:
        named = [getattr(asked, kind) for asked in self.asked]
        classes = sorted({name for name in named if name is not None})
        columns = self.network.concept_indices if kind == "concept" else self.network.style_indices
        found = logits[:, columns(classes)].argmax(1).tolist()
        wanted = [named[i % len(named)] for i in range(len(found))]
        hits = [classes[i] == name for i, name in zip(found, wanted) if name is not None]
        return sum(hits) / len(hits)

    def _shaded(self, logits: Tensor) -> float:
        free = torch.tensor([one.style is None for one in self.asked])
        found = logits.argmax(1) == self.network.style_indices([SHADED]).item()
        return float(found.unflatten(0, (-1, len(free)))[:, free].float().mean())

    def _diversity(self, latents: Tensor) -> float:
        return float(within_prompt_diversity(self._by_caption(latents)))

    def _by_caption(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, len(self.asked))).transpose(0, 1)

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
