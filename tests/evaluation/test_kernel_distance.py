"""The kernel distance against torch-fidelity, its definition and explicit sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)

from diffkit import randomness
from diffkit.errors import UserError
from diffkit.evaluation.kernel_distance import (
    kernel_distance,
    kernel_distance_weighted,
    polynomial_kernel,
    subset_draws,
)
from tests.evaluation.largest_tensor import LargestTensor


def sets(n: int = 60, m: int = 45, d: int = 12, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    x = randomness.normal((n, d), "kernel", "x") + 0.4
    return x.to(dtype), (randomness.normal((m, d), "kernel", "y") * 1.2).to(dtype)


def torch_fidelity(x: Tensor, y: Tensor, subsets: int, size: int, seed: int):
    result = kid_features_to_metric(
        x, y, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


@pytest.mark.parametrize("kind", ["full rank", "n < d", "duplicated columns", "constant columns"])
@pytest.mark.parametrize("seed", [0, 2020])
def test_equals_torch_fidelity_with_its_draws(kind: str, seed: int) -> None:
    x, y = sets(d=200 if kind == "n < d" else 12)
    if kind == "duplicated columns":
        x[:, 1], y[:, 1] = x[:, 0], y[:, 0]
    if kind == "constant columns":
        x[:, 2], y[:, 2] = 1.0, 1.0
    ours = kernel_distance(x, y, subset_draws(len(x), len(y), 7, 30, seed))
    mean, std = torch_fidelity(x, y, 7, 30, seed)
    assert ours.mean == pytest.approx(mean, rel=1e-10)
    assert ours.std == pytest.approx(std, rel=1e-10)


def test_float32_features_as_extractors_give_them() -> None:
    """torch-fidelity then works in float32, ours in float64.

    That costs it digits: 3e-7 of the distance here, 9e-5 where the distance is a thousandth of the
    kernel's mean. Given float64 features the two agree to 1e-13.
    """
    x, y = sets(dtype=torch.float32)
    ours = kernel_distance(x, y, subset_draws(len(x), len(y), 7, 40, 3))
    assert ours.mean == pytest.approx(torch_fidelity(x, y, 7, 40, 3)[0], rel=1e-6)
    assert ours == kernel_distance(x.double(), y.double(), subset_draws(60, 45, 7, 40, 3))


def test_kernel_by_hand() -> None:
    """(1, 2).(3, -1) = 1, so ((1 / 2) + 1)^3 = 3.375."""
    kernel = polynomial_kernel(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0], [0.0, 0.0]]))
    assert kernel.tolist() == [[3.375, 1.0]] and kernel.dtype == torch.float64


def plain(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator, written out."""
    k_x, k_y, k_xy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    n, m = len(x), len(y)
    within = (k_x.sum() - k_x.trace()) / (n * (n - 1)) + (k_y.sum() - k_y.trace()) / (m * (m - 1))
    return float(within - 2 * k_xy.mean())


def test_weights_one_give_the_unbiased_estimator() -> None:
    x, y = sets()
    assert float(kernel_distance_weighted(x, y, torch.ones(60))) == pytest.approx(
        plain(x, y), rel=1e-12
    )


def test_weights_by_explicit_sums() -> None:
    """Every pair of places of the resample, but those that hold one and the same original."""
    x, y = sets(5, 4, 3)
    weights = torch.tensor([2, 0, 1, 3, 1])
    places = [i for i, w in enumerate(weights.tolist()) for _ in range(w)]
    kernel, across = polynomial_kernel(x, x), polynomial_kernel(x, y)
    pairs = [float(kernel[i, j]) for i in places for j in places if i != j]
    others = polynomial_kernel(y, y)
    within_y = (others.sum() - others.trace()) / (4 * 3)
    expected = sum(pairs) / len(pairs) + float(within_y) - 2 * float(across[places].mean())
    assert float(kernel_distance_weighted(x, y, weights)) == pytest.approx(expected, rel=1e-12)


def test_copies_of_an_original_do_not_raise_it() -> None:
    """Twice everything is the same distribution and the same distance."""
    x, y = sets()
    once = kernel_distance_weighted(x, y, torch.ones(60))
    torch.testing.assert_close(kernel_distance_weighted(x, y, torch.full((60,), 2)), once)
    assert plain(torch.cat([x, x]), y) > float(once)


@pytest.mark.parametrize("block", [4, 7, 20, 1000])
def test_blocks_do_not_change_it(block: int) -> None:
    """Nothing of n x n is needed: blocks of four rows and columns give the same sums."""
    x, y = sets()
    weights = randomness.integers(0, 4, (3, 60), "weights")
    blocked = kernel_distance_weighted(x, y, weights, block=block)
    assert blocked.shape == (3,)
    single = torch.stack([kernel_distance_weighted(x, y, w) for w in weights])
    torch.testing.assert_close(blocked, single, rtol=1e-12, atol=0)


def test_no_square_matrix_is_held() -> None:
    """400 pictures against 300 in blocks of 16: nothing is larger than the features themselves."""
    x, y = sets(400, 300, 4)
    with LargestTensor() as largest:
        kernel_distance_weighted(x, y, torch.ones(400), block=16)
    assert largest.elements <= 400 * 4


def test_equal_distributions_give_zero_on_average() -> None:
    """Unbiased: the mean over 200 pairs of sets is within 3 standard errors of 0."""
    values = [
        float(
            kernel_distance_weighted(
                randomness.normal((20, 4), "a", i),
                randomness.normal((20, 4), "b", i),
                torch.ones(20),
            )
        )
        for i in range(200)
    ]
    spread = torch.tensor(values)
    assert abs(spread.mean()) < 3 * spread.std() / 200**0.5
    assert spread.min() < 0


def test_draws_are_a_function_of_their_arguments_without_repeats() -> None:
    first, again = (subset_draws(50, 30, 4, 20, seed=1) for _ in range(2))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(first, again))
    assert all(len(draw.x.unique()) == len(draw.y.unique()) == 20 for draw in first)
    assert not torch.equal(first[0].x, subset_draws(50, 30, 4, 20, seed=2)[0].x)
    with pytest.raises(UserError, match="at most 30"):
        subset_draws(50, 30, 4, 31, seed=1)
