"""How much an encoder enlarges a change, against random noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.amplification import amplification_ratio
from diffkit.protection.budget import as_signed
from diffkit.protection.pgd import random_noise
from tests.protection.attacks import R, plan_of, random_pixels

Loader = Callable[[str], LatentDiffusion]


def test_it_is_the_ratio_of_gains(tiny_model: Loader) -> None:
    """(||dz|| / ||dx||) of each: ||x|| and ||z|| of the picture cancel."""
    model = tiny_model("sd3")
    (clean,) = random_pixels(1)
    other, control = (random_noise(clean[None], k, [k])[0] for k in (4, 8))
    (view,) = plan_of(model, R, R).whole
    found = amplification_ratio(model.codec, clean, other, control, view)
    with torch.no_grad():
        x = as_signed(torch.stack([clean, other, control]))
        z = model.codec.encode(x)
    unit = [(x / 2 + 0.5)[i] for i in range(3)]
    gains = [
        ((z[i] - z[0]).norm() / z[0].norm()) / ((unit[i] - unit[0]).norm() / unit[0].norm())
        for i in (1, 2)
    ]
    assert found == pytest.approx(float(gains[0] / gains[1]), rel=1e-4)
    assert amplification_ratio(model.codec, clean, control, control, view) == pytest.approx(1)


def test_transparent_pictures_are_seen_on_white(tiny_model: Loader) -> None:
    """Colours behind a transparent part were encoded too, though no attack and no viewer sees
    them."""
    model = tiny_model("sd")
    (clean,) = random_pixels(1)
    other, control = (random_noise(clean[None], k, [k])[0] for k in (4, 8))
    (view,) = plan_of(model, R, R).whole
    alpha = torch.full((1, R, R), 255, dtype=torch.uint8)
    alpha[:, :6] = 0
    found = amplification_ratio(model.codec, clean, other, control, view, alpha)
    white = [torch.where(alpha > 0, pixels, 255) for pixels in (clean, other, control)]
    assert found == pytest.approx(amplification_ratio(model.codec, *white, view), rel=1e-6)
    assert found != amplification_ratio(model.codec, clean, other, control, view)


def test_without_a_change_there_is_no_ratio(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    (clean,) = random_pixels(1, channels=1)
    control = random_noise(clean[None], 8, [1])[0]
    (view,) = plan_of(model, R, R).whole
    assert amplification_ratio(model.codec, clean, clean, control, view) is None
    assert amplification_ratio(model.codec, clean, control, clean, view) is None
    assert amplification_ratio(model.codec, clean, control, control, view) == pytest.approx(1)
