"""The offline reward: the text-image scorer that ships with diffkit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.rewards.base import Reward, frozen

__all__ = ["EmbeddedReward", "load"]


class EmbeddedReward(Reward):
    """R = <f(x), g(c)> in [-1, 1], the cosine of a `TextImageScorer`."""

    name = "embedded"
    label = "diffkit text-image scorer"
    resize = "the network resizes to 64x64 (bilinear, antialiased)"

    def __init__(self, scorer: TextImageScorer) -> None:
        self.scorer = scorer
        self.logit_scale = float(scorer.tower.log_scale.exp())

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The scorer."""
        return (self.scorer,)

    def read(self, prompts: list[str]) -> Tensor:
        """Unit vectors (B, D)."""
        return self.scorer.embed_texts(prompts)

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """The cosine (B,)."""
        return (self.scorer.embed_images(2 * pixels - 1) * embedded).sum(-1)


def load(place: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """The embedded scorer; it lies in the package and computes in float32."""
    from diffkit.assets import path

    scorer = TextImageScorer.load(path("scorer"))
    return EmbeddedReward(frozen(scorer, device, torch.float32))
