"""The guard against generators that make the same picture of every noise."""

from __future__ import annotations

import pytest
import torch

from diffkit.errors import RunFailed
from diffkit.objectives.collapse import DiversityGuard, within_prompt_diversity


def test_diversity_by_hand() -> None:
    # prompt 0: pictures 0, 1, 3: distances 1, 3, 2; prompt 1: all equal
    latents = torch.tensor([[0.0, 1.0, 3.0], [5.0, 5.0, 5.0]])[..., None].expand(2, 3, 7)
    assert within_prompt_diversity(latents).item() == pytest.approx((2.0 + 0.0) / 2)


def guard() -> DiversityGuard:
    return DiversityGuard(every=10, prompts=2, noises=3)


def test_it_measures_at_intervals_with_the_same_noise() -> None:
    assert [step for step in range(25) if guard().due(step)] == [0, 10, 20]
    assert torch.equal(guard().noise((4, 2, 2)), guard().noise((4, 2, 2)))
    assert guard().noise((4, 2, 2)).shape == (6, 4, 2, 2)


def test_it_warns_once_and_then_stops(capsys: pytest.CaptureFixture[str]) -> None:
    watch = guard()
    pictures = watch.noise((4, 2, 2))
    watch.inspect("gan")  # nothing was measured yet
    watch.record(0.5 * pictures, 10)
    watch.record(pictures, 20)
    watch.record(0.75 * pictures, 30)
    watch.inspect("gan")
    assert capsys.readouterr().err == ""
    watch.record(0.6 * pictures, 40)
    watch.inspect("gan")
    watch.inspect("gan")
    said = capsys.readouterr().err
    assert said.count("60%") == 1
    watch.record(0.3 * pictures, 50)
    with pytest.raises(RunFailed, match="collapsed.*30%"):
        watch.inspect("gan")


def test_a_resumed_guard_remembers_the_best() -> None:
    first, second = guard(), guard()
    first.record(first.noise((4, 2, 2)), 10)
    for name, tensor in first.tensors.items():
        second.tensors[name].copy_(tensor)
    second.record(0.1 * second.noise((4, 2, 2)), 20)
    with pytest.raises(RunFailed, match="collapsed"):
        second.inspect("gan")


def test_the_noise_that_a_teacher_leaves_in_one_step_is_no_measure() -> None:
    """Called at t = 399 a teacher gives most of the noise back: a run that learnt to remove it
    would have been stopped as collapsed."""
    watch = guard()
    pictures = watch.noise((4, 2, 2))
    watch.record(3 * pictures, 0)
    watch.inspect("gan")
    watch.record(pictures, 10)
    watch.inspect("gan")
    watch.record(0.3 * pictures, 20)
    with pytest.raises(RunFailed, match="collapsed"):
        watch.inspect("gan")
