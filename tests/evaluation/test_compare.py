"""Intervals and differences: identities, hand arithmetic, what pairing buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffkit import randomness
from diffkit.evaluation.compare import Resampling, resampled_groups
from diffkit.evaluation.entrants import Entrant, pair
from diffkit.evaluation.metrics.base import Statistic
from diffkit.evaluation.request import Side

GROUPS = torch.arange(24) // 2


def resampling(pairing: str = "noises", seed: int = 0, resamples: int | None = None) -> Resampling:
    groups = {"model": GROUPS, "against": GROUPS}
    return Resampling(groups, pairing, seed, 0.95, resamples)


def draws(purpose: str) -> torch.Tensor:
    return randomness.normal((len(GROUPS),), 0, purpose)


def ends(estimate) -> tuple[float, float]:
    return estimate.interval.low, estimate.interval.high


def test_a_set_against_itself_differs_by_nothing() -> None:
    values = draws("values")
    found = resampling().of_values({"model": values, "against": values.clone()})
    assert found.difference.value == 0
    assert ends(found.difference) == (0, 0)
    assert found.values["model"] == found.values["against"]

    def of_weights(weights: torch.Tensor) -> torch.Tensor:
        return (weights.double() @ values.double()).square()

    statistic = Statistic(float(values.double().sum() ** 2), of_weights=of_weights)
    found = resampling().of_statistics({"model": statistic, "against": statistic})
    assert ends(found.difference) == (0, 0)


def test_a_constant_shift_is_found_exactly_and_only_by_pairing() -> None:
    values = draws("values")
    sets = {"model": values + 0.25, "against": values}
    paired = resampling().of_values(sets).difference
    assert ends(paired) == pytest.approx((0.25, 0.25), abs=1e-6)
    alone = resampling("none").of_values(sets).difference
    assert alone.interval.low < 0 < alone.interval.high
    assert alone.value == pytest.approx(0.25)


def test_unpaired_sets_may_differ_in_number() -> None:
    groups = {"model": torch.arange(30), "against": torch.arange(50)}
    given = Resampling(groups, "none", 3, 0.95, None)
    a, b = randomness.normal((30,), 1), randomness.normal((50,), 2) + 3
    difference = given.of_values({"model": a, "against": b}).difference
    assert difference.value == pytest.approx(float(a.double().mean() - b.double().mean()))
    standard_error = float((a.var() / 30 + b.var() / 50).sqrt())
    width = difference.interval.high - difference.interval.low
    assert width == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_reference_parts_are_paired_whatever_the_sets_are() -> None:
    """Recall and coverage vary with the real pictures, which both sets share."""
    hits = (randomness.uniform((40,), 5) > 0.5).double()
    part = Statistic.mean(hits, "reference")
    found = resampling("none").of_statistics({"model": part, "against": part})
    assert ends(found.difference) == (0, 0)
    assert found.values["model"].interval.low < float(hits.mean()) < ends(found.values["model"])[1]


def test_parts_of_groups_are_one_a_prompt() -> None:
    part = Statistic.mean(randomness.normal((12,), 6), "groups")
    found = resampling().of_statistics({"model": part})
    assert found.difference is None
    assert found.values["model"].value == pytest.approx(float(part.parts.double().mean()))


def test_resamples_as_asked_or_as_dear() -> None:
    values = draws("values")
    asked = []

    def of_weights(weights: torch.Tensor) -> torch.Tensor:
        asked.append(len(weights))
        return weights.double() @ values.double()

    statistic = {"model": Statistic(float(values.double().sum()), of_weights=of_weights)}
    assert resampling().of_statistics(statistic).resamples == 200
    assert resampling(resamples=300).of_statistics(statistic).resamples == 300
    assert asked == [200, 300]
    assert resampling().of_values({"model": values}).resamples == 1000


def test_one_prompt_alone_is_resampled_by_pictures() -> None:
    assert resampled_groups(torch.zeros(5, dtype=torch.int64)).tolist() == [0, 1, 2, 3, 4]
    assert resampled_groups(torch.tensor([0, 0, 1])).tolist() == [0, 0, 1]


def entrant(name: str = "model", **changes) -> Entrant:
    made = Entrant(
        Side(name, "embedded"),
        ("a", "a", "b"),
        ("0.png", "1.png", "2.png"),
        np.full((3, 2), 64, np.int32),
        latent=(4, 8, 8),
    )
    return replace(made, **changes)


def paired_with(**changes) -> tuple[str, bool]:
    """How a set pairs with a changed one, and whether their pictures lie over each other."""
    pairing, reason = pair({"model": entrant(), "against": entrant("against", **changes)})
    return pairing, not reason


def test_pairing() -> None:
    assert paired_with() == ("noises", True)
    assert paired_with(latent=(16, 8, 8)) == ("prompts", False)
    assert paired_with(prompts=("a", "b", "b")) == ("none", False)
    assert paired_with(sizes=np.full((3, 2), 32, np.int32)) == ("noises", False)
    assert paired_with(latent=None) == ("names", True)
    assert paired_with(latent=None, names=("x.png", "y.png", "z.png")) == ("prompts", False)
    nameless = {"prompts": ("", "", ""), "latent": None}
    a, b = entrant(**nameless), entrant(**nameless, names=("x", "y", "z"))
    assert pair({"model": a, "against": b})[0] == "none"
    assert pair({"model": a, "against": a})[0] == "names"
    assert pair({"model": a})[1].startswith("there is no second set")


def test_groups_are_the_prompts(tmp_path: Path) -> None:
    assert entrant().groups.tolist() == [0, 0, 1]
    assert entrant(prompts=("", "", "")).groups.tolist() == [0, 1, 2]
