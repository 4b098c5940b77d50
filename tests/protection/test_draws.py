"""What is drawn for each view of a step, and behind input transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.budget import as_signed
from diffkit.protection.scene import Scene
from diffkit.protection.settings import Settings
from diffkit.protection.transforms import TRANSFORMS
from diffkit.protection.views import plan_views
from diffkit.randomness import normal, uniform
from tests.protection.attacks import R, gradient, random_pixels, slightly_moved

Loader = Callable[[str], LatentDiffusion]


def test_every_view_has_draws_of_its_own(tiny_model: Loader) -> None:
    """All views of a step had one noise and one time; that of the first view is as it was."""
    model = tiny_model("sd")
    plan = plan_views(40, 48, R, model.working_multiple, views=3)
    pixels = random_pixels(1, 40, 48)
    seen: list[Scene] = []

    def watched(scene: Scene) -> Tensor:
        seen.append(scene)
        return scene.z.flatten(1).sum(1)

    with gradient(model, Settings("advdm"), pixels, plan=plan, seeds=[3]) as g:
        g.method = replace(g.method, loss=watched)
        g(as_signed(pixels), 5)
    (t, eps), *others = (scene.noise for scene in seen)
    assert len(others) == 2
    wide = normal(eps.shape[1:], 3, 5, 0, "eps")[None]
    assert torch.equal(eps, wide)
    assert torch.equal(t, g.surrogates[0].times(uniform((1,), 3, 5, 0, "time")))
    assert len({float(t), *(float(other) for other, _ in others)}) == 3
    assert not torch.equal(others[0][1], others[1][1])
    shared = normal(others[0][1].shape[1:], 3, 5, 0, "eps")[None]
    assert not any(torch.equal(noise, shared) for _, noise in others)


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_the_clean_picture_has_no_gradient_behind_any_transform(
    tiny_model: Loader, transform: str
) -> None:
    """PID compared T(x) with the clean picture itself, so that it followed the transform, not the
    change."""
    model, pixels = tiny_model("sd"), random_pixels(2, 24, 24)
    plan = plan_views(24, 24, R, model.working_multiple, views=2)
    settings = Settings("pid", transforms=(transform,), draws=2)
    settings.check()
    with gradient(model, settings, pixels, plan=plan) as g:
        start = sum(
            g._view_gradient(as_signed(pixels), list(views), 3, 0, None, place)
            for place, views in enumerate(g._views(3))
        )
        assert torch.equal(start, torch.zeros_like(as_signed(pixels)))
        assert g(slightly_moved(pixels), 3).abs().max() > 0
