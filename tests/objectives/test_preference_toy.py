"""What wrong labels do to preference optimisation, and what is left of it, on a toy.

Of 16-d normal data with a linear reward, 8000 pairs and 30 % flipped labels. The mean reward of
samples must come in this order: Adaptive-DPO by confidence alone, unbiased rDPO and Adaptive-DPO
with stability (about equal), DPO, cDPO; and the minority metric u must find the flipped labels.
"""

from __future__ import annotations

import pytest

from tests.objectives.preference_toy import Toy, sampled, tune

ARMS = {
    "confidence": {"loss": "adaptive_dpo", "stability": "none"},
    "adaptive": {"loss": "adaptive_dpo", "stability": "std"},
    "published": {"loss": "adaptive_dpo", "stability": "std", "normalization": "batch"},
    "rdpo": {"loss": "rdpo", "flip_rate": 0.2},
    "dpo": {"loss": "dpo"},
    "cdpo": {"loss": "cdpo", "flip_rate": 0.2},
}


def run(toy, steps, rate, arms):
    found = {arm: tune(toy, steps, rate, **ARMS[arm]) for arm in arms}
    return {arm: reward for arm, (reward, _) in found.items()}, {
        a: f for a, (_, f) in found.items()
    }


def check(rewards, areas, base):
    assert rewards["confidence"] > 1.15 * max(rewards["rdpo"], rewards["adaptive"])
    assert min(rewards["rdpo"], rewards["adaptive"]) > 1.3 * rewards["dpo"]
    assert 0.6 < rewards["adaptive"] / rewards["rdpo"] < 1.7
    assert rewards["dpo"] > 1.3 * rewards["cdpo"] > 1.3 * base
    assert areas["confidence"] > areas["adaptive"] + 0.05


def test_order_under_flips_and_detection():
    """The short version: half the steps at a higher rate, a smaller network, one seed."""
    toy = Toy(seed=0, flips=0.3, width=96, base_steps=500)
    rewards, areas = run(toy, 250, 5e-5, [arm for arm in ARMS if arm != "published"])
    check(rewards, areas, sampled(toy.base))
    assert areas["adaptive"] > 0.72 and areas["confidence"] > 0.84


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_and_detection_in_full(seed):
    """AUC about 0.75 for the published form, 0.79 with the running mean square, above 0.85 for
    confidence alone; and the published form is no better than the running mean square."""
    toy = Toy(seed, flips=0.3)
    rewards, areas = run(toy, 500, 3e-5, ARMS)
    check(rewards, areas, sampled(toy.base))
    assert 0.70 < areas["published"] < areas["adaptive"] < 0.82 and areas["confidence"] > 0.85
    assert rewards["published"] < 1.1 * rewards["adaptive"]


@pytest.mark.slow
def test_flips_cost_dpo_most_of_its_gain():
    """And without flips doubting labels costs nothing."""
    clean, noisy = (Toy(0, flips) for flips in (0.0, 0.3))
    rewards, _ = run(clean, 500, 3e-5, ["dpo", "adaptive", "confidence"])
    flipped, _ = run(noisy, 500, 3e-5, ["dpo"])
    assert flipped["dpo"] < 0.35 * rewards["dpo"]
    assert min(rewards["adaptive"], rewards["confidence"]) > 0.95 * rewards["dpo"]
