"""Autoencoder round trip and SDEdit on tiny models of the true classes."""

from __future__ import annotations

import pytest
import torch

from diffkit import randomness
from diffkit.audit.purifiers.base import Models
from diffkit.audit.purifiers.latent import resized, through_views
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_float, to_uint8
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.views import plan_views


def picture(height: int = 32, width: int = 32) -> torch.Tensor:
    noise = randomness.normal((1, 3, height // 4, width // 4), "picture")
    smooth = resized(noise, (height, width))[0]
    return (128 + 60 * smooth).clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return LatentDiffusion.load(tiny_sd)


def one(text, models):
    (purifier,) = parse_purifiers(text, models)
    return purifier


def distance(a, b):
    return float((a.float() - b.float()).abs().mean())


def test_round_trip_is_the_codecs(model):
    pixels = picture()
    with torch.no_grad():
        images = model.codec.decode(model.codec.encode(to_float(pixels)[None]))
    found = one("vae", Models(model))(pixels, 5)
    assert torch.equal(found, to_uint8(images)[0])
    assert torch.equal(found, one("vae", Models(model))(pixels, 6))


def test_sdedit_of_little_strength_nears_the_round_trip(model):
    """One step of a hundred; this decoder of random weights shows it, so there is no equality."""
    pixels, models = picture(), Models(model, prompt="a")
    there = one("vae", models)(pixels, 1)
    far = [distance(one(f"sdedit{s}", models)(pixels, 1), there) for s in (0.01, 0.05, 0.3)]
    assert far[0] < far[1] < far[2] and far[0] < 0.5 * far[2]


def test_the_seed_is_the_noise_and_twins_share_it(model):
    """Two versions of a picture get one noise: their edits differ less than two seeds' do."""
    purifier = one("sdedit0.2", Models(model, prompt="a"))
    pixels = picture().clamp(1, 254)
    first, again = purifier(pixels, 1), purifier(pixels, 1)
    assert torch.equal(first, again)
    assert distance(first, purifier(pixels + 1, 1)) < distance(first, purifier(pixels, 2))
    assert purifier.parameters == {"steps": 100, "strength": 0.2, "model": "audited"}


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (40, 140), (9, 20)])
@pytest.mark.parametrize("text", ["vae", "sdedit0.02"])
def test_any_size_comes_back(model, size, text):
    found = one(text, Models(model, prompt="a"))(picture(*size), 0)
    assert found.shape == (3, *size)


@pytest.mark.parametrize("size", [(32, 32), (24, 130), (97, 40)])
def test_views_are_put_back_in_place(size):
    pixels = picture(*size)
    views = plan_views(*size, 32, 8, views=1).whole
    found = through_views(pixels, views, lambda images, view: images)
    assert distance(found, pixels) < 6, "resampled, and in place"
    if size == (32, 32):
        assert torch.equal(found, pixels)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_other_families(tiny_folder, name):
    models = Models(LatentDiffusion.load(tiny_folder(name)), prompt="a")
    assert one("sdedit0.02", models)(picture(), 0).shape == (3, 32, 32)


def test_a_model_of_its_own(model, tiny_sd, tiny_sd3):
    models = Models(model, prompt="a")
    both = parse_purifiers(f"vae,vae:{tiny_sd},vae:{tiny_sd3}", models)
    assert [p.name for p in both] == ["vae", "vae:sd", "vae:sd3"], "no path of this machine"
    own, same, other = (p(picture(), 0) for p in both)
    assert torch.equal(own, same) and not torch.equal(own, other)
    assert both[2].parameters["model"] == "sd3"
    assert models.of(str(tiny_sd3)) is models.of(str(tiny_sd3)), "loaded once"


def test_what_cannot_run_is_refused_before_the_first_picture(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="vae: needs a model; write vae:MODEL"):
        parse_purifiers("jpeg,vae")
    pixel = one(f"vae:{tiny_folder('pixel')}", None)
    with pytest.raises(UserError, match="work on pixels and have no autoencoder"):
        pixel.prepare()
    with pytest.raises(UserError, match="no such model"):
        one(f"sdedit0.1:{tmp_path / 'none'}", None).prepare()
    with pytest.raises(UserError, match=r"strength must be a number from 0.01 to 1"):
        parse_purifiers("sdedit2:m")
