"""EDM: the schedule, the preconditioned network and its training, beside diffusers' schedulers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    LDMPipeline,
)

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.models.schedule import Schedule
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective, denoising_loss
from diffkit.randomness import normal
from tests.models.test_families import PROMPTS, ours, stock
from tests.objectives.test_denoising import losses, make_batch
from tests.tiny_labels import unet2d, vqvae

CONFIGS = [
    {},
    {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0},
    {"sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"},
]


def levels(schedule, t):
    """sigma_t as (B, 1, 1, 1)."""
    return schedule.alpha_sigma(t)[1].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("steps", [3, 25])
def test_euler_steps_equal_diffusers(config, steps):
    """Every z along the way, from the same noise and the same outputs of F."""
    stock = EDMEulerScheduler(**config)
    schedule = Schedule.from_scheduler(stock)
    stock.set_timesteps(steps)
    times = schedule.sampling_timesteps(steps)
    assert torch.equal(times[:-1], stock.timesteps)
    noise = normal((2, 4, 8, 8), 1, "start")
    ours, theirs = schedule.init_noise_sigma * noise, stock.init_noise_sigma * noise
    assert schedule.init_noise_sigma == pytest.approx(stock.config.sigma_max, rel=1e-3)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        scaled = stock.scale_model_input(theirs, t)
        assert torch.allclose(schedule.scale_input(ours, t.expand(2)), scaled, atol=1e-4)
        output = normal((2, 4, 8, 8), 1, "output", i) + 0.1 * scaled
        theirs = stock.step(output, t, theirs).prev_sample
        ours = schedule.step(schedule.prediction(output, ours, t.expand(2)), s)
        # t = ln(sigma) / 4 in float32 keeps seven digits of a sigma of 80
        assert torch.allclose(ours, theirs, atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_times_equal_those_of_the_multistep_solver(config):
    stock = EDMDPMSolverMultistepScheduler(**config)
    stock.set_timesteps(7)
    times = Schedule.from_scheduler(stock).sampling_timesteps(7)
    assert torch.equal(times[:-1], stock.timesteps)
    end = config.get("final_sigmas_type") == "sigma_min"
    expected = math.log(0.002) / 4 if end else -math.inf
    assert times[-1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_preconditioning_equals_diffusers(config):
    """c_in, c_noise, and D = c_skip z + c_out F of `precondition_outputs`."""
    stock = EDMEulerScheduler(**config)
    schedule = Schedule.from_scheduler(stock)
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0])
    t = stock.precondition_noise(sigma)
    z_t, output = normal((4, 3, 8, 8), 2, "z"), normal((4, 3, 8, 8), 2, "F")
    wide = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(levels(schedule, t), wide)
    torch.testing.assert_close(schedule.scale_input(z_t, t), stock.precondition_inputs(z_t, wide))
    expected = stock.precondition_outputs(z_t, output, wide)
    torch.testing.assert_close(schedule.prediction(output, z_t, t).x0, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_target_and_the_weight_of_the_paper(config):
    """The loss on F is EDM's loss on D: weight (sigma^2 + s^2) / (sigma s)^2 of |D - x0|^2."""
    schedule = Schedule.from_scheduler(EDMEulerScheduler(**config))
    s = schedule.sigma_data
    t = schedule.train_timesteps(torch.tensor([0.02, 0.3, 0.6, 0.99]))
    x0, eps = s * normal((4, 3, 8, 8), 3, "x0"), normal((4, 3, 8, 8), 3, "eps")
    sigma = levels(schedule, t)
    z_t, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    torch.testing.assert_close(z_t, x0 + sigma * eps)
    assert target.std() == pytest.approx(1.0, abs=0.05), "F has unit variance at every level"
    output = normal((4, 3, 8, 8), 3, "F")
    denoised = schedule.prediction(output, z_t, t).x0
    weight = ((sigma**2 + s**2) / (sigma * s) ** 2).flatten()
    expected = weight * (denoised - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(denoising_loss(output, target), expected, rtol=1e-3, atol=1e-5)


def test_training_times_are_log_normal():
    schedule = Schedule.from_scheduler(EDMEulerScheduler())
    u = (torch.arange(20_000) + 0.5) / 20_000
    logs = schedule.alpha_sigma(schedule.train_timesteps(u))[1].log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert logs.std().item() == pytest.approx(1.2, abs=2e-3)
    other = 4 * schedule.train_timesteps(u, "log_normal", mean=-0.4, std=1.0)
    assert other.mean().item() == pytest.approx(-0.4, abs=1e-3)
    for density in ("uniform", "logit_normal"):
        with pytest.raises(UserError, match="'log_normal'"):
            schedule.train_timesteps(u, density)
    with pytest.raises(UserError, match="'log_normal' is not for ddpm models; use 'uniform'"):
        Schedule.from_scheduler(DDPMScheduler()).train_timesteps(u, "log_normal")


def test_places_and_ends():
    schedule = Schedule.from_scheduler(EDMEulerScheduler())
    t = torch.log(torch.tensor([0.0, 0.002, 0.4, 80.0, 1000.0])) / 4
    assert schedule.place(t).tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)
    alpha, sigma = schedule.alpha_sigma(t)
    assert (alpha == 1).all() and sigma[0] == 0
    assert schedule.density == "log_normal" and not schedule.zero_terminal_snr
    assert schedule.snr(t[2:3]).item() == pytest.approx(1 / 0.16, rel=1e-5)


def test_what_has_no_edm_form_is_refused():
    with pytest.raises(UserError, match="no 'sample' prediction"):
        Schedule.from_scheduler(EDMDPMSolverMultistepScheduler(prediction_type="sample"))


def test_an_unfit_time_embedding_is_refused(tmp_path):
    from diffusers import DDPMPipeline

    unet = unet2d(time_embedding_type="fourier")
    DDPMPipeline(unet, EDMEulerScheduler()).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="'fourier'"):
        LatentDiffusion.load(tmp_path / "m")


@pytest.mark.parametrize("name", ["sdxl-edm", pytest.param("sdxl-edm-v", marks=pytest.mark.slow)])
def test_sdxl_equals_the_stock_pipeline(tiny_folder, tmp_path, name):
    """As Playground v2.5: EDM's preconditioning around SDXL's U-Net, statistics of the latents."""
    model = LatentDiffusion.load(tiny_folder(name))
    assert model.schedule.prediction_type == name.removeprefix("sdxl-").replace("-", "_")
    noise = normal((2, *model.latent_shape(32, 32)), 0, name)
    images = ours(model, noise)
    assert images.std() > 0.02
    model.save(tmp_path / "saved")

    def euler(pipeline):
        pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
        return stock(pipeline, noise)

    assert (images - euler(model.pipeline())).abs().max() < 1e-4
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert isinstance(plain.scheduler, EDMDPMSolverMultistepScheduler)
    assert (images - euler(plain)).abs().max() < 1e-4
    assert (images - ours(LatentDiffusion.load(tmp_path / "saved"), noise)).abs().max() < 1e-6


def test_bfloat16_networks_see_scaled_inputs(tiny_folder):
    model = LatentDiffusion.load(tiny_folder("sdxl-edm"), dtype=torch.bfloat16)
    cond = model.conditioner.encode(PROMPTS, (32, 32))
    latents = sample(model.denoiser, normal((2, 4, 16, 16), 0, "n"), cond, steps=3)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    exact = LatentDiffusion.load(tiny_folder("sdxl-edm"))
    z_t, t = 80 * normal((2, 4, 16, 16), 0, "n"), torch.full((2,), math.log(80) / 4)
    with torch.no_grad():
        rough, fine = (m.denoiser.predict(z_t, t, cond) for m in (model, exact))
    assert (rough.x0 - fine.x0).abs().max() < 0.1


@pytest.mark.parametrize("name", ["sdxl-edm", "pixel-edm", "pixel-class-edm"])
def test_training_draws_losses_and_gradients(tiny_folder, name):
    model = LatentDiffusion.load(tiny_folder(name))
    objective = DenoisingObjective(model, DenoisingConfig())
    assert objective.config.density == "log_normal"
    objective.place(torch.device("cpu"))
    batch = make_batch(4, labels=torch.arange(4))
    terms = losses(objective, batch)
    assert (terms["time"] >= 0).all() and (terms["time"] <= 1).all()
    sigma = model.schedule.alpha_sigma(objective.draw(batch, 0).t)[1]
    assert ((sigma > 1e-4) & (sigma < 100)).all() and len(sigma.unique()) == 4
    terms["loss"].mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.denoiser.parameters())


def test_options_of_other_kinds_are_refused(tiny_folder, tiny_sd):
    model = LatentDiffusion.load(tiny_folder("pixel-edm"))
    with pytest.raises(UserError, match="not for edm"):
        DenoisingObjective(model, DenoisingConfig(min_snr=5.0))
    with pytest.raises(UserError, match="'uniform' is not for edm"):
        DenoisingObjective(model, DenoisingConfig(density="uniform"))
    with pytest.raises(UserError, match="log_mean, log_std: are for EDM"):
        DenoisingObjective(LatentDiffusion.load(tiny_sd), DenoisingConfig(log_mean=0.0))


def test_a_latent_unet_equals_the_stock_pipeline(tmp_path):
    """`LDMPipeline` scales noise and inputs, `DDPMPipeline` neither: pixels have no stock way."""
    torch.manual_seed(0)
    parts = {"vqvae": vqvae(), "unet": unet2d(), "scheduler": EDMEulerScheduler(sigma_data=1.0)}
    LDMPipeline(**parts).save_pretrained(tmp_path / "m")
    model = LatentDiffusion.load(tmp_path / "m")
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    made = pipeline(2, generator=seeds, num_inference_steps=4, output_type="np").images
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = torch.stack([torch.randn(model.latent_shape(32, 32), generator=g) for g in seeds])
    latents = sample(model.denoiser, noise, model.conditioner.encode(["", ""]), steps=4)
    with torch.no_grad():
        images = (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert images.std() > 0.02
    assert (images - torch.as_tensor(made).permute(0, 3, 1, 2)).abs().max() < 1e-4
