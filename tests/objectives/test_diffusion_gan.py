"""One-step distillation on tiny networks: what the generator is, who learns of what, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from diffkit.data.batch import Batch
from diffkit.data.trajectory_store import Prompt
from diffkit.errors import UserError
from diffkit.generation.card import is_student, read_card
from diffkit.generation.trajectories import header_of
from diffkit.models.discriminators import Given
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.one_step import one_step_scheduler
from diffkit.objectives.base import reduce_loss
from diffkit.objectives.consistency import ConsistencyObjective, prepare_student
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.diffusion_gan import DiffusionGanObjective
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig
from diffkit.perceptual.latent_lpips_io import save_latent_lpips
from diffkit.randomness import SampleKeys, normal
from tests.objectives.gan_toy import SIZE, Folder, make, pairs, run


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A narrow random LatentLPIPS network for latents of 4 channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("metric") / "latent_lpips"
    save_latent_lpips(LatentLpips(LatentLpipsConfig(4, width=4)), folder)
    return str(folder)


def moved(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# -- the generator ------------------------------------------------------------------------------


def test_one_call_of_an_eps_model_is_the_schedulers_estimate(tiny_sd: Path) -> None:
    """(z - sigma_T o) / alpha_T: in float64 by hand, and `pred_original_sample` of DDIM."""
    model = LatentDiffusion.load(tiny_sd)
    model.denoiser.double()
    ddim = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    cond = model.conditioner.encode(["a cat", "a dog"])
    z = normal((2, 4, 16, 16), "z").double()
    t = torch.full((2,), 999)
    with torch.no_grad():
        output = model.denoiser(z, t, cond)
    method = DiffusionGanObjective(model, GanConfig("mse", discriminator="none"), DmdConfig(), 4)
    with torch.no_grad():
        found = method.players()["generator"]("generate", None, Given(cond, z))
    table = ddim.alphas_cumprod[999].double()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (z - (1 - table).sqrt() * output) / table.sqrt())
    ddim.set_timesteps(1000)
    step = ddim.step(output.float(), 999, z.float())
    torch.testing.assert_close(found.float(), step.pred_original_sample, rtol=1e-5, atol=1e-4)
    assert 1 / table.sqrt() == pytest.approx(14.65, abs=0.01)


def test_one_call_at_pure_noise_is_the_negative_output_of_a_v_model(tiny_folder: Folder) -> None:
    method = make(tiny_folder("sd-v"), discriminator="none")
    given = Given(method.model.conditioner.encode(["a"]), normal((1, 4, 16, 16), "z"))
    with torch.no_grad():
        found = method.players()["generator"]("generate", None, given)
        output = method.model.denoiser(given.noise, torch.tensor([999]), given.cond)
    torch.testing.assert_close(found, -output)


def test_one_call_of_a_flow(tiny_sd3: Path) -> None:
    method = make(tiny_sd3, discriminator="none")
    given = Given(method.model.conditioner.encode(["a"]), normal((1, 16, 16, 16), "z"))
    with torch.no_grad():
        found = method.players()["generator"]("generate", None, given)
        output = method.model.denoiser(given.noise, torch.tensor([1000.0]), given.cond)
    torch.testing.assert_close(found, given.noise - output)


@pytest.mark.parametrize(("name", "time"), [("sd", 999), ("sd-v", 999), ("sd", 399), ("sdxl", 399)])
def test_the_scheduler_makes_the_same_step(name: str, time: int, tiny_folder: Folder) -> None:
    """An earlier time too: the table then ends there."""
    model = LatentDiffusion.load(tiny_folder(name))
    before = model.schedule
    z, output = normal((2, 4, 8, 8), "z"), normal((2, 4, 8, 8), "o")
    scheduler = one_step_scheduler(model, time)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [time] and scheduler.init_noise_sigma == 1
    stepped = scheduler.step(output, scheduler.timesteps[0], z).prev_sample
    expected = before.prediction(output, z, torch.full((2,), time)).x0
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-6)
    model.set_scheduler(scheduler)
    assert model.schedule.sampling_timesteps(1).tolist() == [time, -1]
    again = one_step_scheduler(model, time)  # of a result that is trained on
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)


# -- who learns of what -------------------------------------------------------------------------

MODES: list[dict[str, Any]] = [
    {},
    {"dmd": True, "discriminator": "ladd", "r1": "approximate"},
    {"dmd": True},
    {"discriminator": "unet", "multiscale": False, "noise_input": False, "mismatch": 0.0},
    {"dmd": True, "regression": "none", "discriminator": "none"},
    {"regression": "none"},
    {"loss": "relativistic"},
]


def some_slow(cases: list[Any], fast: int) -> list[Any]:
    """All cases as parameters, those behind the first `fast` marked slow."""
    marks = [()] * fast + [(pytest.mark.slow,)] * (len(cases) - fast)
    return [pytest.param(case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


@pytest.mark.parametrize("options", some_slow(MODES, 2), ids=str)
def test_every_player_learns_of_its_own_loss_alone(options: dict, tiny_folder: Folder) -> None:
    """Even with the parameters of all others trainable, as they are beside the trainer."""
    method = make(tiny_folder("sd-v"), **options)
    players = method.players()
    for phase in method.phases():
        for player in players.values():
            player.zero_grad(set_to_none=True)
        terms = run(method, phase.name, pairs())
        assert terms["loss"].shape == (4,) and terms["loss"].dtype == torch.float32
        terms["loss"].sum().backward()
        for name, player in players.items():
            assert moved(player) == (name == phase.player), (phase.name, name)
            if name != phase.player:
                assert all(p.grad is None for p in player.parameters())


def test_a_lora_learns_alone(tiny_folder: Folder) -> None:
    method = make(tiny_folder("sd-v"), lora=True)
    run(method, "generator", pairs())["loss"].sum().backward()
    named = dict(method.model.denoiser.named_parameters())
    assert {name for name, p in named.items() if p.grad is not None} == {
        name for name in named if "lora" in name
    }


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_the_generators_gradient_is_that_of_the_weighted_sum(
    loss: str, tiny_folder: Folder
) -> None:
    """With a constant weight: as if both losses had gone back through one graph."""
    method = make(tiny_folder("sd-v"), weight=0.7, r1="none", loss=loss)
    generator, critic = method.players()["generator"], method.players()["discriminator"]
    draws = method.draw(pairs(), 0)
    with torch.no_grad():
        shared = method.shared(draws)
    terms = generator("generator", draws, shared)
    terms["loss"].sum().backward()
    grads = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
    generator.zero_grad(set_to_none=True)
    y = generator.generate(shared.given)
    maps = critic.network(y, shared.given)
    true = [torch.zeros_like(m) for m in maps]
    if loss == "relativistic":
        true = [m.detach() for m in critic.network(shared.real, shared.given)]
    losses = [nn.functional.softplus(t - m).flatten(1).mean(1) for t, m in zip(true, maps)]
    adversarial = torch.stack(losses).mean(0)
    regression = (y - shared.real).square().flatten(1).mean(1)
    (regression + 0.7 * adversarial).sum().backward()
    expected = [p.grad for p in generator.parameters() if p.grad is not None]
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["regression"], regression.detach())
    torch.testing.assert_close(terms["adversarial"], adversarial.detach())


def test_losses_at_logits_of_zero(tiny_folder: Folder) -> None:
    """ln 2 and 2 ln 2, whatever part is mixed."""
    for mismatch in (0.0, 0.75):
        method = make(tiny_folder("sd-v"), mismatch=mismatch, r1="none")
        for head in method.players()["discriminator"].network.heads:  # type: ignore[union-attr]
            nn.init.zeros_(head[2].weight)
            nn.init.zeros_(head[2].bias)
        both = run(method, "discriminator", pairs())["loss"]
        torch.testing.assert_close(both, torch.full((4,), 2 * 0.6931472))
        torch.testing.assert_close(
            run(method, "generator", pairs())["adversarial"], torch.full((4,), 0.6931472)
        )


def test_a_relativistic_discriminator_hears_of_differences_alone(tiny_folder: Folder) -> None:
    """A bias of the heads changes no loss; the accuracy is of pairs."""
    method = make(tiny_folder("sd-v"), loss="relativistic", r1="none", mismatch=0.0)
    before = [run(method, phase.name, pairs()) for phase in method.phases()]
    for head in method.players()["discriminator"].network.heads:  # type: ignore[union-attr]
        head[2].bias.data += 5.0
    after = [run(method, phase.name, pairs()) for phase in method.phases()]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a["loss"], b["loss"])
    critic = before[0]
    right = (critic["real_logit"] > critic["fake_logit"]).float()
    torch.testing.assert_close(critic["accuracy"], right)
    torch.testing.assert_close(after[0]["accuracy"], right)


# -- mix and match, penalties -------------------------------------------------------------------


def test_mixed_rows_are_true_latents_of_others(tiny_folder: Folder) -> None:
    method = make(tiny_folder("sd-v"), mismatch=0.5)
    seen = []
    network = method.players()["discriminator"].network
    hook = network.register_forward_pre_hook(lambda m, args: seen.append(args))
    batch = pairs()
    run(method, "discriminator", batch)
    hook.remove()
    latents, given = seen[0]
    real, fake = latents.chunk(2)
    assert torch.equal(real, batch.latents)
    assert [torch.equal(a, b) for a, b in zip(fake, batch.unrelated, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert torch.equal(given.noise, torch.cat([batch.noise, batch.noise]))
    first, second = given.cond.chunk(2)
    assert torch.equal(first.tokens, second.tokens)


def test_r1_is_of_the_first_sample_at_its_steps(tiny_folder: Folder) -> None:
    """Steps 0, 16, 32; the mean over the batch has 16 gamma / 2 |gradient|^2 of one sample."""
    with_it = make(tiny_folder("sd-v"), gamma=0.4)
    without = make(tiny_folder("sd-v"), r1="none")
    without.players()["discriminator"].load_state_dict(
        with_it.players()["discriminator"].state_dict()
    )
    for step in range(34):
        with_it.begin(step)
        due = with_it.draw(pairs(), 0).penalised.tolist()
        assert due == ([0] if step in (0, 16, 32) else [])
    with_it.begin(16)
    terms, plain = (run(method, "discriminator", pairs()) for method in (with_it, without))
    penalty, count = terms["r1"]
    assert count.tolist() == [1.0, 0.0, 0.0, 0.0] and penalty[0] > 0
    added = (terms["loss"] - plain["loss"]).mean()
    torch.testing.assert_close(added, 16 * 0.4 / 2 * penalty[0], rtol=1e-3, atol=1e-7)
    terms["loss"].mean().backward()
    plain["loss"].mean().backward()
    differ = [
        a.grad is not None and not torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)
        for a, b in zip(
            with_it.players()["discriminator"].parameters(),
            without.players()["discriminator"].parameters(),
            strict=True,
        )
    ]
    assert any(differ)


@pytest.mark.parametrize(
    "options",
    some_slow([{}, {"dmd": True}, {"discriminator": "ladd"}, {"loss": "relativistic"}], 1),
    ids=str,
)
def test_parts_of_a_batch_add_up_to_it(options: dict, tiny_folder: Folder) -> None:
    """Losses and gradients of all phases, the penalty of one sample and mixing included."""
    method = make(tiny_folder("sd-v"), r1_every=1, **options)
    for phase in method.phases():
        player = method.players()[phase.player]
        results = []
        for size in (4, 2):
            player.zero_grad(set_to_none=True)
            losses = []
            for first in range(0, 4, size):
                terms = run(method, phase.name, pairs(size, first=first))
                reduce_loss(terms["loss"], 4).backward()
                losses.append(terms["loss"].detach())
            grads = [p.grad.clone() for p in player.parameters() if p.grad is not None]
            results.append((torch.cat(losses), grads))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# -- regressions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", some_slow(["e_latentlpips", "lpl", "mse", "huber", "latentlpips"], 2)
)
def test_a_perfect_generator_has_no_regression_loss(
    kind: Any, metric: str, tiny_folder: Folder
) -> None:
    more = {"latent_lpips": metric} if kind.endswith("lpips") else {}
    method = make(tiny_folder("sd-v"), regression=kind, discriminator="none", **more)
    batch = pairs()
    draws = method.draw(batch, 0)
    assert (draws.augmentation is not None) == (kind == "e_latentlpips")
    with torch.no_grad():
        shared = method.shared(draws)
    loss = method.players()["generator"].losses["regression"].of(draws, shared)  # type: ignore
    x = batch.latents
    assert loss(x, x).abs().max() < 1e-5
    y = (x + 0.3 * normal(x.shape, "off")).requires_grad_()
    value = loss(y, x)
    assert value.shape == (4,) and (value > 0).all()
    (grad,) = torch.autograd.grad(value.sum(), y)
    assert grad.isfinite().all() and grad.flatten(1).any(1).all()
    terms = run(method, "generator", batch)
    terms["loss"].sum().backward()
    assert moved(method.model.denoiser)
    others = {k: v for k, v in method.model.networks.items() if k != "unet"}
    assert not any(moved(network) for network in others.values())


def test_a_metric_of_other_latents_is_refused(metric: str, tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match="latents of 4 channels"):
        make(tiny_sd3, regression="e_latentlpips", latent_lpips=metric)


# -- order and weights --------------------------------------------------------------------------


def test_who_comes_in_when(tiny_folder: Folder) -> None:
    method = make(tiny_folder("sd-v"), start=5, warmup=3, rate=0.5)
    critic, generator = method.phases()
    assert (critic.player, critic.start, critic.rate) == ("discriminator", 5, 0.5)
    assert (generator.player, generator.start) == ("generator", 0)
    for step, judged, heard in ((0, False, False), (5, True, False), (8, True, True)):
        method.begin(step)
        with torch.no_grad():
            shared = method.shared(method.draw(pairs(), 0))
        assert (shared.fake is not None) == judged
        terms = run(method, "generator", pairs())
        assert ("adversarial" in terms) == heard
        if not heard:
            assert torch.equal(terms["loss"].detach(), terms["regression"])


def test_without_a_regression_the_generator_waits(tiny_folder: Folder) -> None:
    options = {"regression": "none", "warmup": 4, "dmd": True}
    method = make(tiny_folder("sd-v"), DmdConfig(updates=3), **options)
    assert [(p.name, p.start, p.repeats) for p in method.phases()] == [
        ("discriminator", 0, 1),
        ("fake_score", 0, 3),
        ("generator", 4, 1),
    ]
    noises = [method.draw(pairs(), repeat).noise for repeat in range(3)]
    assert torch.equal(noises[0], pairs().noise)
    assert not torch.equal(noises[1], noises[2]) and not torch.equal(noises[0], noises[1])


def test_a_share_finds_its_weight(tiny_folder: Folder) -> None:
    method = make(tiny_folder("sd-v"), share=0.5)
    assert "generator/diversity" not in method.shown()
    for _ in range(3):
        terms = run(method, "generator", pairs())
        means = {name: terms[name].mean() for name in method.watched() if name in terms}
        method.stepped("generator", means)
    terms = run(method, "generator", pairs())
    ratio = (terms["adversarial_square"].mean() / terms["regression_square"].mean()).sqrt()
    torch.testing.assert_close(terms["adversarial_weight"][0] * ratio, torch.tensor(0.5))


def test_dmd_pulls_along_the_difference_of_the_scores(tiny_folder: Folder) -> None:
    """Where the follower is the teacher there is nothing to pull; a moved one pulls away."""
    options = {"regression": "none", "discriminator": "none", "dmd": True}
    method = make(tiny_folder("sd-v"), DmdConfig(guidance=1.0), **options)
    assert run(method, "generator", pairs())["dmd"].abs().max() < 1e-10
    with torch.no_grad():
        for parameter in method.players()["fake_score"].parameters():
            parameter.add_(0.02)
    terms = run(method, "generator", pairs())
    assert (terms["dmd"] > 0).all() and (terms["dmd_square"] > 0).all()
    guided = make(tiny_folder("sd-v"), **options)
    assert guided._score is not None and guided._score.scale == 1.75
    assert (run(guided, "generator", pairs())["dmd"] > 0).all()


def test_pictures_as_the_true_side(tiny_folder: Folder) -> None:
    """DMD2 as it is published: true pictures of other noises, approximate R1, nothing mixed."""
    options = {"regression": "none", "dmd": True, "pictures": True, "warmup": 0}
    method = make(tiny_folder("sd-v"), **options)
    assert (method.config.r1, method.config.mismatch, method.config.noise_input) == (
        "approximate",
        0.0,
        False,
    )
    keys = SampleKeys(5, (0, 0), (0, 1))
    images = normal((2, 3, 32, 32), "picture").clamp(-1, 1)
    batch = Batch(keys, images, None, ["a", "b"], None, None, [SIZE] * 2, ["", ""], [{}, {}])
    for phase in method.phases():
        terms = run(method, phase.name, batch)
        assert terms["loss"].isfinite().all()
        terms["loss"].sum().backward()
        assert moved(method.players()[phase.player])


# -- models --------------------------------------------------------------------------------------


def test_models_that_have_no_one_step(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="EDM"):
        make(tiny_folder("sdxl-edm"))
    with pytest.raises(UserError, match="begin at 1000"):
        make(tiny_folder("sd3"), time=400, discriminator="none")
    with pytest.raises(UserError, match="not one of this model's times"):
        make(tiny_folder("sd"), time=1000)
    with pytest.raises(UserError, match="no place for the scheduler"):
        make(tiny_folder("sd"), lora=True, time=399)


def test_a_student_needs_its_teacher(tiny_folder: Folder) -> None:
    """A discriminator made of a student would know nothing of noise levels but one."""
    first = make(tiny_folder("sd-v"), discriminator="none")
    config = GanConfig("mse", warmup=0)
    with pytest.raises(UserError, match="gan.teacher"):
        DiffusionGanObjective(first.model, config, DmdConfig(), 4)
    teacher = LatentDiffusion.load(tiny_folder("sd-v"))
    second = DiffusionGanObjective(first.model, config, DmdConfig(), 4, teacher=teacher)
    network: Any = second.players()["discriminator"]
    theirs = teacher.denoiser.model.state_dict()
    for name, value in network.network.denoiser.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    with pytest.raises(UserError, match="is no teacher of"):
        other = LatentDiffusion.load(tiny_folder("sd3"))
        DiffusionGanObjective(first.model, config, DmdConfig(), 4, teacher=other)


@pytest.mark.parametrize("name", ["sd3", "sd-v"])
def test_students_that_keep_a_stock_scheduler_are_known_by_their_card(
    name: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    """A flow's one-step student has its teacher's scheduler and was taken for a teacher: of pairs,
    of a discriminator's features, of the score that it should follow. So were students of
    segments, which step by DDIM."""
    folder = tmp_path / "student"
    if name == "sd3":
        make(tiny_folder(name), discriminator="none").save(folder)
    else:
        config = ConsistencyConfig(solver_steps=10, segments=2, embedding=False)
        model = prepare_student(LatentDiffusion.load(tiny_folder(name)), config, False)
        ConsistencyObjective(model, config).save(folder)
    student = LatentDiffusion.load(folder)
    assert not student.schedule.consistency and is_student(student)
    with pytest.raises(UserError, match="gan.teacher"):
        DiffusionGanObjective(student, GanConfig("mse", warmup=0), DmdConfig(), 4)
    with pytest.raises(UserError, match="it is a few-step student"):
        config = GanConfig("mse", warmup=0)
        DiffusionGanObjective(student, config, DmdConfig(), 4, teacher=student)
    with pytest.raises(UserError, match="no teacher of others"):
        header_of(student, [Prompt("a")], count=1, seed=0, shard=1)
    with pytest.raises(UserError, match="few steps already"):
        prepare_student(student, ConsistencyConfig(), False)
    student.save(tmp_path / "again")  # as any training that goes on from it does
    again = LatentDiffusion.load(tmp_path / "again")
    assert is_student(again) and read_card(str(tmp_path / "again")) == read_card(str(folder))


def test_prompts_are_encoded_once_a_step(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five updates of the score that follows cost five runs of the text encoders a step."""
    options = {"dmd": True, "discriminator": "none"}
    method = make(tiny_folder("sd-v"), DmdConfig(guidance=1.0), **options)
    conditioner, calls = method.model.conditioner, []
    encode = conditioner.encode

    def counted(*words: Any, **more: Any) -> Any:
        calls.append(words)
        return encode(*words, **more)

    monkeypatch.setattr(conditioner, "encode", counted)
    for step in range(2):
        method.begin(step)
        for repeat in range(3):
            for first in (0, 2):  # micro-batches, each with its own prompts
                run(method, "fake_score", pairs(2, first=first), repeat)
        run(method, "generator", pairs(2, first=0))
        assert len(calls) == 2 * (step + 1)
    said = [words[0] for words in calls]
    assert said == [["a 0", "a 1"], ["a 2", "a 3"]] * 2
    kept = [cond.tokens for cond, _ in method._asked.values()]
    torch.testing.assert_close(kept[1], encode(["a 2", "a 3"], (32, 32)).tokens)
