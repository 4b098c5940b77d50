"""Diversity of points that can be worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from diffkit import randomness
from diffkit.errors import UserError
from diffkit.evaluation.diversity import vendi_score, within_group_distance


def test_distances_inside_groups_by_hand() -> None:
    """Group 3: points 0, 3, 9 on a line, pairs 3, 9, 6, mean 6. Group 7: (0, 0) and (3, 4): 5.

    Group 5 has one picture and is left out; the rows are out of order.
    """
    features = torch.tensor([[0.0, 0], [0, 0], [3, 0], [8, 8], [3, 4], [9, 0]])
    groups = torch.tensor([3, 7, 3, 5, 7, 3])
    values = within_group_distance(features, groups)
    assert values.tolist() == [6, 5] and values.dtype == torch.float64


def test_a_repeated_picture_has_none() -> None:
    features = randomness.normal((2, 4), "same").repeat_interleave(3, dim=0)
    assert within_group_distance(features, torch.tensor([0, 0, 0, 1, 1, 1])).tolist() == [0, 0]


def test_single_pictures_have_no_distance() -> None:
    with pytest.raises(UserError, match="one picture of each"):
        within_group_distance(torch.zeros(3, 2), torch.arange(3))


@pytest.mark.parametrize("n", [1, 5, 32])
def test_orthogonal_pictures_count_each(n: int) -> None:
    """Whatever their lengths, and more dimensions change nothing."""
    lengths = torch.arange(1, n + 1)[:, None]
    assert vendi_score(torch.eye(n) * lengths) == pytest.approx(n, rel=1e-12)
    assert vendi_score(torch.eye(n, 40) * lengths) == pytest.approx(n, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(6, 20), (20, 6)])
def test_identical_pictures_count_one(n: int, d: int) -> None:
    features = randomness.normal((1, d), "identical").expand(n, d)
    assert vendi_score(features) == pytest.approx(1, abs=1e-10)


def test_two_pictures_at_an_angle() -> None:
    """K / 2 has the eigenvalues (1 + c) / 2 and (1 - c) / 2 for the cosine c."""
    c = 0.6
    high, low = (1 + c) / 2, (1 - c) / 2
    expected = math.exp(-high * math.log(high) - low * math.log(low))
    assert vendi_score(torch.tensor([[1.0, 0], [0.6, 0.8]])) == pytest.approx(expected, rel=1e-7)


def test_uneven_groups_of_equal_pictures() -> None:
    """Eigenvalues 3/4 and 1/4: the exponential of the entropy of the shares."""
    features = torch.eye(2)[torch.tensor([0, 0, 1, 0])]
    assert vendi_score(features) == pytest.approx(4 / 3**0.75, rel=1e-12)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_the_small_matrix_has_the_same_score(block: int) -> None:
    """n > d goes through the d x d moment; the n x n kernel of the definition says the same."""
    x = randomness.normal((40, 6), "vendi").double()
    unit = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.T / 40).clamp(min=1e-300)
    expected = float((-(values * values.log()).sum()).exp())
    assert vendi_score(x, block=block) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(5, 9), (5, 3)])
def test_weights_are_repeats(n: int, d: int) -> None:
    x, weights = randomness.normal((n, d), "weights"), torch.tensor([2, 0, 1, 3, 1])
    repeated = x.repeat_interleave(weights, dim=0)
    assert vendi_score(x, weights) == pytest.approx(vendi_score(repeated), rel=1e-12)
