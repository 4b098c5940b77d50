"""What a user may choose, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from diffkit.errors import UserError
from diffkit.protection.methods import METHODS
from diffkit.protection.settings import STRENGTHS, Settings


def test_strengths_are_levels() -> None:
    assert STRENGTHS == {"low": 4, "medium": 8, "high": 16}
    for levels in STRENGTHS.values():
        assert Settings("advdm", levels=levels).rule().levels == levels


def test_choices_win_over_the_table() -> None:
    rule = Settings(
        "advdm", levels=3, steps=7, step_levels=0.3, random_start=True, decay=True, momentum=0.5,
        keep_best=True,
    ).rule()  # fmt: skip
    assert (rule.levels, rule.steps, rule.step_levels) == (3, 7, 0.3)
    assert rule.random_start
    assert rule.decay
    assert rule.keep_best
    assert rule.momentum == 0.5
    # 0 is a choice, not "the usual value"
    assert Settings("texture", steps=0, levels=0, random_start=False).rule().steps == 0
    assert not Settings("texture", random_start=False).rule().random_start
    assert Settings("sds-", prompt="").shown_prompt == ""
    assert Settings("sds-", target=None).shown_target == ""
    assert Settings("texture", target="checker").shown_target == "checker"
    assert Settings("photoguard-diffusion", norm="linf").rule().norm == "linf"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "glaze"}, "unknown"),
        ({"levels": 33}, "levels"),
        ({"steps": -1}, "steps"),
        ({"step_levels": 0.0}, "--step-levels"),
        ({"method": "advdm", "t_range": (0.5, 0.5)}, "--t-range"),
        ({"method": "advdm", "t_range": (0.5, 1.5)}, "--t-range"),
        ({"method": "advdm", "draws": 0}, "--eot: 0"),
        ({"views": 0}, "--views"),
        ({"method": "pid", "random_start": False}, "--random-start"),
        ({"transforms": ("jpeg", "twirl")}, "twirl"),
        ({"target": "text:"}, "target"),
        ({"method": "advdm", "times": "greedy", "t_range": (0.0, 0.5)}, "--t-range"),
    ],
)
def test_impossible_choices(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Settings(**options).check()


IDLE: list[tuple[str, dict[str, Any]]] = [
    ("random", {"steps": 5}),
    ("random", {"prompt": "a cat"}),
    ("texture", {"prompt": "a cat"}),
    ("texture", {"t_range": (0.5, 1.0)}),
    ("texture", {"draws": 4}),
    ("pid", {"target": "checker"}),
    ("advdm", {"target": "checker"}),
    ("advdm", {"tiles": True}),
    ("mist", {"ensemble": ("other",)}),
    ("advdm", {"output_kind": "eps"}),
    ("sds-", {"residual_weight": 1.0}),
    ("diffusionguard", {"t_range": (0.5, 1.0)}),
    ("diffusionguard", {"times": "greedy"}),
    ("advdm", {"norm": "l2"}),
    ("photoguard", {"sampled": True}),
    ("pid", {"sampled": True}),
]

FLAGS = {"draws": "eot", "output_kind": "ace-output", "sampled": "sample-latents"}


@pytest.mark.parametrize(("method", "options"), IDLE)
def test_an_option_that_would_do_nothing_is_refused(method: str, options: dict[str, Any]) -> None:
    (name,) = options
    words = FLAGS.get(name, name).replace("_", "-")
    with pytest.raises(UserError, match=f"--{words}: does nothing for the method {method}"):
        Settings(method, **options).check()


def test_every_method_takes_the_options_of_the_loop() -> None:
    for name, row in METHODS.items():
        if row.loss is not None:
            Settings(
                name, levels=4, steps=3, momentum=1.0, decay=True, contrast=True, views=2,
                transforms=("jpeg", "identity"), draws=3, seed=5,
            ).check()  # fmt: skip


def test_encoders_draw_transforms_and_latents_alone() -> None:
    """--eot was refused for them, also where each draw would see another transform."""
    for name in ("texture", "photoguard", "pid"):
        Settings(name, transforms=("jpeg",), draws=4).check()
        with pytest.raises(UserError, match="--eot: does nothing .* without --transforms"):
            Settings(name, draws=4).check()
    Settings("texture", sampled=True, draws=4).check()
    with pytest.raises(UserError, match="--sample-latents"):
        Settings("pid", sampled=True).check()
