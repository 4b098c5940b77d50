"""Bootstrap resamples of statistics that take an eigendecomposition, at a bounded price.

A resample of the Frechet distance or of the Vendi score decomposes a (d, d) matrix: nothing at
d = 128, seconds at Inception's 2048. Two ways keep 200 of them affordable:

- n <= d: everything is a function of an (n, n) Gram matrix that is computed once; a resample
  decomposes the rows that it drew, about 0.63 n.
- n > d > `WIDE`: `linearised`, with `FULL` full decompositions instead of all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffkit.console import progress
from diffkit.evaluation.diversity import unit_rows, vendi_score
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.moments import Moments

__all__ = ["FULL", "WIDE", "linearised", "per_row", "resampled_frechet", "resampled_vendi"]

WIDE = 256
"""Dimensions up to which every resample of many rows is computed in full."""

FULL = 20
"""Resamples that `linearised` computes in full."""

_ROWS = 1024

Resampled = Callable[[Tensor], Tensor]
"""Weights (R, n), whole numbers -> the statistic under each row, (R,) float64."""


def per_row(statistic: Callable[[Tensor], float], label: str = "resamples") -> Resampled:
    """The form with many rows of a statistic of one row of weights (n,)."""

    def of_weights(weights: Tensor) -> Tensor:
        values = [statistic(row) for row in progress(weights, label, len(weights))]
        return torch.tensor(values, dtype=torch.float64)

    return of_weights


def linearised(
    statistic: Callable[[Tensor], float], value: float, influence: Tensor, label: str = "resamples"
) -> Resampled:
    """Resamples from the statistic's derivative, corrected by a few full ones.

        theta_r = theta + L_r + (theta_j - theta - L_j),   j = r mod FULL
        L_r = sum_i w_ri h_i / sum_i w_ri - mean(h)

    The linear part L carries nearly all of the spread; the remainder, which holds the bias of
    resampling, is nearly constant, and `FULL` values of it suffice (Davison & Hinkley 1997,
    "Bootstrap methods and their application", section 9.3, take the same step for bias and
    variance). The first `FULL` resamples are exact.

    Args:
        statistic: of one row of weights (n,).
        value: theta, the statistic of the set itself.
        influence: h (n,), the derivative of theta to each picture's share, up to a constant.
    """
    h = influence.double() - influence.double().mean()

    def of_weights(weights: Tensor) -> Tensor:
        linear = torch.stack([row.double() @ h / row.sum() for row in weights])
        full = per_row(statistic, label)(weights[:FULL])
        remainder = full - linear[:FULL]
        return linear + remainder[torch.arange(len(weights)) % len(remainder)]

    return of_weights


def resampled_frechet(features: Tensor, own: Moments, real: Moments) -> tuple[Resampled, str]:
    """Resamples of `frechet_distance` of features (n, d), of moments `own`, and what to note."""
    n, width = features.shape
    label = "resamples of the Fréchet distance"
    if n <= width:
        return per_row(_gram_frechet(features, real), label), ""
    if width <= WIDE:
        return per_row(lambda w: frechet_distance(Moments.of(features, w), real), label), ""
    factor = real.factor
    values, vectors = torch.linalg.eigh(factor.T @ own.cov @ factor)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    # T = root root^T is the optimal map from this set's Gaussian to the real one: the derivative
    # of the distance to this set's covariance is I - T.
    root = factor @ (vectors[:, kept] * values[kept] ** -0.25)
    parts = []
    for rows in features.split(_ROWS):
        centred = rows.double() - own.mean
        shift = 2 * centred @ (own.mean - real.mean)
        parts.append(shift + centred.square().sum(1) - (centred @ root).square().sum(1))

    def full(weights: Tensor) -> float:
        given = Moments.of(features[weights > 0], weights[weights > 0])
        overlap = _roots(factor.T @ given.cov @ factor)
        difference = given.mean - real.mean
        traces = given.cov.trace() + real.cov.trace()
        return max(0.0, float(difference @ difference + traces - 2 * overlap))

    found = linearised(full, frechet_distance(own, real), torch.cat(parts), label)
    return found, f"{FULL} resamples in full, the others linearised"


def _gram_frechet(features: Tensor, real: Moments) -> Callable[[Tensor], float]:
    """`frechet_distance` of one resample of few rows: eigenvalues of a matrix of the drawn rows."""
    rows = features.double() - real.mean
    projected = rows @ real.factor
    gram, squares, trace = projected @ projected.T, rows.square().sum(1), real.cov.trace()

    def statistic(weights: Tensor) -> float:
        drawn = weights > 0
        w = weights[drawn].double()
        total = w.sum()
        mean = w @ rows[drawn] / total
        inner = gram[drawn][:, drawn]
        across = inner @ w / total
        centred = inner - across[:, None] - across + across @ w / total
        overlap = _roots(centred * torch.outer(w.sqrt(), w.sqrt()) / (total - 1))
        spread = (w @ squares[drawn] - total * (mean @ mean)) / (total - 1)
        return max(0.0, float(mean @ mean + spread + trace - 2 * overlap))

    return statistic


def _roots(matrix: Tensor) -> Tensor:
    """Sum of the square roots of a symmetric matrix' eigenvalues, rounding below zero left out."""
    values: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return values.clamp(min=0).sqrt().sum()


def resampled_vendi(features: Tensor) -> tuple[float, Resampled, str]:
    """`vendi_score` of features (n, d), its resamples, and what to note."""
    n, width = features.shape
    value, label = vendi_score(features), "resamples of the Vendi score"

    def full(weights: Tensor) -> float:
        return vendi_score(features[weights > 0], weights[weights > 0])

    if width <= WIDE:
        return value, per_row(full, label), ""
    if n <= width:
        unit = unit_rows(features)
        gram = unit @ unit.T

        def of_gram(weights: Tensor) -> float:
            drawn = weights > 0
            roots = (weights[drawn].double() / weights.sum()).sqrt()
            shares = torch.linalg.eigvalsh(gram[drawn][:, drawn] * torch.outer(roots, roots))
            return float(torch.special.entr(shares.clamp(min=0)).sum().exp())

        return value, per_row(of_gram, label), ""
    moment = torch.zeros(width, width, dtype=torch.float64)
    for rows in features.split(_ROWS):
        unit = unit_rows(rows)
        moment += unit.T @ unit / n
    shares, vectors = torch.linalg.eigh(moment)
    kept = shares > width * torch.finfo(torch.float64).eps * shares[-1]
    # d exp(-tr M log M) = -exp(...) tr((log M + 1) dM), and tr dM = 0
    logs = -value * shares[kept].log()
    influence = torch.cat(
        [(unit_rows(rows) @ vectors[:, kept]).square() @ logs for rows in features.split(_ROWS)]
    )
    found = linearised(full, value, influence, label)
    return value, found, f"{FULL} resamples in full, the others linearised"
