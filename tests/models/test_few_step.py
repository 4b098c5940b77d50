"""Few-step models: stock schedulers, the guidance embedding, and sampling as stock pipelines do."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
)

from diffkit.errors import UserError
from diffkit.models.families.unet import guidance_embedding
from diffkit.models.few_step import (
    consistency_scheduler,
    frozen_teacher,
    one_step,
    phased_scheduler,
    with_guidance_embedding,
)
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample

PROMPTS = ["a red fox", "a tree"]


def noise_of(model: LatentDiffusion, seed: int = 0) -> torch.Tensor:
    shape = (2, *model.latent_shape(32, 32))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- schedulers ---------------------------------------------------------------------------------


def test_the_scheduler_keeps_the_noise_schedule(tiny_folder: Callable[[str], Path]) -> None:
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    before = model.schedule.alpha_sigma(torch.arange(1000))
    scheduler = consistency_scheduler(model, 50)
    assert isinstance(scheduler, LCMScheduler)
    config = scheduler.config
    assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"
    assert not config.clip_sample and config.timestep_scaling == 10
    model.set_scheduler(scheduler)
    assert model.schedule.consistency and model.schedule.zero_terminal_snr
    after = model.schedule.alpha_sigma(torch.arange(1000))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.denoiser.schedule is model.schedule


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_sampling_times(tiny_sd: Path, steps: int, times: list[int]) -> None:
    model = LatentDiffusion.load(tiny_sd)
    model.set_scheduler(consistency_scheduler(model, 50))
    assert model.schedule.sampling_timesteps(steps).tolist() == [*times, -1]
    with pytest.raises(UserError, match="51 steps; this model has 1 to 50"):
        model.schedule.sampling_timesteps(51)


def test_times_of_a_flow_are_shifted_once(tiny_sd3: Path) -> None:
    model = LatentDiffusion.load(tiny_sd3)
    model.set_scheduler(consistency_scheduler(model, 50))
    times = model.schedule.sampling_timesteps(4).tolist()
    assert times == pytest.approx([1000, 900, 750, 500, 0], abs=1e-3)
    own = consistency_scheduler(model, 50)
    own.set_timesteps(4)
    assert own.sigmas[3].item() < 0.01  # what the class would do by itself


def test_edm_models_have_none(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="EDM"):
        consistency_scheduler(LatentDiffusion.load(tiny_folder("sdxl-edm")), 50)


def test_the_scheduler_of_segments_ends_at_x0(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    model.set_scheduler(phased_scheduler(model))
    assert model.schedule.sampling_timesteps(2).tolist() == [999, 499, -1]
    alpha, sigma = model.schedule.alpha_sigma(torch.tensor([499, -1]))
    assert (alpha[1].item(), sigma[1].item()) == (1, 0) and not model.schedule.consistency


def test_a_student_of_pixels_is_sampled_by_its_scheduler(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """`DDIMPipeline` makes any scheduler one of DDIM, also when the student is loaded again."""
    model = LatentDiffusion.load(tiny_folder("pixel-ddim"))
    model.set_scheduler(consistency_scheduler(model, 50))
    folder = model.save(tmp_path / "student")
    assert LatentDiffusion.load(folder).schedule.consistency
    stock = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(stock, DDPMPipeline) and isinstance(stock.scheduler, LCMScheduler)
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "output_type": "pt", "batch_size": 2}
    pictures = stock(generator=torch.Generator().manual_seed(3), **options).images
    fresh, cond = torch.Generator().manual_seed(3), model.conditioner.encode(["", ""])
    noise = torch.randn((2, 3, 32, 32), generator=fresh)
    ours = sample(model.denoiser, noise, cond, steps=4, fresh=stepwise(fresh, noise.shape))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), pictures, rtol=1e-4, atol=1e-4)


def test_nothing_is_said_of_what_is_right(tiny_folder: Callable[[str], Path]) -> None:
    """diffusers warned of the scheduler's config and of the teacher's dtype in every run."""
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    with unittest.TestCase().assertNoLogs("diffusers", "WARNING"):
        model.set_scheduler(consistency_scheduler(model, 50))
        teacher = frozen_teacher(model, torch.bfloat16)
    assert teacher.dtype == torch.bfloat16 and model.dtype == torch.float32


# -- guidance embedding -------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_embedding_changes_nothing(tiny_folder: Callable[[str], Path]) -> None:
    """student == teacher at the start, whatever scale it is told; without zeros it is not."""
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    z, t = noise_of(model), torch.tensor([999, 19])
    cond = model.conditioner.encode(PROMPTS)
    want = model.denoiser(z, t, cond)
    student = with_guidance_embedding(model)
    told = torch.tensor([1.0, 14.3])
    assert torch.equal(student.denoiser(z, t, cond, told), want)
    assert student.family.takes_guidance and not model.family.takes_guidance
    assert student.codec is not None and student.networks["vae"] is model.networks["vae"]
    assert student.denoiser.model.config.time_cond_proj_dim == 256  # type: ignore[union-attr]
    other = with_guidance_embedding(model, zero=False)
    assert not torch.equal(other.denoiser(z, t, cond, told), want)
    teacher = frozen_teacher(other, torch.float32, drop_embedding=True)
    assert torch.equal(teacher(z, t, cond), want)
    assert "cfg" in teacher.family.capabilities
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(UserError, match="has a guidance embedding already"):
        with_guidance_embedding(student)


def test_only_unets_have_the_input(tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match="Stable Diffusion 3 networks have no input"):
        with_guidance_embedding(LatentDiffusion.load(tiny_sd3))


def test_the_embedding_is_the_pipelines(tiny_sd: Path) -> None:
    model = with_guidance_embedding(LatentDiffusion.load(tiny_sd))
    w = torch.tensor([0.0, 0.5, 7.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        model.pipeline(),
        w,
        embedding_dim=256,
    )
    ours = guidance_embedding(model.denoiser.model, w + 1, torch.float32)
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


# -- sampling -----------------------------------------------------------------------------------


def stepwise(generator: torch.Generator, shape: Any) -> Callable[[int], torch.Tensor]:
    return lambda step: torch.randn(shape, generator=generator)


@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_is_the_stock_pipelines(tiny_folder: Callable[[str], Path], steps: int) -> None:
    """With the student's embedding, through StableDiffusionPipeline and LCMScheduler."""
    model = with_guidance_embedding(LatentDiffusion.load(tiny_folder("sd-v")), zero=False)
    model.set_scheduler(consistency_scheduler(model, 50))
    noise = noise_of(model)
    arguments = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    pipeline: Any = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(PROMPTS, latents=noise.clone(), generator=generator, **arguments).images
    fresh = stepwise(torch.Generator().manual_seed(5), noise.shape)
    cond = model.conditioner.encode(PROMPTS)
    ours = sample(model.denoiser, noise, cond, steps=steps, guidance_scale=3.0, fresh=fresh)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    if steps == 1:
        t, told = torch.full((2,), 999), torch.full((2,), 3.0)
        with torch.no_grad():
            once = one_step(model.denoiser, noise, cond, t, told)
        torch.testing.assert_close(once, stock, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="fresh noise"):
            sample(model.denoiser, noise, cond, steps=steps)


@torch.no_grad()
def test_sampling_of_a_flow_is_the_stock_schedulers(tiny_sd3: Path) -> None:
    model = LatentDiffusion.load(tiny_sd3)
    scheduler = consistency_scheduler(model, 50)
    model.set_scheduler(scheduler)
    noise, cond = noise_of(model), model.conditioner.encode(PROMPTS)
    fresh = stepwise(torch.Generator().manual_seed(5), noise.shape)
    ours = sample(model.denoiser, noise, cond, steps=2, fresh=fresh)
    scheduler.set_timesteps(2, sigmas=[1.0, 0.5])
    z, generator = noise, torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        output = model.denoiser(z, t.expand(2), cond)
        z = scheduler.step(output, t, z, generator=generator).prev_sample
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)
