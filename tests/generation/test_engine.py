"""Pictures do not depend on the batch; samplers, sizes, devices and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.errors import RunFailed, UserError
from diffkit.generation.engine import (
    check_strength,
    choose_device,
    choose_dtype,
    in_batches,
    render,
    size_rule,
    weights_digest,
)
from diffkit.generation.plan import Request, plan
from diffkit.generation.recipe import Recipe
from diffkit.generation.schedulers import scheduler_names
from diffkit.models.latent_diffusion import LatentDiffusion

Folder = Callable[[str], Path]
PROMPTS = ("a red apple", "a pear", "the sea")


@cache
def load(folder: Path) -> LatentDiffusion:
    return LatentDiffusion.load(folder)


def recipes(folder: Path, **values: object) -> list[Recipe]:
    request = Request(prompts=PROMPTS, model=str(folder), steps=3)
    return plan(dataclasses.replace(request, **values), load(folder))


def spread(folder: Path, made: list[Recipe]) -> float:
    """Largest difference between a batch of three and its ends made alone."""
    model = load(folder)
    together = torch.stack([torch.as_tensor(x) for x in render(model, made, "pt")])
    alone = [torch.as_tensor(render(model, made[i : i + 1], "pt")[0]) for i in (0, 2)]
    assert together.std() > 0.01
    assert not torch.equal(together[0], together[1])
    return (together[::2] - torch.stack(alone)).abs().max().item()


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl", "sd3"])
def test_the_batch_split_changes_nothing(tiny_folder: Folder, name: str) -> None:
    folder = tiny_folder(name)
    assert spread(folder, recipes(folder)) < 1e-4


@pytest.mark.parametrize("scheduler", scheduler_names("ddpm"))
def test_every_ddpm_sampler_also_the_stochastic_ones(tiny_sd: Path, scheduler: str) -> None:
    assert spread(tiny_sd, recipes(tiny_sd, scheduler=scheduler)) < 1e-4


@pytest.mark.parametrize("scheduler", scheduler_names("flow"))
def test_every_flow_sampler(tiny_sd3: Path, scheduler: str) -> None:
    assert spread(tiny_sd3, recipes(tiny_sd3, scheduler=scheduler)) < 1e-4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "euler-a", "lcm", "unipc", "ddpm"])
def test_samplers_start_from_pure_noise_on_a_zero_snr_model(
    tiny_folder: Folder, scheduler: str
) -> None:
    folder = tiny_folder("sd-v")
    images = render(load(folder), recipes(folder, scheduler=scheduler), "pt")
    assert torch.isfinite(torch.stack(list(images))).all()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_starting_from_a_picture_does_not_depend_on_the_batch_either(
    tiny_folder: Folder, tmp_path: Path, name: str, with_mask: bool
) -> None:
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(image)
    Image.linear_gradient("L").save(mask)
    folder = tiny_folder(name)
    made = recipes(folder, image=image, mask=mask if with_mask else None, steps=4)
    assert (made[0].width, made[0].height) == (32, 32)
    assert made[0].strength == (1.0 if with_mask else 0.8)
    assert spread(folder, made) < 1e-4


def test_inpainting_keeps_the_pixels_outside_the_mask(tiny_sd: Path, tmp_path: Path) -> None:
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(image)
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    half.save(mask)
    made = render(load(tiny_sd), recipes(tiny_sd, image=image, mask=mask)[:1])[0]
    before = Image.open(image)
    right = (16, 0, 32, 32)
    assert made.crop(right).tobytes() == before.crop(right).tobytes()
    left = (0, 0, 16, 32)
    assert made.crop(left).tobytes() != before.crop(left).tobytes()


def with_channels(folder: Path, network: int, latent: int, **more: int) -> LatentDiffusion:
    """The tiny Stable Diffusion with other input and latent channels."""
    from diffusers import UNet2DConditionModel

    from tests.tiny import vae

    pipeline = load(folder).pipeline()
    torch.manual_seed(0)
    config = dict(pipeline.unet.config) | {"in_channels": network, "out_channels": latent} | more
    unet = UNet2DConditionModel.from_config(config)
    parts = pipeline.components | {"vae": vae(latent), "unet": unet}
    return LatentDiffusion(type(pipeline)(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++", "heun", "pndm"])
def test_inpainting_with_any_latent_channels(
    tiny_sd: Path, tmp_path: Path, strength: float, scheduler: str
) -> None:
    """Outside the mask the last latents are the codec's own; inside they follow the prompt."""
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(image)
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    half.save(mask)
    model = with_channels(tiny_sd, 8, 8)  # diffusers' own inpainting refuses it
    request = Request(prompts=("a", "b"), image=image, mask=mask, strength=strength)
    request = dataclasses.replace(request, model=str(tiny_sd), steps=6, scheduler=scheduler)
    made = plan(request, model)
    latents = torch.stack(list(render(model, made, "latent")))
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None] / 127.5 - 1
    known = model.codec.encode(pixels)[0].detach()
    assert (latents[:, :, :, 8:] - known[:, :, 8:]).abs().max() < 1e-5
    assert (latents[:, :, :, :8] - known[:, :, :8]).abs().mean() > 0.05
    alone = torch.as_tensor(render(model, made[1:], "latent")[0])
    assert (alone - latents[1]).abs().max() < 1e-4


def test_a_network_that_takes_masks_gets_them(tiny_sd: Path, tmp_path: Path) -> None:
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(image)
    Image.linear_gradient("L").save(mask)
    model = with_channels(tiny_sd, 9, 4)
    request = Request(prompts=("a",), model=str(tiny_sd), steps=2, image=image, mask=mask)
    assert render(model, plan(request, model))[0].size == (32, 32)
    with pytest.raises(UserError, match="only inpaints"):
        plan(dataclasses.replace(request, mask=None), model)


def test_without_a_negative_prompt_sdxl_is_guided_away_from_zeros(tiny_sdxl: Path) -> None:
    """An empty negative prompt was handed to the pipeline, which then encodes it; SDXL's own null,
    in stock pipelines and in training, is zeros."""
    made = recipes(tiny_sdxl)
    pipeline = load(tiny_sdxl).pipeline()
    seeds = [torch.Generator().manual_seed(recipe.seed) for recipe in made]
    size = {"width": made[0].width, "height": made[0].height}
    options = {"num_inference_steps": 3, "guidance_scale": made[0].guidance, "output_type": "pt"}
    stock = pipeline(list(PROMPTS), generator=seeds, **size, **options).images
    ours = torch.stack(list(render(load(tiny_sdxl), made, "pt")))
    assert (ours - torch.as_tensor(stock)).abs().max() < 1e-5
    assert (ours - torch.stack(render(load(tiny_sdxl), negated(made), "pt"))).abs().max() > 1e-3


def negated(made: list[Recipe]) -> list[Recipe]:
    return [dataclasses.replace(recipe, negative="the sea") for recipe in made]


def test_a_batch_may_mix_pictures_with_and_without_a_negative_prompt(tiny_sdxl: Path) -> None:
    made = recipes(tiny_sdxl)
    mixed = [made[0], negated(made)[1], made[2]]
    assert spread(tiny_sdxl, mixed) < 1e-4
    alone = torch.as_tensor(render(load(tiny_sdxl), mixed[1:2], "pt")[0])
    together = torch.as_tensor(render(load(tiny_sdxl), mixed, "pt")[1])
    assert (alone - together).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_starting_from_a_picture_of_another_size(
    tiny_folder: Folder, tmp_path: Path, name: str, with_mask: bool
) -> None:
    """SD3's pipeline scales the picture to the model's own size unless it is told one, which
    ignored --size and broke masks."""
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((48, 24), 80).convert("RGB").save(image)
    Image.linear_gradient("L").resize((48, 24)).save(mask)
    folder = tiny_folder(name)
    values = {"image": image, "mask": mask if with_mask else None, "strength": 0.6, "size": "48x24"}
    made = render(load(folder), recipes(folder, steps=4, **values))
    assert [picture.size for picture in made] == [(48, 24)] * 3


def test_a_negative_prompt_that_does_nothing_is_refused(tiny_sd: Path) -> None:
    """A network with the guidance scale as an input (LCM) makes one call a step: the pipeline
    drops the negative prompt without a word."""
    model = with_channels(tiny_sd, 4, 4, time_cond_proj_dim=8)
    request = Request(prompts=("a",), model=str(tiny_sd), steps=2)
    assert render(model, plan(request, model))[0].size == (32, 32)
    with pytest.raises(UserError, match="--negative: does nothing with .*told the guidance"):
        plan(dataclasses.replace(request, negative="b"), model)


def test_the_models_own_scheduler_comes_back(tiny_sd: Path) -> None:
    model = load(tiny_sd)
    own = model.pipeline().scheduler
    render(model, recipes(tiny_sd, scheduler="euler")[:1], "pt")
    assert model.pipeline().scheduler is own


def test_size_rules_come_from_the_configs(tiny_folder: Folder) -> None:
    rule = size_rule(load(tiny_folder("sd")))
    assert (rule.native, rule.multiple, rule.largest) == ((32, 32), 8, None)
    # SD3 has a table of positions: 96 patches of 2 latents of 2 pixels.
    assert size_rule(load(tiny_folder("sd3"))).largest == 384
    with pytest.raises(UserError, match="nearest sizes are 32x32 or 40x40"):
        recipes(tiny_folder("sd"), size="36")
    with pytest.raises(UserError, match="at most 384"):
        recipes(tiny_folder("sd3"), size="512")


def test_the_digest_sees_one_weight_and_the_scheduler(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    first = weights_digest(model)
    assert first == weights_digest(LatentDiffusion.load(tiny_sd))
    weight = next(model.denoiser.model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    second = weights_digest(model)
    assert second != first
    model.pipeline().scheduler.register_to_config(timestep_spacing="trailing")
    assert weights_digest(model) != second


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipes(tiny_sd, num=3)
    sizes = []

    def make(batch: Sequence[Recipe]) -> list[Image.Image]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Image.new("RGB", (1, 1))] * len(batch)

    assert [recipe for recipe, _ in in_batches(made, 8, make)] == made
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    assert "going on with 2" in capsys.readouterr().err


def test_one_picture_that_does_not_fit_ends_the_run(tiny_sd: Path) -> None:
    def make(batch: Sequence[Recipe]) -> list[Image.Image]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunFailed, match="one picture of 32x32"):
        list(in_batches(recipes(tiny_sd), 2, make))


def test_strength_and_steps_must_leave_a_step() -> None:
    check_strength(0.5, 2)
    with pytest.raises(UserError, match="--steps 10 or more"):
        check_strength(0.1, 9)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        check_strength(1.5, 9)


def test_devices_and_dtypes() -> None:
    assert choose_dtype("bf16", "cpu") is torch.bfloat16
    with pytest.raises(UserError, match="not on a CPU"):
        choose_dtype("fp16", "cpu")
    with pytest.raises(UserError, match="--device tpu"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            choose_device("cuda")


@pytest.mark.parametrize("with_image", [False, True])
def test_bf16_runs_and_stays_bf16(tiny_sdxl: Path, tmp_path: Path, with_image: bool) -> None:
    """Another stock pipeline over the same weights must not turn them into float32."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in.png")
    image = tmp_path / "in.png" if with_image else None
    model = LatentDiffusion.load(tiny_sdxl, dtype=torch.bfloat16)
    request = Request(prompts=("a",), model=str(tiny_sdxl), steps=2, dtype="bf16", image=image)
    assert render(model, plan(request, model))[0].size == (32, 32)
    assert {p.dtype for part in model.networks.values() for p in part.parameters()} == {
        torch.bfloat16
    }


def test_a_prompt_that_is_cut_is_named(tiny_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes(tiny_sd, prompts=("a", "x" * 40))
    errors = capsys.readouterr().err
    assert errors.count("warning") == 1
    assert "reads 12 of the 42 tokens of 'xxxx" in errors


def test_sd3_cuts_long_prompts_where_its_pipeline_does(
    tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T5's tokenizer says 512, or here 12, but the pipeline reads 256 of its tokens."""
    prompt = "the sea " * 40
    recipes(tiny_sd3, prompts=(prompt,))
    assert "tokenizer_3 reads 256 of the" in capsys.readouterr().err
    recipes(tiny_sd3, prompts=("the sea " * 5,))
    assert "tokenizer_3" not in capsys.readouterr().err
