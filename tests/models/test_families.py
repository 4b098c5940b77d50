"""Every family, on tiny models of the true classes: ours, the stock pipeline's, saved, reloaded."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import set_attention
from diffkit.models.families import families, family_of
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.randomness import normal

NAMES = (
    "sd",
    "sd-v",
    "sdxl",
    "sd3",
    "flux",
    "flux-schnell",
    "pixart-alpha",
    "pixart-sigma",
)
PROMPTS = ["a cat", "a red dog"]
STEPS, SCALE = 5, 4.0


def ours(model, noise):
    cond = model.conditioner.encode(PROMPTS, (32, 32))
    uncond = model.conditioner.null(len(PROMPTS), (32, 32))
    latents = sample(model.denoiser, noise, cond, uncond, steps=STEPS, guidance_scale=SCALE)
    with torch.no_grad():
        return (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


def stock(pipeline, noise):
    """The pipeline's own loop with the deterministic scheduler of its kind."""
    pipeline.set_progress_bar_config(disable=True)
    family = LatentDiffusion(pipeline).family
    if "beta_start" in pipeline.scheduler.config:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline(
        PROMPTS,
        latents=family.pack(noise.clone()),
        num_inference_steps=STEPS,
        **family.pipeline_arguments(family, SCALE, ["", ""]),
        height=32,
        width=32,
        output_type="pt",
    ).images


def told(model, n):
    """The guidance scale as an input, for a network that has it."""
    return torch.full((n,), SCALE) if model.family.takes_guidance else None


@pytest.mark.parametrize("name", NAMES)
def test_our_loop_equals_the_stock_pipeline_and_survives_saving(tiny_folder, tmp_path, name):
    model = LatentDiffusion.load(tiny_folder(name))
    noise = normal((2, *model.latent_shape(32, 32)), 0, name)
    images = ours(model, noise)
    assert images.std() > 0.02, "a constant picture would equal anything"
    assert (images - stock(model.pipeline(), noise)).abs().max() < 1e-4

    model.save(tmp_path / "saved")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert (images - stock(plain, noise)).abs().max() < 1e-4
    assert (images - ours(LatentDiffusion.load(tmp_path / "saved"), noise)).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_networks_run_with_float32_results(tiny_folder, name):
    model = LatentDiffusion.load(tiny_folder(name), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    noise = normal((2, *model.latent_shape(32, 32)), 0, name)
    cond = model.conditioner.encode(PROMPTS, (32, 32))
    prediction = model.denoiser.predict(noise, torch.tensor([300, 300]), cond, told(model, 2))
    assert prediction.x0.dtype == torch.float32
    latents = sample(model.denoiser, noise, cond, steps=2)
    assert latents.dtype == torch.float32 and latents.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_taps_collect_the_named_blocks_with_gradients(tiny_folder, name):
    model = LatentDiffusion.load(tiny_folder(name))
    z_t = normal((1, *model.latent_shape(32, 32)), 1, name).requires_grad_()
    cond = model.conditioner.encode(["a cat"], (32, 32))
    names = model.denoiser.tap_names
    with model.denoiser.taps(names) as found:
        model.denoiser(z_t, torch.tensor([500]), cond, told(model, 1))
    assert tuple(found) == names
    for value in found.values():
        (gradient,) = torch.autograd.grad(value.square().sum(), z_t, retain_graph=True)
        assert gradient.abs().sum() > 0
    with pytest.raises(UserError, match="'attic'"), model.denoiser.taps(["attic"]):
        pass


def test_guidance_of_one_is_the_conditional_model(tiny_sd):
    model = LatentDiffusion.load(tiny_sd)
    z_t = normal((1, *model.latent_shape(32, 32)), 2, "z")
    t = torch.tensor([500])
    cond, uncond = model.conditioner.encode(["a cat"]), model.conditioner.null()
    with torch.no_grad():
        guided = model.denoiser.guided(z_t, t, cond, uncond, 1.0).eps
        assert torch.allclose(guided, model.denoiser.predict(z_t, t, cond).eps, atol=1e-5)
        assert not torch.allclose(guided, model.denoiser.predict(z_t, t, uncond).eps, atol=1e-3)


def test_guidance_embedding_is_needed_or_refused(tiny_sd):
    model = LatentDiffusion.load(tiny_sd)
    z_t, t = normal((1, *model.latent_shape(32, 32)), 2, "z"), torch.tensor([5])
    cond = model.conditioner.encode(["a cat"])
    with pytest.raises(UserError, match="no guidance embedding"):
        model.denoiser(z_t, t, cond, torch.tensor([7.5]))


def test_guidance_embedding_equals_the_stock_pipelines(tiny_sd):
    from diffkit.models.families.unet import guidance_embedding

    pipeline = LatentDiffusion.load(tiny_sd).pipeline()
    scales = torch.tensor([1.0, 4.5, 12.0])

    class Config:
        time_cond_proj_dim = 32

    class Net:
        config = Config()

    expected = pipeline.get_guidance_scale_embedding(scales - 1, embedding_dim=32)
    found = guidance_embedding(Net(), scales, torch.float32)
    assert torch.allclose(found, expected, atol=1e-3)


def test_sdxl_without_sizes_is_refused(tiny_sdxl):
    with pytest.raises(UserError, match="picture sizes"):
        LatentDiffusion.load(tiny_sdxl).conditioner.encode(["a cat"])


def test_sdxl_null_is_zero_as_in_the_stock_pipeline(tiny_sdxl):
    null = LatentDiffusion.load(tiny_sdxl).conditioner.null(2, (32, 64))
    assert null.tokens.abs().max() == 0 and null.pooled.abs().max() == 0
    assert null.time_ids.tolist() == [[32, 64, 0, 0, 32, 64]] * 2


def test_conditioning_operations():
    cond = Conditioning(torch.arange(12.0).reshape(3, 2, 2), torch.arange(6.0).reshape(3, 2))
    null = Conditioning(torch.zeros(1, 2, 2), torch.full((1, 2), -1.0))
    assert len(cond) == 3
    first, second = Conditioning.cat([cond, cond]).chunk(2)
    assert torch.equal(first.tokens, second.tokens)
    dropped = cond.drop(torch.tensor([True, False, True]), null)
    assert dropped.tokens[0].abs().max() == 0 and torch.equal(dropped.tokens[1], cond.tokens[1])
    assert dropped.pooled[:, 0].tolist() == [-1.0, 2.0, -1.0]
    again = Conditioning.from_dict(cond.to_dict())
    assert again.mask is None and torch.equal(again.pooled, cond.pooled)
    half = cond.to(dtype=torch.bfloat16)
    assert half.tokens.dtype == torch.bfloat16
    assert torch.equal(cond.select(slice(1, 2)).pooled, cond.pooled[1:2])


def test_freed_encoders_come_back_when_the_model_is_saved(tiny_sd, tmp_path):
    model = LatentDiffusion.load(tiny_sd)
    expected = model.conditioner.encode(["a cat"])
    model.conditioner.free()
    assert "text_encoder" not in model.networks
    with pytest.raises(UserError, match="freed"):
        model.conditioner.encode(["a cat"])
    model.save(tmp_path / "saved")
    again = LatentDiffusion.load(tmp_path / "saved").conditioner.encode(["a cat"])
    assert torch.equal(again.tokens, expected.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_stock_pipeline_shares_the_weights(tiny_folder, name):
    model = LatentDiffusion.load(tiny_folder(name))
    for kind in ("text2image", "image2image", "inpaint"):
        if kind not in model.family.pipelines:
            with pytest.raises(UserError, match=f"{model.family.name} models have no {kind}"):
                model.pipeline(kind)
            continue
        pipeline = model.pipeline(kind)
        assert type(pipeline).__name__ == model.family.pipelines[kind]
        assert getattr(pipeline, model.family.denoiser) is model.denoiser.model


def test_sizes(tiny_sd, tiny_sd3):
    sd, sd3 = LatentDiffusion.load(tiny_sd), LatentDiffusion.load(tiny_sd3)
    assert (sd.size_multiple, sd3.size_multiple, sd.default_size) == (2, 4, 32)
    assert sd.latent_shape(32, 48) == (4, 16, 24)
    with pytest.raises(UserError, match="33x32: .* multiples of 2 .* nearest is 32x32"):
        sd.latent_shape(32, 33)
    with pytest.raises(UserError, match="nearest is 4x32"):
        sd3.check_size(32, 2)


def test_classic_attention_gives_the_same_output(tiny_sd, tiny_sd3):
    plain, classic = (
        LatentDiffusion.load(tiny_sd),
        LatentDiffusion.load(tiny_sd, attention="classic"),
    )
    z_t, t = normal((1, *plain.latent_shape(32, 32)), 2, "z"), torch.tensor([5])
    cond = plain.conditioner.encode(["a cat"])
    with torch.no_grad():
        difference = plain.denoiser(z_t, t, cond) - classic.denoiser(z_t, t, cond)
    assert difference.abs().max() < 1e-5
    with pytest.raises(UserError, match="'classic' cannot be used"):
        LatentDiffusion.load(tiny_sd3, attention="classic")
    with pytest.raises(UserError, match="'warp' cannot be used"):
        set_attention(plain.denoiser.model, "warp")


def test_capabilities_and_families_are_named_when_missing():
    flow = family_of("StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="Stable Diffusion 3 models have no 'kohya'"):
        flow.require("kohya")
    with pytest.raises(UserError, match="KandinskyPipeline"):
        family_of("KandinskyPipeline")
    assert len({family.name for family in families()}) == len(families())
