"""Addressed draws: functions of their address, whatever was drawn before or beside them."""

from __future__ import annotations

import torch

from diffkit.randomness import SampleKeys, address, integers, normal, permutation, uniform


def test_addresses_are_fixed_numbers():
    """Golden values: a changed address would silently break every committed seed."""
    assert address(0, 1, "noise") == 8771721116450869691
    assert address(0, 1, "noise") != address(0, "1", "noise")
    assert address(0, 1, "noise") != address(1, 0, "noise")
    assert address("ab", "c") != address("a", "bc")


def test_draws_ignore_the_global_generator():
    torch.manual_seed(1)
    first = normal((4,), 0, "x")
    torch.rand(10)
    assert torch.equal(first, normal((4,), 0, "x"))
    assert not torch.equal(first, normal((4,), 0, "y"))


def test_kinds_of_draws():
    assert permutation(7, 0).sort().values.tolist() == list(range(7))
    assert uniform((1000,), 0).min() >= 0 and uniform((1000,), 0).max() < 1
    assert set(integers(2, 4, (100,), 0).tolist()) == {2, 3}
    draws = normal((20000,), 0)
    assert abs(draws.mean()) < 0.03 and abs(draws.std() - 1) < 0.03


def test_rows_do_not_depend_on_the_batch_they_stand_in():
    keys = SampleKeys(5, (0, 0, 1, 1), (3, 1, 3, 0))
    whole = keys.normal((2, 2), "noise")
    parts = [keys.select(slice(0, 1)), keys.select(slice(1, 4))]
    assert torch.equal(whole, torch.cat([part.normal((2, 2), "noise") for part in parts]))
    assert torch.equal(whole[0], normal((2, 2), 5, 0, 3, "noise"))
    assert not torch.equal(whole[0], whole[2]), "another epoch is another draw"
    assert keys.uniform("t").shape == (4,) and keys.integers(0, 9, "i").dtype == torch.int64
