"""LPL as an objective: gate, weight by share, what it adds to denoising and to whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Schedule
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from diffkit.objectives.latent_perceptual import (
    LatentPerceptualObjective,
    ShareControl,
    share_weight,
    snr_gate,
    whole_batch,
)
from diffkit.objectives.latent_perceptual_config import LatentPerceptualConfig
from diffkit.perceptual.decoder_features import FeatureLoss, latent_perceptual_loss
from tests.objectives.test_denoising import make_batch


def objective(folder: Path, denoising: dict[str, Any] | None = None, **config: Any) -> Any:
    """On the model in `folder`, all weights of its denoiser in training."""
    model = LatentDiffusion.load(folder)
    for network in model.networks.values():
        network.requires_grad_(network is model.denoiser.model)
    made = LatentPerceptualObjective(
        model, LatentPerceptualConfig(**config), DenoisingConfig(**(denoising or {}))
    )
    made.place(torch.device("cpu"))
    return made


def run(method: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    draws = method.draw(batch, 0)
    with torch.no_grad():
        shared = method.shared(draws)
    return draws, method.players()["denoiser"]("lpl", draws, shared)


# -- gate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "threshold", "reading", "count"),
    [
        ("scaled_linear", 3.0, "snr", 203),
        ("scaled_linear", 6.0, "snr", 129),
        ("scaled_linear", 5.0, "snr", 147),
        ("scaled_linear", 1.0, "snr", 354),
        ("scaled_linear", 3.0, "noise_to_signal", 674),
        ("linear", 3.0, "snr", 165),
        ("linear", 1.0, "snr", 259),
        ("squaredcos_cap_v2", 3.0, "snr", 328),
        ("squaredcos_cap_v2", 6.0, "snr", 240),
    ],
)
def test_times_inside_the_gate(schedule: str, threshold: float, reading: Any, count: int) -> None:
    """t < 203 for an SNR of 3 on Stable Diffusion's schedule; 1/9 is the other reading of 3."""
    from diffusers import DDPMScheduler

    betas = (0.00085, 0.012) if schedule == "scaled_linear" else (1e-4, 0.02)
    made = DDPMScheduler(beta_schedule=schedule, beta_start=betas[0], beta_end=betas[1])
    snr = Schedule.from_scheduler(made).snr(torch.arange(1000))
    gate = snr_gate(snr, threshold, reading)
    assert gate.sum().item() == count and gate[:count].all()


@pytest.mark.parametrize("tau", [6.0, 5.0, 3.0, 1.0])
def test_the_gate_of_a_straight_flow(tau: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    t = torch.linspace(1, 1000, 1000)
    edge = 1 / (1 + math.sqrt(tau))
    assert torch.equal(snr_gate(schedule.snr(t), tau), t / 1000 <= edge)
    assert torch.equal(snr_gate(schedule.snr(t), 3.0, "noise_to_signal"), t / 1000 <= 0.75)


def test_the_mean_is_over_the_whole_batch() -> None:
    values = torch.tensor([2.0, 4.0], requires_grad=True)
    spread = whole_batch(values, torch.tensor([3, 1]), 4)
    assert spread.tolist() == [0.0, 4.0, 0.0, 2.0]
    assert spread.mean().item() == 1.5
    alone = whole_batch(values[:1], torch.tensor([3]), 4)  # half the share of equal content
    assert alone.mean().item() == 0.5
    assert whole_batch(values[:0], torch.tensor([], dtype=torch.int64), 4).tolist() == [0.0] * 4


# -- weight -------------------------------------------------------------------------------------


def test_weight_of_a_share_by_hand() -> None:
    """s = 0.2, L = 0.12, G = 0.01: w = 0.25 * 12 = 3, and w G = 0.03 is a fifth of 0.15."""
    found = share_weight(torch.tensor(0.12), torch.tensor(0.01), 0.2)
    assert found.item() == pytest.approx(3.0)
    limits = [share_weight(torch.tensor(x), torch.tensor(1.0), 0.2).item() for x in (1e-6, 1e6)]
    assert limits == pytest.approx([0.1, 100.0])
    assert share_weight(torch.tensor(0.5), torch.tensor(0.0), 0.2).item() == 3.0


def test_the_weight_of_the_channel_norm_is_larger_by_the_channels(
    tiny_folder: Callable[[str], Path],
) -> None:
    """Of the mid block. In bounds of the spatial norm the share of 0.2 ended at 2 to 6 %.

    L = 0.12, G = 2e-5: w = 0.25 * 6000 = 1500, beyond 100 but within 512 * 100.
    """
    small = torch.tensor(0.12), torch.tensor(2e-5)
    assert share_weight(*small, 0.2).item() == 100.0
    assert share_weight(*small, 0.2, 512).item() == pytest.approx(1500.0)
    assert share_weight(torch.tensor(0.5), torch.tensor(0.0), 0.2, 512).item() == 1536.0
    for norm, weight in (("spatial", 3.0), ("channel_norm_target", 3.0 * 16)):
        method = objective(tiny_folder("sd-v"), norm=norm)
        assert method.model.codec.vae.config.block_out_channels[-1] == 16
        assert method.state()["lpl"]["weight"].item() == weight


def test_a_weight_frozen_at_a_bound() -> None:
    for perceptual, bound in ((2e-5, 100.0), (1.0, 0.1), (0.01, None)):
        for unit in (1, 8):
            control = ShareControl(0.2, 3.0, unit)
            for _ in range(200):
                assert control.bounded() is None
                control.update(torch.tensor(0.12), torch.tensor(perceptual / unit))
            assert control.bounded() == (bound and pytest.approx(unit * bound))


def test_the_averages_and_when_the_weight_is_frozen() -> None:
    control = ShareControl(0.2, 3.0)
    control.update(torch.tensor(0.4), torch.tensor(0.0))  # no gated sample
    assert control.weight.item() == 3.0
    control.update(torch.tensor(0.4), torch.tensor(0.1))
    # corrected for the start at 0: L = 0.4 and G = 0.1 * 0.01 / (1 - 0.99^2) = 0.0502513
    assert control.weight.item() == pytest.approx(0.25 * 0.4 / (0.1 * 0.01 / (1 - 0.99**2)), 1e-4)
    for _ in range(198):
        control.update(torch.tensor(0.4), torch.tensor(0.1))
    frozen = control.weight.item()
    assert control.tensors["steps"].item() == 200
    control.update(torch.tensor(9.0), torch.tensor(0.1))
    assert control.weight.item() == frozen < 2
    fixed = ShareControl(None, 7.0)
    fixed.update(torch.tensor(0.4), torch.tensor(0.1))
    assert fixed.weight.item() == 7.0


def test_configs_that_cannot_work() -> None:
    for wrong, message in (
        ({"weight": 3.0, "share": 0.2}, "leave one of them out"),
        ({"weight": -1.0}, "lpl.weight"),
        ({"share": 1.0}, "lpl.share"),
        ({"threshold": 0.0}, "lpl.threshold"),
        ({"threshold": float("inf")}, "lpl.threshold: inf must be a finite number"),
        ({"blocks": -1}, "lpl.blocks"),
        ({"start": -1}, "lpl.start"),
        ({"norm": "channel_norm_target", "stats": "own"}, "lpl.stats"),
    ):
        with pytest.raises(UserError, match=message):
            LatentPerceptualConfig(**wrong).check()


# -- objective ----------------------------------------------------------------------------------

FAMILIES = ("sd", "sd-v", "sdxl", "sd3", "flux", "pixart-alpha")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_perfect_output_has_no_loss(name: str, tiny_folder: Callable[[str], Path]) -> None:
    """The true target in the model's own parametrisation gives z_0 back, for times in the gate."""
    schedule = LatentDiffusion.load(tiny_folder(name)).schedule
    z0, eps = torch.randn(64, 4, 4, 4), torch.randn(64, 4, 4, 4)
    t = schedule.train_timesteps(torch.linspace(0, 0.999, 64))
    inside = snr_gate(schedule.snr(t), 3.0)
    assert 8 < inside.sum() < 40
    z0, eps, t = z0[inside], eps[inside], t[inside]
    z_t = schedule.add_noise(z0, eps, t)
    found = schedule.prediction(schedule.target(z0, eps, t), z_t, t).x0
    torch.testing.assert_close(found, z0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *(("sd-v", "low"), ("sd3", "low"), ("flux", "plain")),
        *(("sd", "plain"), ("sdxl-edm", "plain"), ("latent", "low")),
    ],
)
def test_it_adds_what_the_formula_says(
    name: str, memory: Any, tiny_folder: Callable[[str], Path]
) -> None:
    tau = 30.0 if name == "sdxl-edm" else 0.3
    method = objective(
        tiny_folder(name), {"condition_dropout": 0.0}, weight=2.0, threshold=tau, memory=memory
    )
    batch = make_batch(6)
    draws, terms = run(method, batch)
    schedule, player = method.model.schedule, method.players()["denoiser"]
    gate = snr_gate(schedule.snr(draws.t), tau)
    assert 0 < gate.sum() < 6
    assert torch.equal(terms["lpl_gated"], gate.float())
    with torch.no_grad():
        shared = method.shared(draws)
        said = player.denoise(draws, shared)
        estimate = schedule.prediction(said.output, said.z_t, draws.t).x0
        lpl = latent_perceptual_loss(method.model.codec, estimate, shared.z0, FeatureLoss()).value
    torch.testing.assert_close(terms["lpl"], torch.where(gate, lpl, 0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], terms["denoising_loss"] + 2 * terms["lpl"])
    added, whole = terms["lpl_share"]
    torch.testing.assert_close(added, 2 * terms["lpl"])
    assert torch.equal(whole, terms["loss"].detach())
    variances = [key for key in terms if key.startswith("lpl_variance")]
    assert variances == ["lpl_variance_mid", "lpl_variance_up_0", "lpl_variance_up_1"]
    assert all(0.2 < (a.sum() / b.sum()) < 20 for a, b in (terms[key] for key in variances))


@pytest.mark.parametrize("memory", ["plain", "low"])
def test_only_the_denoiser_learns_and_only_from_gated_samples(
    memory: Any, tiny_folder: Callable[[str], Path]
) -> None:
    method = objective(tiny_folder("sd-v"), threshold=1.0, memory=memory)
    player, batch = method.players()["denoiser"], make_batch(6)
    draws = method.draw(batch, 0)
    with torch.no_grad():
        shared = method.shared(draws)
        said = player.denoise(draws, shared)
    output = said.output.requires_grad_()
    lpl = player._compare(said, draws, shared).value
    (grad,) = torch.autograd.grad(lpl.sum(), output)
    inside = [bool(g.any()) for g in grad]
    assert [i for i, moved in enumerate(inside) if moved] == draws.gated.tolist()
    assert 0 < sum(inside) < 6
    player("lpl", draws, shared)["loss"].sum().backward()
    for name, network in method.model.networks.items():
        moved = any(p.grad is not None and p.grad.any() for p in network.parameters())
        assert moved == (name == "unet"), name


def test_min_snr_does_not_weigh_it(tiny_folder: Callable[[str], Path]) -> None:
    plain, weighted = (
        run(objective(tiny_folder("sd-v"), {"min_snr": snr}, weight=1.0), make_batch(8))[1]
        for snr in (None, 5.0)
    )
    assert torch.equal(plain["lpl"], weighted["lpl"]) and plain["lpl"].any()
    assert not torch.equal(plain["denoising_loss"], weighted["denoising_loss"])
    torch.testing.assert_close(weighted["loss"], weighted["denoising_loss"] + weighted["lpl"])


@pytest.mark.parametrize("config", [{"threshold": 1e9}, {"weight": 0.0}, {"start": 1}])
def test_without_a_gated_sample_weight_or_start_it_is_denoising_to_the_bit(
    config: dict[str, Any], tiny_folder: Callable[[str], Path]
) -> None:
    folder, batch = tiny_folder("sd-v"), make_batch(4)
    method = objective(folder, **config)
    method.begin(0)
    _, terms = run(method, batch)
    base = DenoisingObjective(LatentDiffusion.load(folder), DenoisingConfig())
    base.place(torch.device("cpu"))
    _, expected = run(base, batch)
    assert torch.equal(terms["loss"], expected["loss"])
    terms["loss"].sum().backward()
    expected["loss"].sum().backward()
    for a, b in zip(
        method.players()["denoiser"].parameters(), base.players()["denoiser"].parameters()
    ):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    if "start" in config:
        method.begin(1)
        assert run(method, batch)[1]["lpl"].any()
    assert bool(terms["lpl"].any()) == ("weight" in config)


def test_pure_noise_outside_the_gate_gives_no_nan(tiny_folder: Callable[[str], Path]) -> None:
    """At zero terminal SNR an eps-predictor has no estimate of z_0: 0 x infinity is NaN."""
    method = objective(tiny_folder("sd"), weight=1.0)
    table = method.model.schedule._base
    alphas = table[0].clone()
    alphas[-2] = 0  # the last training time
    method.model.schedule._base = alphas, (1 - alphas.square()).sqrt()
    method.model.schedule._tables.clear()
    draws = method.draw(make_batch(4), 0)
    draws.t[:] = torch.tensor([999, 50, 999, 100])
    object.__setattr__(draws, "gated", torch.tensor([1, 3]))
    with torch.no_grad():
        shared = method.shared(draws)
    terms = method.players()["denoiser"]("lpl", draws, shared)
    terms["loss"].sum().backward()
    assert terms["loss"].isfinite().all() and (terms["lpl"] > 0).tolist() == [False, True] * 2
    grads = [p.grad for p in method.players()["denoiser"].parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


def test_terms_are_the_same_whatever_is_gated(tiny_folder: Callable[[str], Path]) -> None:
    """Every micro-batch of every process must log alike."""
    some, none = (
        run(objective(tiny_folder("sd-v"), threshold=tau), make_batch(4))[1] for tau in (0.1, 1e9)
    )
    assert sorted(some) == sorted(none)
    for key, value in none.items():
        assert isinstance(value, tuple) == isinstance(some[key], tuple), key


def test_models_that_have_no_use_for_it(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="works on pixels"):
        objective(tiny_folder("pixel"))
    model = LatentDiffusion.load(tiny_folder("sd"))
    model.codec.vae.register_to_config(force_upcast=False)
    model.codec.to(dtype=torch.float16)
    with pytest.raises(UserError, match="float16"):
        LatentPerceptualObjective(model, LatentPerceptualConfig(), DenoisingConfig())


def test_it_warns_once_of_inflated_features(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    method = objective(tiny_folder("sd-v"))
    capsys.readouterr()  # of the model's making, if it was made here
    names = [name for name in method.watched() if "variance" in name]

    def step(ratio: float) -> None:
        means: dict[str, Tensor] = {"denoising_loss": torch.tensor(0.3), "lpl": torch.tensor(0.1)}
        means |= {name: torch.tensor([0.5, 0.5]) for name in names}
        means[names[-1]] = torch.tensor([ratio, 1.0])
        method.stepped("lpl", means)
        method.inspect()

    for ratio in (1.01,) * 101 + (1.5, 1.01):
        method.inspect()
        step(ratio)
    assert capsys.readouterr().err == ""  # one step alone is luck
    for _ in range(100):
        step(1.05)
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "up_1 1.02" in told and "mid" not in told


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "a lower --lpl.share or --lpl.stats prediction_detached"),
        ({"weight": 3.0}, "a lower --lpl.weight or --lpl.stats prediction_detached"),
        ({"stats": "prediction_detached"}, "; a lower --lpl.share holds"),
        ({"stats": "target", "weight": 3.0}, "; a lower --lpl.weight holds"),
        ({"stats": "own"}, "does not see. Compare"),
        ({"norm": "channel_norm_target"}, "; a lower --lpl.share holds"),
        ({"weight": 0.0}, None),
    ],
)
def test_the_advice_against_inflation_is_one_that_can_be_followed(
    config: dict[str, Any],
    said: str | None,
    tiny_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It told of a loss that is inflated where there was none, and of flags without effect."""
    method = objective(tiny_folder("sd-v"), **config)
    capsys.readouterr()
    state = method.state()["lpl"]
    for key, value in {"steps": 150.0, "denoising": 0.3, "perceptual": 0.1}.items():
        state[key].fill_(value)
    state["variances"].copy_(torch.tensor([[1.0, 1.0], [1.1, 1.0], [1.0, 1.0]]))
    for _ in range(2):
        method.inspect()
    told = capsys.readouterr().err
    assert told.count("warning") == (said is not None) and (said or "") in told
    if said is not None:
        falls = "the loss falls by inflating them" in told
        assert falls == ("stats" not in config and "norm" not in config)


def test_it_warns_of_a_share_that_is_not_reached(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    method = objective(tiny_folder("sd-v"))
    capsys.readouterr()
    state = method.state()["lpl"]
    for key, value in {"steps": 200.0, "denoising": 0.12, "perceptual": 2e-5}.items():
        state[key].fill_(value)
    state["weight"].fill_(100.0)
    state["variances"].fill_(1.0)
    for _ in range(2):
        method.inspect()
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "at its bound 100;" in told
    assert "--lpl.weight 1500" in told


def test_it_warns_of_a_gate_that_never_opens(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    method = objective(tiny_folder("sd-v"), weight=3.0)
    capsys.readouterr()  # of the model's making, if it was made here
    means = dict.fromkeys(method.watched(), torch.zeros(2)) | {"lpl": torch.tensor(0.0)}
    means["denoising_loss"] = torch.tensor(0.3)
    for _ in range(102):
        method.inspect()
        method.stepped("lpl", means)
    assert capsys.readouterr().err.count("no sample was inside the gate") == 1


def test_state_is_what_a_resumed_run_needs(tiny_folder: Callable[[str], Path]) -> None:
    method = objective(tiny_folder("sd-v"))
    state = method.state()["lpl"]
    assert sorted(state) == ["denoising", "perceptual", "steps", "variances", "weight"]
    before = {key: value.clone() for key, value in state.items()}
    zero = torch.zeros(2)
    means = dict.fromkeys(method.watched(), zero) | {
        "denoising_loss": torch.tensor(0.4),
        "lpl": torch.tensor(0.1),
    }
    method.stepped("lpl", means)
    again = method.state()["lpl"]
    assert all(again[key] is state[key] for key in state)
    assert not torch.equal(state["weight"], before["weight"])
    assert again["weight"] is method.players()["denoiser"].control.weight
