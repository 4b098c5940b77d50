"""Sets protected with a surrogate that trains: budgets, order, rounds, the model afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models import lora
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora_layers import lora_layers
from diffkit.protection import gradients
from diffkit.protection.joint import protect_set
from diffkit.protection.joint_set import JointSet, Row
from diffkit.protection.learner import learner
from diffkit.protection.protect import prepared
from diffkit.protection.rounds import attack_rounds, prior_weight, training_steps, work_of
from diffkit.protection.settings import Settings
from tests.models.lora_helpers import randomise
from tests.protection.attacks import hole, random_pixels

Loader = Callable[[str], LatentDiffusion]

JOINT = ("ace", "ace+", "fsmg", "aspl")
WALKS = ["ace", pytest.param("ace+", marks=pytest.mark.slow), "fsmg", "aspl"]
"""All of them; ace+ differs from ace in its loss alone."""

SEEDS = [7, 3, 5]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, which take most of the time here, of two draws."""
    monkeypatch.setattr(gradients, "HELD_OUT", 2)


def settings_of(method: str, **options: Any) -> Settings:
    """Short: three sign steps in two rounds, two training steps each."""
    usual: dict[str, Any] = {"steps": 3, "train_steps": 2, "prompt": "a", "seed": 1}
    if method != "fsmg":
        usual["rounds"] = 2
    return Settings(method, **(usual | options))


def pictures() -> list[Tensor]:
    """Two of one size and one of another."""
    return [*random_pixels(2), random_pixels(1, 16, 24)[0]]


def protected(
    model: LatentDiffusion, settings: Settings, rows: Sequence[Tensor] | None = None, **options: Any
) -> list[Tensor]:
    """The results of two pictures of one size, or of these."""
    rows = list(random_pixels(2)) if rows is None else rows
    results = protect_set(rows, model, settings, seeds=SEEDS[: len(rows)], **options)
    return [result.pixels for result in results]


def change_of(model: LatentDiffusion, settings: Settings) -> list[float]:
    """How far each round moved the surrogate."""
    results = protect_set(list(random_pixels(1)), model, settings, seeds=[3])
    change: list[float] = results[0].stats["surrogate_change"]
    return change


def standing(model: LatentDiffusion) -> dict[str, Any]:
    """All that a user could see of the state of a model."""
    found: dict[str, Any] = {}
    for name, network in model.networks.items():
        found[name] = [(path, type(m), m.training) for path, m in network.named_modules()]
        found[f"{name} weights"] = [
            (key, p.data_ptr(), p.dtype, p.requires_grad, p.grad, _digest(p))
            for key, p in network.named_parameters()
        ]
        found[f"{name} scales"] = [
            (path, dict(layer.scaling), list(layer.active_adapters), layer.disable_adapters)
            for path, layer in lora_layers(network)
        ]
    return found | {"active": lora.active_adapters(model)}


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().float().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("ace", "sd"),
        ("ace+", "sd-v"),
        ("fsmg", "sdxl"),
        ("aspl", "sd3"),
        pytest.param("aspl", "sdxl", marks=pytest.mark.slow),
        pytest.param("fsmg", "pixart-sigma", marks=pytest.mark.slow),
        pytest.param("ace", "flux", marks=pytest.mark.slow),  # its views are of 256 pixels
    ],
)
def test_the_budget_holds_and_the_pictures_move(tiny_model: Loader, method: str, name: str) -> None:
    settings = settings_of(method, levels=4, step_levels=3.0, steps=2)
    q_of = protected(tiny_model(name), settings, pictures())
    for q, clean in zip(q_of, pictures(), strict=True):
        change = (q.short() - clean.short()).abs()
        assert q.dtype == torch.uint8 and q.shape == clean.shape
        assert int(change.max()) == 4


@pytest.mark.parametrize("levels", [1, 16])
def test_no_pixel_moves_further_than_the_budget(tiny_model: Loader, levels: int) -> None:
    settings = settings_of("ace", levels=levels, step_levels=9.0)
    q_of = protected(tiny_model("sd"), settings)
    for q, clean in zip(q_of, random_pixels(2), strict=True):
        assert int((q.short() - clean.short()).abs().max()) == levels


@pytest.mark.parametrize("method", WALKS)
def test_masked_and_transparent_pixels_keep_their_bits(tiny_model: Loader, method: str) -> None:
    clean = list(random_pixels(2))
    mask = hole(1, 16, 16)[0]
    alpha = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    alpha[:, :3] = 0
    results = protect_set(
        clean,
        tiny_model("sd"),
        settings_of(method, levels=16, step_levels=4.0),
        seeds=[1, 2],
        masks=[mask, None],
        alphas=[None, alpha],
    )
    first, second = (
        (r.pixels.short() - x.short()).abs() for r, x in zip(results, clean, strict=True)
    )
    assert not first[:, mask[0] == 0].any() and first.any()
    assert not second[:, :3].any() and second[:, 3:].any()
    assert max(int(first.max()), int(second.max())) <= 16


@pytest.mark.parametrize("method", WALKS)
def test_every_step_is_told(tiny_model: Loader, method: str) -> None:
    told: list[int] = []
    settings = settings_of(method)
    protected(tiny_model("sd"), settings, pictures(), each=told.append)
    assert sum(told) == work_of(settings, 3)


def test_no_steps_return_the_pictures(tiny_model: Loader) -> None:
    for method in JOINT:
        options = {} if method == "fsmg" else {"rounds": None}
        settings = settings_of(method, steps=0, **options)
        assert all(map(torch.equal, protected(tiny_model("sd"), settings), random_pixels(2)))


@pytest.mark.parametrize("method", [pytest.param("ace", marks=pytest.mark.slow), "aspl"])
def test_the_order_of_pictures_does_not_matter(tiny_model: Loader, method: str) -> None:
    model, settings = tiny_model("sd"), settings_of(method)
    clean = None if method == "ace" else list(random_pixels(3, 16, 20))
    there = protected(model, settings, pictures(), clean=clean)
    turned = None if clean is None else clean[::-1]
    back = protect_set(pictures()[::-1], model, settings, seeds=SEEDS[::-1], clean=turned)
    assert all(map(torch.equal, there, [result.pixels for result in back[::-1]]))


@pytest.mark.parametrize("options", [{"batch_size": 1, "lean": True}])
def test_batches_and_the_lean_way_change_hardly_a_byte(
    tiny_model: Loader, options: dict[str, Any]
) -> None:
    model, settings = tiny_model("sd"), settings_of("aspl")
    for a, b in zip(protected(model, settings), protected(model, settings, **options), strict=True):
        assert float((a == b).float().mean()) > 0.99


@pytest.mark.parametrize("method", WALKS)
def test_the_model_comes_back_as_it_was(tiny_folder: Callable[[str], Path], method: str) -> None:
    """With adapters of the user's on it, one of them active at a weight of three tenths."""
    model = LatentDiffusion.load(tiny_folder("sd"))
    lora.add_lora(model, rank=3, alpha=7.0, name="one", targets=["to_q", "ff.net.2"])
    lora.add_lora(model, rank=2, name="two")
    for name in ("one", "two"):
        randomise(model, name)
    lora.set_adapters(model, {"one": 0.3})
    model.denoiser.model.train()
    before = standing(model)
    protected(model, settings_of(method, train_text_encoder=True))
    assert standing(model) == before


def test_waiting_pictures_are_small(tiny_model: Loader) -> None:
    """Between their turns all pictures of a folder kept five float copies, 21 bytes a value."""
    model, settings = tiny_model("sd"), settings_of("ace", steps=2, rounds=2)
    rows = [Row(x, seed, None, None, seed) for seed, x in enumerate(random_pixels(2, 40, 48))]
    with (
        prepared(model, settings) as surrogates,
        learner(model, settings, surrogates[0], 0) as trained,
    ):
        job = JointSet(model, settings, trained, rows, 0, None, False, 1)
        job.advance(1)
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for attack, _ in job._attacks
            for part in (attack.pgd, attack.state, attack.pictures)
            for tensor in vars(part).values()
            if isinstance(tensor, Tensor)
        }
    counts = 2 * 3 * 8
    assert sum(held.values()) <= (1 + 4) * 2 * 3 * 40 * 48 + counts


def test_the_model_comes_back_after_an_interruption(tiny_folder: Callable[[str], Path]) -> None:
    model = LatentDiffusion.load(tiny_folder("sd"))
    before = standing(model)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:  # two sign steps, then in the midst of training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protected(model, settings_of("ace"), each=stop)
    assert standing(model) == before
    assert before["active"] == {}


def test_released_ace_trained_once(tiny_model: Loader) -> None:
    """The released code of ACE looks for plain linear layers to adapt in every round. From the
    second round on there are none, the optimizer gets nothing, and all later rounds attack the
    surrogate of the first. Here the surrogate moves in every round but the last, whose training
    nothing would read."""
    for method, rounds in (("ace", 4), ("aspl", 3)):
        change = change_of(tiny_model("sd"), settings_of(method, steps=4, rounds=rounds))
        assert len(change) == rounds
        assert all(value > 1e-4 for value in change[:-1]) and change[-1] == 0
    (moved,) = change_of(tiny_model("sd"), settings_of("fsmg", steps=1))
    assert moved > 1e-4


def test_training_between_the_rounds_matters(tiny_model: Loader) -> None:
    """The first round attacks the model itself; what was learned reaches the second."""
    model = tiny_model("sd")
    few, many, once = (
        settings_of("ace", steps=4, train_steps=n, rounds=r) for n, r in ((1, 2), (4, 2), (4, 1))
    )
    with_many = protected(model, many)
    assert not all(map(torch.equal, protected(model, few), with_many))
    assert not all(map(torch.equal, protected(model, once), with_many))
    assert change_of(model, once) == [0.0]


@pytest.mark.parametrize("method", ["ace", "ace+"])
def test_scores_rise(tiny_model: Loader, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are read under the surrogate that was attacked last."""
    monkeypatch.setattr(gradients, "HELD_OUT", 8)
    settings = settings_of(method, steps=10)
    for result in protect_set(list(random_pixels(2)), tiny_model("sd"), settings, seeds=[1, 2]):
        assert result.stats["score_last"] > result.stats["score_first"]
        assert result.stats["steps"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fsmg", "aspl"])
def test_the_denoising_loss_rises_on_a_trained_model(method: str) -> None:
    model = LatentDiffusion.load("embedded")
    settings = settings_of(method, steps=18, train_steps=20, prompt="red apple")
    for result in protect_set(list(random_pixels(2, 64, 64)), model, settings, seeds=[1, 2]):
        assert result.stats["score_last"] > result.stats["score_first"]


def test_a_target_changes_fsmg_and_aspl_and_needs_a_ddpm(tiny_model: Loader) -> None:
    for method in ("fsmg", "aspl"):
        plain, aimed = settings_of(method), settings_of(method, target="checker")
        assert aimed.row.loss is aimed.row.targeted is not plain.row.loss
        model = tiny_model("sd-v")
        assert not all(map(torch.equal, protected(model, plain), protected(model, aimed)))
        with pytest.raises(UserError, match="posterior of a DDPM"):
            protected(tiny_model("sd3"), aimed)


def test_all_weights_can_be_the_surrogate(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    before = standing(model)
    results = protect_set(pictures(), model, settings_of("fsmg", surrogate="full"), seeds=SEEDS)
    assert results[0].stats["surrogate_change"][0] > 0
    assert standing(model) == before


def test_class_pictures_matter_and_must_be_there(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    settings = settings_of("ace", train_steps=6, class_prompt="b", prior_weight=1.0)
    with pytest.raises(UserError, match="class_prompt: needs class_images"):
        protected(model, settings)
    given = list(random_pixels(2, 20, 16))
    with_class = protected(model, settings, class_images=given)
    assert all(map(torch.equal, with_class, protected(model, settings, class_images=given[::-1])))
    assert not all(
        map(torch.equal, with_class, protected(model, settings_of("ace", train_steps=6)))
    )


def test_what_makes_no_sense_is_refused(tiny_model: Loader) -> None:
    model = tiny_model("sd")

    def tried(settings: Settings, *rows: Any, **options: Any) -> None:
        protected(model, settings, *rows, **options)

    with pytest.raises(UserError, match="advdm: trains no surrogate"):
        tried(Settings("advdm"))
    with pytest.raises(UserError, match="no picture to protect"):
        tried(settings_of("ace"), [])
    with pytest.raises(UserError, match="clean: ace learns from the protected"):
        tried(settings_of("ace"), clean=pictures())
    with pytest.raises(UserError, match="clean: there is no picture"):
        tried(settings_of("aspl"), clean=[])
    with pytest.raises(UserError, match="class_images: say what they show"):
        tried(settings_of("aspl"), class_images=pictures())
    with pytest.raises(UserError, match="scores of two surrogates"):
        tried(settings_of("ace", keep_best=True))
    with pytest.raises(UserError, match="--rounds: 5 are more than the 3 steps"):
        tried(settings_of("ace", rounds=5))
    with pytest.raises(UserError, match="--surrogate: does nothing for the method ace"):
        tried(settings_of("ace", surrogate="full"))
    with pytest.raises(UserError, match="--prior-weight: does nothing without --class-prompt"):
        tried(settings_of("ace", prior_weight=1.0))


def test_rounds_and_the_weight_of_the_prior_by_hand() -> None:
    assert attack_rounds(Settings("ace")) == [50] * 5 and training_steps(Settings("ace")) == 5
    assert attack_rounds(Settings("ace", steps=7)) == [2, 2, 1, 1, 1]
    assert attack_rounds(Settings("ace", steps=2)) == [1, 1]
    assert attack_rounds(Settings("aspl")) == [6] * 50 and training_steps(Settings("aspl")) == 3
    assert attack_rounds(Settings("aspl", steps=50)) == [6] * 5 + [5] * 4
    assert attack_rounds(Settings("fsmg")) == [100] and training_steps(Settings("fsmg")) == 1000
    assert attack_rounds(Settings("ace", steps=0)) == []
    # 4 pictures of 250 steps and 4 times 5; the copy learns 9 times and its original 8 times
    assert work_of(Settings("ace"), 4) == 1020
    assert work_of(Settings("aspl", steps=50), 2) == 100 + 17 * 3
    assert work_of(Settings("fsmg"), 1) == 1100
    named = Settings("ace", class_prompt="a painting")
    assert prior_weight(Settings("ace"), False) == 0
    assert (prior_weight(named, False), prior_weight(named, True)) == (1, 0)
    assert prior_weight(Settings("ace", class_prompt="b", prior_weight=0.1), True) == 0.1
