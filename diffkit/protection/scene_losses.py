"""Losses of a `Scene`, all to be ascended: one function a method, (B,) values J.

L_S(z) = mean (f(z_t, t, c) - y)^2 is the denoising loss of the model's own parametrisation. The
targets y of v- and flow models depend on z and keep their gradient: with y held fixed the image
gradient has the wrong sign in about half of the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffkit.protection.losses import (
    ACE_PLUS_WEIGHT,
    MIST_WEIGHT,
    mean_square,
    moment_change,
    posterior_mean,
    score_distillation,
    sum_square,
)
from diffkit.protection.scene import Scene

__all__ = [
    "Loss",
    "ace",
    "ace_plus",
    "mist",
    "negative",
    "photoguard",
    "pid",
    "sds",
    "sdst",
    "sdst_minus",
    "sdst_score",
    "semantic",
    "targeted",
    "texture",
]

Loss = Callable[[Scene], Tensor]


def semantic(scene: Scene) -> Tensor:
    """+L_S: the denoising loss, with the whole Jacobian of the denoiser (AdvDM; Mist, semantic)."""
    z = scene.z
    output, _ = scene.output(z)
    return mean_square(output, scene.native_target(z))


def targeted(scene: Scene) -> Tensor:
    """L_S - mean (m(z_t, f) - noise(z_T, eps, t-1))^2 of a DDPM (T-FSMG, T-ASPL).

    m is the posterior mean of z at t-1 (`losses.posterior_mean`), and the noised target has the eps
    of z_t itself (Van Le et al. 2023, arXiv:2303.15433). The noise that a sampler adds
    to m is left out. t = 0, which has no time below it, is taken for 1.
    """
    assert scene.t is not None
    scene = replace(scene, t=scene.t.clamp_min(1))
    z, schedule, (t, eps) = scene.z, scene.surrogate.schedule, scene.noise
    output, z_t = scene.output(z)
    x0 = schedule.prediction(output, z_t, t).x0
    mean = posterior_mean(x0, z_t, schedule.alpha_sigma(t), schedule.alpha_sigma(t - 1))
    wanted = schedule.add_noise(scene.target_z.expand_as(eps), eps, t - 1)
    return mean_square(output, scene.native_target(z)) - mean_square(mean, wanted)


def photoguard(scene: Scene) -> Tensor:
    """-sum (mu - mu_T)^2 on the encoder's unscaled mean."""
    return -sum_square(scene.mean, scene.target_mean)


def texture(scene: Scene) -> Tensor:
    """-sum (z - z_T)^2."""
    return -sum_square(scene.z, scene.target_z)


def mist(scene: Scene) -> Tensor:
    """0.61 L_S - mean (z - z_T)^2."""
    return MIST_WEIGHT * semantic(scene) - mean_square(scene.z, scene.target_z)


def _residual_term(scene: Scene, z: Tensor) -> Tensor:
    """The scalar whose gradient in z is the residual of the noise; no graph in the denoiser."""
    with torch.no_grad():
        residual = scene.predict(z.detach()).eps - scene.noise[1]
    return score_distillation(z, residual)


def sds(scene: Scene) -> Tensor:
    """Cotangent +r on z."""
    return _residual_term(scene, scene.z)


def sdst(scene: Scene) -> Tensor:
    """Cotangent +w_r r - 2 (z - z_T) on z."""
    z = scene.z
    return scene.residual_weight * _residual_term(scene, z) - sum_square(z, scene.target_z)


def sdst_minus(scene: Scene) -> Tensor:
    """Cotangent -w_r r - 2 (z - z_T) on z."""
    z = scene.z
    return -scene.residual_weight * _residual_term(scene, z) - sum_square(z, scene.target_z)


def sdst_score(sign: float) -> Loss:
    """+-w_r (N/2) L_S - sum (z - z_T)^2, of which SDST's cotangent is the gradient, nearly."""

    def score(scene: Scene) -> Tensor:
        half = sign * scene.residual_weight * scene.z[0].numel() / 2
        return half * semantic(scene) - sum_square(scene.z, scene.target_z)

    return score


def ace(scene: Scene) -> Tensor:
    """-mean (f - z_T)^2: the network's output, or its noise, is pulled to a picture's latents."""
    output, z_t = scene.output(scene.z)
    if scene.output_kind == "eps":
        output = scene.surrogate.schedule.prediction(output, z_t, scene.noise[0]).eps
    return -mean_square(output, scene.target_z)


def ace_plus(scene: Scene) -> Tensor:
    """-mean (f - z_T)^2 - 100 mean (z - z_T)^2."""
    return ace(scene) - ACE_PLUS_WEIGHT * mean_square(scene.z, scene.target_z)


def pid(scene: Scene) -> Tensor:
    """mean (mu - mu_0)^2 + mean (log var - log var_0)^2."""
    assert scene.start is not None
    return moment_change(scene.moments, scene.start, scene.surrogate.codec.channels)


def negative(loss: Loss) -> Loss:
    """-J."""

    def negated(scene: Scene) -> Tensor:
        return -loss(scene)

    return negated
