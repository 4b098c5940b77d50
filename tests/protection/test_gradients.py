"""The image gradient: one pass and two, draws, views, batches, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit.models.cost import saved_for_backward
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection import scene_losses as losses
from diffkit.protection.budget import as_signed
from diffkit.protection.gradients import ImageGradient
from diffkit.protection.protect import prepared
from diffkit.protection.scene import Scene
from diffkit.protection.settings import Settings
from diffkit.protection.transforms import TRANSFORMS
from diffkit.protection.views import ViewPlan, plan_views
from tests.protection.attacks import (
    DENOISING,
    R,
    gradient,
    hole,
    linear,
    plan_of,
    random_pixels,
    slightly_moved,
)

Loader = Callable[[str], LatentDiffusion]

FAMILIES = ["sd", "sd-v", "sdxl", "sd3", "flux", "pixart-sigma", "dit"]


def settings_for(model: LatentDiffusion, method: str, **options: Any) -> Settings:
    """Models of classes are told one."""
    if model.conditioner.classes is not None and method in DENOISING:
        options.setdefault("prompt", "red fox")
    return Settings(method, **options)


def same(a: Tensor, b: Tensor, rel: float = 1e-5) -> bool:
    return bool((a - b).norm() <= rel * b.norm())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["advdm", "sdst-"])
def test_two_passes_are_one(tiny_model: Loader, name: str, method: str) -> None:
    model, pixels = tiny_model(name), random_pixels(1)
    x, found = slightly_moved(pixels), []
    for lean in (False, True):
        with gradient(model, settings_for(model, method), pixels, lean=lean) as g:
            found.append(g(x, 3))
    assert found[0].dtype == torch.float32
    assert found[0].abs().sum() > 0
    assert same(found[1], found[0])
    assert torch.equal(found[1].sign(), found[0].sign())


@pytest.mark.parametrize("method", ["photoguard", "pid", "mist", "ace+", "photoguard-diffusion"])
def test_two_passes_are_one_for_the_other_losses(tiny_model: Loader, method: str) -> None:
    model, pixels = tiny_model("sd"), random_pixels(1, R, 24)
    x, found = slightly_moved(pixels), []
    for lean in (False, True):
        with gradient(model, Settings(method), pixels, lean=lean) as g:
            found.append(g(x, 0))
    assert same(found[1], found[0])
    assert torch.equal(found[1].sign(), found[0].sign())


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3", "flux"])
@pytest.mark.parametrize("method", ["advdm", "ace+"])
def test_it_is_the_gradient_of_the_loss_through_the_whole_model(
    tiny_model: Loader, name: str, method: str
) -> None:
    """Against one autograd pass from the pixels, with the target's own dependence on them."""
    model, pixels = tiny_model(name), random_pixels(2)
    x = slightly_moved(pixels)
    with gradient(model, Settings(method), pixels) as g:
        found = g(x, 1)
        leaf = x.clone().requires_grad_()
        moments, frame = g._encoded(leaf, g.plan.whole * 2, 0, 1)
        scene = g._scene(moments, frame, 0, (1, 0), None)
        assert g.method.loss is not None
        (whole,) = torch.autograd.grad(g.method.loss(scene).sum(), leaf)
    assert same(found, whole)
    assert torch.equal(found.sign(), whole.sign())


@pytest.mark.parametrize("method", ["advdm", "sds+", "mist", "ace"])
def test_draws_of_noise_cost_no_further_encoder_pass(tiny_model: Loader, method: str) -> None:
    """The mean of K cotangents through one encoder pass is the mean of K pixel gradients."""
    model, pixels = tiny_model("sd"), random_pixels(2)
    x, calls = slightly_moved(pixels), 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    with gradient(model, Settings(method, draws=3), pixels) as g:
        g(x, 2)  # encodes the target
        hook = model.codec.vae.encoder.conv_in.register_forward_hook(count)
        try:
            averaged = g(x, 2)
        finally:
            hook.remove()
        views = g.plan.whole * 2
        each = [g._passed(x, views, 0, 2, [(2, k)], None, None) for k in range(3)]
    assert calls == 1
    assert same(averaged, torch.stack(each).mean(0), 2e-6)
    assert not same(averaged, each[0], 0.1)


@pytest.mark.parametrize("c", [0.7, -0.7])
def test_signs_of_the_short_and_the_exact_gradient_on_a_toy(tiny_model: Loader, c: float) -> None:
    """For eps_hat = c z_t and one draw they agree at every pixel, or at none."""
    model, pixels = tiny_model("sd"), random_pixels(2)
    signs = []
    for method in ("advdm", "sds+"):
        with gradient(model, Settings(method), pixels) as g:
            one = g.surrogates[0]
            g.surrogates = [replace(one, denoiser=linear(one.network, c))]
            signs.append(g(as_signed(pixels), 0).sign())
    assert torch.equal(signs[0], signs[1] if c > 0 else -signs[1])


def test_first_steps_of_sds_plus_and_minus_are_mirror_images(tiny_model: Loader) -> None:
    model, pixels = tiny_model("sd"), random_pixels(2)
    found = []
    for method in ("sds+", "sds-"):
        with gradient(model, Settings(method), pixels) as g:
            found.append(g(as_signed(pixels), 0))
    assert torch.equal(found[0], -found[1])


def test_only_pictures_get_gradients_and_the_model_comes_back_as_it_was(
    tiny_model: Loader,
) -> None:
    model, pixels = tiny_model("sd"), random_pixels(1)
    networks = [model.codec.vae, model.denoiser.model]
    parameters = [p for network in networks for p in network.parameters()]
    modules = [m for network in networks for m in network.modules()]
    networks[0].train()
    networks[1].up_blocks.train()
    parameters[3].requires_grad_(False)
    before = [m.training for m in modules], [p.requires_grad for p in parameters]
    values = [p.clone() for p in parameters]
    try:
        for lean in (False, True):
            with gradient(model, Settings("advdm"), pixels, lean=lean) as g:
                assert not any(m.training for m in modules)
                assert not any(p.requires_grad for p in parameters)
                assert networks[1].is_gradient_checkpointing == lean
                g(as_signed(pixels), 0)
        with pytest.raises(ZeroDivisionError), prepared(model, Settings("advdm"), (), True):
            _ = 1 / 0
        assert ([m.training for m in modules], [p.requires_grad for p in parameters]) == before
        assert not networks[1].is_gradient_checkpointing
        assert all(p.grad is None for p in parameters)
        assert all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True))
    finally:
        for network in networks:
            network.eval().requires_grad_(True)


@pytest.mark.parametrize("method", ["texture", "pid", "mist", "sds-", "photoguard-diffusion"])
def test_a_picture_s_gradient_does_not_depend_on_its_batch(tiny_model: Loader, method: str) -> None:
    model, pixels = tiny_model("sd"), random_pixels(3)
    x = slightly_moved(pixels)
    options: dict[str, Any] = {"transforms": ("noise", "blur"), "draws": 2, "sampled": True}
    if method == "photoguard-diffusion":
        options = {"draws": 1}
    elif method in ("texture", "pid"):
        del options["draws"]
    settings = Settings(method, **options)
    with gradient(model, settings, pixels, seeds=[7, 8, 9]) as g:
        together = g(x, 4)
    with gradient(model, settings, pixels[[2, 0]], seeds=[9, 7]) as g:
        pair = g(x[[2, 0]], 4)
    with gradient(model, settings, pixels[1:2], seeds=[8]) as g:
        alone = g(x[1:2], 4)
    for one, many in ((pair[0], together[2]), (pair[1], together[0]), (alone[0], together[1])):
        assert same(one, many, 1e-4)


def wide_plan(model: LatentDiffusion, scale: float, aspect: float, views: int) -> ViewPlan:
    short = round(scale * R)
    return plan_views(short, round(short * aspect), R, model.working_multiple, views=views)


@pytest.mark.parametrize("aspect", [1, 1.7, 3])
@pytest.mark.parametrize("scale", [0.5, 1, 1.3, 3])
def test_every_native_pixel_moves_after_one_step(
    tiny_model: Loader, scale: float, aspect: float
) -> None:
    model = tiny_model("sd")
    plan = wide_plan(model, scale, aspect, 2 if scale == 1.3 else 1)
    pixels = random_pixels(1, plan.height, plan.width)
    with gradient(model, Settings("texture"), pixels, plan=plan) as g:
        found = g(as_signed(pixels), 0)
    assert found.shape == pixels.shape
    assert (found != 0).all()


def test_views_are_added_after_division_by_their_mean_size(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    plan = plan_views(40, 48, R, model.working_multiple, views=3)
    pixels = random_pixels(2, 40, 48)
    x = slightly_moved(pixels)
    with gradient(model, Settings("advdm"), pixels, plan=plan, seeds=[3, 4]) as g:
        found = g(x, 5)
        expected = torch.zeros_like(x)
        for row, seed in enumerate((3, 4)):
            for place, view in enumerate(plan.at(5, seed)):
                alone = g.pictures.select(slice(row, row + 1))
                single = ImageGradient(g.surrogates, g.method, alone, plan, g.draws)
                part = single._view_gradient(x[row : row + 1], [view], 5, 0, None, place)[0]
                inside = part[:, view.top : view.top + view.height, view.left :][..., : view.width]
                assert part.abs().sum() == pytest.approx(float(inside.abs().sum()))
                expected[row] += part / inside.abs().mean()
    assert same(found, expected)


def test_tiles_are_one_view_whose_windows_fade(tiny_model: Loader) -> None:
    """Each tile was divided by the mean size of its own gradient, so that where two overlap the
    smoother one weighed more and the windows no longer summed to one."""
    model = tiny_model("sd")
    plan = plan_views(40, 48, R, model.working_multiple, tiles=True, encoder_only=True)
    pixels = random_pixels(2, 40, 48)
    pixels[0, :, :20] = 128
    x = as_signed(pixels)
    assert len(plan.tiling) > 4
    with gradient(model, Settings("texture", tiles=True), pixels, plan=plan) as g:
        found = g(x, 0)
        whole, *tiles = (
            g._view_gradient(x, [view] * 2, 0, 0, None) for view in plan.whole + plan.tiling
        )
        first = plan.tiling[1]
        leaf = first.apply(x).clone().requires_grad_()
        moments = model.codec.encode_moments(leaf)
        target = g._target(0, (R, R))
        assert target is not None
        value = (model.codec.mean(moments) - model.codec.mean(target)).square().sum()
        (c,) = torch.autograd.grad(-value, moments, retain_graph=True)
        fade = torch.nn.functional.interpolate(
            first.window()[None, None], c.shape[-2:], mode="bilinear", antialias=True
        )
        (by_hand,) = torch.autograd.grad(moments, leaf, c * fade)
    inside = tiles[1][:, :, first.top : first.top + R, first.left : first.left + R]
    assert same(inside, by_hand)
    together = torch.stack(tiles).sum(0)
    parts = [part / part.abs().mean((1, 2, 3), keepdim=True) for part in (whole, together)]
    assert same(found, parts[0] + parts[1])
    assert (found != 0).all()


def test_several_autoencoders_weigh_the_same(tiny_model: Loader) -> None:
    """Their scales differ: each gradient is divided by its mean size before they are added."""
    models = [tiny_model("sd"), tiny_model("sd3")]
    pixels, settings = random_pixels(2), Settings("texture")
    x = as_signed(pixels)
    parts = []
    for model in models:
        with gradient(model, settings, pixels) as g:
            part = g(x, 0)
        parts.append(part / part.abs().mean((1, 2, 3), keepdim=True))
    with prepared(models[0], settings, models[1:]) as surrogates:
        assert len(surrogates) == 2
        with gradient(models[0], settings, pixels) as g:
            g.surrogates = surrogates
            together = g(x, 0)
            value = g.score(x)
            separate = []
            for one in surrogates:
                g.surrogates, g._targets = [one], {}
                separate.append(g.score(x))
    assert same(together, parts[0] + parts[1])
    torch.testing.assert_close(value, separate[0] + separate[1])


def test_jpeg_lets_the_gradient_straight_through(tiny_model: Loader) -> None:
    """The gradient is that at the decoded picture, as if the file were not there."""

    model, pixels = tiny_model("sd"), random_pixels(1)
    x = as_signed(pixels)
    with gradient(model, Settings("texture", transforms=("jpeg",)), pixels) as g:
        found = g(x, 2)
    squeezed = TRANSFORMS["jpeg"](x, [0], 2, 0)
    with gradient(model, Settings("texture"), pixels) as g:
        expected = g(squeezed, 2)
        plain = g(x, 2)
    assert same(found, expected)
    assert not same(found, plain, 0.01)


def test_transforms_take_turns_over_draws_and_steps(tiny_model: Loader) -> None:
    model, pixels = tiny_model("sd"), random_pixels(1)
    x = as_signed(pixels)
    names = ("identity", "resize", "noise")
    with gradient(model, Settings("advdm", transforms=names, draws=2), pixels) as g:
        found = g(x, 1)
        views = g.plan.whole
        parts = [g._passed(x, views, 0, 1, [(1, k)], k, None) for k in range(2)]
    assert same(found, (parts[0] + parts[1]) / 2)
    with gradient(model, Settings("texture", transforms=names), pixels) as g:
        plain = gradient(model, Settings("texture"), pixels)
        with plain as p:
            equal = [same(g(x, step), p(x, step)) for step in range(6)]
    assert equal == [True, False, False, True, False, False]


def test_grey_pictures_and_transparent_pixels(tiny_model: Loader) -> None:
    """Grey: one channel, whose gradient is the sum of its three copies. The model sees alpha on
    white, so the gradient passes through alpha; a pixel with alpha 0 has none."""
    model = tiny_model("sd")
    grey = random_pixels(1, channels=1)
    colour = grey.expand(-1, 3, -1, -1)
    with gradient(model, Settings("texture"), grey) as g:
        one = g(as_signed(grey), 0)
    with gradient(model, Settings("texture"), colour) as g:
        three = g(as_signed(colour), 0)
    assert same(one, three.sum(1, keepdim=True))
    alpha = torch.full((1, 1, R, R), 255, dtype=torch.uint8)
    alpha[..., :4, :] = 0
    alpha[..., 4:8, :] = 51
    x = as_signed(colour)
    with gradient(model, Settings("texture"), colour, alpha=alpha) as g:
        found = g(x, 0)
        shown = g.pictures.shown(x)
    assert not found[..., :4, :].any()
    torch.testing.assert_close(shown[..., 4:8, :], 0.2 * x[..., 4:8, :] + 0.8)
    assert (shown[..., :4, :] == 1).all()
    with gradient(model, Settings("texture"), colour) as g:
        expected = g(shown, 0) * (alpha / 255)
    assert same(found, expected)


def test_models_in_half_precision_move_pictures_in_float32(
    tiny_folder: Callable[[str], Any],
) -> None:
    model = LatentDiffusion.load(tiny_folder("sd"))
    pixels = random_pixels(1)
    x, signs = slightly_moved(pixels), []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype=dtype)
        with gradient(model, Settings("mist"), pixels) as g:
            found = g(x, 0)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        signs.append(found.sign())
    assert (signs[0] == signs[1]).float().mean() > 0.85


def faint_ace(scene: Scene) -> Tensor:
    """With gradients below the smallest number that float16 has."""
    return 1e-4 * losses.ace(scene)


def test_small_gradients_survive_float16(tiny_folder: Callable[[str], Any]) -> None:
    """A mean over all latents has gradients that float16 rounds to nothing on their way through
    the denoiser; they are multiplied there and divided again behind it."""
    model = LatentDiffusion.load(tiny_folder("sd"))
    pixels = random_pixels(1, 64, 64)
    plan = plan_views(64, 64, 64, model.working_multiple, views=1)
    found = {}
    for dtype in (torch.float32, torch.float16):
        model.denoiser.model.to(dtype)
        with gradient(model, Settings("ace"), pixels, plan=plan) as g:
            g.method = replace(g.method, loss=faint_ace)
            found[dtype] = g(slightly_moved(pixels), 0)
    exact, half = (found[dtype] for dtype in (torch.float32, torch.float16))
    assert (exact.sign() == half.sign()).float().mean() > 0.9
    assert float(half.norm() / exact.norm()) == pytest.approx(1, abs=0.1)


def test_large_views_keep_less_and_have_the_same_gradient(tiny_model: Loader) -> None:
    model = tiny_model("latent")
    found, kept = [], []
    for side in (120, 128):
        plan = plan_views(side, side, side, model.working_multiple, views=1)
        pixels = random_pixels(1, side, side)
        x = slightly_moved(pixels)
        for lean in (False, True):
            with gradient(model, Settings("texture"), pixels, plan=plan, lean=lean) as g:
                g(x, 0)
                with saved_for_backward(g.surrogates[0].networks()) as saved:
                    found.append(g(x, 0))
            kept.append(saved.elements / side**2)
    assert same(found[1], found[0])
    assert same(found[3], found[2])
    assert kept[2] < 0.7 * kept[0]


def test_clean_moments_are_encoded_once(tiny_model: Loader) -> None:
    """PID compares with the clean picture, which was encoded again in every step."""
    model, pixels = tiny_model("sd"), random_pixels(1)
    calls = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    with gradient(model, Settings("pid"), pixels) as g:
        hook = model.codec.vae.encoder.conv_in.register_forward_hook(count)
        try:
            for step in range(4):
                g(slightly_moved(pixels), step)
        finally:
            hook.remove()
    assert calls == 5


def test_a_score_is_the_mean_over_fixed_draws(tiny_model: Loader) -> None:
    model, pixels = tiny_model("sd"), random_pixels(2)
    x = as_signed(pixels)
    with gradient(model, Settings("advdm", draws=2), pixels, seeds=[4, 5]) as g:
        value = g.score(x)
        assert torch.equal(value, g.score(x))
        moments, frame = g._encoded(x, g.plan.whole * 2, 0, -1)
        assert g.method.loss is not None
        with torch.no_grad():
            draws = [g.method.loss(g._scene(moments, frame, 0, ("held out", k), None))
                     for k in range(8)]  # fmt: skip
    torch.testing.assert_close(value, torch.stack(draws).mean(0))
    with gradient(model, Settings("advdm"), pixels[1:], seeds=[5]) as g:
        torch.testing.assert_close(g.score(x[1:])[0], value[1])


def test_times_are_drawn_between_the_fractions_that_were_asked_for(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    pixels = random_pixels(1)
    seen: dict[str, list[int]] = {}
    for name, settings in (
        ("advdm", Settings("advdm")),
        ("ace", Settings("ace")),
        ("low", Settings("ace", t_range=(0.0, 0.1))),
    ):
        with gradient(model, settings, pixels) as g:
            addresses = [(0, step, 0) for step in range(400)]
            times = g.surrogates[0].times(torch.cat([g._fractions([a]) for a in addresses]))
            seen[name] = times.tolist()
    assert min(seen["advdm"]) < 20
    assert max(seen["advdm"]) > 980
    assert 600 <= min(seen["ace"]) < 610
    assert 990 < max(seen["ace"]) <= 999
    assert 0 <= min(seen["low"]) <= max(seen["low"]) <= 99


def test_a_mask_reaches_an_inpainting_model_and_its_pictures(tiny_model: Loader) -> None:
    model, pixels = tiny_model("inpaint"), random_pixels(1)
    mask = hole(1, R, R)
    with gradient(model, Settings("photoguard-diffusion", draws=1), pixels, mask=mask) as g:
        images, frame = g._framed(as_signed(pixels), plan_of(model, R, R).whole, 0, 0)
        found = g(as_signed(pixels), 0)
    assert torch.equal(frame.keep, mask)
    assert torch.equal(images, as_signed(pixels) * mask)
    assert torch.equal((found != 0).any(1, keepdim=True), mask > 0)
