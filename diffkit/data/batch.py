"""One micro-batch of training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffkit.randomness import SampleKeys

if TYPE_CHECKING:
    from diffkit.models.conditioner import Conditioning, Sizes

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch, B of them; tensors are on the CPU unless moved by `to`.

    Exactly one of `images`, (B, 3, H, W) float32 in [-1, 1], and `moments`, (B, 2C, h, w) float32
    from the latent cache, is given. `conditioning` comes from the embedding cache and belongs to
    `captions`, of which a sample without any has "". It holds no `time_ids`: a model with
    micro-conditioning gets them from `Conditioner.with_sizes(conditioning, sizes)`, where each crop
    is the corner in the resized and flipped picture. `labels` is (B,) int64, None for a set without
    classes. `names` and `extras` say which samples these are.
    """

    keys: SampleKeys
    images: Tensor | None
    moments: Tensor | None
    captions: list[str]
    conditioning: Conditioning | None
    labels: Tensor | None
    sizes: list[Sizes]
    names: list[str]
    extras: list[Mapping[str, object]]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with images, moments, conditioning and labels on `device`."""
        return replace(
            self,
            images=None if self.images is None else self.images.to(device, non_blocking=True),
            moments=None if self.moments is None else self.moments.to(device, non_blocking=True),
            conditioning=None if self.conditioning is None else self.conditioning.to(device),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )
