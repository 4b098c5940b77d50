"""Mean and covariance of features, the statistics behind the Frechet distance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a set of feature vectors.

    Attributes:
        n: how many vectors they were taken from.
        mean: (d,) float64.
        cov: (d, d) float64, symmetric, the unbiased one (divided by n - 1).
    """

    n: int
    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None, block: int = 4096) -> Moments:
        """Moments of features (n, d), in two passes over blocks of rows, summed in float64.

            mean = sum_i w_i x_i / N,  cov = sum_i w_i (x_i - mean)(x_i - mean)^T / (N - 1)

        with N = sum_i w_i. At most `block` rows are held in float64 at a time, so `features` may be
        a float32 tensor over a memory-mapped file.

        Args:
            weights: (n,) how often each row counts, whole numbers, 0 allowed; once each without.

        Raises:
            UserError: fewer than two rows count.
        """
        if weights is None:
            weights = torch.ones(len(features), dtype=torch.int64, device=features.device)
        n = int(weights.sum())
        if n < 2:
            raise UserError(f"a covariance needs at least two feature vectors, not {n}")
        width = features.shape[1]
        mean = torch.zeros(width, dtype=torch.float64, device=features.device)
        cov = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for rows, w in zip(features.split(block), weights.split(block)):
            mean += w.double() @ rows.double()
        mean /= n
        for rows, w in zip(features.split(block), weights.split(block)):
            centred = rows.double() - mean
            cov += centred.T @ (centred * w.double()[:, None])
        cov /= n - 1
        return cls(n, mean, (cov + cov.T) / 2)

    @cached_property
    def factor(self) -> Tensor:
        """F (d, r) with cov = F F^T, r the numerical rank: computed once, then kept.

        Eigenvalues up to d * eps * (the largest) are rounding and left out, as in
        numpy.linalg.matrix_rank; kept, their square roots (1e-8 each for an eigenvalue of 1e-16)
        would be the largest error of a Frechet distance between singular covariances.
        """
        values, vectors = torch.linalg.eigh(self.cov)
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
        return vectors[:, kept] * values[kept].sqrt()

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on a device."""
        return Moments(self.n, self.mean.to(device), self.cov.to(device))
