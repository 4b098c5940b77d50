"""Flux: packing, guidance told or made, resolution shift, LoRA, generation, single files."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.generation.engine import render, size_rule, takes_guidance
from diffkit.generation.inpaint import takes_masks
from diffkit.generation.plan import Request, plan
from diffkit.generation.recipe import read_recipe
from diffkit.generation.schedulers import scheduler_names
from diffkit.models.families.flux import pack, unpack
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora, load_lora, save_lora
from diffkit.models.sampling import sample
from diffkit.models.weights import save_safetensors
from diffkit.randomness import normal
from tests.models.lora_helpers import randomise

slow = partial(pytest.param, marks=pytest.mark.slow)
PROMPTS = ["a cat", "a red dog"]
HEIGHT, WIDTH = 32, 48
SHORT = {"max_sequence_length": 256}  # as the documents of schnell say


@pytest.fixture(scope="module")
def dev(tiny_folder):
    return LatentDiffusion.load(tiny_folder("flux"))


@pytest.fixture(scope="module")
def schnell(tiny_folder):
    return LatentDiffusion.load(tiny_folder("flux-schnell"))


def ours(model, noise, **options):
    cond, negative = (model.conditioner.encode(texts) for texts in (PROMPTS, ["blue", "blue"]))
    latents = sample(model.denoiser, noise, cond, negative, steps=3, **options)
    with torch.no_grad():
        return (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


def stock(pipeline, noise, **options):
    pipeline.set_progress_bar_config(disable=True)
    b, c, h, w = noise.shape
    return pipeline(
        PROMPTS,
        negative_prompt=["blue", "blue"],
        latents=FluxPipeline._pack_latents(noise, b, c, h, w),
        num_inference_steps=3,
        height=HEIGHT,
        width=WIDTH,
        output_type="pt",
        **options,
    ).images


def test_packing_is_that_of_the_stock_pipeline():
    latents = normal((2, 16, 6, 10), 0, "pack")
    packed = FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 6, 10), latents)


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("flux", {"guidance_scale": 2.5}, {"guidance_scale": 2.5}),
        (
            "flux",
            {"guidance_scale": 2.5, "true_cfg_scale": 3.0},
            {"guidance_scale": 2.5, "true_cfg_scale": 3.0},
        ),
        ("flux-schnell", {"guidance_scale": 1.0}, {"guidance_scale": 0.0, **SHORT}),
        ("flux-schnell", {"guidance_scale": 3.0}, {"true_cfg_scale": 3.0, **SHORT}),
    ],
)
def test_each_guidance_equals_the_stock_pipelines_on_an_oblong(tiny_folder, name, here, there):
    model = LatentDiffusion.load(tiny_folder(name))
    noise = normal((2, *model.latent_shape(HEIGHT, WIDTH)), 0, "oblong")
    images = ours(model, noise, **here)
    assert images.std() > 0.02
    assert (images - stock(model.pipeline(), noise, **there)).abs().max() < 1e-4


def test_the_scale_of_the_embedding_changes_the_picture(dev):
    noise = normal((2, *dev.latent_shape(HEIGHT, WIDTH)), 0, "oblong")
    low, high = (ours(dev, noise, guidance_scale=scale) for scale in (1.0, 6.0))
    assert (low - high).abs().max() > 1e-3


def test_capabilities_are_those_of_the_checkpoint(dev, schnell):
    assert dev.family.capabilities == {"lora", "cfg", "guidance_embedding", "taps"}
    assert schnell.family.capabilities == {"lora", "cfg", "taps"}
    assert (dev.family.guidance_scale, schnell.family.guidance_scale) == (3.5, 1.0)
    assert takes_guidance(dev) and not takes_guidance(schnell)
    for model in (dev, schnell):
        with pytest.raises(UserError, match="Flux models have no 'kohya' capability"):
            model.family.require("kohya")
    with pytest.raises(ValueError, match="guidance embedding"):
        sample(schnell.denoiser, normal((1, 16, 4, 4), 0), None, steps=1, true_cfg_scale=2.0)


def test_schnell_has_its_own_steps_and_length(dev, schnell):
    """It is distilled to 4 steps and was trained on 256 tokens; it got 25 steps and 512 tokens, the
    defaults of a pipeline that serves dev too."""
    assert (dev.family.steps, schnell.family.steps) == (25, 4)
    request = Request(("a cat",), model=schnell.source, size="32")
    assert [plan(request, model)[0].steps for model in (dev, schnell)] == [25, 4]
    for model, length in ((dev, 512), (schnell, 256)):
        assert model.conditioner.encode(["a"]).tokens.shape[1] == length
        assert model.conditioner.null().tokens.shape[1] == length
    (recipe,) = recipes(schnell)[:1]
    made = torch.as_tensor(render(schnell, [recipe], "pt")[0])
    stock_ones = [
        schnell.pipeline()(
            recipe.prompt,
            num_inference_steps=recipe.steps,
            height=recipe.height,
            width=recipe.width,
            generator=torch.Generator().manual_seed(recipe.seed),
            max_sequence_length=length,
            output_type="pt",
        ).images[0]
        for length in (256, 512)
    ]
    assert [torch.allclose(made, other, atol=1e-6) for other in stock_ones] == [True, False]


def test_cached_embeddings_of_one_length_do_not_serve_another(dev, schnell):
    """Both have the same encoders and tokenizers: their caches had one key."""
    assert dev.conditioner.fingerprint() != schnell.conditioner.fingerprint()


def test_guidance_is_needed_or_refused(dev, schnell):
    z_t, t = normal((1, 16, 4, 4), 0, "z"), torch.tensor([500.0])
    with pytest.raises(UserError, match="guidance-distilled: give guidance"):
        dev.denoiser(z_t, t, dev.conditioner.encode(["a"]))
    with pytest.raises(UserError, match="no guidance embedding"):
        schnell.denoiser(z_t, t, schnell.conditioner.encode(["a"]), torch.ones(1))


def test_sizes_and_channels_are_those_of_unpacked_latents(dev):
    assert dev.denoiser.geometry.channels == dev.codec.channels == 16
    assert not takes_masks(dev)
    assert dev.latent_shape(32, 48) == (16, 16, 24)
    assert (dev.size_multiple, dev.default_size, dev.denoiser.tokens(16, 24)) == (4, 256, 96)
    assert size_rule(dev).multiple == 8
    with pytest.raises(UserError, match="multiples of 4"):
        dev.latent_shape(32, 34)


def test_the_resolution_shift_is_that_of_the_stock_pipelines(dev):
    for tokens in (16, 256, 1000, 4096):
        assert dev.schedule.mu(tokens) == pytest.approx(calculate_shift(tokens))
    scheduler = dev.pipeline().scheduler
    lengths = {"base_image_seq_len": 64, "max_image_seq_len": 640}
    changed = type(scheduler).from_config(
        scheduler.config, **lengths, base_shift=0.2, max_shift=0.9
    )
    schedule = type(dev.schedule).from_scheduler(changed)
    assert schedule.mu(100) == pytest.approx(calculate_shift(100, 64, 640, 0.2, 0.9))
    with pytest.raises(UserError, match="by resolution: give mu"):
        dev.schedule.sampling_timesteps(4)


def test_training_times_are_not_shifted_by_a_schedule_that_shifts_by_resolution(dev, schnell):
    """FLUX.1-dev's scheduler says shift = 3 beside use_dynamic_shifting; diffusers' training
    scripts draw its times uniformly, and so do we."""
    u = torch.tensor([0.0, 0.25, 0.5])
    assert dev.pipeline().scheduler.config.shift == 3.0
    for model in (dev, schnell):
        assert model.schedule.train_timesteps(u).tolist() == [1000.0, 750.0, 500.0]


def test_a_lora_by_default_targets_loads_in_the_stock_pipeline(dev, tiny_folder, tmp_path):
    noise = normal((2, *dev.latent_shape(HEIGHT, WIDTH)), 0, "lora")
    plain = ours(dev, noise, guidance_scale=3.0)
    model = LatentDiffusion.load(tiny_folder("flux"))
    paths = {key.rsplit(".", 1)[0] for key in add_lora(model, rank=2, alpha=3.0)}
    # 8 projections of the one double block and 4 layers of its two networks; q, k and v of each
    # single block.
    assert len(paths) == 12 + 2 * 3
    randomise(model)
    images = ours(model, noise, guidance_scale=3.0)
    assert (images - plain).abs().max() > 1e-2
    save_lora(model, tmp_path)
    pipeline = FluxPipeline.from_pretrained(tiny_folder("flux"))
    pipeline.load_lora_weights(tmp_path)
    assert (images - stock(pipeline, noise, guidance_scale=3.0)).abs().max() < 1e-4
    again = LatentDiffusion.load(tiny_folder("flux"))
    load_lora(again, tmp_path)
    assert (images - ours(again, noise, guidance_scale=3.0)).abs().max() < 1e-5


def test_a_lora_with_kohyas_keys_is_refused_by_name(schnell, tmp_path):
    path = tmp_path / "kohya.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    parts = {"lora_down.weight": torch.zeros(2, 16), "lora_up.weight": torch.zeros(48, 2)}
    save_safetensors(path, {f"{name}.{part}": value for part, value in parts.items()})
    with pytest.raises(UserError, match="Flux models have no 'kohya' capability"):
        load_lora(schnell, path)


def recipes(model, **values):
    request = Request(prompts=("a cat", "a dog", "a sea"), steps=3, size="32x48")
    request = dataclasses.replace(request, model=model.source, **values)
    return plan(request, model)


def spread(model, made):
    """Largest difference between pictures made together and made alone."""
    together = torch.stack([torch.as_tensor(x) for x in render(model, made, "pt")])
    alone = [torch.as_tensor(render(model, made[i : i + 1], "pt")[0]) for i in (0, 2)]
    assert together.std() > 0.01 and not torch.equal(together[0], together[1])
    return (together[::2] - torch.stack(alone)).abs().max().item()


@pytest.mark.parametrize("way", [slow("text"), slow("picture"), "mask"])
def test_generation_does_not_depend_on_the_batch(dev, schnell, tmp_path, way):
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 48), 80).convert("RGB").save(image)
    Image.linear_gradient("L").save(mask)
    start = {"picture": {"image": image}, "mask": {"image": image, "mask": mask}}.get(way, {})
    assert spread(dev, recipes(dev, **start)) < 1e-4
    assert spread(schnell, recipes(schnell, **start, guidance=2.0)) < 1e-4


def test_inpainting_keeps_the_pixels_outside_the_mask(dev, tmp_path):
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 48), 80).convert("RGB").save(image)
    half = Image.new("L", (32, 48))
    half.paste(255, (0, 0, 16, 48))
    half.save(mask)
    made = render(dev, recipes(dev, image=image, mask=mask)[:1])[0]
    box = (16, 0, 32, 48)
    assert made.crop(box).tobytes() == Image.open(image).crop(box).tobytes()


def test_a_negative_prompt_is_for_classifier_free_guidance(dev, schnell):
    with pytest.raises(UserError, match="network is told the guidance"):
        recipes(dev, negative="blue")
    with pytest.raises(UserError, match="raise --guidance"):
        recipes(schnell, negative="blue")
    made = recipes(schnell, negative="blue", guidance=3.0)[:1]
    without = [dataclasses.replace(made[0], negative="")]
    pictures = [torch.as_tensor(render(schnell, part, "pt")[0]) for part in (made, without)]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", scheduler_names("flow"))
def test_every_flow_sampler_makes_pictures_or_is_refused_by_name(dev, schnell, scheduler):
    for model in (dev, schnell):
        try:
            made = recipes(model, scheduler=scheduler)[:1]
        except UserError as error:
            assert scheduler != "flow-euler" and f"--scheduler {scheduler}" in str(error)
            continue
        assert torch.as_tensor(render(model, made, "pt")[0]).std() > 0.01


@pytest.mark.parametrize("name", ["flux", "flux-schnell"])
def test_the_commands_know_it(tiny_folder, tmp_path, capsys, name):
    words = ("--model", tiny_folder(name), "--size", 32, "--steps", 2, "--output", tmp_path / "out")
    assert main(["generate", "a cat", *map(str, words), "--device", "cpu"]) == 0
    recipe = read_recipe(tmp_path / "out" / "00000.png")
    assert recipe.guidance == {"flux": 3.5, "flux-schnell": 1.0}[name]
    capsys.readouterr()
    assert main(["info", str(tiny_folder(name)), "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["size"]) == ("Flux", "256x256")
    assert ("guidance_embedding" in report["capabilities"]) == (name == "flux")
    assert report["estimate"]["calls_a_step"] == 1


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_known_and_what_it_lacks_is_named(tiny_folder, tmp_path, prefix):
    path = Path(tmp_path / "flux.safetensors")
    key = f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale"
    save_safetensors(path, {key: torch.zeros(2)})
    with pytest.raises(UserError, match=r"flux.safetensors: .* FluxPipeline"):
        LatentDiffusion.load(path, config=tiny_folder("flux"))
