"""Training of a latent proxy reward: who is compared with whom, and what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.proxy_reward import (
    ProxyRewardConfig,
    ProxyRewardObjective,
    grouped_contrast,
    same_prompts,
)
from tests.objectives.test_denoising import make_batch, rows

SMALL = {"text": "embedded", "width": 64, "layers": 1}


def objective(folder: Path, batch_size: int = 4, **flags: Any) -> ProxyRewardObjective:
    model = LatentDiffusion.load(folder)
    for network in model.networks.values():
        network.requires_grad_(False)
    made = ProxyRewardObjective(model, ProxyRewardConfig(**flags), batch_size)
    made.place(torch.device("cpu"))
    return made


def step(method: ProxyRewardObjective, batch: Any) -> dict[str, Any]:
    draws = method.draw(batch, 0)
    with torch.no_grad():
        shared = method.shared(draws)
    terms: dict[str, Any] = method.players()["proxy"]("contrastive", draws, shared)
    return terms


def test_groups_by_hand() -> None:
    """Two orthogonal pairs a group: l = ln(1 + e^-k); swapped texts give ln(1 + e^k)."""
    axes = torch.eye(4)
    images, texts = torch.cat([axes[:2], axes[:2]]), torch.cat([axes[:2], axes[[1, 0]]])
    alone = same_prompts(["a", "b", "c", "d"])
    loss, hits = grouped_contrast(images, texts, torch.tensor(2.0), alone, 2)
    low, high = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert loss.tolist() == pytest.approx([low, low, high, high])
    assert hits.tolist() == [1, 1, 0, 0]


def test_the_same_caption_is_no_wrong_answer() -> None:
    assert same_prompts(["a", "b", "a"]).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]
    axes = torch.eye(3)[[0, 1, 0]]
    scale = torch.tensor(2.0)
    loss, hits = grouped_contrast(axes, axes, scale, same_prompts(["a", "b", "a"]), 3)
    first = math.log1p(math.exp(-2))
    assert loss.tolist() == pytest.approx([first, math.log(1 + 2 * math.exp(-2)), first])
    assert hits.tolist() == [1, 1, 1]


def test_only_the_proxy_is_trained_and_all_of_it(tiny_sd: Path) -> None:
    method = objective(tiny_sd, **SMALL)
    step(method, make_batch(4))["loss"].mean().backward()
    assert all(p.grad is not None for p in method.proxy.parameters())
    assert not any(
        p.grad is not None
        for network in method.model.networks.values()
        for p in network.parameters()
    )
    frozen = objective(tiny_sd, freeze_text=True, **SMALL)
    step(frozen, make_batch(4))["loss"].mean().backward()
    without = {n for n, p in frozen.proxy.named_parameters() if p.grad is None}
    assert without == {n for n, _ in frozen.proxy.named_parameters() if n.startswith("text.")}


def test_a_head_reads_features_of_the_frozen_model(tiny_folder: Callable[[str], Path]) -> None:
    method = objective(tiny_folder("sd-v"), network="taps")
    step(method, make_batch(4))["loss"].mean().backward()
    assert all(p.grad is not None for p in method.proxy.parameters())
    denoiser = method.model.denoiser
    assert not any(p.grad is not None for p in denoiser.parameters())


def test_parts_of_whole_groups_equal_the_batch(tiny_sd: Path) -> None:
    method, batch = objective(tiny_sd, group=2, **SMALL), make_batch(4)
    whole: Tensor = step(method, batch)["loss"]
    parts = [step(method, rows(batch, part))["loss"] for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_first_weights_follow_from_the_seed(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    made = [
        ProxyRewardObjective(model, ProxyRewardConfig(**SMALL), 4, seed=seed).proxy.state_dict()
        for seed in (0, 0, 1)
    ]
    name = "image.visual_projection.weight"
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])


def test_models_without_text_have_no_head_that_reads_it(
    tiny_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(UserError, match="read no text"):
        objective(tiny_folder("dit"), network="taps")
