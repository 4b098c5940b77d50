"""Randomly smaller masks."""

from __future__ import annotations

import torch

from diffkit.protection.outline import shrink_outline


def disc(size: int = 48, radius: float = 15.0) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = (size - 1) / 2
    return (((y - centre) ** 2 + (x - centre) ** 2) < radius**2).float()[None]


def test_a_region_only_shrinks_and_keeps_most_of_itself() -> None:
    keep = disc()
    shares = []
    for step in range(40):
        smaller = shrink_outline(keep, (3, step))
        assert smaller.shape == keep.shape
        assert set(smaller.unique().tolist()) <= {0.0, 1.0}
        assert (smaller <= keep).all()
        shares.append(float(smaller.sum() / keep.sum()))
    assert len({round(share, 3) for share in shares}) > 20
    assert min(shares) < 0.95
    assert sum(shares) / len(shares) > 0.3


def test_its_draws_depend_on_the_address_alone() -> None:
    keep = disc()
    assert torch.equal(shrink_outline(keep, (3, 4)), shrink_outline(keep, (3, 4)))
    assert not torch.equal(shrink_outline(keep, (3, 4)), shrink_outline(keep, (3, 5)))
    assert not torch.equal(shrink_outline(keep, (3, 4)), shrink_outline(keep, (4, 4)))


def test_nothing_comes_of_nothing_and_little_of_little() -> None:
    empty = torch.zeros(1, 16, 16)
    assert torch.equal(shrink_outline(empty, (0, 0)), empty)
    dot = empty.clone()
    dot[0, 5, 5] = 1
    assert (shrink_outline(dot, (0, 0)) <= dot).all()


def test_a_region_at_the_border_and_one_in_two_parts() -> None:
    full = torch.ones(1, 24, 30)
    smaller = shrink_outline(full, (1, 2))
    assert 0 < smaller.sum() <= full.sum()
    two = torch.zeros(1, 24, 30)
    two[0, 2:10, 2:10] = 1
    two[0, 12:22, 15:28] = 1
    for step in range(10):
        assert (shrink_outline(two, (1, step)) <= two).all()
