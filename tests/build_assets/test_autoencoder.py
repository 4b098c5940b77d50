"""The autoencoder recipe: optimizer, resume, and the rewriting of the latent space."""

from __future__ import annotations

import io
from typing import Any

import autoencoder
import pytest
import torch
from torch import Tensor


@pytest.fixture
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 4, 64, 64), generator=generator, dtype=torch.uint8)


def tiny() -> autoencoder.Training:
    torch.manual_seed(0)
    return autoencoder.Training(autoencoder.build(2, (8, 8, 8)))


def saved_and_loaded(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_shape_of_the_latents() -> None:
    model = autoencoder.build(8, (8, 8, 8))
    assert model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode().shape == (1, 8, 16, 16)
    assert model.encoder.mid_block.attentions[0] is None


def test_draw_is_in_range_and_repeats_by_seed(pictures: Tensor) -> None:
    first, again = (autoencoder.draw(pictures, 5, torch.Generator().manual_seed(3)) for _ in "ab")
    assert first.shape == (5, 3, 64, 64)
    assert first.min() >= -1
    assert first.max() <= 1
    assert torch.equal(first, again)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(autoencoder.orthogonalised(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_resumed_training_repeats_losses_and_average(pictures: Tensor) -> None:
    whole = tiny()
    for _ in range(2):
        whole.update(autoencoder.draw(pictures, 2, whole.generator), 0.1)
    resumed = tiny()
    resumed.restore(saved_and_loaded(whole.state()))
    for _ in range(2):
        losses = [
            one.update(autoencoder.draw(pictures, 2, one.generator), 0.2)
            for one in (whole, resumed)
        ]
        assert torch.equal(*losses)
    pairs = zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_standardised_latents_decode_to_the_same_pictures(pictures: Tensor) -> None:
    model = tiny().model
    x = autoencoder.draw(pictures, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.encode(x).latent_dist
        picture = model.decode(before.mean).sample
        mean, std = autoencoder.latent_moments(model, pictures)
        autoencoder.standardise(model, mean, std)
        after = model.encode(x).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, picture, atol=1e-4)
        shaped = std.float()[:, None, None]
        assert torch.allclose(after.std * shaped, before.std, rtol=1e-4)
        mean, std = autoencoder.latent_moments(model, pictures)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-4)
    assert torch.allclose(std, torch.ones_like(std), atol=1e-4)
