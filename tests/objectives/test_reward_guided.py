"""Reward-guided distillation: to whom gradients go, what is bit-equal to plain distillation, which
prompt belongs to which sample, what the proxy is shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.files import read_json, write_json
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.objectives.consistency import ConsistencyObjective, prepare_student
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.reward_guided import (
    RewardGuidedObjective,
    distinct_names,
    fitted_rows,
    prompts_of,
)
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.randomness import SampleKeys
from diffkit.rewards.base import Reward
from diffkit.rewards.proxies import new_latent_clip
from diffkit.rewards.spec import load_reward
from diffkit.rewards.tap_proxy import TapProxy
from tests.objectives.test_denoising import make_batch

embedded_reward = cache(lambda: load_reward("embedded"))

LCD = {"solver_steps": 10, "guidance_min": 1.0, "guidance_max": 3.0}


class Constant(Reward):
    """Whatever the picture shows."""

    name, label, resize = "constant", "constant", "not at all"

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)

    @property
    def networks(self) -> Sequence[nn.Module]:
        return [self.network]

    def read(self, prompts: list[str]) -> Tensor:
        return torch.tensor([float(prompt.rsplit(" ", 1)[1]) for prompt in prompts])

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        return 0 * pixels.flatten(1).mean(1) + embedded


class Bright(Constant):
    """The mean of the pixels, times the number in the prompt."""

    name = "bright"

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        return embedded * pixels.flatten(1).mean(1)


@pytest.fixture(scope="module")
def proxy(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small latent CLIP for the tiny model, with weights as they start."""
    codec = LatentDiffusion.load(tiny_folder("sd-v")).codec
    made = new_latent_clip(codec, 16, "embedded", width=64, layers=2)
    folder = tmp_path_factory.mktemp("proxy") / "clip"
    made.save(folder)
    return folder


@pytest.fixture
def objective(tiny_folder: Callable[[str], Path]) -> Callable[..., RewardGuidedObjective]:
    """`objective(rewards, source, **flags of the reward)` on the tiny v-prediction model."""

    def made(rewards: Any = None, source: str = "sd-v", **flags: Any) -> RewardGuidedObjective:
        config, model = RewardConfig(**flags), student(tiny_folder(source))
        if rewards is None and config.active and config.mode != "frozen_proxy":
            rewards = [(embedded_reward(), 1.0)]
        method = RewardGuidedObjective(model, ConsistencyConfig(**LCD), config, rewards or ())
        method.place(torch.device("cpu"))
        return method

    return made


def student(folder: Path) -> LatentDiffusion:
    model = prepare_student(LatentDiffusion.load(folder), ConsistencyConfig(**LCD), False)
    for network in model.networks.values():
        network.requires_grad_(network is model.denoiser.model)
    return model


def material(method: Any, batch: Any = None) -> tuple[Any, Any]:
    draws = method.draw(make_batch(3) if batch is None else batch, 0)
    with torch.no_grad():
        return draws, method.shared(draws)


def step(method: Any, made: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """The student's terms, after its backward pass."""
    terms = method.players()["student"]("lcd", *(material(method) if made is None else made))
    (terms["loss"].sum() / len(terms["loss"])).backward()
    return terms


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def warm(method: Any) -> None:
    """As after a first step, by which the lengths of gradients are known."""
    names = method._weights.watched()
    method.stepped("lcd", dict.fromkeys(names, torch.tensor(1.0)))


# -- plain distillation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(tiny_folder: Callable[[str], Path]) -> dict[str, Tensor]:
    """The student's gradients in plain distillation."""
    plain = ConsistencyObjective(student(tiny_folder("sd-v")), ConsistencyConfig(**LCD))
    plain.place(torch.device("cpu"))
    step(plain)
    return gradients(plain.players()["student"])


class Forbidden(Constant):
    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        raise AssertionError("a reward that does not count was asked")


@pytest.mark.parametrize(
    ("rewards", "flags"),
    [
        ([], {"mode": "none"}),
        ([(Forbidden(), 1.0)], {"beta": 0.0}),
        ([(Constant(), 1.0)], {"beta": 2.0}),
        ([(Constant(), 1.0)], {"share": 0.5}),
    ],
)
def test_without_a_reward_the_gradient_is_that_of_distillation_to_the_bit(
    distilled: dict[str, Tensor],
    objective: Callable[..., Any],
    rewards: list[tuple[Reward, float]],
    flags: dict[str, Any],
) -> None:
    """No weight, or nothing to gain; a reward without weight is not asked, and nothing decoded."""
    guided = objective(rewards, **flags)
    if "share" in flags:
        warm(guided)
    step(guided)
    found = gradients(guided.players()["student"])
    assert distilled.keys() == found.keys() and len(found) > 10
    assert all(torch.equal(gradient, found[name]) for name, gradient in distilled.items())


# -- gradients ------------------------------------------------------------------------------------


def test_the_direct_reward_moves_the_student_and_nothing_else(objective: Any) -> None:
    """The gradient is that of the distance plus that of -beta R, through one estimate."""
    method = objective([(Bright(), 0.5)], beta=4.0)
    made = material(method)
    terms = step(method, made)
    found = gradients(method.players()["student"])
    (reward, _), network = method.pictures.rewards["bright"], method.players()["student"]
    network.zero_grad()
    estimate = network.end(made[1].start)
    pictures = method.model.codec.decode(estimate)
    loss = network.distance(estimate, made[1].target, made[0])
    (loss - 2.0 * reward.score(pictures, made[1].embedded[0])).mean().backward()
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        terms["bright"], reward.score(pictures, made[1].embedded[0]).detach()
    )
    assert (terms["bright_weight"] == 2.0).all()
    assert (terms["bright_square"] > 0).any() and (terms["lcd_square"] > 0).all()
    frozen = [method._teacher, method.model.codec.vae, *method.model.conditioner.encoders.values()]
    frozen += [*reward.networks]
    assert not any(gradients(module) for module in frozen)
    assert not any(weight.requires_grad for weight in method._target.weights.values())


def test_shares_follow_the_lengths_of_gradients(objective: Any) -> None:
    """Two rewards, 3 to 1: their gradients come to 0.3 and 0.1 of the distance's, scale aside."""
    method = objective([(Bright(), 3.0), (embedded_reward(), 1.0)], share=0.4)
    made = material(method)
    terms = step(method, made)
    assert not terms["bright_weight"].any()  # nothing is known yet
    method.stepped("lcd", {name: terms[name].mean() for name in method.watched()})
    terms = step(method, made)
    main = terms["lcd_square"].mean().sqrt()
    for name, share in (("bright", 0.3), ("embedded", 0.1)):
        length = terms[f"{name}_weight"][0] * terms[f"{name}_square"].mean().sqrt()
        assert (length / main).item() == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("mode", ["proxy", "frozen_proxy"])
def test_the_students_step_gives_the_proxy_no_gradient(
    objective: Any, proxy: Path, mode: str
) -> None:
    method = objective(mode=mode, proxy=proxy, beta=1.0)
    for parameter in method.proxy.parameters():
        parameter.requires_grad_()
    terms = step(method)
    assert not gradients(method.proxy) and not gradients(method._teacher)
    assert gradients(method.players()["student"])
    assert (terms["proxy_square"] > 0).all() and terms["proxy"].abs().max() <= 1


def test_the_refit_gives_the_student_no_gradient(objective: Any, proxy: Path) -> None:
    """And locked layers none; they are the same bits after a step, the unlocked ones are not."""
    method = objective(mode="proxy", proxy=proxy, beta=1.0)
    made = material(method)
    step(method, made)
    network, player = method.players()["student"], method.players()["proxy"]
    network.zero_grad()
    before = {name: p.detach().clone() for name, p in player.proxy.named_parameters()}
    optimizer = torch.optim.SGD([p for p in player.parameters() if p.requires_grad], lr=0.1)
    terms = player("refit", *made)
    terms["loss"].mean().backward()
    assert not gradients(network)
    optimizer.step()
    unlocked = set(player.proxy.unlocked())
    assert 0 < len(unlocked) < len(before)
    same = {n for n, p in player.proxy.named_parameters() if torch.equal(p, before[n])}
    assert same == before.keys() - unlocked
    assert not any(gradients(n) for r, _ in method.pictures.rewards.values() for n in r.networks)


def test_a_head_on_the_teacher_leaves_the_teacher_alone(objective: Any) -> None:
    method = objective(mode="proxy", beta=1.0)
    made = material(method)
    step(method, made)
    player = method.players()["proxy"]
    player("refit", *made)["loss"].mean().backward()
    assert gradients(player) and not gradients(method._teacher)
    assert not any("teacher" in name or "denoiser" in name for name in player.state_dict())


def test_the_proxy_has_a_learning_rate_of_its_own(objective: Any, proxy: Path) -> None:
    """In parts of the run's, here 1e-4: the paper's for a CLIP, more for a head that is new."""
    clip = objective(mode="proxy", proxy=proxy, refit_every=3).phases()
    assert [phase.name for phase in clip] == ["lcd", "refit"] and clip[1].every == 3
    assert clip[1].rate == pytest.approx(0.033) and clip[0].rate == 1
    assert objective(mode="proxy").phases()[1].rate == pytest.approx(1.0)
    assert objective(mode="proxy", refit_rate=0.001).phases()[1].rate == pytest.approx(10.0)


# -- prompts and samples --------------------------------------------------------------------------


def test_prompts_follow_the_samples_that_are_fitted(objective: Any, proxy: Path) -> None:
    """Rows in any order, some left out: expert and proxy read the prompt of each row's latents."""
    method = objective([(Bright(), 1.0)], mode="proxy", proxy=proxy, beta=1.0)
    draws, shared = material(method, make_batch(4))
    step(method, (draws, shared))
    player, rows = method.players()["proxy"], torch.tensor([3, 0, 2])
    some = replace(draws, fitted=rows, fit_weight=torch.full((3,), 4 / 3))
    found = player("refit", some, shared)
    alone = []
    for row in rows.tolist():
        one = torch.tensor([row])
        alone.append(player("refit", replace(draws, fitted=one, fit_weight=torch.ones(1)), shared))
    for place, row in enumerate(rows.tolist()):
        torch.testing.assert_close(found["loss"][row], 4 / 3 * alone[place]["loss"][row])
        for name in ("reward", "reward_target", "reward_real"):
            torch.testing.assert_close(found[name][0][row], alone[place][name][0][row])
        torch.testing.assert_close(
            torch.stack(found["gap_accuracy"])[:, row],
            torch.stack(alone[place]["gap_accuracy"])[:, row],
        )
    assert found["loss"][1] == 0 and found["accuracy"][1].tolist() == [1, 0, 1, 1]
    gaps = found["gap_accuracy"][1]  # the first prompt is rewarded with 0 times the brightness
    assert gaps.gt(0).tolist() == [False, False, True, True]
    pictures = method.model.codec.decode(shared.z0)
    expected = torch.arange(4) * ((pictures + 1) / 2).clamp(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(found["reward_real"][0][rows], expected[rows])


def test_every_sample_has_its_own_luck_of_being_fitted() -> None:
    keys = SampleKeys(5, (0,) * 400, tuple(range(400)))
    rows, weight = fitted_rows(keys, 0.25, 0)
    assert 70 < len(rows) < 130 and (weight == 4).all()
    halves = [fitted_rows(keys.select(part), 0.25, 0)[0] for part in (slice(200), slice(200, 400))]
    assert torch.equal(rows, torch.cat([halves[0], halves[1] + 200]))
    assert not torch.equal(rows, fitted_rows(keys, 0.25, 1)[0])
    none = fitted_rows(keys.select(slice(1)), 1e-9, 0)
    assert none[0].tolist() == [0] and none[1].tolist() == [0.0]
    assert fitted_rows(keys, 1.0, 0)[0].tolist() == list(range(400))


def test_classes_are_called_by_their_names(tiny_folder: Callable[[str], Path]) -> None:
    from diffkit.models.classes import Classes

    classes = Classes(3, names={0: "cat", 2: "dog"})
    batch = make_batch(3, labels=torch.tensor([2, 0, 1]))
    assert prompts_of(batch, classes) == ["dog", "cat", "1"]
    assert prompts_of(batch, None) == batch.captions


def test_rewards_of_one_name_are_told_apart() -> None:
    assert distinct_names(["clip", "hps", "clip", "clip"]) == ["clip", "hps", "clip_2", "clip_3"]


# -- what the proxy is shown ----------------------------------------------------------------------


def test_the_proxy_reads_raw_latents_in_both_steps(objective: Any, proxy: Path) -> None:
    """z / scaling + shift, as the decoder takes them; the tiny model's scaling is 0.5."""
    method = objective(mode="proxy", proxy=proxy, beta=1.0)
    draws, shared = material(method)
    seen: list[Tensor] = []
    hook = method.proxy.image.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    step(method, (draws, shared))
    estimate = shared.candidates.latents[0]
    method.players()["proxy"]("refit", draws, shared)
    hook.remove()
    torch.testing.assert_close(seen[0], estimate / 0.5)
    for found, latents in zip(seen[1:], (estimate, shared.target, shared.z0), strict=True):
        torch.testing.assert_close(found, latents / 0.5)


def test_alpha_weights_the_reward_by_the_signal(objective: Any) -> None:
    method = objective([(Bright(), 1.0)], "sd", weighting="alpha", beta=1.0)
    draws, shared = material(method)
    torch.testing.assert_close(shared.factor, method.model.schedule.alpha_sigma(draws.t)[0])
    plain = step(objective([(Bright(), 1.0)], "sd", beta=1.0), None)
    found = step(method, (draws, shared))
    torch.testing.assert_close(found["bright"], plain["bright"])
    torch.testing.assert_close(
        found["bright_square"], plain["bright_square"] * shared.factor.square()
    )


def test_alpha_is_for_eps_models(objective: Any) -> None:
    """Of others it would only take the reward away, all of it where one step starts."""
    with pytest.raises(UserError, match="reward.weighting: alpha .* predicts v_prediction"):
        objective([(Bright(), 1.0)], weighting="alpha")


def test_a_proxy_of_another_autoencoder_is_refused(
    objective: Any, proxy: Path, tmp_path: Path
) -> None:
    """Two autoencoders of four channels scale their latents differently."""
    shutil.copytree(proxy, tmp_path / "other")
    config = read_json(tmp_path / "other" / "config.json")
    write_json(tmp_path / "other" / "config.json", config | {"scale": [0.13025]})
    with pytest.raises(UserError, match="scaled by .0.13025"):
        objective(mode="frozen_proxy", proxy=tmp_path / "other")


def test_what_a_proxy_reads_moves_with_it(tiny_folder: Callable[[str], Path]) -> None:
    """Beside a LoRA there is no other copy of the teacher, and this one stayed on the CPU."""
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    add_lora(model, 2, name="default")
    model = prepare_student(model, ConsistencyConfig(**LCD), True)
    config = RewardConfig(mode="proxy", beta=1.0)
    rewards = [(Bright(), 1.0)]
    method = RewardGuidedObjective(model, ConsistencyConfig(**LCD), config, rewards, "default")
    method.place(torch.device("meta"))
    assert isinstance(method.proxy, TapProxy)
    assert method.proxy._teacher[0].device.type == "meta"


@pytest.mark.parametrize("temperature", ["auto", "median"])
def test_a_reward_without_a_scale_is_measured_by_its_running_median(
    objective: Any, proxy: Path, temperature: str
) -> None:
    """The first refit only measures; then a typical pair differs by one logit.

    So is, where that is asked for, one with a scale. The embedded scorer sees students, targets and
    pictures differ by a fraction of a logit of its own, so that it prefers hardly anything.
    """
    rewards = [(Bright(), 1.0)] if temperature == "auto" else None
    options: dict[str, Any] = {"mode": "proxy", "proxy": proxy, "beta": 1.0}
    method = objective(rewards, refit_temperature=temperature, **options)
    made = material(method)
    step(method, made)
    player = method.players()["proxy"]
    terms = player("refit", *made)
    assert not terms["loss"].any() and not terms["temperature"].any()
    means = {
        name: torch.stack([part.mean() for part in terms[name]]) for name in ("gap", "gap_above")
    }
    method.stepped("refit", means)
    torch.testing.assert_close(method.median.value, terms["gap"][0].mean())
    assert player("refit", *made)["loss"].all()
    nothing = dict.fromkeys(means, torch.zeros(2))
    method.stepped("refit", nothing)
    torch.testing.assert_close(method.median.value, terms["gap"][0].mean())
    assert method.state()["temperature"]["median"] is method.median.value
    assert "temperature" not in objective(mode="proxy", proxy=proxy, beta=1.0).state()


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"mode": "none", "share": 0.2}, "reward.share: would do nothing"),
        ({"beta": 0.0, "chunk": 2}, "reward.chunk: would do nothing"),
        ({"beta": 1.0, "share": 0.2}, "the weight is fixed by reward.beta"),
        ({"share": 0.0}, "--reward.mode none"),
        ({"beta": -1.0}, "must not be negative"),
        ({"refit_every": 2}, "reward.refit_every: would do nothing"),
        ({"proxy": Path("x")}, "reward.proxy: would do nothing"),
        ({"mode": "frozen_proxy"}, "needs a trained proxy"),
        ({"mode": "frozen_proxy", "proxy": Path("x"), "refit_rate": 1.0}, "is not fitted"),
        ({"mode": "frozen_proxy", "proxy": Path("x"), "decoder": "x"}, "decodes nothing"),
        ({"mode": "proxy", "refit_share": 1.5}, "not in (0, 1]"),
        ({"mode": "proxy", "checkpoint": "block"}, "reward.checkpoint: would do nothing"),
        ({"rewards": "nonsense"}, "unknown"),
        ({"chunk": 0}, "must be above 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        RewardConfig(**flags).check()
    assert said in str(caught.value)


def test_segments_end_in_noise_that_no_reward_can_judge(tiny_folder: Any) -> None:
    config = ConsistencyConfig(**{**LCD, "segments": 2})
    model = prepare_student(LatentDiffusion.load(tiny_folder("sd-v")), config, False)
    with pytest.raises(UserError, match="noisy latents"):
        RewardGuidedObjective(model, config, RewardConfig(), [(Bright(), 1.0)])


def tapped(folder: Path, lora: bool, **flags: Any) -> RewardGuidedObjective:
    """With a head on the teacher, of all weights or of a LoRA."""
    config = ConsistencyConfig(**LCD)
    model = prepare_student(LatentDiffusion.load(folder), config, lora)
    if lora:
        add_lora(model, 2, name="default")
    reward, given = RewardConfig(mode="proxy", **flags), [(embedded_reward(), 1.0)]
    name = "default" if lora else None
    return RewardGuidedObjective(model, config, reward, given, name)


def test_a_lora_holds_no_second_decoder_for_its_proxy(tiny_sd: Path) -> None:
    """A head reads the first half of a frozen copy; the other half was kept too."""
    whole, half = (tapped(tiny_sd, lora) for lora in (False, True))
    sizes = []
    for method in (whole, half):
        assert method._read is not None
        sizes.append(sum(p.numel() for p in method._read.parameters()))
    assert sizes[1] < 0.7 * sizes[0]
    z, cond = torch.randn(2, 4, 16, 16), whole.model.conditioner.encode(["a", "b"])
    assert whole.proxy is not None and half.proxy is not None
    torch.testing.assert_close(half.proxy(z, cond), whole.proxy(z, cond))


def test_a_head_of_another_teacher_is_refused_at_the_start(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Blocks are named alike in all Stable Diffusions: a head failed in its first step, or not."""
    made = tapped(tiny_folder("sd"), False).proxy
    assert isinstance(made, TapProxy)
    made.save(tmp_path / "proxy")
    config = read_json(tmp_path / "proxy" / "config.json")
    assert tapped(tiny_folder("sd"), False, proxy=tmp_path / "proxy").proxy is not None
    other = TapProxy(replace(made.config, text=config["text"] + 8), made._teacher[0])
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="made for another model"):
        tapped(tiny_folder("sd"), False, proxy=tmp_path / "other")
