"""Pixel-space post-training: golden numbers, weights in time, controls, calibration, routing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.objectives.pixel_space import (
    PixelConfig,
    PixelObjective,
    PixelPlayer,
    balanced_weight,
    clean_delta,
    clean_factor,
    flow_emphasis,
)
from diffkit.perceptual.decoded import decoded_error
from diffkit.randomness import normal
from tests.models.test_tiny_decoder import network
from tests.objectives.test_denoising import make_batch, rows

NO_DROPOUT = DenoisingConfig(condition_dropout=0.0)
FIXED: dict[str, Any] = {"weight": 2.0}


class Mixed:
    """A linear decoder D with D^T D = 1: a rotation of the channels."""

    device = torch.device("cpu")

    def decode(self, latents: Tensor, checkpoint: Any = None) -> Tensor:
        channels = latents.shape[1]
        rotation = torch.linalg.qr(normal((channels, channels), 5).double())[0]
        return torch.einsum("dc,bchw->bdhw", rotation.to(latents), latents)


@cache
def loaded(folder: Path) -> LatentDiffusion:
    return LatentDiffusion.load(folder)


def objective_of(
    folder: Path, denoising: DenoisingConfig = NO_DROPOUT, **config: Any
) -> PixelObjective:
    model = loaded(folder)
    for part in model.networks.values():
        part.requires_grad_(part is model.denoiser.model).zero_grad()
    objective = PixelObjective(model, PixelConfig(**config), denoising)
    objective.place(torch.device("cpu"))
    return objective


def orthonormal(objective: PixelObjective) -> PixelObjective:
    player = player_of(objective)
    player.decoder = objective._decoder = Mixed()
    return objective


def player_of(objective: PixelObjective) -> PixelPlayer:
    player = objective.players()["denoiser"]
    assert isinstance(player, PixelPlayer)
    return player


def terms_of(objective: PixelObjective, batch: Any = None) -> dict[str, Any]:
    draws = objective.draw(make_batch() if batch is None else batch, 0)
    with torch.no_grad():
        shared = objective.shared(draws)
    return player_of(objective)("pixel", draws, shared)


def gradient(objective: PixelObjective) -> Tensor:
    terms_of(objective)["loss"].mean().backward()
    found = [p.grad.flatten() for p in player_of(objective).parameters() if p.grad is not None]
    return torch.cat(found)


def step(objective: PixelObjective, number: int, batch: Any = None) -> dict[str, Any]:
    """What the trainer does, the optimizer aside."""
    objective.begin(number)
    terms = terms_of(objective, batch)
    means = {k: terms[k].detach().mean() for k in objective.watched() if k in terms}
    objective.stepped("pixel", means)
    return terms


# -- mathematics --------------------------------------------------------------------------------


def test_emphasis_by_hand() -> None:
    """1 / (1 - t)^2: 1, 4, 100, and 100 beyond t = 0.9."""
    assert torch.allclose(
        flow_emphasis(torch.tensor([0.0, 0.5, 0.9, 1.0])), torch.tensor([1.0, 4.0, 100.0, 100.0])
    )


def test_the_clean_estimate_weighs_one_over_snr() -> None:
    """An orthonormal decoder, eps-prediction, float64: E / |eps - eps_th|^2 = 1 / SNR exactly."""
    ab = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    alpha, sigma = ab.sqrt(), (1 - ab).sqrt()
    z, error = normal((3, 12, 4, 4), 1, "z").double(), normal((3, 12, 4, 4), 1, "e").double()
    delta = clean_delta(sigma.view(-1, 1, 1, 1) * error, alpha)
    found = decoded_error(Mixed(), z, delta) / error.square().flatten(1).mean(1)
    assert torch.allclose(found, (1 - ab) / ab, rtol=1e-10)
    assert torch.equal(clean_delta(error, torch.zeros(3)), torch.zeros_like(error))


def test_the_clean_estimate_is_gated_and_clamped() -> None:
    """SNR 4, 1, 0.2 and 0.05 with weight 1 / SNR, clamped at 2 and gated at 0.1."""
    snr = torch.tensor([4.0, 1.0, 0.2, 0.05, 0.0])
    factor = clean_factor(snr, 1 / snr, 0.1, 2.0)
    assert torch.allclose(factor, torch.tensor([1.0, 1.0, 0.4, 0.0, 0.0]))


def test_lambda_by_hand() -> None:
    latent, pixel = torch.tensor([0.3, 0.3, 0.3, 0.3]), torch.tensor([0.1, 3.0, 0.001, 0.0])
    assert torch.allclose(balanced_weight(latent, pixel), torch.tensor([3.0, 0.5, 32.0, 32.0]))


# -- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl", "sd3"])
def test_the_loss_is_the_papers_formula_through_the_stock_vae(name: str, tiny_folder: Any) -> None:
    """Decodes of alpha z_0 + sigma eps and alpha z_0 + sigma eps_theta, by diffusers; routing."""
    objective = objective_of(tiny_folder(name), **FIXED)
    model, batch = objective.model, make_batch()
    draws = objective.draw(batch, 0)
    with torch.no_grad():
        shared = objective.shared(draws)
        schedule = model.schedule
        z_t = schedule.add_noise(shared.z0, draws.eps, draws.t)
        said = model.denoiser.predict(z_t, draws.t, shared.cond)
        second = said.alpha_t * shared.z0 + said.sigma_t * said.eps
        vae = model.pipeline().vae
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        true, found = (vae.decode(z / scale + shift).sample for z in (z_t, second))
        expected = (true - found).square().mean((1, 2, 3))
    terms = player_of(objective)("pixel", draws, shared)
    assert torch.allclose(terms["pixel_loss"], expected, rtol=2e-3, atol=1e-7)
    latent = terms["latent_loss"]
    assert torch.allclose(terms["loss"], latent + 2.0 * terms["pixel_loss"])
    ratio, over = terms["pixel_ratio"]
    assert torch.allclose(ratio / over, 2.0 * terms["pixel_loss"] / latent)
    terms["loss"].mean().backward()
    for part, module in model.networks.items():
        moved = [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]
        assert any(moved) == (module is model.denoiser.model), part


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3"])
def test_the_control_is_the_pixel_loss_of_an_orthonormal_decoder(
    name: str, tiny_folder: Any
) -> None:
    """Where D only rotates, pixels are the latent loss with another weight, and g = 1.

    So the control must have the pixel arm's loss and gradient, at every place of the schedule.
    """
    found = []
    for control in (False, True):
        objective = orthonormal(objective_of(tiny_folder(name), control=control, **FIXED))
        step(objective, 0)
        if control:
            assert torch.allclose(objective.gain, torch.ones(()))
        found.append((terms_of(objective)["loss"].detach(), gradient(objective)))
    (pixel, by_pixel), (control, by_control) = found
    assert torch.allclose(pixel, control, rtol=1e-4)
    assert torch.allclose(by_pixel, by_control, rtol=1e-3, atol=1e-5 * float(by_pixel.abs().max()))


def test_the_weights_in_time_of_the_model_itself(tiny_folder: Any) -> None:
    """weighted_error over latent loss: 1 - ab (eps), ab (1 - ab) (v), t^2 (1 - t)^2 (flow)."""
    for name, weight in (
        ("sd", lambda alpha, sigma: sigma**2),
        ("sd-v", lambda alpha, sigma: (alpha * sigma) ** 2),
        ("sd3", lambda alpha, sigma: (alpha * sigma) ** 2),
    ):
        objective = objective_of(tiny_folder(name), **FIXED)
        terms, t = terms_of(objective), objective.draw(make_batch(), 0).t
        expected = weight(*objective.model.schedule.alpha_sigma(t)) * terms["latent_loss"]
        assert torch.allclose(terms["weighted_error"], expected, rtol=1e-4, atol=1e-9), name


def test_min_snr_weighs_the_latent_loss_alone(tiny_sd: Path) -> None:
    plain = terms_of(objective_of(tiny_sd, **FIXED))
    weighed = terms_of(objective_of(tiny_sd, DenoisingConfig(5.0, condition_dropout=0.0), **FIXED))
    assert torch.equal(plain["pixel_loss"], weighed["pixel_loss"])
    assert torch.equal(plain["weighted_error"], weighed["weighted_error"])
    assert (weighed["latent_loss"] < plain["latent_loss"]).any()


def test_emphasis_gives_a_flow_the_weight_of_eps_prediction(tiny_sd3: Path) -> None:
    """t^2 in place of t^2 (1 - t)^2, up to t = 0.9."""
    objective = objective_of(tiny_sd3, emphasis=True, **FIXED)
    terms = terms_of(objective, make_batch(8))
    place = terms["time"]
    expected = place**2 * ((1 - place) * 10).clamp_max(1) ** 2 * terms["latent_loss"]
    assert torch.allclose(terms["weighted_error"], expected, rtol=1e-4)


def test_the_clean_variant_compares_with_the_decoded_latents(tiny_sd: Path) -> None:
    objective = objective_of(tiny_sd, target="clean", clean_max_weight=3.0, **FIXED)
    batch = make_batch(8)
    terms, draws = terms_of(objective, batch), objective.draw(batch, 0)
    with torch.no_grad():
        shared, model = objective.shared(draws), objective.model
        z_t = model.schedule.add_noise(shared.z0, draws.eps, draws.t)
        x0 = model.denoiser.predict(z_t, draws.t, shared.cond).x0
        both = (model.codec.decode(z) for z in (shared.z0, x0))
        error = (next(both) - next(both)).square().mean((1, 2, 3))
    snr = model.schedule.snr(draws.t)
    factor = torch.where(snr >= 0.1, (3.0 * snr).clamp_max(1), 0)
    assert 0 < int((factor == 0).sum()) < 8
    assert torch.allclose(terms["pixel_loss"], factor * error, rtol=1e-3, atol=1e-6)


def test_the_clean_variant_is_finite_at_pure_noise(tiny_folder: Any) -> None:
    """alpha = 0 at the last time of a zero-SNR schedule: nothing is known of the clean latents."""
    objective = objective_of(tiny_folder("sd-v"), target="clean", clean_min_snr=0.0, **FIXED)
    draws = objective.draw(make_batch(), 0)
    last = type(draws)(**{**vars(draws), "t": torch.full_like(draws.t, 999)})
    with torch.no_grad():
        shared = objective.shared(last)
    terms = player_of(objective)("pixel", last, shared)
    assert torch.equal(terms["pixel_loss"], torch.zeros(4))
    terms["loss"].sum().backward()
    grads = [p.grad for p in player_of(objective).parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_pixels_alone(tiny_sd: Path) -> None:
    terms = terms_of(objective_of(tiny_sd, latent_weight=0.0, **FIXED))
    assert torch.equal(terms["loss"], 2.0 * terms["pixel_loss"])
    assert (terms["latent_loss"] > 0).all()


@pytest.mark.parametrize("crop", [None, 8])
def test_both_memory_modes_are_one_loss(crop: int | None, tiny_sd: Path) -> None:
    grads = []
    for memory in ("plain", "low"):
        objective = objective_of(tiny_sd, memory=memory, crop_latent=crop, **FIXED)
        grads.append(gradient(objective))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6 * float(grads[0].abs().max()))


def test_a_sample_does_not_know_its_batch(tiny_sd: Path) -> None:
    objective = objective_of(tiny_sd, crop_latent=8, **FIXED)
    batch = make_batch(6)
    with torch.no_grad():
        whole = terms_of(objective, batch)
        parts = [terms_of(objective, rows(batch, slice(i, i + 2))) for i in (0, 2, 4)]
    for key in ("loss", "pixel_loss", "weighted_error"):
        torch.testing.assert_close(torch.cat([p[key] for p in parts]), whole[key])


def test_windows_by_default_are_for_large_latents(tiny_sd: Path) -> None:
    """32 of 64, everything below that, everything for 0."""
    objective = objective_of(tiny_sd, **FIXED)
    assert objective.draw(make_batch(2, size=32), 0).crop is None
    crop = objective.draw(make_batch(2, size=128), 0).crop
    assert crop is not None and (crop.height, crop.width) == (32, 32)
    objective.pixel.crop_latent = 0
    assert objective.draw(make_batch(2, size=128), 0).crop is None


def test_a_tiny_decoder_serves(tiny_sd: Path, tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "tiny")
    objective = objective_of(tiny_sd, decoder=str(tmp_path / "tiny"), **FIXED)
    whole = objective_of(tiny_sd, **FIXED)
    assert not torch.equal(*(terms_of(o)["pixel_loss"] for o in (objective, whole)))
    assert bool(gradient(objective).any())
    assert "network" not in {name for name, _ in player_of(objective).named_modules()}


def test_only_adapters_get_gradients(tiny_sd3: Path) -> None:
    model = LatentDiffusion.load(tiny_sd3)
    for part in model.networks.values():
        part.requires_grad_(False)
    add_lora(model, 2)
    objective = PixelObjective(model, PixelConfig(**FIXED), NO_DROPOUT, lora="default")
    objective.place(torch.device("cpu"))
    terms_of(objective)["loss"].mean().backward()
    player = player_of(objective)
    moved = [n for n, p in player.named_parameters() if p.grad is not None and p.grad.any()]
    assert moved and all("lora_B" in name for name in moved)


# -- calibration --------------------------------------------------------------------------------


def test_lambda_follows_the_first_batches_and_is_then_frozen(tiny_sd: Path) -> None:
    """The mean of the means so far; nothing before the first batch; no change after the third."""
    objective = orthonormal(objective_of(tiny_sd, calibration=3))
    first = step(objective, 0, make_batch(seed=0))
    assert torch.equal(first["loss"], first["latent_loss"])
    sums, weights = torch.zeros(2), []
    for number in range(6):
        if number:
            weights.append(float(objective.weight))
            terms = step(objective, number, make_batch(seed=number))
            assert torch.equal(terms["pixel_weight"], objective_weight(weights[-1]))
        else:
            terms = first
        if number < 3:
            sums += torch.stack([terms["latent_loss"].mean(), terms["pixel_loss"].mean()]).detach()
            assert torch.allclose(objective.weight, (sums[0] / sums[1]).clamp(0.5, 32))
    assert len(set(weights)) == 3 and len(set(weights[2:])) == 1
    kept = {k: v.clone() for k, v in objective.state()["calibration"].items()}
    other = orthonormal(objective_of(tiny_sd, calibration=3))
    for name, total in other.state()["calibration"].items():
        total.copy_(kept[name])
    assert torch.equal(other.weight, objective.weight)


def objective_weight(value: float) -> Tensor:
    return torch.full((4,), value)


def test_every_other_step_decodes_with_twice_the_weight(tiny_sd: Path) -> None:
    objective = objective_of(tiny_sd, every=2, **FIXED)
    even, odd = step(objective, 0), step(objective, 1)
    assert torch.allclose(even["loss"], even["latent_loss"] + 4.0 * even["pixel_loss"])
    assert torch.equal(odd["loss"], odd["latent_loss"]) and "pixel_loss" not in odd
    assert torch.allclose(even["latent_loss"], odd["latent_loss"])


def test_the_control_stops_decoding(tiny_sd: Path) -> None:
    """And its weight is that of the calibration: lambda g = mean L_lat / mean weighted error."""
    objective = objective_of(tiny_sd, control=True, calibration=2)
    for number in range(2):
        assert "pixel_loss" in step(objective, number, make_batch(seed=number))
    sums = objective.state()["calibration"]
    terms = step(objective, 2)
    assert "pixel_loss" not in terms
    lam = (sums["latent"] / sums["pixel"]).clamp(0.5, 32)
    extra = lam * sums["pixel"] / sums["error"] * terms["weighted_error"]
    assert torch.allclose(terms["loss"], terms["latent_loss"] + extra)
    assert torch.equal(sums["latent"], objective.state()["calibration"]["latent"])


def test_it_says_once_where_lambda_is_bounded(
    tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it would have been; nothing before the calibration ends, nor for one in between."""
    objective = objective_of(tiny_sd, calibration=3, every=2)
    capsys.readouterr()  # of the model's making, if it was made here
    for latent, pixel, told in (
        (0.3, 0.1, None),
        (0.3, 3.0, "its bound 0.5; the two losses would count alike at 0.1, to be had with "),
        (0.3, 0.006, "--pixel.weight 50."),
        (0.3, 0.0, "no pixel loss was found"),
    ):
        objective._warned = False
        for total, value in zip(objective.state()["calibration"].values(), (latent, pixel, 1.0)):
            total.fill_(value)
        objective.begin(3)
        objective.inspect()
        assert capsys.readouterr().err == ""
        for _ in range(2):
            objective.begin(4)
            objective.inspect()
        err = capsys.readouterr().err
        assert err.count("warning") == (told is not None) and (told or "") in err
    given = objective_of(tiny_sd, **FIXED)
    given.begin(99)
    given.inspect()
    assert capsys.readouterr().err == ""


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight": 0.0}, "diffkit train denoising"),
        ({"calibration": 0}, "at least 1"),
        ({"every": 0}, "at least 1"),
        ({"latent_weight": -1.0}, "must not be negative"),
        ({"weight": float("inf")}, "pixel.weight: inf must be a finite number"),
        ({"target": "clean", "clean_min_snr": float("nan")}, "nan must be a finite number"),
        ({"crop_latent": -8}, "must not be negative"),
        ({"clean_min_snr": 0.5}, "belongs to --pixel.target clean"),
        ({"target": "clean", "emphasis": True}, "belongs to --pixel.target noisy"),
        ({"weight": 2.0, "calibration": 9}, "leave one of them out"),
        ({"control": True, "every": 2}, "decodes in the calibration only"),
        ({"latent_weight": 0.0, "every": 2}, "--pixel.latent-weight 0 the steps"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PixelConfig(**config).check()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("sd", {"emphasis": True}, "is for flow models"),
        ("sd", {"crop_latent": 16}, "crop_latent: a window of 16 .* latents of 16 x 16"),
        ("sd", {"decoder": "nowhere/at/all"}, "no such tiny decoder"),
        ("pixel", {}, "works on pixels"),
    ],
)
def test_what_cannot_work_with_the_model_is_refused(
    name: str, config: dict[str, Any], message: str, tiny_folder: Any
) -> None:
    with pytest.raises(UserError, match=message):
        PixelObjective(loaded(tiny_folder(name)), PixelConfig(**config), NO_DROPOUT)


def test_the_decoder_is_frozen_and_not_in_half_precision(tiny_sd: Path, tmp_path: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    model.codec.vae.requires_grad_(True)
    PixelObjective(model, PixelConfig(), NO_DROPOUT)
    assert not any(p.requires_grad for p in model.codec.vae.parameters())
    model.codec.vae.register_to_config(force_upcast=False)
    model.codec.to(dtype=torch.float16)
    with pytest.raises(UserError, match="float16"):
        PixelObjective(model, PixelConfig(), NO_DROPOUT)
    network().save_pretrained(tmp_path / "tiny")  # in float32, which serves
    PixelObjective(model, PixelConfig(decoder=str(tmp_path / "tiny")), NO_DROPOUT)


def test_the_decoder_is_no_part_of_the_player(tiny_sd: Path) -> None:
    """Or it would be wrapped, moved and written with every checkpoint."""
    objective = objective_of(tiny_sd, **FIXED)
    vae: nn.Module = objective.model.networks["vae"]
    assert not {id(m) for m in vae.modules()} & {id(m) for m in player_of(objective).modules()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "dit", "latent-class", "sdxl-edm"])
def test_every_family_learns_from_pixels(name: str, tiny_folder: Any) -> None:
    """Transformers, classes instead of text, latents of a VQModel, EDM: all by the one delta."""
    objective = objective_of(tiny_folder(name), latent_weight=0.0, **FIXED)
    conditioner, size = objective.model.conditioner, objective.model.default_size
    labels = None if conditioner.classes is None else torch.tensor([0, 1, 0, 1])
    objective.place(torch.device("cpu"))
    batch = make_batch(size=size, labels=labels)
    terms = terms_of(objective, batch)
    assert (terms["pixel_loss"] > 0).all() and bool(terms["pixel_loss"].isfinite().all())
    terms["loss"].mean().backward()
    moved = [p.grad is not None and bool(p.grad.any()) for p in player_of(objective).parameters()]
    assert any(moved)
