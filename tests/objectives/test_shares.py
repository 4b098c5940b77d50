"""Weights by gradient share against hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from diffkit.objectives.shares import GradientShare, Share


def means(**squares: float) -> dict[str, torch.Tensor]:
    return {f"{name}_square": torch.tensor(value) for name, value in squares.items()}


def test_a_share_is_silent_until_the_first_measurement_and_then_a_ratio_of_norms() -> None:
    shares = GradientShare("main", {"reward": Share(share=0.5), "fixed": Share(weight=3.0)})
    assert shares.weights.tolist() == [1.0, 0.0, 3.0]
    shares.update(means(main=16.0, reward=4.0, fixed=1.0))
    # norms 4 and 2, both averages 1 % of them
    assert shares.weights.tolist() == pytest.approx([1.0, 0.5 * 4 / 2, 3.0])


def test_the_averages_move_by_one_percent() -> None:
    shares = GradientShare("main", {"reward": Share(share=1.0)})
    shares.update(means(main=1.0, reward=1.0))
    shares.update(means(main=1.0, reward=9.0))
    main, reward = 0.01 * 0.99 + 0.01, 0.01 * 0.99 + 0.03
    assert shares.weights[1].item() == pytest.approx(main / reward)


def test_a_loss_without_gradient_weighs_nothing() -> None:
    shares = GradientShare("main", {"reward": Share(share=1.0)})
    shares.update(means(main=1.0, reward=0.0))
    assert shares.weights.tolist() == [1.0, 0.0]


def test_the_state_brings_the_weights_back() -> None:
    first = GradientShare("main", {"reward": Share(share=0.3)})
    first.update(means(main=2.0, reward=5.0))
    second = GradientShare("main", {"reward": Share(share=0.3)})
    second.tensors["norms"].copy_(first.tensors["norms"])
    assert torch.equal(first.weights, second.weights)


def test_share_and_weight_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="share or a weight"):
        Share()
    with pytest.raises(ValueError, match="share or a weight"):
        Share(share=0.1, weight=1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_is_forgotten_at_once(bad: float) -> None:
    """One infinite norm once switched a reward off for the rest of the run and its resumes."""
    shares = GradientShare("main", {"reward": Share(share=0.5)})
    shares.update(means(main=4.0, reward=4.0))
    shares.update(means(main=4.0, reward=bad))
    shares.update(means(main=bad, reward=4.0))
    weight = shares.weights[1].item()
    assert 0.2 < weight < 1
