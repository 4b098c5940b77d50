"""The greedy choice of times: what it removes, what it keeps, and that attacks draw from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection import timesteps
from diffkit.protection.gradients import ImageGradient
from diffkit.protection.methods import METHODS
from diffkit.protection.protect import Attack
from diffkit.protection.scene import Scene
from diffkit.protection.settings import Settings
from diffkit.protection.timesteps import CELLS, greedy_choice, useful_times
from tests.protection.attacks import attack, random_pixels

Loader = Callable[[str], LatentDiffusion]


def loud_early(scene: Scene) -> Tensor:
    """J whose gradient shrinks with the time: (1 - t / T) sum z."""
    t, _ = scene.noise
    return (1 - t / 1000).view(-1) * scene.z.flatten(1).sum(1)


def easy(ready: Attack) -> ImageGradient:
    """The gradient of an attack, of that J."""
    assert ready.gradient is not None
    ready.gradient.method = replace(METHODS["advdm"], loss=loud_early)
    return ready.gradient


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of eight rounds, which leave many cells."""
    monkeypatch.setattr(timesteps, "_ROUNDS", 8)


def test_forty_cells_go_at_a_time() -> None:
    for cell, gone in ((500, (480, 519)), (3, (0, 39)), (999, (960, 999)), (20, (0, 39))):
        left = torch.ones(CELLS, dtype=torch.bool)
        timesteps._remove(left, cell)
        cells = (~left).nonzero().flatten().tolist()
        assert (cells[0], cells[-1], len(cells)) == (*gone, 40)


def test_times_with_large_gradients_stay(tiny_model: Loader) -> None:
    with attack(tiny_model("sd"), Settings("advdm", prompt="a"), random_pixels(2)) as ready:
        kept = useful_times(easy(ready), ready.pgd)
    for cells in kept:
        assert 1 <= len(cells) <= 100
        assert float(cells.float().mean()) < 200 and int(cells.min()) < 40
        assert cells.tolist() == sorted(set(cells.tolist()))
    assert kept[0].tolist() != kept[1].tolist()


def test_times_without_a_finite_gradient_go_first(tiny_model: Loader) -> None:
    """In half precision one such time made the picture NaN, after which all times were alike, and
    those that were kept came by chance."""

    def broken_late(scene: Scene) -> Tensor:
        t, _ = scene.noise
        loud = torch.where(t < 500, 1.0, float("nan")) * (1 + t / 1000)
        return loud.view(-1) * scene.z.flatten(1).sum(1)

    with attack(tiny_model("sd"), Settings("advdm", prompt="a"), random_pixels(1)) as ready:
        assert ready.gradient is not None
        ready.gradient.method = replace(METHODS["advdm"], loss=broken_late)
        (kept,) = useful_times(ready.gradient, ready.pgd)
    assert float((kept < 500).float().mean()) > 0.8
    assert float(kept.float().mean()) > 250


@pytest.mark.usefixtures("short_search")
def test_what_a_picture_keeps_is_its_own_affair(tiny_model: Loader) -> None:
    """Alone or in a batch, whichever of them is done first."""
    settings, pixels = Settings("advdm", prompt="a"), random_pixels(2)
    with attack(tiny_model("sd"), settings, pixels, seeds=[4, 9]) as ready:
        together = useful_times(easy(ready), ready.pgd)
    with attack(tiny_model("sd"), settings, pixels[1:], seeds=[9]) as ready:
        (alone,) = useful_times(easy(ready), ready.pgd)
    assert torch.equal(alone, together[1])


def test_u_falls_into_a_cell_that_was_kept(
    tiny_model: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cells 2, 7 and 10 kept: u = 1/2 is the middle of the second, 7.5 thousandths."""

    def three(gradient: ImageGradient, pgd: object) -> Sequence[Tensor]:
        return [torch.tensor([2, 7, 10])]

    monkeypatch.setattr(timesteps, "useful_times", three)
    with attack(tiny_model("sd"), Settings("advdm", prompt="a"), random_pixels(1)) as ready:
        assert ready.gradient is not None
        choose = greedy_choice(ready.gradient, ready.pgd)
        assert choose(0, 0.5) == pytest.approx(0.0075)
        assert choose(0, 0.0) == 0.002 and 0.010 <= choose(0, 0.999999) < 0.011
        ready.gradient.draws = replace(ready.gradient.draws, choose=choose)
        fractions = [float(ready.gradient._fractions([(0, step, 0)])) for step in range(50)]
    surrogate = ready.gradient.surrogates[0]
    times = surrogate.times(torch.tensor(fractions)).tolist()
    assert set(times) == {2, 7, 10}


@pytest.mark.usefixtures("short_search")
def test_an_attack_searches_first_and_draws_from_what_is_left(tiny_model: Loader) -> None:
    model, pixels = tiny_model("sd"), random_pixels(1)
    results = []
    for times in ("uniform", "greedy"):
        settings = Settings("advdm", prompt="a", steps=2, times=times)  # type: ignore[arg-type]
        with attack(model, settings, pixels) as ready:
            gradient = easy(ready)
            ready.advance(2)
            assert (gradient.draws.choose is None) == (times == "uniform")
            results.append(ready.x)
            if gradient.draws.choose is not None:
                (cells,) = useful_times(gradient, ready.pgd)
                found = {int(CELLS * gradient.draws.choose(0, u / 64)) for u in range(64)}
                assert found <= set(cells.tolist())
    # the search itself leaves no trace in the picture that the walk starts from
    assert float((results[0] - results[1]).abs().max()) <= 4 * 2 * 2 / 255
    with pytest.raises(UserError, match="greedy choice of times has none"):
        Settings("advdm", times="greedy", t_range=(0.1, 0.5)).check()
    with pytest.raises(UserError, match="--times: does nothing for the method texture"):
        Settings("texture", times="greedy").check()
