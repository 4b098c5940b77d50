"""Noisy upscaling through a tiny upscaler of the true class."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline
from transformers import CLIPTextModel

from diffkit import randomness
from diffkit.audit.purifiers import upscale
from diffkit.audit.purifiers.base import Models
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.errors import UserError
from tests import tiny

PIXELS = randomness.integers(0, 256, (3, 16, 24), "upscale").to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "x4"
    torch.manual_seed(0)
    autoencoder = tiny.vae(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    StableDiffusionUpscalePipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(tiny._clip_config()),
        tokenizer=tiny.clip_tokenizer(),
        unet=tiny._unet(in_channels=7, out_channels=4, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
    ).save_pretrained(place)
    return place


def test_a_real_upscaler(folder, monkeypatch):
    monkeypatch.setattr(upscale, "_STEPS", 2)
    (purifier,) = parse_purifiers(f"upscale:{folder}", Models(prompt="a"))
    found = purifier(PIXELS, 1)
    assert found.shape == PIXELS.shape and torch.equal(found, purifier(PIXELS, 1))
    assert not torch.equal(found, purifier(PIXELS, 2))
    assert purifier.name == "upscale320:x4" and purifier.parameters["noise level"] == 320
    odd = PIXELS[:, :15, :21]
    assert purifier(odd, 1).shape == odd.shape


def test_large_pictures_are_seen_in_views(folder, monkeypatch):
    """Twelve megapixels went in whole, came out as 192, and no memory held them."""
    for name, value in (("_STEPS", 1), ("_LARGEST", 32), ("_SIDE", 16)):
        monkeypatch.setattr(upscale, name, value)
    (purifier,) = parse_purifiers(f"upscale:{folder}", Models(prompt="a"))
    pipeline = purifier.prepare()._models._kept[f"upscale:{folder}"]
    sizes = []
    original = type(pipeline).__call__

    def watched(self, *args, **named):
        sizes.append(tuple(named["image"].shape[-2:]))
        return original(self, *args, **named)

    monkeypatch.setattr(type(pipeline), "__call__", watched)
    pixels = randomness.integers(0, 256, (3, 40, 60), "large").to(torch.uint8)
    found = purifier(pixels, 1)
    assert found.shape == pixels.shape and torch.equal(found, purifier(pixels, 1))
    assert sizes and all(min(size) == 16 and max(size) <= 32 for size in sizes)


def test_other_folders_and_levels_are_refused(folder, tiny_sd, tmp_path):
    for text, message in (
        (f"upscale:{tiny_sd}", "is a StableDiffusionPipeline"),
        (f"upscale:{tmp_path}", "is no folder of a StableDiffusionUpscalePipeline"),
        (f"upscale400:{folder}", "noise levels up to 350"),
    ):
        (purifier,) = parse_purifiers(text)
        with pytest.raises(UserError, match=message):
            purifier.prepare()
