"""Samples of a few-step model from fixed captions and noises, and everything that scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffkit.assets import path
from runner.inputs import FEATURES
from runner.judge import Asked, Distances, Judge, scorer_features
from runner.open_captions import asked_of
from runner.scores import detail
from torch import Tensor

from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.randomness import normal
from diffkit.rewards.spec import load_reward

__all__ = ["POOLED", "Judges", "Prompts", "Sampler"]

POOLED = "embedded@16"
"""The embedded scorer of pictures averaged down to 16x16."""

SEEN = (
    *("kernel", "kernel_taught", "scorer", "scorer_taught"),
    *("concept", "shaded", "diversity"),
)
"""What is told of the scores of a `Judge`, and of the distances in the scorer's features."""

BATCH = 64


@dataclass(frozen=True)
class Prompts:
    """What the samples are asked for: P captions that leave things open, `noises` of each in a row.

    The samples come in the order of `captions`; `by_caption` puts them into rows.
    """

    asked: list[Asked]
    noises: int

    @classmethod
    def read(cls, data: Path, noises: int) -> Prompts:
        """Every open caption of the data once, in order."""
        return cls(asked_of(data), noises)

    @property
    def captions(self) -> list[str]:
        """Of all samples."""
        return [one.caption for one in self.asked for _ in range(self.noises)]

    def by_caption(self, samples: Tensor) -> Tensor:
        """(P, noises, ...) of all samples (n, ...)."""
        return samples.unflatten(0, (len(self.asked), self.noises))


@dataclass(frozen=True)
class Sampler:
    """A model with the scale that it is sampled with, and the noise of a seed."""

    model: LatentDiffusion
    guidance: float
    seed: int

    def _noise(self, places: range, *step: int) -> Tensor:
        size = self.model.default_size
        shape = self.model.latent_shape(size, size)
        rows = [normal(shape, self.seed, "few-step sample", place, *step) for place in places]
        return torch.stack(rows).to(self.model.device)

    @torch.no_grad()
    def latents(self, captions: Sequence[str], steps: int) -> Tensor:
        """(n, C, h, w); sample i starts from the same noise for every model of the seed."""
        model, made = self.model, []
        size = (model.default_size, model.default_size)
        model.denoiser.eval()
        for start in range(0, len(captions), BATCH):
            texts = list(captions[start : start + BATCH])
            places = range(start, start + len(texts))
            cond = model.conditioner.encode(texts, size).to(model.device)
            null = model.conditioner.null(1, size).to(model.device).expand(len(texts))
            made.append(
                sample(
                    model.denoiser,
                    self._noise(places),
                    cond,
                    null,
                    steps=steps,
                    guidance_scale=self.guidance,
                    fresh=partial(self._noise, places),
                    shown=False,
                )
            )
        return torch.cat(made)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1]."""
        parts = [self.model.codec.decode(part).clamp(-1, 1) for part in latents.split(BATCH)]
        return torch.cat(parts)


class Judges:
    """Everything that scores the samples of one seed, on the samples' device.

    Arguments:
        prompts: of the samples.
        real: pictures (m, 3, H, W) that the teacher was trained on.
        ends: latents (n, C, h, w) where the teacher's trajectories end from the samples' noises.
        taught: pictures (n, 3, H, W) of such ends from other noises, of the same prompts.
        device: of the samples.
    """

    def __init__(
        self,
        prompts: Prompts,
        real: Tensor,
        ends: Tensor,
        taught: Tensor,
        device: torch.device,
    ) -> None:
        self.prompts = prompts
        self.ends = ends.to(device)
        network = FeatureNetwork.load(FEATURES).to(device)
        known = real.to(device), prompts.by_caption(taught.to(device))
        self.judge = Judge(network, prompts.asked, *known)
        self.rewards = {
            name: load_reward(spec, device)
            for name, spec in (("reward", POOLED), ("reward_full", "embedded"))
        }
        scorer = TextImageScorer.load(path("scorer")).to(device)
        features = partial(scorer_features, scorer)
        self.scorer = Distances(features, prompts.asked, *known, "scorer")

    @torch.no_grad()
    def score(self, latents: Tensor, images: Tensor) -> dict[str, float]:
        """All measures of samples made of `prompts`, in order; see `Judge` for most of them.

        `endpoint`: mean squared distance of latents to the ends. `detail`: see `runner.scores`.
        `reward`, `reward_full`: mean rewards, of pooled and of whole pictures.
        """
        grouped = [self.prompts.by_caption(x) for x in (latents, images)]
        seen = self.judge.scores(*grouped) | self.scorer.of(grouped[1])
        found = {name: seen[name] for name in SEEN}
        found["endpoint"] = float((latents - self.ends).square().mean())
        found["detail"] = detail(images)
        for name, reward in self.rewards.items():
            embedded = reward.embed_prompts(self.prompts.captions)
            parts = zip(images.split(BATCH), embedded.split(BATCH), strict=True)
            found[name] = float(torch.cat([reward.score(*part) for part in parts]).mean())
        return found
