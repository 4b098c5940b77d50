"""What trains in a surrogate and what does not, in which dtype, and that training teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffkit.errors import RunFailed, UserError
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import lora_parameters
from diffkit.protection.budget import as_signed
from diffkit.protection.joint_training import Examples, Prior, Training, picture_loss
from diffkit.protection.learner import ADAPTER, RANK, Learner, learner
from diffkit.protection.losses import prior_preservation
from diffkit.protection.protect import prepared
from diffkit.protection.settings import Settings
from diffkit.protection.views import ViewPlan, plan_views
from tests.protection.attacks import random_pixels

Loader = Callable[[str], LatentDiffusion]


@contextmanager
def learning(model: LatentDiffusion, settings: Settings) -> Iterator[Learner]:
    with (
        prepared(model, settings) as surrogates,
        learner(model, settings, surrogates[0], seed=3) as trained,
    ):
        yield trained


def plan_of(model: LatentDiffusion, height: int = 16, width: int = 16) -> ViewPlan:
    return plan_views(height, width, 16, model.working_multiple, views=1)


def examples(model: LatentDiffusion, count: int = 2) -> Examples:
    return still(model, as_signed(random_pixels(count)), plan_of(model))


def still(model: LatentDiffusion, shown: Tensor, plan: ViewPlan) -> Examples:
    """Pictures (B, 3, H, W) that do not change."""
    rows = [partial(shown.__getitem__, slice(i, i + 1)) for i in range(len(shown))]
    return Examples(model.codec, rows, [plan] * len(rows))


def mean_loss(trained: Learner, pictures: Examples, draws: int = 16) -> float:
    told = trained.told(trained.prompt)
    with torch.no_grad():
        losses = [
            picture_loss(told, *pictures.at(i), ("fixed", i, k))
            for i in range(len(pictures))
            for k in range(draws)
        ]
    return float(torch.cat(losses).mean())


def weights(model: LatentDiffusion) -> dict[str, Tensor]:
    found = {}
    for name, network in model.networks.items():
        found |= {f"{name}.{key}": p.detach().clone() for key, p in network.named_parameters()}
    return found


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_only_the_adapter_moves(tiny_model: Loader, name: str) -> None:
    model = tiny_model(name)
    with learning(model, Settings("ace", prompt="a")) as trained:
        before = weights(model)
        Training(trained, None, ("test",)).run(examples(model), 3)
        after = weights(model)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved and all(f".{ADAPTER}." in key for key in moved)
        # A waits for B to leave zero, then both move
        assert {key for key in before if f".{ADAPTER}." in key} == moved
        assert all(p.grad is None and not p.requires_grad for p in trained.parameters)
        gradients = [p.grad for network in model.networks.values() for p in network.parameters()]
        assert all(g is None for g in gradients)


@pytest.mark.parametrize(
    ("name", "ending"),
    [("sd", "ff.net.0.proj"), ("sd3", "ff.net.0.proj"), ("flux", "attn.add_k_proj"),
     ("pixart-sigma", "attn2.to_q")],
)  # fmt: skip
def test_attention_and_feed_forward_of_every_family_are_adapted(
    tiny_model: Loader, name: str, ending: str
) -> None:
    model = tiny_model(name)
    with learning(model, Settings("ace", prompt="a")) as trained:
        found = lora_parameters(model, ADAPTER)
        assert any(key.removesuffix(".lora_A").endswith(ending) for key in found)
        assert any(key.removesuffix(".lora_A").endswith("ff.net.0.proj") for key in found)
        assert len(found) == len(trained.parameters)
        for key, value in found.items():
            assert value.dtype == torch.float32
            side = value.shape[0] if key.endswith("lora_A") else value.shape[1]
            assert side == RANK
        down = torch.cat([v.flatten() for k, v in found.items() if k.endswith("lora_A")])
        assert abs(float(down.detach().std()) - 1 / RANK) < 0.02
    assert not lora_parameters(model, ADAPTER)


def test_adapters_stay_float32_on_a_bfloat16_base(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd, dtype=torch.bfloat16)
    with learning(model, Settings("ace", prompt="a")) as trained:
        assert {p.dtype for p in trained.parameters} == {torch.float32}
        start = trained.weights()
        Training(trained, None, ("test",)).run(examples(model), 2)
        pairs = zip(start, trained.weights(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)
    assert model.dtype == torch.bfloat16


def test_bfloat16_weights_would_not_feel_a_step_of_5e_7(tiny_sd: Path) -> None:
    """Released ASPL and FSMG train bfloat16 weights at a rate of 5e-7: a step is far below their
    spacing, so that almost none changes and the surrogate stays what it was. Here all weights are
    trained on a float32 copy that computes in bfloat16."""
    model = LatentDiffusion.load(tiny_sd, dtype=torch.bfloat16)
    with learning(model, Settings("fsmg", surrogate="full", prompt="a")) as trained:
        assert {p.dtype for p in trained.parameters} == {torch.float32}
        start = trained.weights()
        Training(trained, None, ("test",)).run(examples(model), 2)
        pairs = list(zip(start, trained.weights(), strict=True))
        felt = torch.cat([(a != b).flatten() for a, b in pairs])
        rounded = torch.cat([(a.bfloat16() != b.bfloat16()).flatten() for a, b in pairs])
        assert float(felt.float().mean()) > 0.9 and float(rounded.float().mean()) < 0.05
        network = trained.surrogate.network
        images = torch.randn(1, 4, 8, 8)
        cond = trained.surrogate.conditioning([Sizes((16, 16), (0, 0), (16, 16))])
        with torch.no_grad():
            assert network(images, torch.tensor([5]), cond).dtype == torch.bfloat16


def test_text_encoders_train_on_request(tiny_model: Loader) -> None:
    model = tiny_model("sdxl")
    with learning(model, Settings("ace", prompt="a", train_text_encoder=True)) as trained:
        slow = trained.groups[1]["lr"]
        assert trained.groups[0]["lr"] == 1e-4 and slow == 5e-6
        before, told = weights(model), trained.surrogate.cond
        Training(trained, None, ("test",)).run(examples(model), 2)
        after, again = weights(model), trained.surrogate.cond
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert any(key.startswith("text_encoder_2.") for key in moved)
        assert all(f".{ADAPTER}." in key for key in moved)
        assert told is not None and again is not None
        assert told.tokens is not None and again.tokens is not None
        assert not again.tokens.requires_grad and not torch.equal(told.tokens, again.tokens)
    settings = Settings("ace", prompt="a", train_text_encoder=True)
    with (
        pytest.raises(UserError, match="have no CLIP text encoder"),
        learning(tiny_model("pixart-sigma"), settings),
    ):
        pass


@pytest.mark.slow
def test_training_teaches_the_picture() -> None:
    """On a model that was trained: a rank-4 adapter takes up a picture of noise within 30 steps."""
    model = LatentDiffusion.load("embedded")
    plan = plan_views(64, 64, 64, model.working_multiple, views=1)
    pictures = still(model, as_signed(random_pixels(1, 64, 64)), plan)
    with learning(model, Settings("ace", prompt="red apple")) as trained:
        before = mean_loss(trained, pictures)
        Training(trained, None, ("test",)).run(pictures, 30)
        after = mean_loss(trained, pictures)
    assert after < 0.97 * before


def test_a_stream_of_steps_can_be_cut_anywhere(tiny_model: Loader) -> None:
    """One optimizer for all rounds: its moments and the order of the pictures go on."""
    model = tiny_model("sd")
    results = []
    for pieces in ((5,), (1, 3, 1)):
        with learning(model, Settings("ace", prompt="a")) as trained:
            training = Training(trained, None, ("test",))
            for steps in pieces:
                training.run(examples(model, 3), steps)
            assert training.done == 5
            results.append(trained.weights())
    assert all(map(torch.equal, *results))


def test_every_picture_is_seen_before_any_is_seen_again(tiny_model: Loader) -> None:
    """The released code starts at the first picture in every call and never sees the later ones."""
    model = tiny_model("sd")

    class Noted(Examples):
        seen: list[int]

        def at(self, index: int, *address: int | str) -> tuple[Tensor, Sizes]:
            self.seen.append(index)
            return super().at(index, *address)

    shown = [partial(torch.zeros, 1, 3, 16, 16)] * 5
    noted = Noted(model.codec, shown, [plan_of(model)] * 5)
    noted.seen = []
    with learning(model, Settings("ace", prompt="a")) as trained:
        training = Training(trained, None, ("test",))
        for _ in range(5):
            training.run(noted, 2)
    assert sorted(noted.seen[:5]) == sorted(noted.seen[5:]) == [0, 1, 2, 3, 4]
    assert noted.seen[:5] != noted.seen[5:]


def test_prior_preservation_by_hand(tiny_model: Loader) -> None:
    instance, of_class = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 4.0])
    assert prior_preservation(instance, of_class, 0.1).tolist() == pytest.approx([0.525, 2.4])
    # and the step adds just these two, each at its own time and noise
    model = tiny_model("sd")
    with learning(model, Settings("ace", prompt="a")) as trained:
        own, others = examples(model, 1), examples(model, 2)
        training = Training(trained, Prior(others, "b", 0.5), ("test",))
        index = training._index(2, "class")
        first = picture_loss(trained.told("a"), *own.at(0), ("test", 0, "pictures"))
        second = picture_loss(trained.told("b"), *others.at(index), ("test", 0, "class"))
        with trained.training(), torch.enable_grad():
            total = training._step(own, trained.optimizer())
        assert float(total) == pytest.approx(float(first) + 0.5 * float(second), rel=1e-5)


def test_a_long_picture_is_learned_in_its_windows(tiny_model: Loader) -> None:
    model = tiny_model("sd")
    plan = plan_of(model, 16, 64)
    pictures = still(model, as_signed(random_pixels(1, 16, 64)), plan)
    corners = {pictures.at(0, "draw", k)[1].crop for k in range(12)}
    assert len(plan.whole) > 1
    assert corners == {view.sizes(16, 64).crop for view in plan.whole}


def test_a_loss_that_is_not_finite_stops(tiny_folder: Callable[[str], Path]) -> None:
    model = LatentDiffusion.load(tiny_folder("sd"))
    with learning(model, Settings("ace", prompt="a")) as trained:
        broken = still(model, torch.full((1, 3, 16, 16), torch.nan), plan_of(model))
        with pytest.raises(RunFailed, match="surrogate's loss was not finite"):
            Training(trained, None, ("test",)).run(broken, 1)


def test_half_precision_gradients_are_scaled_on_their_way(tiny_sd: Path) -> None:
    """A mean over the latents of 128 pixels has gradients at the end of what float16 holds: without
    a scale 4 % of the weights move the wrong way or not at all, at 256 pixels 12 %. The same step
    in float32 says what they should do."""
    moved = []
    for dtype in (torch.float32, torch.float16):
        model = LatentDiffusion.load(tiny_sd, dtype=dtype)
        plan = plan_views(128, 128, 128, model.working_multiple, views=1)
        pictures = still(model, as_signed(random_pixels(1, 128, 128)), plan)
        with learning(model, Settings("ace", prompt="a")) as trained:
            start = trained.weights()
            Training(trained, None, ("test",)).run(pictures, 1)
            pairs = zip(start, trained.weights(), strict=True)
            moved.append(torch.cat([(b - a).flatten() for a, b in pairs]))
    # the first step of Adam is the sign of the gradient
    there = moved[0] != 0
    assert float((moved[0].sign() == moved[1].sign())[there].float().mean()) > 0.99
