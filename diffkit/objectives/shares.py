"""Weights of several losses of one prediction, by the share that each has in its gradient.

Losses whose values have nothing to do with each other (a distance and a reward, a distance and a
discriminator) are balanced where they meet: in their gradients with respect to the prediction y,

    weight_k = share_k E|g_main| / E|g_k|,    |g|^2 = mean over the batch of |d loss_b / d y_b|^2

with exponential moving averages E over optimizer steps (Esser et al. 2021 balance the
discriminator of VQGAN so, at the last layer and without averages).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientShare", "Share"]

DECAY = 0.99


@dataclass(frozen=True)
class Share:
    """How one loss is weighted: by its share of the main loss's gradient, or by a constant.

    Exactly one of the two is given.
    """

    share: float | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.weight is None):
            raise ValueError("give a share or a weight")


class GradientShare:
    """The weights of a main loss, which is 1, and of others, from averages of gradient norms.

    A share is 0 until the first norms were measured, and for a loss whose gradient is 0. Both
    averages lack the same factor of bias, which their ratio does not have.

    Arguments:
        main: name of the main loss.
        terms: the other losses by name.
    """

    def __init__(self, main: str, terms: Mapping[str, Share]) -> None:
        self.names = (main, *terms)
        self._shares = torch.tensor([t.share or 0.0 for t in terms.values()])
        self._constants = torch.tensor([t.weight or 0.0 for t in terms.values()])
        self._constant = torch.tensor([t.share is None for t in terms.values()], dtype=torch.bool)
        self.tensors = {"norms": torch.zeros(len(self.names))}

    def place(self, device: torch.device) -> None:
        """Move the numbers there."""
        self._shares = self._shares.to(device)
        self._constants, self._constant = self._constants.to(device), self._constant.to(device)
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    @property
    def weights(self) -> Tensor:
        """(1 + K,): 1, and the weight of each other loss."""
        main, others = self.tensors["norms"][:1], self.tensors["norms"][1:]
        shared = torch.where(others > 0, self._shares * main / others, 0.0)
        return torch.cat(
            [torch.ones_like(main), torch.where(self._constant, self._constants, shared)]
        )

    def watched(self) -> tuple[str, ...]:
        """The terms whose means `update` wants: NAME_square, |d loss_b / d y_b|^2."""
        return tuple(f"{name}_square" for name in self.names)

    def update(self, means: Mapping[str, Tensor]) -> None:
        """Take in the means of one step over the global batch, each ().

        A norm that is not finite is left out: an average would never forget it.
        """
        averages = self.tensors["norms"]
        norms = torch.stack([means[name] for name in self.watched()]).sqrt().to(averages)
        averages.lerp_(torch.where(norms.isfinite(), norms, averages), 1 - DECAY)
