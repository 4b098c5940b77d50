"""SimAC's greedy choice of times (Wang et al. 2024, arXiv:2312.07865, section 4.2, and its code).

Many times give a picture hardly any gradient. Before the attack each picture looks for those that
do. All times are there at first, 1,000 equal cells of the model's axis. While more than 100 are:

1. five of them are drawn, each with its own noise, and the size sum |dJ/dx| of the gradient taken;
2. the 40 cells around the one with the smallest gradient go;
3. the picture takes one sign step at the one with the largest, so that the next search sees a
   picture on its way.

The attack then draws its times uniformly from the cells that are left, and begins at the clean
picture. J is the method's own loss, in the whole view. A search ends after 50 rounds at the latest,
with what is left then; it costs 30 to 50 rounds of six gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffkit.protection.gradients import ImageGradient
from diffkit.protection.pgd import Pgd
from diffkit.randomness import uniform

__all__ = ["CELLS", "SEARCH", "Choice", "greedy_choice", "useful_times"]

Choice = Callable[[int, float], float]
"""(row of the picture, u in [0, 1)) -> fraction in [0, 1) of the time axis."""

CELLS = 1000
_KEPT = 100
_TRIED = 5
_HALF = 20
_ROUNDS = 50

SEARCH = _ROUNDS * (_TRIED + 1)
"""Gradients that the search for one picture takes at most."""


def greedy_choice(gradient: ImageGradient, pgd: Pgd) -> Choice:
    """The choice of every picture of a batch, found before its first step.

    u falls into one of the cells that a picture kept, and to a place in it.
    """
    found = useful_times(gradient, pgd)

    def choose(row: int, u: float) -> float:
        cells = found[row]
        number, place = divmod(u * len(cells), 1.0)
        return (float(cells[int(number)]) + place) / CELLS

    return choose


def useful_times(gradient: ImageGradient, pgd: Pgd) -> list[Tensor]:
    """The cells that each picture of a batch keeps, int64 in ascending order; see the module.

    What a picture keeps depends on nothing but itself, its seed and the model.
    """
    left = [torch.ones(CELLS, dtype=torch.bool) for _ in pgd.seeds]
    x = pgd.origin
    for number in range(_ROUNDS):
        searching = [int(cells.sum()) > _KEPT for cells in left]
        if not any(searching):
            break
        tried = [_drawn(cells, seed, number) for cells, seed in zip(left, pgd.seeds, strict=True)]
        columns = [[row[k] for row in tried] for k in range(_TRIED)]
        found = [_gradient(gradient, x, number, k, cells) for k, cells in enumerate(columns)]
        sizes = torch.stack([g.abs().flatten(1).sum(1) for g in found]).cpu()
        sizes = sizes.nan_to_num(0.0, 0.0)  # no gradient at all is of use nowhere
        for i, cells in enumerate(left):
            if searching[i]:
                _remove(cells, tried[i][int(sizes[:, i].argmin())])
        best = [row[int(sizes[:, i].argmax())] for i, row in enumerate(tried)]
        g = _gradient(gradient, x, number, _TRIED, best)
        finite = g.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
        x = torch.where(finite, pgd.stepped(x, g), x)
    return [cells.nonzero().flatten() for cells in left]


def _drawn(left: Tensor, seed: int, number: int) -> list[int]:
    cells = left.nonzero().flatten()
    draws = uniform((_TRIED,), seed, number, "greedy times")
    return [int(cells[int(u * len(cells))]) for u in draws.tolist()]


def _remove(left: Tensor, cell: int) -> None:
    """The cells [c - 20, c + 20), where c is moved inwards so that they are always 40."""
    middle = min(max(cell, _HALF), CELLS - _HALF)
    left[middle - _HALF : middle + _HALF] = False


def _gradient(
    gradient: ImageGradient, x: Tensor, number: int, k: int, cells: Sequence[int]
) -> Tensor:
    """At the middle of a cell of each picture, with the draws of a step before all steps."""
    u = (torch.tensor(cells, dtype=torch.float32) + 0.5) / CELLS
    return gradient.plain(x, -2 - (number * (_TRIED + 1) + k), u)
