"""Validation pictures take little memory and leave the model as they found it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.training.validation import Validation

SIZE = 32


@pytest.fixture
def model(tiny_folder):
    return LatentDiffusion.load(tiny_folder("sd"))


@pytest.fixture
def validation(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na cat\na house\n")

    def make(size=SIZE):
        options = {"seed": 0, "steps": 2, "guidance_scale": 3.0, "folder": None}
        return Validation(model, prompts, size=size, **options)

    return make


@pytest.mark.parametrize(("size", "batch"), [(32, 16), (256, 16), (512, 4), (1024, 1)])
def test_large_pictures_are_sampled_a_few_at_a_time(size, batch, validation):
    assert validation(size).batch == batch


def test_the_batch_does_not_show(validation):
    one, all_at_once = validation(), validation()
    one.batch = 1
    for a, b in zip(one.images(), all_at_once.images(), strict=True):
        assert a.size == (SIZE, SIZE)
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_autocast_is_for_the_denoiser_alone(model, validation):
    """The codec overflows in fp16, and decodes one picture at a time in its own precision."""
    seen = {"denoiser": set(), "codec": set()}
    for name, layer in (
        ("denoiser", model.denoiser.model.conv_out),
        ("codec", model.codec.vae.decoder.conv_out),
    ):
        layer.register_forward_hook(lambda _, __, y, name=name: seen[name].add((y.dtype, len(y))))
    with torch.autocast("cpu", torch.bfloat16):
        validation().images()
    assert seen == {"denoiser": {(torch.bfloat16, 6)}, "codec": {(torch.float32, 1)}}
