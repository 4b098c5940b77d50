"""Precision, recall, density and coverage of points on a line, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_full

from diffkit import randomness
from diffkit.errors import UserError
from diffkit.evaluation.neighbours import neighbourhood
from tests.evaluation.largest_tensor import LargestTensor


def line(*positions: float) -> Tensor:
    return torch.tensor(positions)[:, None]


def test_one_neighbour_by_hand() -> None:
    """k = 1.

    Real 0, 1, 3, 10: radii 1, 1, 2, 7; balls [-1, 1], [0, 2], [1, 5], [3, 17].
    Fake 0.5, 4, 20: radii 3.5, 3.5, 16; balls [-3, 4], [0.5, 7.5], [4, 36].

    0.5 lies in the balls of 0 and 1; 4 in those of 3 and 10; 20 in none.
    0 lies in the first fake ball, 1 and 3 in the first two, 10 in the third.
    The balls of 0 and 1 hold 0.5, those of 3 and 10 hold 4.
    """
    result = neighbourhood(line(0, 1, 3, 10), line(0.5, 4, 20), k=1)
    assert result.precision.tolist() == [1, 1, 0]
    assert result.density.tolist() == [2, 2, 0]
    assert result.recall.tolist() == [1, 1, 1, 1]
    assert result.coverage.tolist() == [1, 1, 1, 1]


def test_two_neighbours_by_hand() -> None:
    """k = 2, with a point on a sphere and a mode left out.

    Real 0, 2, 3, 100, 101, 103: radii 3, 2, 3, 3, 2, 3;
    balls [-3, 3], [0, 4], [0, 6], [97, 103], [99, 103], [100, 106].
    Fake 1, 4, 5, 6: radii 4, 2, 1 of {1, 1, 4} -> 1, 2;
    balls [-3, 5], [2, 6], [4, 6], [4, 8].

    1 lies in the balls of 0, 2 and 3: density 3 / 2. 4 in those of 2 (on the sphere) and 3: 2 / 2.
    5 in that of 3: 1 / 2. 6 in that of 3 (on the sphere): 1 / 2.
    0, 2, 3 lie in the first fake ball, the others in none; the balls of 0, 2, 3 hold a fake.
    """
    result = neighbourhood(line(0, 2, 3, 100, 101, 103), line(1, 4, 5, 6), k=2)
    assert result.precision.tolist() == [1, 1, 1, 1]
    assert result.density.tolist() == [1.5, 1, 0.5, 0.5]
    assert result.recall.tolist() == [1, 1, 1, 0, 0, 0]
    assert result.coverage.tolist() == [1, 1, 1, 0, 0, 0]


def test_copies_of_one_picture_by_hand() -> None:
    """k = 1. A collapsed model: fake 1, 1, 1 of radius 0, among real 0, 1, 2 of radius 1.

    Each fake lies in all three balls: density 3. Only the real 1 lies in a fake ball (a point).
    """
    result = neighbourhood(line(0, 1, 2), line(1, 1, 1), k=1)
    assert result.precision.tolist() == [1, 1, 1]
    assert result.density.tolist() == [3, 3, 3]
    assert result.recall.tolist() == [0, 1, 0]
    assert result.coverage.tolist() == [1, 1, 1]


@pytest.mark.parametrize("block", [7, 64, 1024])
@pytest.mark.parametrize("d", [3, 700])
def test_a_set_against_itself_in_every_blocking(block: int, d: int) -> None:
    """Every ball holds its centre and its k neighbours, the k-th on the sphere: (k + 1) / k."""
    x = randomness.normal((150, d), "self", d) + 5
    result = neighbourhood(x, x.clone(), k=5, block=block)
    assert float(result.density.mean()) == pytest.approx(6 / 5, rel=1e-14)
    assert all(v.min() == 1 for v in (result.precision, result.recall, result.coverage))


def direct(real: Tensor, fake: Tensor, k: int):
    """The definitions over whole matrices of directly summed distances."""
    mode = "donot_use_mm_for_euclid_dist"
    real, fake = real.double(), fake.double()
    radius_real = torch.cdist(real, real, compute_mode=mode).kthvalue(k + 1).values
    radius_fake = torch.cdist(fake, fake, compute_mode=mode).kthvalue(k + 1).values
    distance = torch.cdist(real, fake, compute_mode=mode)
    inside = distance <= radius_real[:, None]
    recall = (distance <= radius_fake).any(1).double()
    return inside.any(0).double(), inside.sum(0).double() / k, recall, inside.any(1).double()


@pytest.mark.parametrize("block", [5, 13, 1000])
def test_equals_the_whole_matrices(block: int) -> None:
    real, fake = randomness.normal((70, 6), "real"), randomness.normal((50, 6), "fake") * 1.3 + 0.5
    result = neighbourhood(real, fake, k=3, block=block)
    values = (result.precision, result.density, result.recall, result.coverage)
    for value, expected in zip(values, direct(real, fake, 3)):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        assert 0 < value.mean() < 1


def test_precision_and_recall_equal_torch_fidelity() -> None:
    real, fake = randomness.normal((90, 5), "real"), randomness.normal((80, 5), "fake") + 0.7
    result = neighbourhood(real, fake, k=3)
    precision, recall = calculate_precision_recall_full(fake.double(), real.double(), 3)
    assert float(result.precision.mean()) == pytest.approx(precision, rel=1e-6)
    assert float(result.recall.mean()) == pytest.approx(recall, rel=1e-6)


def test_no_square_matrix_is_held() -> None:
    """500 pictures against 400 in blocks of 16: nothing is larger than the features themselves."""
    real, fake = randomness.normal((500, 4), "real"), randomness.normal((400, 4), "fake")
    with LargestTensor() as largest:
        neighbourhood(real, fake, block=16)
    assert largest.elements <= 500 * 4


def test_too_few_pictures() -> None:
    with pytest.raises(UserError, match="more than 5 pictures; there are 9 real and 5 generated"):
        neighbourhood(torch.zeros(9, 2), torch.zeros(5, 2))
