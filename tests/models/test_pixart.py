"""PixArt-alpha and -Sigma: captions and their mask, the variance half, sizes, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.generation.engine import render, weights_digest
from diffkit.generation.plan import Request, plan
from diffkit.generation.recipe import read_recipe
from diffkit.generation.schedulers import scheduler_names
from diffkit.models.conditioner import Conditioner, Sizes
from diffkit.models.families import pixart
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.models.sampling import sample
from diffkit.randomness import normal

NAMES = ("pixart-alpha", "pixart-sigma")
PROMPTS = ["a cat", "a large red dog"]
HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module", params=NAMES)
def model(request, tiny_folder):
    return LatentDiffusion.load(tiny_folder(request.param))


@pytest.fixture(scope="module")
def alpha(tiny_folder):
    return LatentDiffusion.load(tiny_folder("pixart-alpha"))


@pytest.fixture(scope="module")
def sigma(tiny_folder):
    return LatentDiffusion.load(tiny_folder("pixart-sigma"))


def test_a_guided_oblong_equals_the_stock_pipelines(model):
    noise = normal((2, *model.latent_shape(HEIGHT, WIDTH)), 0, "oblong")
    cond = model.conditioner.encode(PROMPTS, (HEIGHT, WIDTH))
    negative = model.conditioner.encode(["blue", "blue"], (HEIGHT, WIDTH))
    latents = sample(model.denoiser, noise, cond, negative, steps=4, guidance_scale=3.0)
    with torch.no_grad():
        images = (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    pipeline = type(model.pipeline())(**model.pipeline().components)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        negative_prompt=["blue", "blue"],
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=HEIGHT,
        width=WIDTH,
        use_resolution_binning=False,
        output_type="pt",
    ).images
    assert images.std() > 0.02
    assert (images - expected).abs().max() < 1e-4


def test_captions_are_those_of_the_stock_pipelines_default(model):
    """The pipelines' calls clean captions where bs4 and ftfy are installed, else lower-case them;
    their encode_prompt by itself does neither unless told."""
    odd = "  A &quot;RED&quot; Cat, see http://cats.com/1 #12  "
    found = model.conditioner.encode([odd], (HEIGHT, WIDTH))
    with torch.no_grad():
        tokens, mask, _, _ = model.pipeline().encode_prompt(
            [odd], do_classifier_free_guidance=False, clean_caption=True
        )
    assert torch.equal(found.tokens, tokens) and torch.equal(found.mask, mask)
    upper, lower = (model.conditioner.encode([t], (HEIGHT, WIDTH)) for t in ("A CAT ", "a cat"))
    assert torch.equal(upper.tokens, lower.tokens)


def test_keys_follow_how_captions_are_cleaned_and_cut(alpha, sigma, monkeypatch):
    """Embeddings cached without beautifulsoup4 and ftfy served a run that had them, and a picture
    could be repeated in name only; alpha's embeddings of 120 tokens served Sigma's 300."""
    before = alpha.conditioner.fingerprint(), weights_digest(alpha)
    cleans = pixart._cleans()
    monkeypatch.setattr(pixart, "_cleans", lambda: not cleans)
    assert before[0] != alpha.conditioner.fingerprint()
    assert before[1] != weights_digest(alpha)
    longer = Conditioner(sigma.family, alpha.pipeline())
    assert longer.fingerprint() != alpha.conditioner.fingerprint()


def test_tokens_behind_the_mask_change_nothing(model):
    z_t, t = normal((1, *model.latent_shape(HEIGHT, WIDTH)), 0, "z"), torch.tensor([500])
    cond = model.conditioner.encode(["a cat"], (HEIGHT, WIDTH))
    assert 0 < cond.mask.sum() < cond.mask.numel()
    noise = normal(tuple(cond.tokens.shape), 1, "tokens")
    hidden = torch.where(cond.mask[..., None] == 1, cond.tokens, noise)
    shown = torch.where(cond.mask[..., None] == 1, noise, cond.tokens)
    with torch.no_grad():
        plain, behind, before = (
            model.denoiser(z_t, t, dataclasses.replace(cond, tokens=tokens))
            for tokens in (cond.tokens, hidden, shown)
        )
    assert torch.equal(plain, behind)
    assert (plain - before).abs().max() > 1e-3


def test_lengths_are_the_pipelines(alpha, sigma):
    for model, length in ((alpha, 120), (sigma, 300)):
        cond = model.conditioner.encode(["a"], (HEIGHT, WIDTH))
        assert cond.tokens.shape[1] == cond.mask.shape[1] == length
        assert model.family.prompt_limits == {"tokenizer": length}


def test_the_output_is_the_first_half_and_the_variance_gets_no_gradient(sigma):
    network = sigma.denoiser.model
    assert network.config.out_channels == 8 == 2 * sigma.codec.channels
    cond = sigma.conditioner.encode(["a cat"])
    z_t, t = normal((1, 4, 16, 16), 0, "z"), torch.tensor([500])
    output = sigma.denoiser(z_t, t, cond)
    assert output.shape == z_t.shape
    raw = network(
        z_t, encoder_hidden_states=cond.tokens, encoder_attention_mask=cond.mask, timestep=t
    ).sample
    assert torch.equal(raw[:, :4], output)
    weight = network.proj_out.weight
    (gradient,) = torch.autograd.grad(output.square().sum(), weight)
    # Rows are (row, column, channel) of a patch.
    by_channel = gradient.unflatten(0, (4, 8)).abs().sum((0, 2))
    assert (by_channel[:4] > 0).all() and (by_channel[4:] == 0).all()


def test_only_a_checkpoint_that_was_trained_so_is_told_sizes(alpha, sigma):
    assert alpha.family.capabilities == {"cfg", "taps", "micro_conditioning"}
    assert sigma.family.capabilities == {"cfg", "taps"}
    with pytest.raises(UserError, match="PixArt-alpha needs picture sizes"):
        alpha.conditioner.encode(["a cat"])
    assert sigma.conditioner.encode(["a cat"]).time_ids is None
    z_t, t = normal((1, 4, 16, 24), 0, "z"), torch.tensor([500])

    def output(original, target):
        cond = alpha.conditioner.encode(["a cat"], [Sizes(original, (0, 0), target)])
        with torch.no_grad():
            return alpha.denoiser(z_t, t, cond)

    assert (output((32, 48), (32, 48)) - output((32, 48), (64, 48))).abs().max() > 1e-4
    assert torch.equal(output((32, 48), (32, 48)), output((999, 777), (32, 48)))


def test_what_diffusers_cannot_do_is_refused_by_name(model):
    name = model.family.name
    with pytest.raises(UserError, match=f"{name} models have no 'lora' capability"):
        add_lora(model, rank=2)
    with pytest.raises(UserError, match=f"{name} models have no image2image pipeline"):
        model.pipeline("image2image")
    z_t = normal((1, 4, 16, 24), 0, "z")
    cond = model.conditioner.encode(["a"], (HEIGHT, WIDTH))
    with pytest.raises(UserError, match="PixArt has no guidance embedding"):
        model.denoiser(z_t, torch.tensor([5]), cond, torch.ones(1))


def recipes(model, **values):
    request = Request(prompts=("a cat", "a dog", "a sea"), steps=4, size="48x32")
    request = dataclasses.replace(request, model=model.source, **values)
    return plan(request, model)


def test_generation_has_the_size_asked_for_and_does_not_depend_on_the_batch(model):
    made = recipes(model)
    together = [torch.as_tensor(image) for image in render(model, made, "pt")]
    assert {tuple(image.shape) for image in together} == {(3, 32, 48)}
    alone = torch.as_tensor(render(model, made[1:2], "pt")[0])
    assert alone.std() > 0.01 and (together[1] - alone).abs().max() < 1e-4
    other = recipes(model, negative="blue")[1:2]
    assert (torch.as_tensor(render(model, other, "pt")[0]) - alone).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_know_it(tiny_folder, tmp_path, capsys, name):
    words = ("--model", tiny_folder(name), "--size", 32, "--steps", 2, "--output", tmp_path / "out")
    assert main(["generate", "a cat", *map(str, words), "--device", "cpu"]) == 0
    assert read_recipe(tmp_path / "out" / "00000.png").guidance == 4.5
    capsys.readouterr()
    flags = ("--size", "32", "--json", "--device", "cpu")
    assert main(["info", str(tiny_folder(name)), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"].lower() == name
    assert ("micro_conditioning" in report["capabilities"]) == (name == "pixart-alpha")
    assert report["estimate"]["calls_a_step"] == 2


@pytest.mark.parametrize("scheduler", scheduler_names("ddpm"))
def test_every_sampler(sigma, scheduler):
    made = recipes(sigma, scheduler=scheduler)[:1]
    image = torch.as_tensor(render(sigma, made, "pt")[0])
    assert image.isfinite().all() and image.std() > 0.01


def test_starting_from_a_picture_is_refused(model, tmp_path):
    path = tmp_path / "in.png"
    Image.effect_noise((48, 32), 80).convert("RGB").save(path)
    with pytest.raises(UserError, match=f"{model.family.name} models have no image2image"):
        render(model, recipes(model, image=path)[:1])
