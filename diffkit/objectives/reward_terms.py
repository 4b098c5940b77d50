"""Rewards of what latents decode to: as losses of latents, and as the word of an expert.

    f_k(z, a, c) = -a R_k(D(z), c)

with a decoder D and rewards R_k that look at pictures within [-1, 1]. Pixels outside of it get no
gradient, so their part is logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.models.decode import Checkpoint
from diffkit.models.tiny_decoder import TinyDecoder
from diffkit.rewards.base import Reward

__all__ = ["Found", "PictureRewards", "WeightedReward", "saturated_fraction"]

WeightedReward = tuple[Reward, float]

_PIXELS, _MOST = 512 * 512, 4
"""Pixels that are decoded at once with gradients, whose activations all stay; and pictures."""


def saturated_fraction(images: Tensor) -> Tensor:
    """The part of all values outside [-1, 1] in images (B, 3, H, W): (B,), without gradient."""
    return (images.detach().abs() > 1).flatten(1).float().mean(1)


class Found:
    """What is seen on the way of losses that are taken apart into chunks, put together again."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def note(self, name: str, values: Tensor) -> None:
        """Values (b,) of the next samples."""
        self._parts.setdefault(name, []).append(values.detach())

    def terms(self) -> dict[str, Tensor]:
        """All values (B,) by name."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


class PictureRewards:
    """Frozen rewards behind a frozen decoder.

    Each reward decodes anew: its own gradient in the latents, by which it may be weighted, goes
    back through the whole decoder in any case.

    Arguments:
        rewards: with the weight of each, above 0, by a name for logs.
        decoder: D.
        chunk: pictures that are decoded at once; None for as many as 512x512 pixels hold, one to 4.
        checkpoint: of the decoder's backward pass.
    """

    def __init__(
        self,
        rewards: dict[str, WeightedReward],
        decoder: Codec | TinyDecoder,
        chunk: int | None,
        checkpoint: Checkpoint = None,
    ) -> None:
        self.rewards = rewards
        self.decoder = decoder
        self._chunk = chunk
        self.checkpoint = checkpoint

    def chunk(self, latents: Tensor) -> int:
        """How many of these latents (B, C, h, w) are decoded at once."""
        if self._chunk is not None:
            return self._chunk
        pixels = math.prod(latents.shape[-2:]) * self.decoder.factor**2
        return min(max(_PIXELS // pixels, 1), _MOST)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards, in order."""
        return tuple(self.rewards)

    @property
    def logit_scale(self) -> float | None:
        """What makes log odds of the weighted sum: of one reward that was trained to give them."""
        (first, weight), *others = self.rewards.values()
        return None if others or first.logit_scale is None else first.logit_scale / weight

    def to(self, device: torch.device) -> None:
        """Move all rewards."""
        for reward, _ in self.rewards.values():
            reward.to(device)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What each reward needs of B prompts: (B, ...) each."""
        return tuple(reward.embed_prompts(prompts) for reward, _ in self.rewards.values())

    def losses(self, found: Found) -> list[partial[Tensor]]:
        """f_k(z, a, c_1, ..., c_K) -> (b,) of each reward, for `eager_sum`.

        z: latents (b, C, h, w); a: (b,); c_k: rows of `embed`. R_k by its name, and the "saturated"
        fraction, are noted in `found`.
        """
        return [partial(self._loss, place, found) for place in range(len(self.rewards))]

    def _loss(
        self, place: int, found: Found, z: Tensor, factor: Tensor, *embedded: Tensor
    ) -> Tensor:
        name, (reward, _) = list(self.rewards.items())[place]
        images = self.decoder.decode(z, self.checkpoint)
        value = reward.score(images, embedded[place])
        found.note(name, value)
        if place == 0:
            found.note("saturated", saturated_fraction(images))
        return -factor * value

    @torch.no_grad()
    def judge(self, latents: Tensor, embedded: Sequence[Tensor]) -> Tensor:
        """sum_k weight_k R_k(D(z), c), (B,), float32, without gradient, chunk by chunk."""
        size = self.chunk(latents)
        chunks = (latents.split(size), *(rows.split(size) for rows in embedded))
        return torch.cat([self._sum(z, own) for z, *own in zip(*chunks, strict=True)])

    def _sum(self, z: Tensor, embedded: Sequence[Tensor]) -> Tensor:
        images = self.decoder.decode(z)
        pairs = zip(self.rewards.values(), embedded, strict=True)
        values = [weight * reward.score(images, own) for (reward, weight), own in pairs]
        return torch.stack(values).sum(0)
