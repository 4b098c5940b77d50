"""The networks that metrics share, each loaded at its first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.evaluation.extractors import EMBEDDED_RESIZE
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.fingerprint import fingerprint_module
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.perceptual.latent_lpips_pictures import PictureLatentLpips, load_embedded
from diffkit.perceptual.lpips import load_lpips, lpips_name
from diffkit.rewards.base import Reward
from diffkit.rewards.spec import load_reward

__all__ = ["NETWORKS", "REWARD", "Scorer", "Toolbox", "load_scorer", "networks"]

NETWORKS = frozenset({"scorer", "classifier", "latent_lpips", "lpips"})
"""What a metric may need of a `Toolbox`, beside rewards."""

REWARD = "reward:"
"""Begins the need of a reward, which the rest specifies."""

_TEXTS = 64  # texts a call of the text tower


def networks(needs: Iterable[str]) -> list[str]:
    """Those of a metric's needs that are networks of a `Toolbox`, in order."""
    return sorted(need for need in needs if need in NETWORKS or need.startswith(REWARD))


@dataclass(frozen=True)
class Scorer:
    """A text-image model; `embed_images` and `embed_texts` give unit vectors of one space."""

    name: str
    label: str
    resize: str
    key: str
    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[list[str]], Tensor]


def load_scorer(spec: str, device: torch.device) -> Scorer:
    """The scorer "embedded", or one of open_clip by a name as `extractors` takes it.

    Raises `UserError` for an unknown name or weights that cannot be had.
    """
    if spec.startswith("clip:"):
        from diffkit.models.clip import load_clip

        clip = load_clip(spec, device)
        return Scorer(
            clip.name, clip.label, clip.resize, clip.key, clip.embed_images, clip.embed_texts
        )
    if spec != "embedded":
        raise UserError(f"scorer {spec!r}: unknown. Known: embedded, clip:ARCH:TAG_OR_PATH.")
    from diffkit.assets import path

    network = TextImageScorer.load(path("scorer")).to(device).requires_grad_(False)
    return Scorer(
        name="embedded",
        label="diffkit text-image scorer",
        resize=EMBEDDED_RESIZE,
        key=fingerprint_module(network),
        embed_images=network.embed_images,
        embed_texts=network.embed_texts,
    )


class Toolbox:
    """Networks by need: those of `NETWORKS`, and rewards by their specification.

    Arguments:
        device: where they run.
        scorer, lpips: see `load_scorer` and `perceptual.lpips.load_lpips`.
        prompts: of the run, in any order and with repeats: retrieval and the classifier choose
            among what these name.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        scorer: str = "embedded",
        lpips: str = "alex",
        prompts: Sequence[str] = (),
    ) -> None:
        self.device = torch.device(device)
        self.scorer_spec = scorer
        self.lpips_spec = lpips
        self.prompts = tuple(dict.fromkeys(prompts))
        self._rewards: dict[str, Reward] = {}
        self._reward_prompts: dict[str, Tensor] = {}

    @cached_property
    def scorer(self) -> Scorer:
        """The text-image model."""
        return load_scorer(self.scorer_spec, self.device)

    @cached_property
    def classifier(self) -> FeatureNetwork:
        """The embedded classifier of concepts and styles."""
        from diffkit.assets import path

        return FeatureNetwork.load(path("features")).to(self.device).requires_grad_(False)

    @cached_property
    def lpips(self) -> Any:
        """The LPIPS network."""
        return load_lpips(self.lpips_spec, self.device)

    @cached_property
    def latent_lpips(self) -> PictureLatentLpips:
        """The embedded LatentLPIPS network behind the embedded autoencoder."""
        return load_embedded(self.device)

    @cached_property
    def prompt_embeddings(self) -> Tensor:
        """Unit vectors (P, D) of the run's distinct prompts."""
        with torch.no_grad():
            parts = [
                self.scorer.embed_texts(list(self.prompts[start : start + _TEXTS]))
                for start in range(0, len(self.prompts), _TEXTS)
            ]
        return torch.cat(parts)

    @cached_property
    def prompt_numbers(self) -> dict[str, int]:
        """Rows of `prompt_embeddings`."""
        return {text: number for number, text in enumerate(self.prompts)}

    def reward(self, spec: str) -> Reward:
        """The reward of a specification, see `diffkit.rewards.spec`."""
        if spec not in self._rewards:
            self._rewards[spec] = load_reward(spec, self.device)
        return self._rewards[spec]

    def reward_prompts(self, spec: str, prompts: Sequence[str]) -> Tensor:
        """What the reward needs of these prompts, one row each; those of the run are read once."""
        if not set(prompts) <= set(self.prompts):
            return self.reward(spec).embed_prompts(prompts)
        if spec not in self._reward_prompts:
            parts = [
                self.reward(spec).embed_prompts(self.prompts[start : start + _TEXTS])
                for start in range(0, len(self.prompts), _TEXTS)
            ]
            self._reward_prompts[spec] = torch.cat(parts)
        return self._reward_prompts[spec][[self.prompt_numbers[text] for text in prompts]]

    def label(self, need: str) -> str:
        """What the report calls a network."""
        if need.startswith(REWARD):
            return self.reward(need.removeprefix(REWARD)).label
        if need == "scorer":
            return self.scorer.label
        return {
            "classifier": "diffkit feature network",
            "latent_lpips": "diffkit embedded latents",
            "lpips": lpips_name(self.lpips_spec),
        }[need]

    def resize(self, need: str) -> str:
        """How a network resizes pictures."""
        if need.startswith(REWARD):
            return self.reward(need.removeprefix(REWARD)).resize
        if need == "scorer":
            return self.scorer.resize
        return EMBEDDED_RESIZE if need == "classifier" else "pictures at their own size"

    def key(self, need: str) -> str:
        """A digest of a network's weights: values of another key are not comparable."""
        if need.startswith(REWARD):
            return self.reward(need.removeprefix(REWARD)).fingerprint()
        if need == "scorer":
            return self.scorer.key
        network: nn.Module = getattr(self, need)
        return fingerprint_module(network)
