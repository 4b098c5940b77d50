"""Samples of a few-step model from fixed captions and noises, and everything that scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from runner.distances import caption_distance
from runner.inputs import FEATURES
from runner.open_captions import KINDS, open_caption
from runner.scores import SHADED, detail
from torch import Tensor

from diffkit.files import read_jsonl
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.objectives.collapse import within_prompt_diversity
from diffkit.randomness import normal
from diffkit.rewards.spec import load_reward

__all__ = ["POOLED", "Judges", "Prompts", "Sampler"]

POOLED = "embedded@16"
"""The embedded scorer of pictures averaged down to 16x16."""

BATCH = 64


@dataclass(frozen=True)
class Prompts:
    """Captions of the samples, each with several noises: all of a kind that leaves things open."""

    captions: list[str]
    kinds: list[str]
    noises: int

    @classmethod
    def read(cls, data: Path, noises: int) -> Prompts:
        """Every open caption of the data once, in order, `noises` times."""
        found: dict[str, str] = {}
        for kind in KINDS:
            for row in read_jsonl(data / "metadata.jsonl"):
                full = max(row["text"], key=lambda text: text.count(","))
                found.setdefault(open_caption({**row, "text": [full]}, kind), kind)
        each = [pair for pair in found.items() for _ in range(noises)]
        return cls([caption for caption, _ in each], [kind for _, kind in each], noises)


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
        self.network = FeatureNetwork.load(FEATURES).to(device)
        self.references = {
            "kernel": self._features(real.to(device))[None],
            "kernel_taught": self._by_caption(self._features(taught.to(device))),
        }
        self.rewards = {
            name: load_reward(spec, device)
            for name, spec in (("reward", POOLED), ("reward_full", "embedded"))
        }

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.network.features(part) for part in images.split(BATCH)])

    @torch.no_grad()
    def score(self, latents: Tensor, images: Tensor) -> dict[str, float]:
        """All measures of samples made of `prompts`, in order."""
        drawn = self._features(images)
        found = {
            name: caption_distance(self._by_caption(drawn), reference)
            for name, reference in self.references.items()
        }
        found |= {
            "endpoint": float((latents - self.ends).square().mean()),
            "detail": detail(images),
            "diversity": float(within_prompt_diversity(self._by_caption(latents))),
            **self._classes(images),
        }
        for name, reward in self.rewards.items():
            embedded = reward.embed_prompts(self.prompts.captions)
            parts = zip(images.split(BATCH), embedded.split(BATCH), strict=True)
            found[name] = float(torch.cat([reward.score(*part) for part in parts]).mean())
        return found

    def _by_caption(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, self.prompts.noises))

    def _classes(self, images: Tensor) -> dict[str, float]:
        """What the feature network sees in the samples of captions that name a concept alone.

        `concept`: the share in which it finds that one among all that are asked for. `shaded`: the
        share that it takes for the one style with soft shades; of the pictures it is a quarter.
        """
        places = [i for i, kind in enumerate(self.prompts.kinds) if kind == "concept"]
        names = [self.prompts.captions[i] for i in places]
        every = sorted(set(names))
        logits = self.network.classify(images[places])
        columns = self.network.concept_indices(every).to(images.device)
        best = logits["concept"][:, columns].argmax(1)
        truth = torch.tensor([every.index(name) for name in names], device=best.device)
        shaded = self.network.style_indices([SHADED]).to(images.device)
        return {
            "concept": float((best == truth).float().mean()),
            "shaded": float((logits["style"].argmax(1) == shaded).float().mean()),
        }
