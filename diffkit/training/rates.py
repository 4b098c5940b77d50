"""Learning rates as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["RateSchedule", "learning_rate"]

RateSchedule = Literal["constant", "linear", "cosine", "warmup-stable-decay"]


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: RateSchedule,
    max_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
) -> float:
    """The rate of training step `step` in 0..max_steps-1.

    Warm-up: peak (s + 1) / W for s < W, so that step W - 1 is the first at the peak. Then, with
    N = max_steps and r = (N - s) / D the part of the decay that is left (above 0 on every step):

    - constant: peak;
    - linear: peak r with D = N - W;
    - cosine: peak (1 - cos(pi r)) / 2 with D = N - W;
    - warmup-stable-decay: peak min(1, r) with D = decay_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    length = decay_steps if schedule == "warmup-stable-decay" else max_steps - warmup_steps
    left = min(1.0, (max_steps - step) / length)
    if schedule == "cosine":
        return peak * (1 - math.cos(math.pi * left)) / 2
    return peak * left
