"""Streaming pictures costs no more memory than their features."""

from __future__ import annotations

import evaluation
import pytest


@pytest.mark.slow
def test_memory_grows_by_the_features_alone():
    """Beyond 2000 pictures every buffer has its full size: only what grows with n is left."""
    found = evaluation.compare(small=2000, large=6000, edge=32, batch_size=64)
    assert [run["n"] for run in found["runs"]] == [2000, 6000]
    assert found["features_bytes"] == 4000 * 192 * 4
    assert found["within"], found
