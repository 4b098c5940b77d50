"""Preference optimisation of tiny real models: what a pair shares, who gets a gradient, what is
kept from step to step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffkit.data.preferences import PreferenceBatch
from diffkit.errors import RunFailed, UserError
from diffkit.models.families import family_of
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.models.lora_layers import plain_modules
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.denoising import DenoisingConfig, denoising_loss
from diffkit.objectives.preference import PreferenceConfig, PreferenceObjective
from diffkit.objectives.preference_state import CALIBRATION_STEPS
from tests.objectives.test_denoising import make_batch, rows

CPU, SLOW = torch.device("cpu"), pytest.mark.slow
REFERENCED = ["dpo", "cdpo", "rdpo", "hinge", "ipo", "alpha_dpo", "adaptive_dpo", "adaptive_ipo"]
LABELS = {"cdpo": 0.2, "rdpo": 0.2}


def pairs(n=3, seed=0):
    winners = make_batch(n, seed=seed)
    images = winners.keys.uniform("the other", (3, 32, 32)) * 2 - 1
    return PreferenceBatch(winners, replace(winners, images=images))


def made(folder, lora=False, denoising=None, adaptive=None, steps=20, **values):
    """An objective on its model, trained whole or by a LoRA, in its place."""
    model = LatentDiffusion.load(folder)
    for network in model.networks.values():
        network.requires_grad_(False)
    if lora:
        add_lora(model, 2)
    else:
        model.denoiser.model.requires_grad_(True)
    values.setdefault("flip_rate", LABELS.get(values.get("loss")))
    objective = PreferenceObjective(
        model,
        PreferenceConfig(**values),
        adaptive or AdaptiveConfig(),
        denoising or DenoisingConfig(condition_dropout=0.0),
        steps,
        "default" if lora else None,
    )
    objective.place(CPU)
    objective.begin(0)
    return objective


def nudge(objective, size=0.02):
    """Move the trained weights off the start model, by a fixed random step."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in player(objective).parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=draw)


def player(objective):
    return objective.players()["denoiser"]


def material(objective, batch):
    draws = objective.draw(batch, 0)
    with torch.no_grad():
        return draws, objective.shared(draws)


def terms(objective, batch):
    return player(objective)("preference", *material(objective, batch))


def step(objective, batch, number):
    """A step without an optimizer: what the objective hears of it."""
    objective.begin(number)
    found = terms(objective, batch)
    means = {}
    for name in objective.watched():
        value = found[name]
        parts = torch.stack(value) if isinstance(value, tuple) else value
        means[name] = parts.detach().mean(-1)
    objective.stepped("preference", means)
    return found


@pytest.mark.parametrize("loss", REFERENCED)
def test_a_model_that_is_its_reference(loss, tiny_sd):
    """s is exactly 0, and the loss that of the table: IPO's times kappa beta / 2.

    The latents have 4 x 16 x 16 numbers, a sixteenth of those that kappa 2500 is for.
    """
    objective = made(tiny_sd, lora=loss in ("dpo", "adaptive_dpo"), loss=loss)
    found = terms(objective, pairs())
    expected = {"hinge": 1.0, "alpha_dpo": alpha_at_start(), "ipo": 2500 / 16 / 800}
    expected["adaptive_ipo"] = expected["ipo"]
    value = expected.get(loss, math.log(2))
    torch.testing.assert_close(found["loss"], torch.full((3,), value), rtol=1e-6, atol=1e-6)
    assert not found["margin"].any() and found["accuracy"].eq(0.5).all()
    assert torch.equal(*found["winner_drift"]) and found["win_rate"][0].eq(0.5).all()


def alpha_at_start():
    a = 0.9999 * 0.5
    return (0.5**a - (1 - a) - a * 0.5) / (a * (a - 1))


@pytest.mark.parametrize(
    "name", ["sd-v", *(pytest.param(n, marks=SLOW) for n in ("sd", "sdxl", "sd3", "flux"))]
)
def test_a_pair_is_two_plain_denoising_losses(name, tiny_folder):
    """Same noise, time and prompt; e is the error of the model's own target; both halves at once
    are what they are alone, and the reference's are those of the start model."""
    objective = made(tiny_folder(name), loss="dpo", kappa=10.0)
    nudge(objective)
    batch = pairs()
    draws, shared = material(objective, batch)
    noisy, schedule = shared.noisy, objective.model.schedule
    assert torch.equal(*noisy.t.chunk(2)) and torch.equal(*noisy.cond.tokens.chunk(2))
    if name == "sdxl":
        assert torch.equal(*noisy.cond.time_ids.chunk(2))
    codec, posterior = objective.model.codec, draws.winners.posterior
    moments = [codec.encode_moments(half.images) for half in (batch.winners, batch.losers)]
    z0 = [codec.sample(each, posterior) for each in moments]
    eps, t = draws.winners.eps, draws.winners.t
    start = LatentDiffusion.load(tiny_folder(name))
    errors = {}
    for kind, model in (("model", objective.model), ("start", start)):
        for side, z in zip(("winner", "loser"), z0, strict=True):
            told = torch.full((3,), 3.5) if name == "flux" else None
            cond = noisy.cond.select(slice(3))
            with torch.no_grad():
                output = model.denoiser(schedule.add_noise(z, eps, t), t, cond, told)
            errors[kind, side] = denoising_loss(output, schedule.target(z, eps, t))
    found = player(objective)("preference", draws, shared)
    close = {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(found["winner_error"], errors["model", "winner"], **close)
    torch.testing.assert_close(found["loser_error"], errors["model", "loser"], **close)
    torch.testing.assert_close(found["winner_drift"][1], errors["start", "winner"], **close)
    torch.testing.assert_close(shared.reference.latent[3:], errors["start", "loser"], **close)
    assert not torch.allclose(errors["model", "winner"], errors["start", "winner"])


def gradients(objective):
    named = player(objective).named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("loss", ["dpo", "adaptive_dpo", "simpo"])
def test_only_adapters_get_gradients(loss, tiny_sd):
    objective = made(tiny_sd, lora=True, loss=loss, kappa=100.0, pixel="none")
    terms(objective, pairs())["loss"].mean().backward()
    assert gradients(objective) and all("lora_B" in name for name in gradients(objective))
    networks = objective.model.networks
    others = [n for k, n in networks.items() if k != objective.model.family.denoiser]
    assert not any(p.grad is not None for network in others for p in network.parameters())


def test_views_get_no_gradient_and_leave_no_trace(tiny_sd):
    """Reference and annotators: their tensors ask for nothing, and the weights are as before."""
    objective = made(tiny_sd, loss="adaptive_dpo")
    nudge(objective)
    before = {n: p.detach().clone() for n, p in player(objective).named_parameters()}
    _, shared = material(objective, pairs())
    assert not shared.reference.latent.requires_grad and len(shared.annotators) == 2
    assert not any(errors.requires_grad for errors in shared.annotators)
    for name, parameter in player(objective).named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
    kept = {n: w.clone() for s in objective.state().values() for n, w in s.items()}
    terms(objective, pairs())["loss"].mean().backward()
    after = {n: w for s in objective.state().values() for n, w in s.items()}
    assert all(torch.equal(kept[name], after[name]) for name in kept)
    assert not any(w.requires_grad for w in after.values())


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=SLOW)])
def test_the_gradient_at_the_start(lora, tiny_sd):
    """-(kappa / 2) grad(d_ref - d_th) = (kappa / 2) grad(e(w) - e(l))."""
    objective = made(tiny_sd, lora, loss="dpo", kappa=300.0)
    batch = pairs()
    terms(objective, batch)["loss"].mean().backward()
    found = gradients(objective)
    player(objective).zero_grad()
    draws, shared = material(objective, batch)
    winner, loser = player(objective)("latent", None, shared.noisy).latent.chunk(2)
    ((winner - loser).mean() * 150.0).backward()
    for name, grad in gradients(objective).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3)


def test_ipo_starts_with_the_gradient_of_dpo(tiny_sd):
    """Its slope was kappa^2 / beta, 50 times DPO's at the usual values: every step was clipped."""
    found = []
    for loss in ("dpo", "ipo"):
        objective = made(tiny_sd, lora=True, loss=loss, kappa=300.0)
        terms(objective, pairs())["loss"].mean().backward()
        found.append(gradients(objective))
    assert found[0].keys() == found[1].keys() and found[0]
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


def test_the_logit_is_logged(tiny_sd):
    objective = made(tiny_sd, lora=True)
    nudge(objective)
    found = terms(objective, pairs())
    torch.testing.assert_close(found["logit"], 2500 / 16 * found["margin"].abs())
    assert found["logit"].any()


def test_sdpo_holds_the_losers_part(tiny_folder):
    """The loss is the same; of the loser's gradient remains what does not raise the winner's error.

    Of v-prediction, whose targets are large where the picture is: so are the losers' here.
    """
    values = {"loss": "dpo", "kappa": 300.0}
    moments = make_batch(3).keys.normal((8, 16, 16), "moments")
    winners = replace(make_batch(3), images=None, moments=moments)
    batch = PreferenceBatch(winners, replace(winners, moments=5 * moments))
    plain, held = (made(tiny_folder("sd-v"), sdpo=sdpo, **values) for sdpo in (False, True))
    assert torch.equal(terms(plain, batch)["loss"], terms(held, batch)["loss"])
    noisy = material(held, batch)[1].noisy
    network = player(held)
    output = network._output(noisy)
    winner, loser = (output - noisy.target).detach().flatten(1).chunk(2)
    product = (winner * loser).sum(1)
    scale = torch.where(product > 0, (winner.square().sum(1) / product).clamp_max(1), 1.0)
    assert (scale < 0.9).any()
    e_w, e_l = denoising_loss(output, noisy.target).chunk(2)
    ((e_w - scale * e_l).mean() * 150.0).backward()
    expected = gradients(held)
    network.zero_grad()
    terms(held, batch)["loss"].mean().backward()
    for name, grad in gradients(held).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3)


def test_the_anchor_pulls_at_the_winner(tiny_sd):
    plain = terms(made(tiny_sd, kappa=100.0), pairs())
    held = terms(made(tiny_sd, kappa=100.0, anchor=0.05), pairs())
    torch.testing.assert_close(held["loss"], plain["loss"] + 5.0 * held["winner_error"])


def test_one_prompt_one_fate(tiny_sd):
    """A dropped caption is dropped for both pictures."""
    objective = made(tiny_sd, denoising=DenoisingConfig(condition_dropout=0.5))
    draws, shared = material(objective, pairs(6))
    winner, loser = shared.noisy.cond.tokens.chunk(2)
    assert torch.equal(winner, loser) and 0 < draws.winners.drop.sum() < 6


def test_listed_times(tiny_sd, tiny_sd3):
    objective = made(tiny_sd, timesteps=(249, 499, 749, 999))
    batch = pairs(16)
    t = objective.draw(batch, 0).winners.t
    assert set(t.tolist()) == {249, 499, 749, 999} and t.dtype == torch.int64
    t = made(tiny_sd3, timesteps=(250, 1000)).draw(pairs(8), 0).winners.t
    assert set(t.tolist()) == {250.0, 1000.0} and t.dtype == torch.float32
    with pytest.raises(UserError, match="1000 is not one of this model's times, 0 to 999"):
        made(tiny_sd, timesteps=(1000,))


# -- from step to step --------------------------------------------------------------------------


def test_simpo_measures_its_kappa(tiny_sd):
    """No reference in the loss; the first step has no gradient, the middle pair of later ones a
    logit of about a half; after 50 steps nothing moves any more."""
    objective = made(tiny_sd, loss="simpo")
    first = step(objective, pairs(8), 0)
    assert first["kappa"].eq(0).all() and first["loss"].eq(math.log(2)).all()
    assert torch.equal(first["margin"], first["loser_error"] - first["winner_error"])
    second = step(objective, pairs(8, seed=1), 1)
    kappa = second["kappa"][0]
    torch.testing.assert_close(kappa, 0.6 / first["difference"].mean())
    expected = torch.nn.functional.softplus(-kappa * second["margin"])
    torch.testing.assert_close(second["loss"].detach(), expected)
    assert 0.2 < (kappa * second["difference"]).median() < 1
    step(objective, pairs(8, seed=2), CALIBRATION_STEPS)
    third = step(objective, pairs(8, seed=3), CALIBRATION_STEPS + 1)
    both = torch.cat([first["difference"], second["difference"]])
    torch.testing.assert_close(third["kappa"][0], 0.6 / both.mean())


def test_simpo_of_equal_pictures_is_ln_2(tiny_sd):
    batch = pairs()
    batch = PreferenceBatch(batch.winners, batch.winners)
    found = terms(made(tiny_sd, loss="simpo", kappa=1000.0), batch)
    torch.testing.assert_close(found["loss"], torch.full((3,), math.log(2)), rtol=1e-3, atol=1e-3)


def test_simpo_looks_at_the_start_now_and_then(tiny_sd):
    """Every tenth step, winners only; in between it logs nothing, and keeps the ratio."""
    objective = made(tiny_sd, loss="simpo")
    step(objective, pairs(), 0)
    nudge(objective)
    found = step(objective, pairs(), 1)
    assert found["winner_drift"][1].eq(0).all() and objective._state.drift() == 1.0
    objective.begin(10)
    assert len(material(objective, pairs())[1].reference.latent) == 3
    step(objective, pairs(), 10)
    assert objective._state.drift() != 1.0
    assert "winner_drift" not in terms(made(tiny_sd, loss="simpo", drift_limit=None), pairs())


def test_the_run_stops_when_winners_drift(tiny_sd):
    objective = made(tiny_sd, drift_limit=1.1)
    objective.inspect()
    step(objective, pairs(), 0)
    objective.inspect()
    nudge(objective, 0.3)
    for number in range(1, 4):
        step(objective, pairs(), number)
    with pytest.raises(RunFailed, match=r"step 4: the error of the winners has grown to") as caught:
        objective.inspect()
    assert "with --max-steps set to its step writes its result" in str(caught.value)


def test_alpha_follows_the_last_step(tiny_sd):
    objective = made(tiny_sd, loss="alpha_dpo")
    nudge(objective, 0.002)
    step(objective, pairs(), 0)
    found = step(objective, pairs(seed=1), 1)
    assert objective._state.controls(2).alpha.item() == pytest.approx(
        0.9999 * found["probability"].mean().item()
    )


def test_annotators_follow_the_model(tiny_sd):
    """fast: 1/10 of the first weights are left after the first step, 2/11 after the second."""
    objective = made(tiny_sd, lora=True, loss="adaptive_dpo")
    states = {k: dict(v) for k, v in objective.state().items()}
    assert set(states) == {"annotator_slow", "annotator_fast", "preference"}
    name, fast = next((n, w) for n, w in states["annotator_fast"].items() if "lora_B" in n)
    weight = dict(player(objective).named_parameters())[name]
    for number, keep in ((0, 0.1), (1, 2 / 11)):
        before = fast.clone()
        nudge(objective)
        step(objective, pairs(), number)
        expected = keep * before + (1 - keep) * weight.detach()
        torch.testing.assert_close(fast, expected)
    assert all("lora" in n for n in states["annotator_slow"])
    assert all(w.dtype == torch.float32 for w in states["annotator_slow"].values())


def test_weights_begin_after_the_warm_up(tiny_sd):
    """The statistic of a step is that of the steps before it."""
    adaptive = AdaptiveConfig(warmup_steps=2)
    objective = made(tiny_sd, loss="adaptive_dpo", adaptive=adaptive)
    nudge(objective, 0.005)
    squares = []
    for number in range(2):
        found = step(objective, pairs(4, seed=number), number)
        assert found["weight"].eq(1).all() and found["minority"].eq(0).all()
        squares.append(found["square_policy"].mean())
    objective.begin(2)
    found = terms(objective, pairs(4, seed=2))
    rms = ((0.99 * squares[0] + squares[1]) / 1.99).sqrt()
    own = torch.sigmoid(-3.75 * found["margin"] / rms)
    others = objective.minority(pairs(4, seed=2)) * 3 - own
    assert (others > -1e-5).all() and (others < 2 + 1e-5).all()
    torch.testing.assert_close(found["weight"], 1 / (10 * found["minority"] + 1))
    torch.testing.assert_close(objective.minority(pairs(4, seed=2)), found["minority"])
    alone = pairs(4, seed=2)
    alone = PreferenceBatch(*(first(half) for half in (alone.winners, alone.losers)))
    alone = objective.minority(alone)
    torch.testing.assert_close(alone, found["minority"][:1], rtol=1e-3, atol=1e-4)


def first(batch):
    """Its first sample alone."""
    half = rows(batch, slice(1))
    return replace(half, extras=half.extras[:1], names=half.names[:1])


def test_annotators_cost_half_as_much_again(tiny_sd):
    """Of a network pass each: DPO one without gradient and one with, 1 + 3; two annotators more."""
    winners = make_batch(2)
    moments = winners.keys.normal((8, 16, 16), "moments")
    found = {}
    for loss in ("dpo", "adaptive_dpo"):
        objective = made(tiny_sd, loss=loss)
        cond = objective.model.conditioner.encode(winners.captions)
        cached = replace(winners, images=None, moments=moments, conditioning=cond)
        with FlopCounterMode(display=False) as counter:
            terms(objective, PreferenceBatch(cached, cached))["loss"].mean().backward()
        found[loss] = counter.get_total_flops()
    assert found["adaptive_dpo"] / found["dpo"] == pytest.approx(1.5, abs=0.02)


def test_the_published_lora_of_stable_diffusion():
    """Rank 8 on the family's own layers: what the published scripts train."""
    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768)
    targets = family_of("StableDiffusionPipeline").lora_targets
    layers = [
        layer
        for path, layer in plain_modules(network).items()
        if any(path.endswith(f".{target}") for target in targets)
    ]
    assert 2 * len(layers) == 256
    assert sum(8 * (layer.in_features + layer.out_features) for layer in layers) == 1_594_368


# -- decoded pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd-v", *(pytest.param(n, marks=SLOW) for n in ("sd", "sd3"))])
def test_errors_of_decoded_pictures(name, tiny_folder):
    """mu x the same loss of D-space errors; no gradient reaches the decoder."""
    values = {"kappa": 10.0, "pixel_kappa": 20.0, "pixel_weight": 3.0}
    objective = made(tiny_folder(name), loss="dpo", pixel="dpo", **values)
    nudge(objective)
    found = terms(objective, pairs())
    plain = made(tiny_folder(name), loss="dpo", kappa=10.0)
    nudge(plain)
    latent = terms(plain, pairs())["loss"]
    torch.testing.assert_close(found["loss"], latent + 3 * found["pixel_loss"])
    expected = torch.nn.functional.softplus(-20.0 * found["pixel_margin"])
    torch.testing.assert_close(found["pixel_loss"], expected)
    assert found["pixel_margin"].any() and not found["margin"].equal(found["pixel_margin"])
    found["loss"].mean().backward()
    assert gradients(objective)
    assert not any(p.grad is not None for p in objective.model.codec.vae.parameters())


def test_decoded_pictures_without_a_reference(tiny_sd):
    """S = E(l) - E(w) by the codec itself, one window a pair."""
    objective = made(tiny_sd, pixel="simpo", pixel_kappa=5.0, pixel_crop=8)
    draws, shared = material(objective, pairs())
    crop, codec, noisy = draws.crop, objective.model.codec, shared.noisy
    assert torch.equal(*crop.top.chunk(2)) and torch.equal(*crop.left.chunk(2))
    found = player(objective)("preference", draws, shared)
    with torch.no_grad():
        output = player(objective)._output(noisy)
        sigma = objective.model.schedule.alpha_sigma(noisy.t)[1].view(-1, 1, 1, 1)
        second = noisy.z_t + sigma * (output - noisy.target)
        pictures = [codec.decode(crop.of(z)) for z in (noisy.z_t, second)]
    errors = (pictures[0] - pictures[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(found["pixel_margin"], errors[3:] - errors[:3], atol=1e-6, rtol=1e-4)
    relative = made(tiny_sd, pixel="simpo", pixel_kappa=5.0, pixel_crop=8, pixel_relative=True)
    share = errors / pictures[0].flatten(1).var(1)
    found = terms(relative, pairs())
    torch.testing.assert_close(found["pixel_winner_error"], share[:3], atol=1e-6, rtol=1e-4)


def test_pixel_kappa_is_measured(tiny_sd):
    """Against a reference: so that decoded errors count as latent ones do."""
    objective = made(tiny_sd, kappa=100.0, pixel="dpo")
    before = step(objective, pairs(), 0)
    assert before["pixel_kappa"].eq(0).all()
    found = step(objective, pairs(), 1)
    ratio = before["winner_error"].mean() / before["pixel_winner_error"].mean()
    torch.testing.assert_close(found["pixel_kappa"][0], 100 * ratio)


# -- refusals -----------------------------------------------------------------------------------


def test_values_of_denoising_that_would_do_nothing(tiny_sd):
    with pytest.raises(UserError, match="denoising.min_snr: weighs the denoising loss"):
        made(tiny_sd, denoising=DenoisingConfig(condition_dropout=0.0, min_snr=5.0))
    with pytest.raises(UserError, match="timesteps: times out of a list have no density"):
        made(tiny_sd, timesteps=(5,), denoising=DenoisingConfig(density="logit_normal"))


def test_a_window_that_is_no_window(tiny_sd):
    """One as large as the latents was taken without a word, and did nothing."""
    for size in (16, 64):
        with pytest.raises(UserError, match=f"pixel_crop: a window of {size} .* of 16 x 16; give"):
            made(tiny_sd, pixel="dpo", pixel_crop=size)
