"""Effects, controls and retention on numbers that are checked by hand."""

from __future__ import annotations

import pytest
import torch

from diffkit.audit.edits import gather
from diffkit.audit.effects import Measured
from diffkit.audit.measures import (
    CLEAN,
    CONTROL,
    PROTECTED,
    Values,
    effect_summary,
    retention_summary,
)

ONES = torch.ones(2, 3)


def values(protected: float, random: float, **more: bool) -> Values:
    effect = {PROTECTED: protected * ONES, CONTROL: random * ONES}
    return Values(effect, {CLEAN: 2 * ONES, PROTECTED: 3 * ONES, CONTROL: 2.5 * ONES}, **more)


def test_an_effect_stands_beside_its_control() -> None:
    found = effect_summary(values(6, 2))
    assert found["effect"][PROTECTED] == {"value": 6, "low": 6, "high": 6}
    assert found["over_random"] == {"value": 3, "low": 3, "high": 3}
    assert found["minus_random"] == {"value": 4, "low": 4, "high": 4}
    assert found["clear"] is True
    assert found["vs_original"][CLEAN]["value"] == 2
    assert effect_summary(values(2.8, 2))["clear"] is False


def test_retention_is_the_ratio_of_means_with_the_floor_beside_it() -> None:
    found = retention_summary(values(1.5, 1), values(6, 2))
    assert found is not None
    assert found[PROTECTED]["value"] == 0.25 and found[CONTROL]["value"] == 0.5
    assert found["effect"][PROTECTED]["value"] == 1.5


def test_nothing_is_left_of_an_effect_that_was_not_there() -> None:
    found = retention_summary(values(1.5, 1), values(2.8, 2))
    assert found is not None and found[PROTECTED] is None
    assert found[CONTROL]["value"] == 0.5


def test_what_an_identity_leaves_is_exactly_one() -> None:
    effect = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).double() + 1
    plain = Values({PROTECTED: effect, CONTROL: effect / 7}, {})
    found = retention_summary(plain, plain)
    assert found is not None
    assert found[PROTECTED] == found[CONTROL] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_scores_have_signs_and_no_ratio_to_noise() -> None:
    found = effect_summary(values(-0.2, 0.01, score=True))
    assert "over_random" not in found and found["minus_random"]["value"] == pytest.approx(-0.21)
    assert found["clear"] is True


def test_a_number_of_information_is_shown_and_nothing_more() -> None:
    given = values(30, 40, information=True)
    assert effect_summary(given).keys() == {"effect", "vs_original"}
    assert not given.clear and retention_summary(given, given) is None


def test_pictures_are_gathered_and_what_one_lacks_is_left_out() -> None:
    """S(y) - S(x): the alignment of the protected picture's edit minus that of the clean one's."""

    def row(shift: float, *more: str) -> dict[str, Measured]:
        near = {name: torch.tensor([shift, shift + 1]) for name in ("latent_l2", *more)}
        far = {name: 10 + value for name, value in near.items()}
        score = {"alignment": torch.tensor([0.5, 0.25])}
        low = {"alignment": torch.tensor([0.25, 0.25])}
        return {CLEAN: Measured({}, far, score), PROTECTED: Measured(near, far, low)}

    found = gather([row(0.0, "ms_ssim"), row(5.0)])
    assert found.keys() == {"latent_l2", "alignment"}
    assert found["latent_l2"].effect[PROTECTED].tolist() == [[0, 5], [1, 6]]
    assert found["latent_l2"].vs_original[CLEAN].tolist() == [[10, 15], [11, 16]]
    assert found["alignment"].score
    assert found["alignment"].effect[PROTECTED].tolist() == [[-0.25, -0.25], [0, 0]]


def test_what_is_left_of_a_score_that_noise_does_not_move_is_not_told() -> None:
    """Alignment behind JPEG: noise moved it by 0.001 with and without, which read "-340 % left"."""
    around_zero = torch.tensor([[0.01, -0.01, 0.002], [-0.008, 0.01, -0.003]]).double()
    plain = Values({PROTECTED: -0.2 * ONES, CONTROL: around_zero}, {}, score=True)
    found = retention_summary(values(-0.1, 0.01, score=True), plain)
    assert found is not None and found[CONTROL] is None
    assert found[PROTECTED]["value"] == pytest.approx(0.5)
    steady = retention_summary(values(-0.1, 0.01, score=True), values(-0.2, 0.02, score=True))
    assert steady is not None and steady[CONTROL]["value"] == pytest.approx(0.5)
