"""Rewards of decoded latents: signs, weights, chunks, what is noted on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffkit.models.eager import eager_sum
from diffkit.objectives.reward_terms import Found, PictureRewards, saturated_fraction
from diffkit.rewards.base import Reward


class Doubling:
    """A decoder whose pictures are the first three channels, twice as large."""

    factor = 2

    def decode(self, latents: Tensor, checkpoint: object = None) -> Tensor:
        return 2 * latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


class Brightness(Reward):
    """The mean of all pixels, times the length of the prompt."""

    label, resize = "brightness", "not at all"

    def __init__(self, name: str = "bright", logit_scale: float | None = None) -> None:
        self.name, self.logit_scale = name, logit_scale
        self.network = nn.Linear(1, 1)

    @property
    def networks(self) -> list[nn.Module]:
        return [self.network]

    def read(self, prompts: list[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        return embedded * pixels.flatten(1).mean(1)


def pictures(chunk: int = 2, **rewards: tuple[Reward, float]) -> PictureRewards:
    return PictureRewards(rewards or {"bright": (Brightness(), 1.0)}, Doubling(), chunk)


def latents(count: int, scale: float = 0.2) -> Tensor:
    return scale * torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_saturated_fraction_counts_values_beyond_one() -> None:
    images = torch.tensor([0.0, 1.0, -1.0, 1.5, -2.0, 0.5]).view(1, 3, 1, 2)
    assert saturated_fraction(images).tolist() == pytest.approx([2 / 6])


def test_the_loss_is_minus_the_weighted_reward() -> None:
    """R = n mean((2z + 1) / 2): d(-a R)/dz = -a n / (3 h w), with 4 pixels to a latent one."""
    z, rewards = latents(3).requires_grad_(), pictures()
    embedded = rewards.embed(["a", "ab", "abcd"])
    factor, found = torch.tensor([1.0, 0.5, 0.0]), Found()
    total, values, squares = eager_sum(
        rewards.losses(found), torch.tensor([3.0]), z, factor, *embedded, chunks=[2]
    )
    total.sum().backward()
    size = torch.tensor([1.0, 2.0, 4.0])
    expected = size * (z.detach()[:, :3].flatten(1).mean(1) + 0.5)
    torch.testing.assert_close(values[0], -factor * expected)
    torch.testing.assert_close(total, -3 * factor * expected)
    slope = -factor * size / 12
    assert z.grad is not None
    torch.testing.assert_close(z.grad[:, :3], (3 * slope).view(3, 1, 1, 1).expand(3, 3, 2, 2))
    assert (z.grad[:, 3] == 0).all()
    torch.testing.assert_close(squares[0], 12 * slope.square())
    torch.testing.assert_close(found.terms()["bright"], expected)


def test_saturated_pixels_give_no_gradient_and_are_counted() -> None:
    z, rewards, found = torch.full((2, 4, 2, 2), 0.6).requires_grad_(), pictures(), Found()
    embedded = rewards.embed(["a", "b"])
    total, *_ = eager_sum(
        rewards.losses(found), torch.ones(1), z, torch.ones(2), *embedded, chunks=[1]
    )
    total.sum().backward()
    assert z.grad is not None and (z.grad == 0).all()
    assert found.terms()["saturated"].tolist() == [1.0, 1.0]


def test_several_rewards_are_told_apart_and_summed() -> None:
    rewards = pictures(one=(Brightness(), 2.0), other=(Brightness("dim"), 0.5))
    z, embedded, found = latents(5), rewards.embed(["abc"] * 5), Found()
    _, values, _ = eager_sum(
        rewards.losses(found), torch.ones(2), z, torch.ones(5), *embedded, chunks=[2, 2]
    )
    torch.testing.assert_close(rewards.judge(z, embedded), 2.5 * -values[0])
    assert set(found.terms()) == {"one", "other", "saturated"}
    assert found.terms()["saturated"].shape == (5,)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_do_not_matter(chunk: int) -> None:
    z = latents(5)
    whole, parts = pictures(5), pictures(chunk)
    embedded = whole.embed(["a", "bc", "def", "g", "hi"])
    torch.testing.assert_close(parts.judge(z, embedded), whole.judge(z, embedded))


def test_log_odds_of_one_reward_do_not_depend_on_its_weight() -> None:
    rewards = pictures(one=(Brightness(logit_scale=7.0), 0.5))
    z, prompts = latents(2), ["a", "b"]
    embedded = rewards.embed(prompts)
    assert rewards.logit_scale is not None
    logits = rewards.logit_scale * rewards.judge(z, embedded)
    alone = Brightness().score(Doubling().decode(z), embedded[0])
    torch.testing.assert_close(logits, 7.0 * alone)
    both = pictures(a=(Brightness(logit_scale=7.0), 1.0), b=(Brightness(logit_scale=7.0), 1.0))
    assert both.logit_scale is None and pictures().logit_scale is None


@pytest.mark.parametrize(("side", "fits"), [(64, 4), (128, 4), (256, 1), (512, 1)])
def test_by_default_as_many_are_decoded_as_a_large_picture_has_pixels(side: int, fits: int) -> None:
    """Four at once, of any size, was the default: sixteen times the activations at 1024 pixels."""
    rewards = PictureRewards({"bright": (Brightness(), 1.0)}, Doubling(), None)
    assert rewards.chunk(torch.zeros(8, 4, side, side)) == fits
    assert pictures(3).chunk(torch.zeros(8, 4, side, side)) == 3
