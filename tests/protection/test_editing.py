"""Attacks on whole edits: the unrolled sampler against diffusers, guidance, masks, first steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.editing import ancestral_step, diffusion_guard, photoguard_diffusion
from diffkit.protection.protect import check_mask, check_model
from diffkit.protection.scene import Scene
from diffkit.protection.settings import Settings
from diffkit.protection.surrogate import Surrogate
from diffkit.randomness import normal
from tests.protection.attacks import R, hole, scene_of

Loader = Callable[[str], LatentDiffusion]


def told(model: LatentDiffusion, scene: Scene, prompt: str, keep: Tensor | None = None) -> Scene:
    return replace(scene, surrogate=Surrogate.of(model, prompt), keep=keep)


def calls_of(scene: Scene, run: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    """(input, time) of every call of the network."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: Any, args: Any, named: Any) -> None:
        named = dict(zip(("sample", "timestep"), args, strict=False)) | named
        seen.append((named["sample"].detach(), torch.as_tensor(named["timestep"])))

    hook = scene.surrogate.network.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_a_step_is_that_of_ddim_with_eta_one(
    tiny_model: Loader, tiny_folder: Callable[[str], Path], name: str
) -> None:
    model = tiny_model(name)
    scene = scene_of(model).detached()
    schedule = model.schedule
    theirs = DDIMScheduler.from_pretrained(tiny_folder(name), subfolder="scheduler")
    theirs.set_timesteps(4)
    times = schedule.sampling_timesteps(4)
    z_t, output = normal((2, 4, 8, 8), "z"), normal((2, 4, 8, 8), "output")
    for i in range(4):
        noise = normal((2, 4, 8, 8), "noise", i)
        t, s = times[i].expand(2), times[i + 1].expand(2)
        prediction = schedule.prediction(output, z_t, t)
        ours = ancestral_step(scene, prediction, t, s, noise)
        expected = theirs.step(output, times[i], z_t, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "sdxl-edm"])
def test_other_schedules_take_the_deterministic_step(tiny_model: Loader, name: str) -> None:
    scene = scene_of(tiny_model(name)).detached()
    with torch.no_grad():
        prediction = scene.predict(scene.z)
    t, s = scene.noise[0], scene.surrogate.times(torch.tensor([0.1, 0.2]))
    ours = ancestral_step(scene, prediction, t, s, normal(scene.z.shape, "noise"))
    torch.testing.assert_close(ours, scene.surrogate.schedule.step(prediction, s))


def unrolled(scene: Scene, empty: Scene | None = None) -> Tensor:
    """The whole sampler again, without checkpoints: the decoded pictures."""
    surrogate, z = scene.surrogate, scene.z
    schedule = surrogate.schedule
    given = []
    times = schedule.sampling_timesteps(4 if surrogate.inpaints else 8)[-5:]
    noise = scene.normal(z.shape[1:], "edit")
    if surrogate.inpaints:
        assert scene.keep is not None
        z_t, given = noise, [1 - scene.keep[..., ::2, ::2], z]
    else:
        z_t = schedule.add_noise(z, noise, times[0].expand(len(z)))
    for i in range(4):
        t, s = times[i].expand(len(z)), times[i + 1].expand(len(z))
        taken = torch.cat([z_t, *given], 1)
        output = surrogate.output(taken, t, scene.sizes)
        if empty is not None:
            without = empty.surrogate.output(taken, t, scene.sizes)
            output = without + 7.5 * (output - without)
        prediction = schedule.prediction(output, z_t, t)
        z_t = ancestral_step(scene, prediction, t, s, scene.normal(z.shape[1:], f"edit step {i}"))
    return surrogate.codec.decode(z_t)


@pytest.mark.parametrize(("name", "prompt"), [("sd", ""), ("sd", "a cat"), ("inpaint", "")])
def test_photoguard_attacks_the_end_of_four_steps(
    tiny_model: Loader, name: str, prompt: str
) -> None:
    """With the empty prompt guidance changes nothing and costs nothing: four calls, not eight."""
    model = tiny_model(name)
    keep = hole(2, R, R) if name == "inpaint" else None
    scene = told(model, scene_of(model), prompt, keep)
    empty = told(model, scene, "", keep) if prompt else None
    value = photoguard_diffusion(scene)
    image = unrolled(scene, empty)
    torch.testing.assert_close(value, -image.square().flatten(1).sum(1), rtol=1e-4, atol=1e-3)
    (found,) = torch.autograd.grad(value.sum(), scene.moments)
    again = -unrolled(scene, empty).square().sum()
    (expected,) = torch.autograd.grad(again, scene.moments)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    with torch.no_grad():
        seen = calls_of(scene, lambda: photoguard_diffusion(scene))
    assert len(seen) == (8 if prompt else 4)
    times = [int(t.flatten()[0]) for _, t in seen]
    assert times[0] == (751 if name == "inpaint" else 376)


def test_fresh_noise_for_every_gradient(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    scene = told(model, scene_of(model), "").detached()
    other = replace(scene, addresses=[(0, 1), (1, 0)])
    with torch.no_grad():
        a, b = photoguard_diffusion(scene), photoguard_diffusion(other)
    assert a[0] != b[0]
    torch.testing.assert_close(a[1], b[1])


def test_diffusion_guard_looks_at_the_first_step_only(tiny_model: Loader) -> None:
    """||eps_hat(noise, 751)||: 751 of a four-step sampler, not 999; the picture enters through the
    channels of the masked picture, and the mask is 1 where the model paints."""
    model = tiny_model("inpaint")
    keep = hole(2, R, R)
    scene = told(model, scene_of(model), "", keep)
    seen = calls_of(scene, lambda: diffusion_guard(scene))
    assert len(seen) == 1
    taken, t = seen[0]
    assert set(t.flatten().tolist()) == {751}
    c = model.codec.channels
    assert taken.shape[1] == 2 * c + 1
    torch.testing.assert_close(taken[:, c + 1 :], scene.z.detach())
    assert torch.equal(taken[:, c : c + 1], 1 - keep[..., ::2, ::2])
    with torch.no_grad():
        output = scene.surrogate.output(taken, torch.tensor([751, 751]), scene.sizes)
    value = diffusion_guard(scene)
    torch.testing.assert_close(value, output.flatten(1).norm(dim=1))
    (g,) = torch.autograd.grad(value.sum(), scene.moments)
    assert g.abs().sum() > 0


def test_methods_against_inpainting_say_what_they_need(tiny_model: Loader) -> None:
    model, inpaint = tiny_model("sd"), tiny_model("inpaint")
    with pytest.raises(UserError, match="needs an inpainting model"):
        check_model(model, Settings("diffusionguard"))
    with pytest.raises(UserError, match="text-to-image model"):
        check_model(inpaint, Settings("advdm"))
    check_model(inpaint, Settings("photoguard-diffusion"))
    for method in ("diffusionguard", "photoguard-diffusion"):
        check_mask(inpaint, Settings(method), True)
        with pytest.raises(UserError, match=f"--mask: {method} needs it"):
            check_mask(inpaint, Settings(method), False)
    check_mask(model, Settings("photoguard-diffusion"), False)
    check_mask(inpaint, Settings("texture"), False)
