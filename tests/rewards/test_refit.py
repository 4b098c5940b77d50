"""The mathematics of a proxy's refit: known answers, invariances, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffkit.randomness import normal
from diffkit.rewards.refit import (
    RunningMedian,
    contrastive_loss,
    expert_logits,
    gap_accuracy,
    pair_accuracy,
    pair_kl,
)

PAIRS = ((0, 1), (0, 2), (1, 2))


def draw(name: str, n: int = 5) -> Tensor:
    return 3 * normal((n, 3), name).double()


def test_nothing_to_learn_where_the_proxy_differs_by_a_constant_per_prompt():
    expert = draw("r")
    proxy = (expert + draw("c")[:, :1]).requires_grad_()
    loss = pair_kl(expert, proxy)
    assert loss.shape == (5,)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-14, rtol=0)
    loss.sum().backward()
    torch.testing.assert_close(proxy.grad, torch.zeros_like(proxy.grad), atol=1e-14, rtol=0)


def test_constants_per_prompt_do_not_count():
    expert, proxy, shift = draw("r"), draw("s"), 10 * draw("c")[:, :1]
    plain = pair_kl(expert, proxy)
    torch.testing.assert_close(pair_kl(expert + shift, proxy), plain)
    torch.testing.assert_close(pair_kl(expert, proxy - shift), plain)


def test_an_undecided_proxy_pays_three_bits_less_the_experts_entropies():
    expert = draw("r")
    entropies = [
        torch.distributions.Categorical(logits=expert[:, list(pair)]).entropy() for pair in PAIRS
    ]
    expected = 3 * math.log(2) - torch.stack(entropies).sum(0)
    torch.testing.assert_close(pair_kl(expert, torch.zeros_like(expert)), expected)


def test_the_gradient_is_the_difference_of_the_softmaxes():
    expert, proxy = draw("r"), draw("s").requires_grad_()
    pair_kl(expert, proxy).sum().backward()
    expected = torch.zeros_like(expert)
    for pair in PAIRS:
        own = list(pair)
        expected[:, own] += (proxy[:, own].softmax(1) - expert[:, own].softmax(1)).detach()
    torch.testing.assert_close(proxy.grad, expected)


def test_it_is_torchs_divergence_and_the_expert_gets_no_gradient():
    expert, proxy = draw("r").requires_grad_(), draw("s").requires_grad_()
    loss = pair_kl(expert, proxy).mean()
    expected = sum(
        F.kl_div(proxy[:, p].log_softmax(1), expert[:, p].softmax(1), reduction="batchmean")
        for p in map(list, PAIRS)
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert expert.grad is None


def test_certain_experts_and_proxies_stay_finite():
    expert = torch.tensor([[1e4, -1e4, 0.0]])
    proxy = torch.tensor([[-500.0, 500.0, 0.0]]).requires_grad_()
    loss = pair_kl(expert, proxy)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1000.0 + 500.0 + 500.0]))
    loss.sum().backward()
    assert proxy.grad.isfinite().all()


def test_half_precision_is_widened():
    assert pair_kl(draw("r").half(), draw("s").bfloat16()).dtype == torch.float32


def test_a_real_picture_is_never_taught_to_be_the_worse_one():
    """Where the expert prefers a made one, the pair becomes a tie; other pairs stay."""
    expert = torch.tensor([[2.0, -1.0, 0.0]]).double()
    proxy = draw("s", 1)
    softened = pair_kl(expert, proxy, real=2)
    pairs = [(expert[:, p], proxy[:, p]) for p in map(list, PAIRS)]
    pairs[1] = (torch.zeros(1, 2).double(), pairs[1][1])  # 2.0 beats the real 0.0; -1.0 does not
    expected = sum(
        F.kl_div(s.log_softmax(1), r.softmax(1), reduction="batchmean") for r, s in pairs
    )
    torch.testing.assert_close(softened[0], expected)
    first = pair_kl(expert.roll(1, 1), proxy.roll(1, 1), real=0)
    torch.testing.assert_close(first, softened)


def test_the_accuracy_counts_pairs():
    expert = torch.tensor([[3.0, 2.0, 1.0]] * 4)
    proxy = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([1.0, 0.0, 2 / 3, 0.5])
    torch.testing.assert_close(pair_accuracy(expert, proxy), expected)


def test_pairs_count_by_their_gaps():
    """Gaps 1, 4, 3, of which the first is ordered wrongly; a tie of the expert has no gap."""
    expert = torch.tensor([[4.0, 3.0, 0.0], [5.0, 5.0, 5.0]])
    proxy = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]])
    for scale in (1.0, 0.01):
        hits, gaps = gap_accuracy(scale * expert, proxy)
        torch.testing.assert_close(hits / scale, torch.tensor([7 / 3, 0.0]))
        torch.testing.assert_close(gaps / scale, torch.tensor([8 / 3, 0.0]))
        assert float(hits.sum() / gaps.sum()) == pytest.approx(7 / 8)
    assert pair_accuracy(expert, proxy)[0] == pytest.approx(2 / 3)


def test_a_reward_with_a_logit_scale_needs_no_temperature():
    rewards = draw("r")
    torch.testing.assert_close(expert_logits(rewards, 100.0, RunningMedian()), 100 * rewards)


def test_the_temperature_finds_the_median_whatever_the_scale():
    """Gaps of one normal variable: their median is 0.954 of its standard deviation."""
    for scale in (1e-3, 1.0, 50.0):
        median = RunningMedian()
        assert median.known == 0 and (median.logits(draw("r")) == 0).all()
        for step in range(300):
            rewards = scale * normal((64, 3), "rewards", step)
            means = {name: term.mean() for name, term in median.terms(rewards).items()}
            median.update(means)
        assert float(median.value) == pytest.approx(scale * 2**0.5 * 0.6745, rel=0.1)
        logits = median.logits(scale * normal((4000, 3), "later"))
        gaps = torch.stack([(logits[:, a] - logits[:, b]).abs() for a, b in PAIRS])
        assert float(gaps.median()) == pytest.approx(1, rel=0.1)
        assert median.known == 1


def test_the_temperature_does_not_depend_on_how_the_batch_is_split():
    """Its terms are one value a prompt, whose means over the global batch move it."""
    whole, parts = RunningMedian(), RunningMedian()
    for step in range(5):
        rewards = normal((8, 3), "rewards", step)
        whole.update({k: v.mean() for k, v in whole.terms(rewards).items()})
        halves = [parts.terms(half) for half in rewards.split(3)]
        parts.update({k: torch.cat([h[k] for h in halves]).mean() for k in halves[0]})
        torch.testing.assert_close(parts.value, whole.value)
    kept = RunningMedian()
    kept.tensors["median"].copy_(whole.tensors["median"])
    assert kept.value == whole.value


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_temperature_forgets_an_overflow_at_once(bad):
    median, overflow = RunningMedian(), {"gap": torch.tensor(bad), "gap_above": torch.tensor(1.0)}
    median.update(overflow)
    assert median.known == 0
    median.update({"gap": torch.tensor(2.0), "gap_above": torch.tensor(0.5)})
    median.update(overflow)
    assert median.value == 2


def test_equal_rewards_give_no_preference():
    median = RunningMedian()
    rewards = torch.full((4, 3), 7.0)
    median.update({k: v.mean() for k, v in median.terms(rewards).items()})
    assert median.known == 0 and (median.logits(rewards) == 0).all()


def unit(name: str, n: int) -> Tensor:
    return F.normalize(normal((n, 8), name).double(), dim=1)


def test_the_contrastive_loss_is_clips():
    images, texts, scale = unit("u", 6), unit("v", 6), torch.tensor(10.0).double()
    logits = 10 * images @ texts.T
    own = torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    found = contrastive_loss(images, texts, scale)
    assert found.shape == (6,)
    torch.testing.assert_close(found.mean().double(), expected, atol=1e-5, rtol=1e-5)


def test_members_with_the_same_caption_are_no_wrong_answers():
    images, texts, scale = unit("u", 4), unit("v", 4), torch.tensor(10.0)
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    same.fill_diagonal_(True)
    found = contrastive_loss(images, texts, scale, excused=same)
    keep = torch.tensor([0, 2, 3])
    expected = contrastive_loss(images[keep], texts[keep], scale)
    torch.testing.assert_close(found[:1], expected[:1])
    assert (contrastive_loss(images, texts, scale)[:2] > found[:2]).all()
