"""Whole attacks: the budget on the saved integers, what they reach, on what they depend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection import gradients
from diffkit.protection import scene_losses as losses
from diffkit.protection.budget import as_signed
from diffkit.protection.gradients import ImageGradient
from diffkit.protection.methods import METHODS
from diffkit.protection.protect import idle_networks, prepared, protect
from diffkit.protection.settings import Settings
from tests.protection.attacks import (
    FIXED,
    R,
    attack,
    hole,
    linear,
    protected,
    random_pixels,
)

Loader = Callable[[str], LatentDiffusion]


def model_for(tiny_model: Loader, method: str) -> LatentDiffusion:
    return tiny_model("inpaint" if method == "diffusionguard" else "sd")


def run(model: LatentDiffusion, settings: Settings, pixels: Tensor, **options: Any) -> list[Tensor]:
    """A whole attack, the control's too."""
    if settings.row.loss is not None:
        return protected(model, settings, pixels, **options)
    seeds = list(range(len(pixels)))
    return [row.pixels for row in protect(pixels, None, settings, seeds=seeds, **options)]


@pytest.mark.parametrize(
    "levels", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (4, 8)), 16]
)
@pytest.mark.parametrize("method", FIXED)
def test_no_saved_pixel_leaves_its_budget(tiny_model: Loader, method: str, levels: int) -> None:
    """On pixels of 0 and 255, on sizes that fit no model, with a mask and transparent pixels; what
    is masked out keeps its bits."""
    pixels = random_pixels(2, 18, 25)
    pixels[0, :, :4] = 0
    pixels[0, :, -4:] = 255
    mask = hole(2, 18, 25)
    alpha = torch.full((2, 1, 18, 25), 255, dtype=torch.uint8)
    alpha[:, :, :, :3] = 0
    steps = 1 if METHODS[method].edits else 2
    options: dict[str, Any] = {} if method == "random" else {"steps": steps}
    if "draws" in METHODS[method].options:
        options["draws"] = 1
    settings = Settings(method, levels=levels, **options)
    settings.check()
    model = model_for(tiny_model, method)
    for q, clean in zip(run(model, settings, pixels, mask=mask, alpha=alpha), pixels, strict=True):
        delta = q.short() - clean.short()
        assert q.dtype == torch.uint8
        assert q.shape == clean.shape
        assert 0 < delta.abs().max() <= levels
        assert not delta[:, mask[0, 0] == 0].any()
        assert not delta[:, :, :3].any()


@pytest.mark.parametrize("method", FIXED)
def test_nothing_to_spend_changes_nothing(tiny_model: Loader, method: str) -> None:
    pixels = random_pixels(1, 18, 25)
    model, mask = model_for(tiny_model, method), hole(1, 18, 25)
    free: dict[str, Any] = {"levels": 0}
    if method != "random":
        free["steps"] = 1
    if "draws" in METHODS[method].options:
        free["draws"] = 1
    assert torch.equal(run(model, Settings(method, **free), pixels, mask=mask)[0], pixels[0])
    if method not in ("random", "pid"):
        still = Settings(method, steps=0, random_start=False)
        assert torch.equal(run(model, still, pixels, mask=mask)[0], pixels[0])


def test_a_weighted_budget(tiny_model: Loader) -> None:
    """Flat areas get a quarter: 2 of 8 levels."""
    pixels = torch.full((1, 3, R, 2 * R), 128, dtype=torch.uint8)
    pixels[..., R:] = random_pixels(1)
    settings = Settings("texture", levels=8, steps=12, contrast=True)
    (q,) = protected(tiny_model("sd"), settings, pixels)
    delta = (q.short() - pixels[0].short()).abs()
    assert delta[..., : R - 4].max() == 2
    assert delta[..., R + 4 :].max() == 8


@pytest.fixture
def two_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of two draws, which is enough to see them move."""
    monkeypatch.setattr(gradients, "HELD_OUT", 2)


def on_held_out(g: ImageGradient) -> None:
    """Let the steps draw what the score draws, so that the walk ascends what is looked at."""
    drawn = g._passed

    def passed(x: Tensor, views: Any, number: int, step: int, *rest: Any) -> Tensor:
        addresses = [("held out", k) for k in range(gradients.HELD_OUT)]
        return drawn(x, views, number, step, addresses, None, None)

    g._passed = passed  # type: ignore[assignment, method-assign]


@pytest.mark.usefixtures("two_draws")
@pytest.mark.parametrize(
    "method", ["photoguard", "texture", "pid", "advdm", "advdm-", "mist", "ace", "ace+"]
)
def test_ten_small_steps_raise_what_a_method_maximises(tiny_model: Loader, method: str) -> None:
    settings = Settings(method, steps=10, step_levels=0.25, random_start=method == "pid")
    with attack(tiny_model("sd"), settings, random_pixels(1)) as ready:
        g = ready.gradient
        assert g is not None
        on_held_out(g)
        ready.advance(10)
        assert ready.first is not None
        assert ready.state is not None
        assert (g.score(ready.state.x) > ready.first).all()


@pytest.mark.usefixtures("two_draws")
@pytest.mark.parametrize(("method", "sign"), [("sds+", 1), ("sds-", -1)])
def test_score_distillation_moves_the_denoising_loss_its_way(
    tiny_model: Loader, method: str, sign: int
) -> None:
    """On eps_hat = c z_t, c > 0, where the short gradient has the sign of the exact one. The score
    of sds- is minus the loss: both are written to be ascended."""
    settings = Settings(method, steps=10, step_levels=0.25, t_range=(0.3, 0.31))
    with attack(tiny_model("sd"), settings, random_pixels(2)) as ready:
        g = ready.gradient
        assert g is not None
        g.surrogates = [
            replace(one, denoiser=linear(one.network, 0.7)) for one in g.surrogates
        ]  # fmt: skip
        on_held_out(g)
        ready.advance(10)
        assert ready.first is not None
        assert ready.state is not None
        assert (g.score(ready.state.x) > ready.first).all()
        assert (ready.first * sign > 0).all()


@pytest.mark.usefixtures("two_draws")
def test_ace_plus_lowers_both_of_its_terms(tiny_model: Loader) -> None:
    """Where both pull the same way: the output of eps_hat = c z_t is the latents, noised."""
    settings = Settings("ace+", steps=10, step_levels=0.25, t_range=(0.3, 0.31))
    with attack(tiny_model("sd"), settings, random_pixels(2)) as ready:
        g = ready.gradient
        assert g is not None
        g.surrogates = [
            replace(one, denoiser=linear(one.network, 1.0)) for one in g.surrogates
        ]  # fmt: skip
        on_held_out(g)
        ready.advance(10)
        assert ready.state is not None
        for loss in (losses.ace, losses.texture):
            g.method = replace(g.method, loss=loss)
            assert (g.score(ready.state.x) > g.score(ready.pgd.origin)).all()


@pytest.mark.parametrize(
    "name", ["sd-v", "sdxl", "sd3", "flux", "pixart-alpha", "dit", "latent", "latent-kl"]
)
@pytest.mark.parametrize("method", ["texture", "sds-", "advdm"])
def test_every_family_is_attacked(tiny_model: Loader, name: str, method: str) -> None:
    """Also autoencoders without a variance, models of classes, and unconditional ones."""
    pixels = random_pixels(1, R, 24)
    settings = Settings(method, steps=1, step_levels=2.0, levels=4, random_start=False)
    (q,) = protected(tiny_model(name), settings, pixels)
    delta = (q.short() - pixels[0].short()).abs()
    assert delta.max() == 2
    assert (delta == 2).float().mean() > 0.95


def test_seeds_decide_and_neither_batch_nor_order(tiny_model: Loader) -> None:
    model, pixels = tiny_model("sd"), random_pixels(3, R, 24)
    settings = Settings("mist", steps=3, draws=2, sampled=True)
    first = protected(model, settings, pixels, seeds=[5, 6, 7])
    again = protected(model, settings, pixels, seeds=[5, 6, 7])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    turned = protected(model, settings, pixels.flip(0), seeds=[7, 6, 5])[::-1]
    alone = [
        protected(model, settings, pixels[i : i + 1], seeds=[5 + i])[0] for i in range(3)
    ]  # fmt: skip
    for others in (turned, alone):
        for a, b in zip(first, others, strict=True):
            assert (a == b).float().mean() >= 0.99
    other = protected(model, settings, pixels[:1], seeds=[9])[0]
    assert (other == first[0]).float().mean() < 0.9


def test_statistics_are_of_the_saved_pixels(tiny_model: Loader) -> None:
    pixels = random_pixels(2)
    settings = Settings("advdm", steps=3, step_levels=0.6, levels=4)
    with attack(tiny_model("sd"), settings, pixels) as ready:
        ready.advance(3)
        results = ready.finish()
        assert ready.gradient is not None
        q = torch.stack([row.pixels for row in results])
        last, first = (ready.gradient.score(as_signed(p)).tolist() for p in (q, pixels))
    for i, row in enumerate(results):
        delta = (row.pixels.short() - pixels[i].short()).float()
        assert row.stats["steps"] == 3
        assert row.stats["skipped_steps"] == 0
        assert row.stats["score_first"] == pytest.approx(first[i])
        assert row.stats["score_last"] == pytest.approx(last[i])
        assert row.stats["max_change"] == delta.abs().max()
        assert row.stats["mean_change"] == pytest.approx(float(delta.abs().mean()))
        assert row.stats["mean_shift"] == pytest.approx(float(delta.mean()))


def test_models_of_classes_are_told_their_null_class(tiny_model: Loader) -> None:
    """They were told "a picture", which is no class; so no method with a denoiser ran on them."""
    dit = tiny_model("dit")
    with prepared(dit, Settings("advdm")) as (surrogate,):
        assert surrogate.cond is not None
        assert surrogate.cond.labels is not None
        assert surrogate.cond.labels.tolist() == [dit.conditioner.classes.null]
    with prepared(dit, Settings("advdm", prompt="red fox")) as (surrogate,):
        assert surrogate.cond is not None
        assert surrogate.cond.labels is not None
        assert surrogate.cond.labels.tolist() == [2]
    assert Settings("advdm").prompt_for(tiny_model("sd")) == "a picture"
    assert Settings("diffusionguard").prompt_for(tiny_model("inpaint")) == ""


def test_the_whole_way_from_pixels_to_pixels(tiny_model: Loader) -> None:
    """`protect` at the model's own resolution; the model is as it was, the input untouched."""
    model, pixels = tiny_model("sd"), random_pixels(1, 20, 30)
    copy, told = pixels.clone(), []
    weights = [p.clone() for p in model.denoiser.model.parameters()]
    settings = Settings("sdst-", steps=3, decay=True, momentum=1.0, keep_best=True)
    (result,) = protect(pixels, model, settings, seeds=[1], lean=True, each=told.append)
    assert result.pixels.shape == (3, 20, 30)
    assert told == [0, 1, 2]
    assert torch.equal(pixels, copy)
    now = list(model.denoiser.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    assert all(p.requires_grad and p.grad is None for p in now)
    (still,) = protect(pixels, model, Settings("sds-", steps=0), seeds=[1])
    assert torch.equal(still.pixels, pixels[0])
    assert still.stats["score_first"] == still.stats["score_last"]


def test_a_model_that_gives_no_numbers_fails_and_says_so(
    tiny_folder: Callable[[str], Any],
) -> None:
    model = LatentDiffusion.load(tiny_folder("sd"))
    with torch.no_grad():
        model.denoiser.model.conv_in.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite in 3 steps running"):
        protect(random_pixels(1), model, Settings("advdm", steps=5), seeds=[0])
    assert all(p.requires_grad for p in model.denoiser.model.parameters())


def test_what_a_model_cannot_do_is_said_before_the_first_step(tiny_model: Loader) -> None:
    pixels = random_pixels(1)

    def refused(name: str | None, method: str, words: str) -> None:
        model = None if name is None else tiny_model(name)
        with pytest.raises(UserError, match=words):
            protect(pixels, model, Settings(method), seeds=[0])

    refused(None, "texture", "needs a model")
    refused("sd", "diffusionguard", "inpainting model")
    refused("inpaint", "mist", "text-to-image model")
    refused("inpaint", "photoguard-diffusion", "--mask: photoguard-diffusion needs it")
    refused("sd", "ace", "trains a surrogate")
    refused("pixel", "texture", "works on pixels")
    sd = tiny_model("sd")
    with pytest.raises(UserError, match="--ensemble: does nothing for the method advdm"):
        protect(pixels, sd, Settings("advdm"), seeds=[0], ensemble=[sd])
    with pytest.raises(UserError, match="name 1 further models, and 0 are given"):
        protect(pixels, sd, Settings("texture", ensemble=("b",)), seeds=[0])
    with pytest.raises(UserError, match="no such class"):
        protect(pixels, tiny_model("dit"), Settings("advdm", prompt="a picture"), seeds=[0])


def test_networks_that_no_step_runs_through_are_named(tiny_model: Loader) -> None:
    """Text encoders stayed on the GPU through the whole attack; SD3's are larger than all else."""
    model = tiny_model("sd3")
    idle = idle_networks(model, Settings("advdm"))
    assert {id(net) for net in idle} == {id(net) for net in model.conditioner.encoders.values()}
    assert len(idle) == 3
    assert idle_networks(model, Settings("ace", train_text_encoder=True)) == []


def test_calls_may_share_what_was_prepared(tiny_model: Loader) -> None:
    model, settings = tiny_model("sd"), Settings("sds-", steps=1)
    alone = protect(random_pixels(1), model, settings, seeds=[1])
    with prepared(model, settings) as shared:
        for lean in (False, True):
            options: dict[str, Any] = {"surrogates": shared, "lean": lean}
            (found,) = protect(random_pixels(1), model, settings, seeds=[1], **options)
            assert torch.equal(found.pixels, alone[0].pixels)


def test_encoder_methods_need_an_autoencoder_alone(tiny_model: Loader) -> None:
    with prepared(tiny_model("sd"), Settings("pid")) as surrogates:
        assert surrogates[0].denoiser is None
        assert surrogates[0].cond is None
        with pytest.raises(UserError, match="needs a denoiser"):
            _ = surrogates[0].network
