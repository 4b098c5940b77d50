"""Losses of a scene: what they pull on latents, against direct computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection import scene_losses as losses
from diffkit.protection.scene import Scene
from tests.protection.attacks import Exact, linear, scene_of

Loader = Callable[[str], LatentDiffusion]

FAMILIES = ["sd", "sd-v", "sdxl", "sd3", "flux", "pixart-alpha", "dit", "sdxl-edm"]


def pull(scene: Scene, loss: losses.Loss) -> Tensor:
    """The gradient in the moments."""
    (g,) = torch.autograd.grad(loss(scene).sum(), scene.moments)
    return g


def cotangent(scene: Scene, loss: losses.Loss) -> Tensor:
    """The gradient in z: that in mu over the scale of the latents."""
    z = scene.z
    (unit,) = torch.autograd.grad(z.sum(), scene.moments)
    c = scene.surrogate.codec.channels
    return pull(scene, loss)[:, :c] / unit[:, :c]


def close(a: Tensor, b: Tensor, rel: float = 1e-5) -> bool:
    return bool((a - b).norm() <= rel * b.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_perfect_denoiser_has_no_loss_and_no_residual(tiny_model: Loader, name: str) -> None:
    scene = scene_of(tiny_model(name), [0.3, 0.8])
    network = scene.surrogate.network
    perfect = Exact(network.model, network.family, network.schedule)
    z = scene.z.detach()
    perfect.answer = scene.native_target(z)
    scene = replace(scene, surrogate=replace(scene.surrogate, denoiser=perfect))
    assert losses.semantic(scene).detach().max() < 1e-10
    residual = scene.predict(z).eps - scene.noise[1]
    assert residual.abs().max() < 1e-5 * max(1.0, float(z.abs().max()))


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3", "flux"])
def test_the_residual_of_the_noise_in_every_parametrisation(tiny_model: Loader, name: str) -> None:
    """r = eps_hat - eps; v: alpha_t (v_hat - v); flow: (1 - sigma)(v_hat - v)."""
    scene = scene_of(tiny_model(name), [0.3, 0.8])
    schedule = scene.surrogate.schedule
    t, eps = scene.noise
    z = scene.z.detach()
    with torch.no_grad():
        output, _ = scene.output(z)
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in schedule.alpha_sigma(t))
    direct = {
        "epsilon": output - eps,
        "v_prediction": alpha * (output - (alpha * eps - sigma * z)),
        "velocity": (1 - sigma) * (output - (eps - z)),
    }[schedule.prediction_type]
    assert close(cotangent(scene, losses.sds), direct)
    assert close(cotangent(scene, losses.negative(losses.sds)), -direct)


@pytest.mark.parametrize("name", ["sd-v", "sd3", "flux"])
def test_the_target_keeps_its_gradient(tiny_model: Loader, name: str) -> None:
    """dL/dz has (alpha J_v + sigma I)^T where v depends on z: with a target held fixed about half
    of the pixels would move the wrong way."""
    scene = scene_of(tiny_model(name), [0.3, 0.8])
    t, eps = scene.noise
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in scene.surrogate.schedule.alpha_sigma(t))
    z = scene.z.detach().requires_grad_()
    output, _ = scene.output(z)
    target = alpha * eps - sigma * z if name == "sd-v" else eps - z
    through = (output - target).square().flatten(1).mean(1).sum()
    held = (output - target.detach()).square().flatten(1).mean(1).sum()
    (right,) = torch.autograd.grad(through, z, retain_graph=True)
    (wrong,) = torch.autograd.grad(held, z)
    found = cotangent(scene, losses.semantic)
    assert close(found, right)
    assert not close(found, wrong, 0.1)


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3", "flux", "dit"])
@pytest.mark.parametrize("loss", [losses.sds, losses.sdst, losses.sdst_minus])
def test_score_distillation_runs_the_denoiser_without_a_graph(
    tiny_model: Loader, name: str, loss: losses.Loss
) -> None:
    scene = scene_of(tiny_model(name), target=True)
    seen: list[tuple[bool, bool, bool]] = []

    def look(module: Any, args: Any, named: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output.sample
        inputs = [x for x in (*args, *named.values()) if torch.is_tensor(x)]
        wanted = any(x.requires_grad for x in inputs)
        seen.append((torch.is_grad_enabled(), wanted, first.requires_grad))

    network = scene.surrogate.network.model
    hook = network.register_forward_hook(look, with_kwargs=True)
    try:
        g = pull(scene, loss)
    finally:
        hook.remove()
    assert seen == [(False, False, False)]
    assert g.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_cotangents_of_sdst_by_hand(tiny_model: Loader, name: str) -> None:
    """-+w_r r - 2 (z - z_T), with w_r = 5 or what the scene says; w_r does not depend on N."""
    scene = scene_of(tiny_model(name), target=True)
    r = cotangent(scene, losses.sds)
    pulled = -2 * (scene.z - scene.target_z).detach()
    assert close(cotangent(scene, losses.sdst_minus), -5 * r + pulled)
    assert close(cotangent(scene, losses.sdst), 5 * r + pulled)
    once = replace(scene, residual_weight=1.0)
    assert close(cotangent(once, losses.sdst_minus), -r + pulled)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_score_of_sdst_is_its_scalar(tiny_model: Loader, sign: int) -> None:
    """+-w_r (N/2) L_S - sum (z - z_T)^2."""
    scene = scene_of(tiny_model("sd"), target=True).detached()
    n = scene.z[0].numel()
    value = losses.sdst_score(sign)(scene)
    expected = sign * 5 * n / 2 * losses.semantic(scene) + losses.texture(scene)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("c", [0.7, -0.7])
def test_the_short_gradient_against_the_exact_one_on_a_toy(tiny_model: Loader, c: float) -> None:
    """For eps_hat = c z_t the exact cotangent is (2/N) c alpha_t r: SDS is its sign at c > 0 and
    its opposite at c < 0."""
    scene = scene_of(tiny_model("sd"), [0.3, 0.8])
    toy = linear(scene.surrogate.network, c)
    scene = replace(scene, surrogate=replace(scene.surrogate, denoiser=toy))
    t, _ = scene.noise
    alpha = scene.surrogate.schedule.alpha_sigma(t)[0].view(-1, 1, 1, 1)
    r = cotangent(scene, losses.sds)
    exact = cotangent(scene, losses.semantic)
    assert close(exact, 2 / scene.z[0].numel() * c * alpha * r)
    assert torch.equal(exact.sign(), r.sign() * (1 if c > 0 else -1))


def test_targets_by_hand(tiny_model: Loader) -> None:
    scene = scene_of(tiny_model("sd3"), target=True).detached()
    assert scene.target is not None
    codec, config = scene.surrogate.codec, scene.surrogate.codec.vae.config
    mu, mu_t = scene.moments[:, : codec.channels], scene.target[:, : codec.channels]
    z, z_t = ((m - config.shift_factor) * config.scaling_factor for m in (mu, mu_t))
    torch.testing.assert_close(scene.z, z)
    far = (z - z_t).square().flatten(1)
    torch.testing.assert_close(losses.texture(scene), -far.sum(1))
    torch.testing.assert_close(losses.photoguard(scene), -(mu - mu_t).square().flatten(1).sum(1))
    semantic = losses.semantic(scene)
    torch.testing.assert_close(losses.mist(scene), 1e4 / 16384 * semantic - far.mean(1))
    torch.testing.assert_close(losses.ace_plus(scene), losses.ace(scene) - 100 * far.mean(1))


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3"])
def test_ace_pulls_the_output_or_the_noise(tiny_model: Loader, name: str) -> None:
    """For flow n_hat = z_t + (1 - sigma) v_hat, for v alpha v_hat + sigma z_t; the same thing as
    the output in a model that predicts the noise."""
    scene = scene_of(tiny_model(name), [0.3, 0.8], target=True).detached()
    t, eps = scene.noise
    alpha, sigma = (x.view(-1, 1, 1, 1) for x in scene.surrogate.schedule.alpha_sigma(t))
    with torch.no_grad():
        native, noised = losses.ace(scene), losses.ace(replace(scene, output_kind="eps"))
        output, z_t = scene.output(scene.z)
    torch.testing.assert_close(z_t, alpha * scene.z + sigma * eps)
    hat = {"sd": output, "sd-v": alpha * output + sigma * z_t, "sd3": z_t + (1 - sigma) * output}
    for value, pulled in ((native, output), (noised, hat[name])):
        distance = (pulled - scene.target_z).square().flatten(1).mean(1)
        torch.testing.assert_close(value, -distance)
    assert torch.equal(native, noised) == (name == "sd")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_flow_network_is_told_the_sigma_that_mixed_its_input(
    tiny_model: Loader, name: str
) -> None:
    """SD3's transformer is told 1000 sigma, Flux's sigma, of the sigma in z_t; at the noisy end z_t
    is the noise alone. Mist-X looked the two up in tables of opposite order."""
    scene = scene_of(tiny_model(name), [0.37, 1.0]).detached()
    told: list[Tensor] = []
    network = scene.surrogate.network.model
    hook = network.register_forward_pre_hook(
        lambda module, args, named: told.append(named["timestep"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            _, z_t = scene.output(scene.z)
    finally:
        hook.remove()
    t, eps = scene.noise
    # how much of the noise is in z_t, from z_t itself
    sigma = [
        float(torch.linalg.lstsq((n - z).reshape(-1, 1), (mixed - z).reshape(-1, 1)).solution)
        for z, n, mixed in zip(scene.z, eps, z_t, strict=True)
    ]
    unit = 1000 if name == "sd3" else 1
    torch.testing.assert_close(told[0].float(), unit * torch.tensor(sigma), rtol=1e-4, atol=1e-4)
    assert t[1] == 1000
    torch.testing.assert_close(z_t[1], eps[1], rtol=0, atol=0)


def test_the_last_time_of_a_rescaled_schedule_is_pure_noise(tiny_model: Loader) -> None:
    scene = scene_of(tiny_model("sd-v"), [0.9995, 0.9995]).detached()
    t, eps = scene.noise
    assert t.tolist() == [999, 999]
    with torch.no_grad():
        torch.testing.assert_close(scene.output(scene.z)[1], eps, rtol=0, atol=1e-4)
    assert not losses.sds(scene).isnan().any()
