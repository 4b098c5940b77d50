"""The Frechet distance of two sets of features."""

from __future__ import annotations

import torch

from diffkit.evaluation.moments import Moments

__all__ = ["frechet_distance"]


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance between the Gaussians of two sets, at least 0.

        |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)

    The last trace is the sum of the singular values of F_a^T F_b, with A = F_a F_a^T and
    B = F_b F_b^T (`Moments.factor`): no square root of a rounded zero is taken, so singular
    covariances (n < d, constant or repeated features) lose no digits. The usual roots of the
    eigenvalues of A B do there: each rounded zero adds up to 1e-8 to the trace and the distance
    comes out too low, by a part in 1e8 for sets far apart and by several per cent for sets nearly
    equal (tests/evaluation/test_frechet.py measures it).

    On Inception features this is the FID (Heusel et al. 2017, "GANs trained by a two time-scale
    update rule converge to a local Nash equilibrium"). It is biased upward at finite n, by about
    the same amount for sets of equal n: compare only sets of equal n.

    Both moments lie on one device; the result is in squared feature units.
    """
    difference = a.mean - b.mean
    overlap = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    distance = difference @ difference + a.cov.trace() + b.cov.trace() - 2 * overlap
    return max(0.0, float(distance))
