"""Adversarial losses: hand arithmetic, closed forms, and rows that do not depend on the split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diffkit.objectives.adversarial_losses import (
    approximate_r1,
    discriminator_loss,
    distribution_matching_direction,
    distribution_matching_loss,
    generator_loss,
    mean_logit,
    mix_and_match,
    r1_penalty,
    relativistic_loss,
    replaced_rows,
)
from diffkit.randomness import SampleKeys


def maps(value: float, count: int = 3) -> list[Tensor]:
    """Maps of several sizes that are `value` everywhere."""
    return [torch.full((count, 1, side, side), value) for side in (8, 4, 2)]


def test_losses_at_logits_of_zero() -> None:
    torch.testing.assert_close(generator_loss(maps(0.0)), torch.full((3,), math.log(2)))
    both = discriminator_loss(maps(0.0), maps(0.0))
    torch.testing.assert_close(both, torch.full((3,), 2 * math.log(2)))


def test_losses_are_of_the_right_sign_and_of_each_sample() -> None:
    logits = [torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)]
    soft = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = torch.tensor([(soft(-2) + soft(0)) / 2, (soft(1) + soft(-3)) / 2])
    torch.testing.assert_close(generator_loss(logits), expected)
    fake = torch.tensor([(soft(2) + soft(0)) / 2, (soft(-1) + soft(3)) / 2])
    torch.testing.assert_close(discriminator_loss(logits, logits), expected + fake)
    torch.testing.assert_close(mean_logit(logits), torch.tensor([1.0, 1.0]))
    half = [part.bfloat16() for part in logits]
    assert generator_loss(half).dtype == torch.float32
    assert generator_loss([part.double() for part in logits]).dtype == torch.float64


def test_a_relativistic_loss_knows_differences_alone() -> None:
    torch.testing.assert_close(
        relativistic_loss(maps(5.0), maps(5.0)), torch.full((3,), math.log(2))
    )
    above = [torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)]
    below = [torch.tensor([1.0, 1.0]).view(2, 1, 1, 1), torch.tensor([3.0, 3.0]).view(2, 1, 1, 1)]
    soft = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = torch.tensor([(soft(-1) + soft(3)) / 2, (soft(2) + soft(0)) / 2])
    torch.testing.assert_close(relativistic_loss(above, below), expected)
    shifted = [part + 7 for part in above], [part + 7 for part in below]
    torch.testing.assert_close(relativistic_loss(*shifted), expected)
    half = [part.bfloat16() for part in above]
    assert relativistic_loss(half, half).dtype == torch.float32


def test_a_fine_map_does_not_outweigh_a_coarse_one() -> None:
    fine, coarse = torch.ones(1, 1, 32, 32), torch.zeros(1, 1, 1, 1)
    assert mean_logit([fine, coarse]).item() == 0.5


class Linear(nn.Module):
    """D(x) = <w, x>, as one map of one logit."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).view(3, 2, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [(x * self.w).sum((1, 2, 3)).view(-1, 1, 1, 1)]


def test_r1_of_a_linear_critic() -> None:
    """|w|^2, whose gradient in w is 2 w."""
    critic = Linear()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    penalty = r1_penalty(lambda a: mean_logit(critic(a)), x)
    square = critic.w.detach().square().sum()
    torch.testing.assert_close(penalty, square.expand(2))
    (grad,) = torch.autograd.grad(penalty[0], critic.w)
    torch.testing.assert_close(grad, 2 * critic.w.detach())


def test_r1_is_of_each_sample_alone() -> None:
    critic = lambda x: x.pow(3).flatten(1).sum(1)  # noqa: E731
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert r1_penalty(critic, x).tolist() == [9.0 + 144.0, 9.0]


def test_approximated_r1_averages_to_r1() -> None:
    """Within 5% over 10 000 draws; each is (<w, n>)^2 of a normal number."""
    critic, sigma = Linear(torch.float32), 0.1
    n = torch.randn(10_000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    x = torch.ones(1, 3, 2, 2).expand_as(n)
    found = approximate_r1(critic(x), critic(x + sigma * n), sigma)
    assert found.shape == (10_000,)
    assert found.mean().item() == pytest.approx(critic.w.square().sum().item(), rel=0.05)
    grads = torch.autograd.grad(found.mean(), critic.w)
    torch.testing.assert_close(grads[0], 2 * critic.w.detach(), rtol=0.1, atol=0.05)


KEYS = SampleKeys(3, (0,) * 8, tuple(range(8)))


@pytest.mark.parametrize(
    ("share", "size", "count"), [(0.25, 8, 2), (0.3, 8, 2), (0.01, 8, 1), (0.0, 8, 0), (0.95, 8, 7)]
)
def test_so_many_rows_are_replaced_however_the_batch_is_split(share, size, count) -> None:
    whole = replaced_rows(KEYS, range(8), share, size)
    assert whole.sum() == count and whole.dtype == torch.bool
    parts = [
        replaced_rows(KEYS.select(slice(i, i + 2)), range(i, i + 2), share, size)
        for i in range(0, 8, 2)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_batch_of_one_is_replaced_with_that_probability() -> None:
    keys = [SampleKeys(0, (0,), (i,)) for i in range(400)]
    found = [replaced_rows(k, (0,), 0.25, 1).item() for k in keys]
    assert 70 < sum(found) < 130
    assert found == [replaced_rows(k, (0,), 0.25, 1).item() for k in keys]


def test_mix_and_match_replaces_those_rows_alone() -> None:
    fake, other = torch.zeros(4, 2, 2, 2), torch.ones(4, 2, 2, 2)
    rows = torch.tensor([True, False, True, False])
    assert mix_and_match(fake, other, rows).flatten(1).mean(1).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_distribution_matching_by_hand() -> None:
    x = torch.tensor([[4.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2).requires_grad_()
    fake = torch.tensor([[3.0, 1.0], [2.0, 0.0]]).view(2, 1, 1, 2)
    real = torch.tensor([[2.0, 2.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    direction = distribution_matching_direction(x, fake, real)
    # Of the first mean|x - real| = 2; the teacher has nothing to correct in the second.
    assert direction.flatten(1).tolist() == [[0.5, -0.5], [0.0, 0.0]]
    loss = distribution_matching_loss(x, direction)
    torch.testing.assert_close(loss, torch.tensor([0.125, 0.0]))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(grad, direction / 2)
