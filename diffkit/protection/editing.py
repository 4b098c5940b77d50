"""Attacks on whole edits: PhotoGuard's through a short sampler, DiffusionGuard's on its first step.

An inpainting model is given a mask, 1 where it paints, and the latents of the picture without that
region. Other models edit from a noised picture (SDEdit). Both read the picture through the
encoder's moments, so that the loop of all methods serves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from diffkit.errors import UserError
from diffkit.models.schedule import Prediction
from diffkit.protection.losses import sum_square
from diffkit.protection.scene import Scene

__all__ = ["GUIDANCE", "STEPS", "ancestral_step", "diffusion_guard", "photoguard_diffusion"]

STEPS = 4
"""Steps of the sampler that is unrolled (PhotoGuard's code)."""

GUIDANCE = 7.5
"""Classifier-free guidance of that sampler, where a prompt is given."""


def photoguard_diffusion(scene: Scene) -> Tensor:
    """-sum (x_out)^2: the edit's result is pulled to a grey picture (B,).

    x_out is the decoder's raw output after 4 DDIM steps with eta = 1 (Salman et al. 2023, section
    4.2: encoder and diffusion model attacked together, target zeros). An inpainting model starts
    from noise; others start from the noised picture at half strength, with the same 4 steps. Each
    call of the denoiser is recomputed in the backward pass. The squared norm has the same sign of
    the gradient for one draw and averages well over several.
    """
    schedule, z = scene.surrogate.schedule, scene.z
    inpaints = scene.surrogate.inpaints
    times = _times(scene, STEPS if inpaints else 2 * STEPS)[-STEPS - 1 :]
    noise = scene.normal(z.shape[1:], "edit").to(z)
    if inpaints:
        z_t, given = schedule.init_noise_sigma * noise, _given(scene, z)
    else:
        z_t, given = schedule.add_noise(z, noise, times[0].expand(len(z))), None
    for i in range(STEPS):
        t, s = times[i].expand(len(z)), times[i + 1].expand(len(z))
        fresh = scene.normal(z.shape[1:], f"edit step {i}").to(z)

        def step(
            z_t: Tensor,
            t: Tensor = t,
            s: Tensor = s,
            fresh: Tensor = fresh,
        ) -> Tensor:
            prediction = _guided(scene, z_t, t, given)
            return ancestral_step(scene, prediction, t, s, fresh)

        z_t = checkpoint(step, z_t, use_reentrant=False, preserve_rng_state=False)
    image = scene.surrogate.codec.decode(z_t, checkpoint="resnet")
    return -sum_square(image, torch.zeros_like(image))


def diffusion_guard(scene: Scene) -> Tensor:
    """||eps_hat(noise, t_0)||_2 at the first step of inpainting (B,); Choi et al. 2024, equation 5.

    The noise is pure, so the picture enters through the channels of the masked picture alone. t_0
    is the first time of a 4-step sampler (751 of 1000 where its times are spaced from the start).
    """
    schedule, z = scene.surrogate.schedule, scene.z
    t = _times(scene, STEPS)[0].expand(len(z))
    noise = schedule.init_noise_sigma * scene.normal(z.shape[1:], "edit").to(z)
    output = _raw(scene, noise, t, _given(scene, z))
    eps = schedule.prediction(output, noise, t).eps
    return eps.flatten(1).norm(dim=1)


def ancestral_step(
    scene: Scene, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor
) -> Tensor:
    """One DDIM step with eta = 1 (Song et al. 2021, equations 12 and 16), the DDPM posterior.

        z_s = alpha_s x0 + sqrt(sigma_s^2 - v^2) eps + v noise,
        v   = (sigma_s / sigma_t) sqrt(1 - (alpha_t / alpha_s)^2)

    On flow and EDM schedules, which have no such posterior here, it is the deterministic step.
    """
    schedule = scene.surrogate.schedule
    if schedule.kind != "ddpm":
        return schedule.step(prediction, s)
    alpha_t, sigma_t = (x.view(-1, 1, 1, 1) for x in schedule.alpha_sigma(t))
    alpha_s, sigma_s = (x.view(-1, 1, 1, 1) for x in schedule.alpha_sigma(s))
    variance = (sigma_s / sigma_t) ** 2 * (1 - (alpha_t / alpha_s) ** 2).clamp_min(0)
    kept = (sigma_s**2 - variance).clamp_min(0).sqrt()
    return alpha_s * prediction.x0 + kept * prediction.eps + variance.sqrt() * noise


def _times(scene: Scene, steps: int) -> Tensor:
    schedule = scene.surrogate.schedule
    mu = None
    if schedule.shifts_by_resolution:
        mu = schedule.mu(scene.surrogate.network.tokens(*scene.moments.shape[-2:]))
    return schedule.sampling_timesteps(steps, mu).to(scene.moments.device)


def _given(scene: Scene, z: Tensor) -> Tensor:
    """What an inpainting model gets beside z_t: the mask (1 paints) and z, (B, 1 + C, h, w)."""
    if not scene.surrogate.inpaints:
        raise UserError("this method is for inpainting models, whose denoiser takes a mask.")
    assert scene.keep is not None
    painted = 1 - interpolate(scene.keep, z.shape[-2:], mode="nearest")
    return torch.cat([painted.to(z), z], 1)


def _raw(scene: Scene, z_t: Tensor, t: Tensor, given: Tensor | None, empty: bool = False) -> Tensor:
    taken = z_t if given is None else torch.cat([z_t, given], 1)
    return scene.surrogate.output(taken, t, scene.sizes, empty)


def _guided(scene: Scene, z_t: Tensor, t: Tensor, given: Tensor | None) -> Prediction:
    """With the empty prompt guidance changes nothing, and is left out."""
    output = _raw(scene, z_t, t, given)
    if scene.surrogate.null is not None and scene.surrogate.prompted:
        without = _raw(scene, z_t, t, given, empty=True)
        output = without + GUIDANCE * (output - without)
    return scene.surrogate.schedule.prediction(output, z_t, t)
