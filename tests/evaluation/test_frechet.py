"""The Frechet distance against closed forms, torch-fidelity and 50-digit arithmetic.

torch-fidelity 0.4 sums the square roots of the eigenvalues of A B. For covariances of full rank it
agrees with ours to rounding. For singular ones the eigenvalues that should be 0 come out as about
1e-16 of either sign; the positive ones add some 1e-8 each to the trace that is subtracted, so its
distance is too LOW: by 1e-9 to 3e-8 of itself in the cases below, within the 1e-6 asked for; by
several per cent when the distance itself is small against the covariances (nearly equal sets). Ours
stays within 1e-13 of the 50-digit value in the first cases and within 1e-7 in the last.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from diffkit import randomness
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.moments import Moments

mpmath.mp.dps = 50
ZERO = mpmath.mpf(10) ** -35  # eigenvalues that are 0 come out below this at 50 digits


def ours(x: Tensor, y: Tensor) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


def torch_fidelity(x: Tensor, y: Tensor) -> float:
    statistics = (fid_features_to_statistics(x), fid_features_to_statistics(y))
    return fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID]


def exact(x: Tensor, y: Tensor) -> float:
    """The definition in 50-digit arithmetic."""
    mean_x, a = exact_moments(x)
    mean_y, b = exact_moments(y)
    values, vectors = mpmath.eigsy(a)
    root = vectors * mpmath.diag([real_root(v) for v in values]) * vectors.T
    overlap = sum(real_root(v) for v in mpmath.eigsy(root * b * root, eigvals_only=True))
    trace = sum(a[i, i] + b[i, i] for i in range(a.rows))
    shift = sum((p - q) ** 2 for p, q in zip(mean_x, mean_y))
    return float(shift + trace - 2 * overlap)


def exact_moments(x: Tensor):
    rows = mpmath.matrix(x.double().tolist())
    n, d = x.shape
    mean = [mpmath.fsum(rows[i, j] for i in range(n)) / n for j in range(d)]
    centred = mpmath.matrix(n, d)
    for i in range(n):
        for j in range(d):
            centred[i, j] = rows[i, j] - mean[j]
    return mean, centred.T * centred / (n - 1)


def real_root(value):
    return mpmath.sqrt(value) if value > ZERO else mpmath.mpf(0)


def sets(n: int, d: int, kind: str) -> tuple[Tensor, Tensor]:
    """Two float64 sets of different means and covariances, or the second near the first."""
    x = randomness.normal((n, d), kind, "x").double() * torch.linspace(0.1, 3, d)
    y = randomness.normal((n + 1, d), kind, "y").double() + 0.3
    if kind == "duplicated columns":
        x[:, 1], y[:, 1] = x[:, 0], y[:, 0]
    if kind == "constant columns":
        x[:, 2], y[:, 2], y[:, 3] = 1.0, 1.5, 2.0
    if kind == "nearly equal":
        y = x + 0.001 * y[:n]
    return x, y


CASES = [
    (40, 8, "full rank"),
    (5, 12, "n < d"),
    (9, 16, "n < d"),
    (40, 8, "duplicated columns"),
    (40, 8, "constant columns"),
]


@pytest.mark.parametrize(("n", "d", "kind"), CASES)
def test_equals_fifty_digits_and_torch_fidelity(n: int, d: int, kind: str) -> None:
    x, y = sets(n, d, kind)
    truth = exact(x, y)
    assert ours(x, y) == pytest.approx(truth, rel=1e-13)
    assert torch_fidelity(x, y) == pytest.approx(ours(x, y), rel=1e-6)


@pytest.mark.parametrize(
    ("n", "d", "kind"),
    [
        (600, 128, "full rank"),
        (64, 128, "n < d"),
        (128, 256, "n < d"),
        (300, 64, "constant columns"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torch_fidelity_at_size(n: int, d: int, kind: str, dtype: torch.dtype) -> None:
    """float32 features are what extractors give; torch-fidelity rounds their mean to float32."""
    x, y = (features.to(dtype) for features in sets(n, d, kind))
    assert torch_fidelity(x, y) == pytest.approx(ours(x, y), rel=1e-6)


def test_torch_fidelity_is_too_low_on_nearly_equal_singular_sets() -> None:
    x, y = sets(9, 16, "nearly equal")
    truth = exact(x, y)
    assert ours(x, y) == pytest.approx(truth, rel=1e-7)
    assert torch_fidelity(x, y) < 0.99 * truth


def test_diagonal_covariances_in_closed_form() -> None:
    """sum (mu_a - mu_b)^2 + (s_a - s_b)^2, zero variances included."""
    a = Moments(10, torch.tensor([1.0, 2, 3]).double(), torch.tensor([4.0, 9, 0]).double().diag())
    b = Moments(10, torch.tensor([1.0, 0, 3]).double(), torch.tensor([1.0, 0, 0]).double().diag())
    assert frechet_distance(a, b) == pytest.approx(4 + (2 - 1) ** 2 + 3**2, rel=1e-15)
    assert frechet_distance(b, a) == frechet_distance(a, b)


def test_rotation_leaves_it() -> None:
    x, y = sets(30, 6, "full rank")
    turn = torch.linalg.qr(randomness.normal((6, 6), "turn").double()).Q
    assert ours(x @ turn, y @ turn) == pytest.approx(ours(x, y), rel=1e-13)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (9, 16)])
def test_a_set_against_itself(n: int, d: int) -> None:
    """Zero up to the rounding of the traces, and never negative."""
    x, _ = sets(n, d, "full rank")
    assert 0 <= ours(x, x) <= 1e-13 * float(Moments.of(x).cov.trace())


def test_the_bias_is_upward_and_falls_with_n() -> None:
    def distance(n: int) -> float:
        halves = (randomness.normal((n, 8), "bias", n, half) for half in "ab")
        return ours(*halves)

    few, many = distance(50), distance(5000)
    assert few > 10 * many > 0 and math.isfinite(few)
