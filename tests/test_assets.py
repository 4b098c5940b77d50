"""The embedded assets: the model draws what it is told, also in plain diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffkit.assets import path
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffkit.data.check import check
from diffkit.data.transforms import to_float
from diffkit.errors import UserError
from diffkit.evaluation.metrics.captions import background_of
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.perceptual.latent_lpips_io import load_latent_lpips
from diffkit.randomness import normal

CAPTIONS = [
    "red apple, noto style, blue background",
    "panda, twemoji style, yellow background",
    "rocket, fluent 3d style, white background",
]
NAMES = ["red apple", "panda", "rocket"]


@pytest.fixture(scope="module")
def drawn():
    """One picture a caption, (3, 3, 64, 64) in [-1, 1], and the noise it came from."""
    model = LatentDiffusion.load("embedded")
    noise = normal((3, *model.latent_shape(64, 64)), 0, "assets")
    cond, null = model.conditioner.encode(CAPTIONS), model.conditioner.null(3)
    latents = sample(model.denoiser, noise, cond, null, steps=10, guidance_scale=2.0)
    with torch.no_grad():
        return model.codec.decode(latents).clamp(-1, 1), noise


def test_the_model_draws_what_it_is_told(drawn):
    """By the palette, by the feature network and by the scorer, none of which drew it."""
    images, _ = drawn
    assert background_of(images) == ["blue", "yellow", "white"]
    features = FeatureNetwork.load(path("features")).eval()
    scorer = TextImageScorer.load(path("scorer")).eval()
    with torch.no_grad():
        concepts = features.classify(images)["concept"][:, features.concept_indices(NAMES)]
        assert concepts.argmax(1).tolist() == [0, 1, 2]
        scores = torch.stack([scorer.score(images, [text] * 3) for text in CAPTIONS], 1)
        assert scores.argmax(1).tolist() == [0, 1, 2]


def test_plain_diffusers_draws_the_same(drawn):
    images, noise = drawn
    pipeline = StableDiffusionPipeline.from_pretrained(path("model"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "pt"}
    theirs = pipeline(CAPTIONS, latents=noise.clone(), height=64, width=64, **options).images
    assert (theirs * 2 - 1 - images).abs().max() < 1e-3


def test_the_text_encoder_is_the_scorers():
    model = LatentDiffusion.load("embedded")
    scorer = TextImageScorer.load(path("scorer"))
    ours = model.conditioner.encoders["text_encoder"].state_dict()
    theirs = scorer.text_encoder.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in ours)


def test_the_distance_of_latents_knows_which_is_nearer():
    """Of a caption's own latents, those with a little noise; another picture is further."""
    network = load_latent_lpips()
    model = LatentDiffusion.load("embedded")
    assert network.config.channels == model.codec.channels
    files = sorted(path("sample").glob("*-noto-blue.png"))[:4]
    images = to_float([np.asarray(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        latents = model.codec.encode(images)
    noisy = [latents + s * normal(latents.shape, 0, "noise") for s in (0.1, 0.5)]
    near, far, other = (network.distance(latents, x) for x in (*noisy, latents.roll(1, 0)))
    assert (near > 0).all() and (near < far).all() and (far < other).all()


def test_the_sample_is_a_training_folder():
    report = check(path("sample"))
    assert not report.problems
    assert (path("pictures") / "README.md").is_file()


def test_unknown_assets_are_named():
    with pytest.raises(UserError, match="no asset named 'moon'"):
        path("moon")
