"""Resize, crop and flip: geometry, addressed draws, value range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.data.transforms import Transform, render, to_float
from tests.data.pictures import encoded, noise

SIZES = [(48, 48), (100, 37), (37, 100), (481, 640), (64, 64), (10, 10), (1, 300)]


@pytest.mark.parametrize("original", SIZES)
@pytest.mark.parametrize("target", [(64, 64), (32, 48)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_view_covers_the_target_and_cuts_one_side_only(original, target, crop):
    transform = Transform(crop, flip=True)
    for index in range(20):
        view = transform.view(original, target, 0, 1, index)
        spare = [view.resized[i] - target[i] for i in (0, 1)]
        assert min(spare) == 0
        assert all(0 <= view.corner[i] <= spare[i] for i in (0, 1))
        scale = max(target[i] / original[i] for i in (0, 1))
        assert all(abs(view.resized[i] - original[i] * scale) <= 0.5 for i in (0, 1))
        if crop == "center":
            assert view.corner == (spare[0] // 2, spare[1] // 2)


def test_draws_depend_on_seed_epoch_and_sample_alone():
    transform = Transform("random", flip=True)

    def draw(*place):
        return transform.view((300, 100), (50, 50), *place)

    assert draw(0, 1, 2) == draw(0, 1, 2)
    for axis in range(3):
        places = [tuple(n if i == axis else 0 for i in range(3)) for n in range(20)]
        assert len({draw(*place).corner for place in places}) > 10
        assert len({draw(*place).flip for place in places}) == 2


def test_draws_are_uniform():
    transform = Transform("random", flip=True)
    views = [transform.view((53, 50), (50, 50), 0, 0, index) for index in range(2000)]
    tops = np.bincount([view.corner[0] for view in views], minlength=4)
    assert tops.size == 4 and abs(tops / 2000 - 0.25).max() < 0.04
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 0.04


@pytest.mark.parametrize("original", [(96, 64), (64, 96), (130, 64)])
@pytest.mark.parametrize("flip", [False, True])
def test_render_equals_flip_then_resize_then_cut(original, flip):
    image = noise(*original, seed=1)
    transform = Transform("random", flip)
    for index in range(6):
        view = transform.view(original, (40, 40), 0, 0, index)
        turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image
        large = turned.resize(view.resized[::-1], Image.Resampling.LANCZOS)
        top, left = view.corner
        expected = np.asarray(large.crop((left, top, left + 40, top + 40))).astype(int)
        # Pillow rounds to 8 bits after each of its two passes
        assert np.abs(render(encoded(image), view) - expected).max() <= 2


def test_same_size_is_the_identity():
    image = noise(32, 32)
    view = Transform().view((32, 32), (32, 32), 0, 0, 0)
    assert (render(encoded(image), view) == np.asarray(image)).all()


def test_shrinking_is_antialiased():
    """One-pixel stripes shrink to even grey, not to a moire."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    view = Transform().view((256, 256), (64, 64), 0, 0, 0)
    out = render(encoded(Image.fromarray(stripes)), view).astype(int)
    assert np.abs(out[:, 4:-4] - 127.5).max() < 4


def test_views_of_a_cache_are_those_of_the_epochs():
    transform = Transform("center", flip=True)
    drawn = {transform.view((80, 60), (32, 32), 7, epoch, 0) for epoch in range(30)}
    assert drawn == set(transform.views((80, 60), (32, 32)))


def test_values_span_minus_one_to_one():
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    out = to_float([pixels, pixels])
    assert out.shape == (2, 3, 1, 1) and out.dtype == torch.float32 and out.is_contiguous()
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
