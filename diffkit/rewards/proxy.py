"""Latent proxy rewards: networks that score latents, so that a student needs no decoder.

    S(z, c) = <f(z, c), g(c)>, |f| = |g| = 1,    s = exp(log_scale) S

A proxy stands in for an expert reward R of decoded pictures and is fitted to it (`refit`). All
proxies take latents as the denoiser sees them, scaled and shifted; those that read the latents of
the autoencoder undo that inside, in one place.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffkit.models.conditioner import Conditioning

__all__ = ["LatentProxy", "Told"]

Told = Tensor | Conditioning
"""What a proxy is told of a batch of prompts: tokens (B, L), or the denoiser's conditioning."""

_MOST = math.log(100.0)


class LatentProxy(nn.Module, ABC):
    """A network S from latents and a prompt to a cosine, of which only some layers are trained.

    It stays in evaluation mode, during refits too: dropout would make preferences random. Which
    layers train is a list, `unlocked`; `lock` switches the gradients of all others off, for good.

    Attributes:
        log_scale: (1,), logarithm of the inverse temperature, trained. FSDP shards no scalars.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    @property
    def logit_scale(self) -> Tensor:
        """exp(log_scale) (), at most 100 as in CLIP; the bound does not hold its gradient back."""
        over = torch.relu(self.log_scale - _MOST).detach()
        return (self.log_scale - over).exp().squeeze(0)

    @abstractmethod
    def told(self, prompts: Sequence[str], cond: Conditioning) -> Told:
        """What `forward` takes of a batch: made from its prompts, or its conditioning as it is."""

    @abstractmethod
    def embed_text(self, told: Told) -> Tensor:
        """g(c) (B, D), unit vectors, float32."""

    @abstractmethod
    def embed_latents(self, latents: Tensor, told: Told) -> Tensor:
        """f(z, c) (B, D), unit vectors, float32, of scaled latents (B, C, h, w)."""

    def forward(self, latents: Tensor, told: Told, text: Tensor | None = None) -> Tensor:
        """S (B,) in [-1, 1], float32.

        Arguments:
            latents: (B, C, h, w), scaled as the denoiser sees them.
            told: of the same B prompts, see `told`.
            text: `embed_text(told)` where it is there already.
        """
        text = self.embed_text(told) if text is None else text
        return (self.embed_latents(latents, told) * text).sum(-1)

    @abstractmethod
    def unlocked(self) -> list[str]:
        """Names of the parameters that a refit trains; all others are locked."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write what `load_proxy` reads; `UserError` when `folder` exists without `overwrite`."""

    def lock(self) -> None:
        """Let gradients into the unlocked parameters alone."""
        names = set(self.unlocked())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)

    def train(self, mode: bool = True) -> LatentProxy:
        """Stay in evaluation mode: dropout has no place here."""
        super().train(False)
        return self
