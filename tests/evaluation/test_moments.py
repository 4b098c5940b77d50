"""Moments against numpy, in any blocking, and their factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkit import randomness
from diffkit.errors import UserError
from diffkit.evaluation.moments import Moments


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_mean_and_unbiased_covariance(block: int) -> None:
    x = randomness.normal((50, 6), "moments") * 3 + 100
    moments = Moments.of(x, block=block)
    wide = x.double().numpy()
    assert moments.n == 50 and moments.cov.dtype == moments.mean.dtype == torch.float64
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.cov, np.cov(wide, rowvar=False), rtol=1e-11)


def test_weights_are_repeats() -> None:
    x = randomness.normal((5, 3), "moments")
    weights = torch.tensor([2, 0, 1, 3, 0])
    weighted, repeated = Moments.of(x, weights), Moments.of(x.repeat_interleave(weights, dim=0))
    assert weighted.n == repeated.n == 6
    torch.testing.assert_close(weighted.mean, repeated.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weighted.cov, repeated.cov, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("n", "d", "rank"), [(20, 6, 6), (5, 8, 4)])
def test_factor_has_the_rank_and_gives_the_covariance(n: int, d: int, rank: int) -> None:
    moments = Moments.of(randomness.normal((n, d), "factor"))
    assert moments.factor.shape == (d, rank)
    torch.testing.assert_close(
        moments.factor @ moments.factor.T, moments.cov, rtol=1e-12, atol=1e-12
    )


def test_a_float32_memory_map_is_read_in_blocks(tmp_path) -> None:
    """No float64 copy of the whole file: what is written there stays float32 and unchanged."""
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (300, 4))
    file[:] = randomness.normal((300, 4), "map").numpy()
    mapped = Moments.of(torch.from_numpy(file), block=64)
    torch.testing.assert_close(mapped.mean, torch.from_numpy(file.astype(np.float64)).mean(0))


def test_one_vector_has_no_covariance() -> None:
    with pytest.raises(UserError, match="at least two feature vectors, not 1"):
        Moments.of(torch.zeros(1, 3))
    with pytest.raises(UserError, match="not 0"):
        Moments.of(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
