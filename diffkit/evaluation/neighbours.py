"""Precision, recall, density and coverage: nearest-neighbour balls around features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["Neighbourhood", "neighbourhood"]


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """One float64 value a picture; each metric is the mean of its values.

    Attributes:
        precision: (n_fake,) 1 where the picture lies in the ball of some real one.
        density: (n_fake,) how many real balls hold the picture, divided by k; may exceed 1.
        recall: (n_real,) 1 where the real picture lies in the ball of some generated one.
        coverage: (n_real,) 1 where the real picture's ball holds some generated one.
    """

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def neighbourhood(real: Tensor, fake: Tensor, k: int = 5, block: int = 1024) -> Neighbourhood:
    """Compare the supports of real (n, d) and generated (m, d) features.

    The ball of a picture is closed, centred at its feature, and its radius is the Euclidean
    distance to its k-th nearest other picture of its own set. Precision and recall are those of
    Kynkaanniemi et al. 2019 ("Improved precision and recall metric for assessing generative
    models"), density and coverage those of Naeem et al. 2020 ("Reliable fidelity and diversity
    metrics for generative models"), whose published code takes open balls; the two differ for
    points exactly on a sphere only.

    Squared distances are |x|^2 + |y|^2 - 2 x.y in float64, around the mean of the real features.
    Those that differ by less than their rounding (8 d eps times the largest squared norm) count as
    equal, so that a point on a sphere is inside in whatever order the sums are taken. At most
    (block, block) distances are held at a time.

    The means depend on n, m and k: compare only at equal ones. `precision` and `density` vary with
    the generated pictures drawn; an interval from the spread of `recall` or `coverage` is over the
    real pictures, the generated set held fixed.

    Raises:
        UserError: a set has no k other pictures.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(
            f"the {k} nearest neighbours need sets of more than {k} pictures; "
            f"there are {len(real)} real and {len(fake)} generated ones"
        )
    space = _Space.around(real, fake, block)
    real_reach, fake_reach = space.reach(real, k), space.reach(fake, k)
    held_by = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    recall = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    coverage = torch.zeros_like(recall)
    for j in range(0, len(real), block):
        rows = slice(j, j + block)
        for i in range(0, len(fake), block):
            columns = slice(i, i + block)
            distance = space.squared_distances(real[rows], fake[columns])
            inside = distance <= real_reach[rows, None]
            held_by[columns] += inside.sum(0)
            coverage[rows] |= inside.any(1)
            recall[rows] |= (distance <= fake_reach[columns]).any(1)
    return Neighbourhood((held_by > 0).double(), held_by / k, recall.double(), coverage.double())


@dataclass(frozen=True, eq=False)
class _Space:
    """Where distances are measured from, and below which difference they count as equal."""

    origin: Tensor
    tolerance: float
    block: int

    @classmethod
    def around(cls, real: Tensor, fake: Tensor, block: int) -> _Space:
        origin = torch.zeros(real.shape[1], dtype=torch.float64, device=real.device)
        for rows in real.split(block):
            origin += rows.double().sum(0) / len(real)
        norms = [
            (rows.double() - origin).square().sum(1).max()
            for rows in (*real.split(block), *fake.split(block))
        ]
        rounding = 8 * len(origin) * torch.finfo(torch.float64).eps
        return cls(origin, rounding * float(torch.stack(norms).max()), block)

    def squared_distances(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, d), (m, d) -> (n, m) float64, each within half the tolerance."""
        x, y = x.double() - self.origin, y.double() - self.origin
        norms = x.square().sum(1)[:, None] + y.square().sum(1)
        return norms.addmm_(x, y.T, alpha=-2)

    def reach(self, x: Tensor, k: int) -> Tensor:
        """Squared distance to the k-th nearest other row, and the tolerance: (n,).

        The row itself, at distance 0, is one of the k + 1 smallest.
        """
        reached = []
        for rows in x.split(self.block):
            nearest = rows.new_full((len(rows), k + 1), torch.inf, dtype=torch.float64)
            for others in x.split(self.block):
                candidates = torch.cat([nearest, self.squared_distances(rows, others)], dim=1)
                nearest = candidates.topk(k + 1, dim=1, largest=False).values
            reached.append(nearest.amax(1))
        return torch.cat(reached) + self.tolerance
