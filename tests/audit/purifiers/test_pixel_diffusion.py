"""DiffPure and GrIDPure: the posterior's closed form, tiles, and runs of real tiny U-Nets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from diffkit import randomness
from diffkit.audit.purifiers.pixel_diffusion import (
    ancestral,
    corner_tile,
    grid_starts,
    purified_tiles,
)
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.schedule import Schedule

COND = Conditioning(labels=torch.zeros(1, dtype=torch.int64))
PIXELS = randomness.integers(0, 256, (3, 40, 72), "pixel purifiers").to(torch.uint8)


class Gaussian:
    """The exact denoiser of data N(mean, spread^2), pixel by pixel."""

    def __init__(self, mean: float, spread: float, scheduler: DDPMScheduler) -> None:
        self.schedule = Schedule.from_scheduler(scheduler)
        self.mean, self.spread = mean, spread

    def predict(self, z, t, cond):
        alpha, sigma = (x[0] for x in self.schedule.alpha_sigma(t))
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        x0 = self.mean + gain * (z - alpha * self.mean)
        return self.schedule.prediction((z - alpha * x0) / sigma, z, t)


def open_table(**more):
    return DDPMScheduler(clip_sample=False, **more)


def test_data_of_the_models_own_kind_keeps_its_distribution():
    """Noised and sampled back by the exact denoiser, N(m, s^2) is N(m, s^2) again."""
    denoiser = Gaussian(0.2, 0.3, open_table())
    x = 0.2 + 0.3 * randomness.normal((1, 3, 96, 96), "data")
    found = ancestral(denoiser, x, COND, 100, 1)
    assert found.mean() == pytest.approx(0.2, abs=0.01)
    assert found.std() == pytest.approx(0.3, rel=0.03)
    assert 0.01 < (found - x).std() < 0.35, "a new draw near the old"


def test_a_perturbation_shrinks_by_the_posterior():
    """Noising to t and drawing from the exact posterior shrinks what is off the mean to
    alpha^2 s^2 / (alpha^2 s^2 + sigma^2) of it."""
    denoiser = Gaussian(0.0, 0.1, open_table())
    clean = torch.zeros(1, 3, 8, 8)
    twins = [ancestral(denoiser, x, COND, 300, 1) for x in (clean, clean + 0.05)]
    alpha, sigma = denoiser.schedule.alpha_sigma(torch.tensor(299))
    left = alpha**2 * 0.01 / (alpha**2 * 0.01 + sigma**2)
    change = (twins[1] - twins[0]).mean() / 0.05
    assert change == pytest.approx(float(left), rel=0.05)


def test_one_step_is_the_stock_schedulers():
    """Mean and variance of DDPMScheduler.step (fixed_small), x0 limited as it does."""
    scheduler = DDPMScheduler(clip_sample=True)
    schedule = Schedule.from_scheduler(scheduler)
    output = randomness.normal((1, 3, 8, 8), "output")
    seen = []

    def predict(z, t, cond):
        seen.append((int(t[0]), z))
        return schedule.prediction(output, z, t)

    ancestral(SimpleNamespace(schedule=schedule, predict=predict), output * 0, COND, 5, 3)
    assert [t for t, _ in seen] == [4, 3, 2, 1, 0]
    for (t, z), (_, after) in zip(seen, seen[1:]):
        noise = randomness.normal((3, 8, 8), 3, 0, t)[None]
        stock = scheduler.step(output, t, z, generator=torch.Generator().manual_seed(0))
        theirs = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        spread = scheduler._get_variance(t).sqrt()
        torch.testing.assert_close(after - spread * noise, stock.prev_sample - spread * theirs,
                                   atol=2e-5, rtol=0)  # fmt: skip


def test_tiles_cover_a_line():
    assert grid_starts(512, 256) == [0, 128, 256]
    assert grid_starts(256, 256) == [0]
    assert grid_starts(300, 256) == [0, 44]
    starts = grid_starts(1000, 256)
    assert starts[-1] == 744 and max(b - a for a, b in zip(starts, starts[1:])) <= 128


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 72)])
def test_tiles_are_put_back_in_place(size):
    x = randomness.normal((3, *size), "tiles")
    seen = []

    def keep(tiles, round_):
        seen.append(tiles)
        return tiles

    torch.testing.assert_close(purified_tiles(x, 32, 0, keep), x)
    assert len(seen[0]) == {(32, 32): 1, (64, 64): 10, (40, 72): 9}[size]


def test_the_corners_make_one_tile():
    x = torch.arange(16.0).reshape(1, 4, 4).expand(3, -1, -1)
    assert corner_tile(x, 2)[0].tolist() == [[0, 3], [12, 15]]
    assert corner_tile(x, 4).equal(x)


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder("pixel")


@pytest.mark.parametrize("text", ["diffpure0.005", "gridpure2"])
def test_a_real_network(folder, text):
    (purifier,) = parse_purifiers(f"{text}:{folder}")
    found = purifier(PIXELS, 1)
    assert found.shape == PIXELS.shape and torch.equal(found, purifier(PIXELS, 1))
    assert not torch.equal(found, purifier(PIXELS, 2))
    assert purifier.name == f"{text}:pixel" and not purifier.deterministic
    small = PIXELS[:, :20, :20]
    assert purifier(small, 1).shape == small.shape, "enlarged to a tile and brought back"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd", "needs a diffusion model of RGB pixels"),
        ("pixel-grey", "with 1 channels"),
        ("pixel-edm", "schedule is of the kind 'edm'"),
        ("pixel-class-no-null", "class"),
    ],
)
def test_other_models_are_refused(tiny_folder, name, message):
    (purifier,) = parse_purifiers(f"gridpure:{tiny_folder(name)}")
    with pytest.raises(UserError, match=message):
        purifier.prepare()


def test_they_need_a_model():
    with pytest.raises(UserError, match="needs a model of its own, diffpure:PATH"):
        parse_purifiers("diffpure0.1")
