"""The table of methods, against the table of published settings."""

from __future__ import annotations

import pytest
import torch

from diffkit.errors import UserError
from diffkit.protection.methods import HIGH, METHODS, method_named
from diffkit.protection.settings import Settings

NAMES = [
    "random", "photoguard", "photoguard-diffusion", "texture", "advdm", "advdm-", "mist", "sds+",
    "sds-", "sdst+", "sdst-", "ace", "ace+", "fsmg", "aspl", "pid", "diffusionguard",
]  # fmt: skip


def test_every_method_is_there_by_its_name() -> None:
    assert sorted(METHODS) == sorted(NAMES)
    for name, row in METHODS.items():
        assert row.name == name
        assert row.words
        assert (row.loss is None) == (name == "random")
    with pytest.raises(UserError, match="Known: random"):
        method_named("glaze")


@pytest.mark.parametrize(
    ("names", "steps", "step_levels", "start", "levels"),
    [
        (("photoguard", "texture", "mist", "pid"), 100, 1.0, True, 8),
        (("advdm", "advdm-", "sds+", "sds-", "sdst+", "sdst-"), 100, 1.0, False, 8),
        (("ace", "ace+"), 250, 0.75, False, 8),
        (("fsmg",), 100, 0.64, False, 8),
        (("aspl",), 300, 0.64, False, 8),
        (("diffusionguard",), 200, 0.5, False, 8),
        (("photoguard-diffusion",), 200, 1.0, False, 16),
    ],
)
def test_usual_settings(
    names: tuple[str, ...], steps: int, step_levels: float, start: bool, levels: int
) -> None:
    for name in names:
        rule = Settings(name).rule()
        assert (rule.steps, rule.step_levels, rule.levels) == (steps, step_levels, levels)
        assert rule.random_start == start
        assert rule.norm == ("l2" if name == "photoguard-diffusion" else "linf")
        Settings(name).check()
    assert METHODS["photoguard-diffusion"].draws == 4


def test_passes_of_the_denoiser() -> None:
    """The encoder's methods need none, score distillation no backward pass."""
    none = {"random", "photoguard", "texture", "pid"}
    short = {"sds+", "sds-", "sdst+", "sdst-"}
    for name, row in METHODS.items():
        expected = "none" if name in none else "forward" if name in short else "backward"
        assert row.denoiser == expected
        assert row.encoder_only == (name in none - {"random"})


def test_prompts_and_targets() -> None:
    targeted = {"photoguard", "texture", "mist", "sdst+", "sdst-", "ace", "ace+"}
    for name, row in METHODS.items():
        assert bool(row.target) == (name in targeted)
        assert row.edits == (name in ("photoguard-diffusion", "diffusionguard"))
        assert row.prompt == ("" if row.edits else "a picture")
    assert METHODS["photoguard"].target == "zero"


def test_ace_draws_noisy_times_unless_told() -> None:
    """{600..999} as in its released script; the table said 0 to 1 for every method."""
    assert Settings("ace").shown_range == Settings("ace+").shown_range == HIGH == (0.6, 1.0)
    assert Settings("ace", t_range=(0.0, 1.0)).shown_range == (0.0, 1.0)
    for name in ("advdm", "mist", "sds-", "fsmg", "aspl"):
        assert Settings(name).shown_range == (0.0, 1.0)
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    low, high = HIGH
    times = ((low + (high - low) * u) * 1000).long().clamp_max(999)
    assert times.tolist() == [600, 800, 999]
