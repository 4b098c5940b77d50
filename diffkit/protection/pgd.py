"""The one loop of all methods: projected gradient ascent in a box of 8-bit levels.

    x_0     = x8 / 127.5 - 1, moved to a random point of its box where the method starts there
    x_{i+1} = clamp(x_i + a_i sign(g_i), lo, hi)                      ("linf", Madry et al. 2018)
    x_{i+1} = clamp(P(x_i + a_i g_i / ||g_i||_2), lo, hi)             ("l2", P: ||x - x_0||_2 <= r)
    q       = the integers nearest to x, within the budget            (`budget.to_levels`)

sign(0) = 0: a pixel that no gradient reaches does not move. x is float32 whatever the models are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffkit.errors import RunFailed, UserError
from diffkit.protection.budget import LEVEL, as_signed, box, check_levels, to_levels
from diffkit.randomness import uniform

__all__ = ["Gradient", "Pgd", "Score", "State", "StepRule", "random_noise"]

Gradient = Callable[[Tensor, int], Tensor]
"""(x (B, C, H, W), step) -> the gradient of J, of x's shape."""

Score = Callable[[Tensor], Tensor]
"""x (B, C, H, W) -> J on a fixed set of draws, (B,)."""

SCORE_EVERY = 10
_PATIENCE = 3
_L2_RADIUS = 16 / (3 * 512 * 512) ** 0.5
"""PhotoGuard's radius 16 (in units of [-1, 1]) at 512 x 512 x 3, as root mean square."""
_L2_STEP = _L2_RADIUS / 16


@dataclass(frozen=True)
class StepRule:
    """How the loop walks.

    Attributes:
        levels: k, the budget.
        steps: number of steps.
        step_levels: a, the size of a sign step in levels, above 0.
        random_start: begin at a uniformly random point of the box.
        decay: a_i = a (1 - 0.99 i / steps), as in PhotoGuard.
        momentum: mu of m = mu m + g / mean |g| (Dong et al. 2018); 0 is none.
        norm: "linf", or "l2": steps along g whose length is that of PhotoGuard's 1 at 512 pixels,
            inside a ball of its radius 16, both scaled by the square root of the pixel count.
        keep_best: the result is the iterate with the best score, not the last one.
    """

    levels: int = 8
    steps: int = 100
    step_levels: float = 1.0
    random_start: bool = False
    decay: bool = False
    momentum: float = 0.0
    norm: Literal["linf", "l2"] = "linf"
    keep_best: bool = False

    def check(self) -> None:
        """Raise `UserError` for impossible values."""
        check_levels(self.levels)
        if self.steps < 0:
            raise UserError(f"--steps: {self.steps} must not be negative.")
        if not self.step_levels > 0:
            raise UserError(f"--step-levels: {self.step_levels} must be above 0.")
        if self.momentum < 0:
            raise UserError(f"--momentum: {self.momentum} must not be negative.")

    def size(self, step: int) -> float:
        """a_i in units of [-1, 1]."""
        shrink = 1 - 0.99 * step / self.steps if self.decay else 1.0
        return self.step_levels * LEVEL * shrink


@dataclass
class State:
    """Where a walk of B pictures stands.

    Attributes:
        x: (B, C, H, W) float32.
        velocity: the momentum's mean, of x's shape, or None.
        skipped: (B,) steps whose gradient was not finite.
        failing: (B,) how many of them came last in a row; `longest` the longest such row.
        best, best_score: the best iterate and its score, where it is kept.
    """

    x: Tensor
    skipped: Tensor
    failing: Tensor
    longest: Tensor
    velocity: Tensor | None = None
    best: Tensor | None = None
    best_score: Tensor | None = None

    def to(self, device: torch.device | str) -> None:
        """Move all of it."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))


class Pgd:
    """The walk of pictures of one size.

    Arguments:
        pixels: x8, uint8 (B, C, H, W), on the device of the models.
        rule: how to walk.
        seeds: one a picture, for the random start.
        weight: m, (B, 1, H, W) in [0, 1], the share of the budget of each pixel; 0 fixes it.
    """

    def __init__(
        self, pixels: Tensor, rule: StepRule, seeds: Sequence[int], weight: Tensor | None = None
    ) -> None:
        rule.check()
        self.pixels = pixels
        self.rule = rule
        self.seeds = list(seeds)
        self.weight = weight

    @cached_property
    def origin(self) -> Tensor:
        """x_0, (B, C, H, W) float32 in [-1, 1]."""
        return as_signed(self.pixels)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(lo, hi) of the box, each of x's shape."""
        return box(self.pixels, self.rule.levels, self.weight)

    def to(self, device: torch.device | str) -> None:
        """Move the pictures; what follows from them is made again when it is wanted."""
        self.pixels = self.pixels.to(device)
        self.weight = None if self.weight is None else self.weight.to(device)
        for name in ("origin", "bounds"):
            self.__dict__.pop(name, None)

    def start(self) -> State:
        """The first iterate: the pictures themselves, or random points of their boxes."""
        x = self.origin
        if self.rule.random_start:
            shape = x.shape[1:]
            draws = torch.stack([uniform(shape, seed, "start") for seed in self.seeds]).to(x)
            x = self._into_box(x + self._reach() * (2 * draws - 1))
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return State(x.clone(), count, count.clone(), count.clone())

    def advance(
        self,
        state: State,
        gradient: Gradient,
        first: int,
        count: int,
        score: Score | None = None,
        each: Callable[[int], None] | None = None,
    ) -> State:
        """`count` more steps from step `first` on.

        Arguments:
            state: changed in place and returned.
            gradient: of J, to be ascended.
            first: number of the first step, which is a part of the addresses of its draws.
            count: of steps.
            score: J on fixed draws; read every 10 steps for the best iterate.
            each: called with the number of every finished step.

        Raises:
            RunFailed: the gradient of a picture was not finite three times in a row.
        """
        for step in range(first, first + count):
            g = gradient(state.x, step)
            finite = g.flatten(1).isfinite().all(1)
            state.skipped += ~finite
            state.failing = torch.where(finite, 0, state.failing + 1)
            state.longest = torch.maximum(state.longest, state.failing)
            self._step(state, g, finite.view(-1, 1, 1, 1), step)
            looked = step % SCORE_EVERY == SCORE_EVERY - 1
            if looked or step == first + count - 1:
                self._check(state, step)
            # At the walk's own end, not at this call's: calls may be of any length.
            judged = looked or step == self.rule.steps - 1
            if score is not None and self.rule.keep_best and judged:
                self._note_best(state, score(state.x))
            if each is not None:
                each(step)
        return state

    def finish(self, state: State) -> Tensor:
        """The saved pictures, uint8 (B, C, H, W), within the budget of the originals exactly."""
        x = state.x if state.best is None else state.best
        return to_levels(x, self.pixels, self.rule.levels, self.weight)

    def stepped(self, x: Tensor, g: Tensor, step: int = 0) -> Tensor:
        """x after one sign step along g, inside the box."""
        return self._into_box(x + self.rule.size(step) * g.sign())

    def _step(self, state: State, g: Tensor, finite: Tensor, step: int) -> None:
        """One step along g; where that is not finite neither x nor the velocity changes."""
        # What may not move has no say in lengths and means.
        moves = finite if self.weight is None else finite & (self.weight > 0)
        g = torch.where(moves, g, 0.0)
        if self.rule.momentum > 0:
            scaled = g / g.abs().flatten(1).mean(1).clamp_min(1e-30).view(-1, 1, 1, 1)
            before = torch.zeros_like(g) if state.velocity is None else state.velocity
            g = torch.where(finite, self.rule.momentum * before + scaled, before)
            state.velocity = g
        move = self.stepped if self.rule.norm == "linf" else self._moved
        state.x = torch.where(finite, move(state.x, g, step), state.x)

    def _moved(self, x: Tensor, g: Tensor, step: int) -> Tensor:
        """x after one step of the "l2" kind."""
        unit = self.origin[0].numel() ** 0.5
        length = _L2_STEP * unit * (self.rule.size(step) / LEVEL)
        delta = x + length * g / _norms(g).clamp_min(1e-30) - self.origin
        radius = _L2_RADIUS * unit
        return self._into_box(self.origin + delta * (radius / _norms(delta)).clamp_max(1))

    def _reach(self) -> Tensor | float:
        reach = self.rule.levels * LEVEL
        return reach if self.weight is None else reach * self.weight.to(self.origin)

    def _into_box(self, x: Tensor) -> Tensor:
        low, high = self.bounds
        return torch.minimum(torch.maximum(x, low), high)

    def _note_best(self, state: State, values: Tensor) -> None:
        if state.best is None or state.best_score is None:
            state.best, state.best_score = state.x.clone(), values.clone()
            return
        better = values > state.best_score
        state.best = torch.where(better.view(-1, 1, 1, 1), state.x, state.best)
        state.best_score = torch.where(better, values, state.best_score)

    def _check(self, state: State, step: int) -> None:
        if bool((state.longest >= _PATIENCE).any()):
            raise RunFailed(
                f"by step {step} the gradient was not finite in {_PATIENCE} steps running. In half "
                "precision some autoencoders overflow; try --dtype fp32 or bf16."
            )


def random_noise(
    pixels: Tensor, levels: int, seeds: Sequence[int], weight: Tensor | None = None
) -> Tensor:
    """The control: +k or -k levels at every pixel by a coin, cut to [0, 255]; uint8 as `pixels`.

    Its largest change is that of an attack with budget k, its mean change larger.
    """
    shape = pixels.shape[1:]
    draws = torch.stack([uniform(shape, seed, "control") for seed in seeds]).to(pixels.device)
    sign = torch.where(draws < 0.5, -1.0, 1.0)
    reach = levels * LEVEL * (1.0 if weight is None else weight.to(sign))
    return to_levels(as_signed(pixels) + reach * sign, pixels, levels, weight)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
