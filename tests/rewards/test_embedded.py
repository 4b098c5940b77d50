"""What all rewards keep to, shown on the embedded one: names, limits, gradients, few pixels."""

from __future__ import annotations

import pytest
import torch
from diffkit.assets import path

from diffkit.errors import UserError
from diffkit.models.eager import eager_sum
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.randomness import uniform
from diffkit.rewards.spec import load_reward, parse_reward, parse_rewards

PROMPTS = ["red apple", "cat face", "piano"]


@pytest.fixture(scope="module")
def reward():
    return load_reward("embedded")


def pictures(n: int = 3, side: int = 64) -> torch.Tensor:
    return 2 * uniform((n, 3, side, side), "reward pictures") - 1


def test_it_is_the_cosine_of_the_scorer(reward):
    scorer = TextImageScorer.load(path("scorer"))
    with torch.no_grad():
        expected = scorer.score(pictures(), PROMPTS)
        found = reward(pictures(), PROMPTS)
    assert found.shape == (3,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert reward.logit_scale == pytest.approx(float(scorer.tower.log_scale.detach().exp()))
    torch.testing.assert_close(reward.measure(pictures(), reward.embed_prompts(PROMPTS)), found)


def test_the_gradient_is_in_the_pictures_and_in_nothing_else(reward):
    images = pictures().requires_grad_()
    rows = reward.embed_prompts(PROMPTS)
    assert not rows.requires_grad
    reward.score(images, rows).sum().backward()
    assert images.grad.abs().amin(0).max() > 0
    for network in reward.networks:
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_what_is_beyond_black_and_white_counts_as_such_and_has_no_gradient(reward):
    images = pictures()
    images[:, :, :32] *= 3
    limited = images.clamp(-1, 1)
    images.requires_grad_()
    value = reward(images, PROMPTS)
    torch.testing.assert_close(value, reward(limited, PROMPTS))
    value.sum().backward()
    beyond = images.detach().abs() > 1
    assert beyond.float().mean() > 0.2
    assert images.grad[beyond].abs().max() == 0 < images.grad[~beyond].abs().max()


def test_autocast_does_not_change_it(reward):
    """A reward that trains is the reward that measures, whatever the dtype of the step."""
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(pictures(), PROMPTS)
    torch.testing.assert_close(inside, reward(pictures(), PROMPTS), rtol=0, atol=0)


def test_samples_are_scored_one_by_one(reward):
    """So that it goes through `eager_sum` in chunks, prompts beside their pictures."""
    images, rows = pictures().requires_grad_(), reward.embed_prompts(PROMPTS)
    total, values, _ = eager_sum([reward.score], torch.ones(1), images, rows, chunks=[2])
    torch.testing.assert_close(values[0], reward.score(images, rows).detach())
    (grad,) = torch.autograd.grad(total.sum(), images)
    (whole,) = torch.autograd.grad(reward.score(images, rows).sum(), images)
    torch.testing.assert_close(grad, whole)


def test_one_prompt_a_picture(reward):
    with pytest.raises(UserError, match="embedded: 3 images and 2 prompts"):
        reward(pictures(), PROMPTS[:2])


def test_few_pixels_hide_fine_detail(reward):
    """At 16 pixels a checkerboard is its mean; the whole reward sees it."""
    pooled = load_reward("embedded@16")
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    board = (0.4 * (-1.0) ** (row + column)).expand(3, 3, 64, 64)
    smooth = pictures() * 0.5
    torch.testing.assert_close(pooled(smooth + board, PROMPTS), pooled(smooth, PROMPTS))
    assert (reward(smooth + board, PROMPTS) - reward(smooth, PROMPTS)).abs().max() > 0.01
    assert pooled.name == "embedded@16" and pooled.logit_scale == reward.logit_scale
    assert "16 pixels" in pooled.label


def test_pooling_keeps_flat_pictures_and_their_proportions(reward):
    pooled = load_reward("embedded@8")
    flat = torch.full((1, 3, 32, 64), 0.3)
    torch.testing.assert_close(pooled(flat, PROMPTS[:1]), reward(flat, PROMPTS[:1]))
    small = pictures(1, 8)
    torch.testing.assert_close(pooled(small, PROMPTS[:1]), reward(small, PROMPTS[:1]))


def test_names():
    assert parse_reward("hpsv2@64:/folder/a:b.pt") == ("hpsv2", 64, "/folder/a:b.pt")
    assert parse_rewards("hpsv2:1,imagereward:0.1") == [("hpsv2", 1.0), ("imagereward", 0.1)]
    assert parse_rewards("clip:ViT-B-32:openai, embedded@16:2") == [
        ("clip:ViT-B-32:openai", 1.0),
        ("embedded@16", 2.0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name at least one"),
        ("hps", "reward 'hps': unknown. Known: embedded, hpsv2"),
        ("embedded:-1", "its weight must be a number above 0"),
        ("embedded:nan", "its weight must be a number above 0"),
        ("embedded:1,embedded:2", "is named twice"),
        ("embedded@0", "cannot be averaged to 0 pixels"),
        ("embedded:/folder", "no place fits"),
    ],
)
def test_wrong_names_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_rewards(text)
