"""The loop on gradients that are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffkit.errors import RunFailed, UserError
from diffkit.protection.budget import LEVEL, as_signed
from diffkit.protection.pgd import Gradient, Pgd, State, StepRule

GREY = torch.full((2, 3, 4, 6), 100, dtype=torch.uint8)


def up(x: Tensor, step: int) -> Tensor:
    return torch.ones_like(x)


def walk(rule: StepRule, gradient: Gradient, pixels: Tensor = GREY, **options: object) -> State:
    pgd = Pgd(pixels, rule, list(range(len(pixels))))
    return pgd.advance(pgd.start(), gradient, 0, rule.steps, **options)  # type: ignore[arg-type]


def levels_moved(state: State, pixels: Tensor = GREY) -> Tensor:
    return (state.x - as_signed(pixels)) / LEVEL


def test_steps_are_signs_times_levels_inside_the_box() -> None:
    slope = torch.tensor([3.0, -1e-20, 0.0]).view(1, 3, 1, 1)
    state = walk(StepRule(levels=8, steps=3, step_levels=0.5), lambda x, step: slope.expand_as(x))
    moved = levels_moved(state)
    for channel, expected in enumerate((1.5, -1.5, 0.0)):
        torch.testing.assert_close(
            moved[:, channel], torch.full((2, 4, 6), expected), atol=1e-4, rtol=0
        )
    assert torch.equal(state.x[:, 2], as_signed(GREY)[:, 2])
    full = walk(StepRule(levels=2, steps=9, step_levels=0.5), up)
    torch.testing.assert_close(levels_moved(full), torch.full((2, 3, 4, 6), 2.0), atol=1e-4, rtol=0)


def test_decay_shrinks_steps_to_a_hundredth() -> None:
    rule = StepRule(steps=100, step_levels=2.0, decay=True)
    assert rule.size(0) == 2 * LEVEL
    assert rule.size(50) == pytest.approx(2 * LEVEL * 0.505)
    assert rule.size(99) == pytest.approx(2 * LEVEL * (1 - 0.99 * 0.99))
    assert StepRule(steps=100).size(99) == LEVEL


def test_momentum_adds_normalised_gradients() -> None:
    """m = mu m + g / mean |g|: with mu = 1 a first gradient outweighs a later, opposite one only
    where it was larger in units of its own mean."""
    first = torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1, 1)  # 1.5, 0.5, 1 of its mean
    second = -100.0 * torch.tensor([1.0, 1.0, 1.0]).view(1, 3, 1, 1)  # -1 each

    def turning(x: Tensor, step: int) -> Tensor:
        return (first if step == 0 else second).expand_as(x)

    state = walk(StepRule(steps=2, momentum=1.0), turning)
    moved = levels_moved(state)
    for channel, expected in enumerate((2.0, 0.0, 1.0)):
        torch.testing.assert_close(
            moved[:, channel], torch.full((2, 4, 6), expected), atol=1e-4, rtol=0
        )


def test_l2_steps_and_radius_scale_with_the_picture() -> None:
    """PhotoGuard's radius 16 and step 1 at 3 x 512 x 512, the same root mean square elsewhere."""
    unit = (3 * 4 * 6 / (3 * 512 * 512)) ** 0.5
    spike = torch.zeros(2, 3, 4, 6)
    spike[:, 0, 0, 0] = 5.0
    rule = StepRule(levels=32, steps=1, norm="l2")
    one = walk(rule, lambda x, step: spike).x - as_signed(GREY)
    torch.testing.assert_close(one[:, 0, 0, 0], torch.full((2,), unit))
    assert one.abs().flatten(1).sum(1) == pytest.approx([unit, unit], rel=1e-4)
    far = walk(StepRule(levels=32, steps=60, norm="l2"), up).x - as_signed(GREY)
    torch.testing.assert_close(far.flatten(1).norm(dim=1), torch.full((2,), 16 * unit))
    # the box of k levels holds all the same
    cut = walk(StepRule(levels=1, steps=60, norm="l2"), up)
    torch.testing.assert_close(levels_moved(cut), torch.ones(2, 3, 4, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("norm", "momentum"), [("l2", 0.0), ("linf", 1.0)])
def test_what_may_not_move_takes_nothing_of_a_step(norm: str, momentum: float) -> None:
    """A large gradient behind a mask made the steps of all other pixels short, and with momentum
    outweighed the steps before."""
    weight = torch.ones(2, 1, 4, 6)
    weight[..., 3:] = 0
    rule = StepRule(levels=32, steps=3, norm=norm, momentum=momentum)  # type: ignore[arg-type]
    ends = []
    for hidden in (0.0, 1e6):

        def slope(x: Tensor, step: int, hidden: float = hidden) -> Tensor:
            g = torch.full_like(x, -1.0 if step == 1 else 3.0)
            g[..., 3:] = hidden if step == 1 else 0.0
            return g

        pgd = Pgd(GREY, rule, [0, 1], weight)
        ends.append(pgd.advance(pgd.start(), slope, 0, 3).x)
    assert torch.equal(ends[0], ends[1])
    assert (ends[0][..., :3] != as_signed(GREY)[..., :3]).all()
    assert torch.equal(ends[0][..., 3:], as_signed(GREY)[..., 3:])


def test_a_random_start_is_in_the_box_and_the_picture_s_own() -> None:
    rule = StepRule(levels=4, steps=0, random_start=True)
    weight = torch.ones(2, 1, 4, 6)
    weight[..., 0, :] = 0
    pgd = Pgd(GREY, rule, [5, 6], weight)
    x = pgd.start().x
    moved = (x - as_signed(GREY)) / LEVEL
    assert moved.abs().max() <= 4.001
    assert moved.abs().max() > 3
    assert not moved[..., 0, :].any()
    assert torch.equal(Pgd(GREY[:1], rule, [6], weight[:1]).start().x[0], x[1])
    assert torch.equal(Pgd(GREY, StepRule(), [5, 6]).start().x, as_signed(GREY))


def test_steps_may_be_made_in_pieces() -> None:
    """The best iterate was looked for at the end of every call, so that it depended on how the
    caller cut the walk."""
    target = as_signed(GREY) + 3.3 * LEVEL

    def towards(x: Tensor, step: int) -> Tensor:
        return target - x

    def score(x: Tensor) -> Tensor:
        return -(x - target).square().flatten(1).sum(1)

    rule = StepRule(steps=25, keep_best=True)
    pgd = Pgd(GREY, rule, [0, 1])
    whole = pgd.advance(pgd.start(), towards, 0, 25, score)
    pieces = pgd.start()
    for first, count in ((0, 3), (3, 14), (17, 8)):
        pieces = pgd.advance(pieces, towards, first, count, score)
    assert torch.equal(whole.x, pieces.x)
    assert whole.best is not None
    assert torch.equal(whole.best, pieces.best)


def test_the_best_iterate_of_each_picture_is_kept() -> None:
    """One picture is best after 10 steps, the other at the end of 12."""
    rule = StepRule(levels=32, steps=12, keep_best=True)
    pgd = Pgd(GREY, rule, [0, 1])

    def score(x: Tensor) -> Tensor:
        return (x - as_signed(GREY)).flatten(1).sum(1) * torch.tensor([-1.0, 1.0])

    state = pgd.advance(pgd.start(), up, 0, 12, score)
    q = pgd.finish(state).short() - 100
    assert (q[0] == 10).all()
    assert (q[1] == 12).all()
    plain = Pgd(GREY, StepRule(levels=32, steps=12), [0, 1])
    assert (plain.finish(plain.advance(plain.start(), up, 0, 12, score)) == 112).all()


def broken(where: Callable[[int], bool], row: int = 0) -> Gradient:
    def gradient(x: Tensor, step: int) -> Tensor:
        g = torch.ones_like(x)
        if where(step):
            g[row, 0, 0, 0] = float("nan") if step % 2 else float("inf")
        return g

    return gradient


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_steps_without_a_finite_gradient_are_skipped_and_counted(momentum: float) -> None:
    """With momentum such a step went on along the old direction."""
    rule = StepRule(levels=32, steps=12, momentum=momentum)
    state = walk(rule, broken(lambda step: step % 3 != 0))
    assert state.skipped.tolist() == [8, 0]
    moved = levels_moved(state)
    torch.testing.assert_close(moved[0], torch.full((3, 4, 6), 4.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[1], torch.full((3, 4, 6), 12.0), atol=1e-4, rtol=0)


def test_three_such_steps_running_are_a_failure() -> None:
    with pytest.raises(RunFailed, match="not finite in 3 steps running"):
        walk(StepRule(steps=30), broken(lambda step: 4 <= step < 7))
    with pytest.raises(RunFailed, match="not finite"):
        walk(StepRule(steps=3), broken(lambda step: True))
    walk(StepRule(steps=30), broken(lambda step: 4 <= step < 6))
    # also when the three are spread over two calls
    pgd = Pgd(GREY, StepRule(steps=4), [0, 1])
    state = pgd.advance(pgd.start(), broken(lambda step: True), 0, 2)
    with pytest.raises(RunFailed):
        pgd.advance(state, broken(lambda step: True), 2, 2)


def test_progress_is_told_after_every_step() -> None:
    told: list[int] = []
    walk(StepRule(steps=4), up, each=told.append)
    assert told == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": 40}, "levels"),
        ({"steps": -1}, "steps"),
        ({"step_levels": 0.0}, "--step-levels"),
        ({"momentum": -0.1}, "momentum"),
    ],
)
def test_impossible_rules(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        StepRule(**options).check()  # type: ignore[arg-type]
