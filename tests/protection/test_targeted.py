"""The targeted loss of FSMG and ASPL: the posterior mean, the target's noise, its first time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Schedule
from diffkit.protection import scene_losses as losses
from diffkit.protection.losses import posterior_mean
from tests.protection.attacks import Exact, scene_of

Loader = Callable[[str], LatentDiffusion]


def scheduler_of(prediction_type: str, zero_snr: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [1, 2, 500, 998, 999])
def test_the_posterior_mean_is_that_of_ddpm(kind: str, t: int) -> None:
    """diffusers' step without the noise that it adds, which is known from its generator."""
    scheduler = scheduler_of(kind)
    schedule = Schedule.from_scheduler(scheduler)
    output, z_t = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(t))
    step = scheduler.step(output, t, z_t, generator=torch.Generator().manual_seed(1)).prev_sample
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    mean = step - scheduler._get_variance(t) ** 0.5 * noise
    now = torch.full((2,), t)
    x0 = schedule.prediction(output, z_t, now).x0
    ours = posterior_mean(x0, z_t, schedule.alpha_sigma(now), schedule.alpha_sigma(now - 1))
    assert torch.allclose(ours, mean, atol=1e-4 * float(mean.abs().max()))


def test_the_posterior_mean_by_hand() -> None:
    """alpha_t^2 = .25, alpha_s^2 = .64: a = .625, beta = .75 - .390625 x .36 = .609375, and
    m = (.8 x .609375 x 2 + .625 x .36 x 4) / .75 = 2.5."""
    pair = [(torch.tensor([a]), torch.tensor([(1 - a * a) ** 0.5])) for a in (0.5, 0.8)]
    x0, z_t = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 4.0)
    assert float(posterior_mean(x0, z_t, *pair)) == pytest.approx(2.5)


def test_pure_noise_has_a_posterior_too() -> None:
    """At zero terminal signal a = 0 and beta = 1, so m = alpha_s x0."""
    schedule = Schedule.from_scheduler(scheduler_of("v_prediction", zero_snr=True))
    last = torch.tensor([999])
    now, before = schedule.alpha_sigma(last), schedule.alpha_sigma(last - 1)
    x0, z_t = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(posterior_mean(x0, z_t, now, before), before[0] * x0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_the_loss_is_the_denoising_loss_minus_the_way_to_the_target(
    tiny_model: Loader, name: str
) -> None:
    """With a perfect denoiser L_S = 0 and m is the posterior mean of the true z."""
    scene = scene_of(tiny_model(name), [0.4, 0.7], target=True)
    schedule, (t, eps) = scene.surrogate.schedule, scene.noise
    z = scene.z.detach()
    network = scene.surrogate.network
    exact = Exact(network.model, network.family, network.schedule)
    exact.answer = schedule.target(z, eps, t)
    perfect = replace(scene, surrogate=replace(scene.surrogate, denoiser=exact))
    assert float(losses.semantic(perfect).detach().abs().max()) < 1e-10
    z_t = schedule.add_noise(z, eps, t)
    mean = posterior_mean(z, z_t, schedule.alpha_sigma(t), schedule.alpha_sigma(t - 1))
    wanted = schedule.add_noise(scene.target_z.expand_as(eps), eps, t - 1)
    by_hand = -(mean - wanted).square().flatten(1).mean(1)
    assert torch.allclose(losses.targeted(perfect).detach(), by_hand, rtol=1e-4)
    plain = losses.targeted(scene) - losses.semantic(scene)
    assert (plain < 0).all()


def test_no_time_lies_before_the_first(tiny_model: Loader) -> None:
    """The released code noises the target at t - 1, and for t = 0 reads the last entry of the
    table, almost pure noise. Here t = 0 is taken for 1."""
    scene = scene_of(tiny_model("sd"), 0.4, target=True)

    def at(t: int) -> Tensor:
        return losses.targeted(replace(scene, t=torch.tensor([t, t])))

    assert torch.equal(at(0), at(1)) and not torch.equal(at(1), at(2))
    wanted = scene.surrogate.schedule.add_noise(
        scene.target_z.expand_as(scene.z), scene.noise[1], torch.tensor([0, 0])
    )
    # the target at time 0 is nearly clean
    assert float((wanted - scene.target_z).abs().mean()) < 0.05


def test_the_gradient_reaches_the_picture(tiny_model: Loader) -> None:
    scene = scene_of(tiny_model("sd-v"), 0.5, target=True)
    (g,) = torch.autograd.grad(losses.targeted(scene).sum(), scene.moments)
    assert (g.flatten(1).abs().sum(1) > 0).all()
