"""What a loss is given: one view of the pictures, encoded, and one draw of noise and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffkit.models.conditioner import Sizes
from diffkit.models.schedule import Prediction
from diffkit.protection.surrogate import Surrogate
from diffkit.randomness import generator

__all__ = ["Address", "Scene"]

Address = tuple[int | str, ...]
"""Where a draw of one picture stands: (seed of the picture, step, draw, ...)."""


@dataclass(frozen=True)
class Scene:
    """B pictures of one view size, as a loss sees them.

    Attributes:
        surrogate: the model.
        moments: (B, 2C, h, w) of the encoder, with a graph where a gradient is wanted.
        eta: (B, C, h, w) noise of the posterior; None for its mean.
        t: (B,) times in the model's units; None where the method has no denoiser.
        eps: (B, C, h, w) noise; None likewise.
        sizes: original size, corner and size of each view, for models that are told them.
        addresses: one a picture, for further draws of a loss.
        start: (B, 2C, h, w) moments of the clean pictures, for methods that need them.
        target: (1, 2C, h, w) moments of the target picture, for methods that have one.
        keep: (B, 1, H, W) 1 where the picture is kept by an editor and 0 where it paints; or None.
        output_kind: what ACE pulls to the target, "native" or "eps".
        residual_weight: weight of the residual in SDST.
    """

    surrogate: Surrogate
    moments: Tensor
    eta: Tensor | None
    t: Tensor | None
    eps: Tensor | None
    sizes: Sequence[Sizes]
    addresses: Sequence[Address]
    start: Tensor | None = None
    target: Tensor | None = None
    keep: Tensor | None = None
    output_kind: str = "native"
    residual_weight: float = 5.0

    @property
    def z(self) -> Tensor:
        """Latents (B, C, h, w), scaled and shifted."""
        codec = self.surrogate.codec
        return (
            codec.mean(self.moments) if self.eta is None else codec.sample(self.moments, self.eta)
        )

    @property
    def mean(self) -> Tensor:
        """mu, the posterior's mean before scaling: (B, C, h, w)."""
        return self.moments[:, : self.surrogate.codec.channels]

    @property
    def target_mean(self) -> Tensor:
        """mu of the target picture, (1, C, h, w)."""
        assert self.target is not None
        return self.target[:, : self.surrogate.codec.channels]

    @property
    def target_z(self) -> Tensor:
        """z_T: the target picture's latents from its posterior mean, (1, C, h, w)."""
        assert self.target is not None
        return self.surrogate.codec.mean(self.target)

    @property
    def noise(self) -> tuple[Tensor, Tensor]:
        """(t, eps)."""
        assert self.t is not None and self.eps is not None
        return self.t, self.eps

    def detached(self) -> Scene:
        """The same without the moments' graph."""
        return replace(self, moments=self.moments.detach())

    def output(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(network output, z_t) at the noised z: each (B, C, h, w)."""
        t, eps = self.noise
        z_t = self.surrogate.schedule.add_noise(z, eps, t)
        return self.surrogate.output(z_t, t, self.sizes), z_t

    def predict(self, z: Tensor) -> Prediction:
        """The network's prediction at the noised z."""
        output, z_t = self.output(z)
        return self.surrogate.schedule.prediction(output, z_t, self.noise[0])

    def native_target(self, z: Tensor) -> Tensor:
        """y, what a perfect network would put out. In v- and flow models it depends on z."""
        t, eps = self.noise
        return self.surrogate.schedule.target(z, eps, t)

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """More standard normal draws (B, *shape), by each picture's address."""
        rows = [
            torch.randn(tuple(shape), generator=generator(*address, purpose))
            for address in self.addresses
        ]
        return torch.stack(rows).to(self.moments.device)
