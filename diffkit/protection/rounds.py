"""How a method that trains a surrogate divides its work: rounds, steps, and weights of losses."""

from __future__ import annotations

from diffkit.protection.settings import Settings

__all__ = ["attack_rounds", "prior_weight", "training_steps", "work_of"]

_ACE_ROUNDS = 5
_ASPL_STEPS = 6
_TRAIN_STEPS = {"ace": 5, "aspl": 3, "fsmg": 1000}


def attack_rounds(settings: Settings) -> list[int]:
    """Sign steps of each round: as equal as whole numbers can be, the longer ones first."""
    steps = settings.rule().steps
    usual = {"ace": _ACE_ROUNDS, "fsmg": 1, "aspl": -(-steps // _ASPL_STEPS)}
    count = min(steps, settings.rounds or usual[settings.row.joint or ""])
    if count == 0:
        return []
    length, longer = divmod(steps, count)
    return [length + 1] * longer + [length] * (count - longer)


def training_steps(settings: Settings) -> int:
    """Training steps of a round."""
    return settings.train_steps or _TRAIN_STEPS[settings.row.joint or ""]


def work_of(settings: Settings, pictures: int) -> int:
    """Sign steps of all pictures and training steps of a set, for progress bars."""
    rounds = len(attack_rounds(settings))
    phases = {"ace": max(0, rounds - 1), "fsmg": 1, "aspl": max(0, 2 * rounds - 1)}
    trained = phases[settings.row.joint or ""] * training_steps(settings)
    return pictures * settings.rule().steps + trained


def prior_weight(settings: Settings, on_cpu: bool) -> float:
    """w of the class pictures: 0 without a class prompt, and on a CPU unless it is asked for."""
    if settings.class_prompt is None:
        return 0.0
    if settings.prior_weight is not None:
        return settings.prior_weight
    return 0.0 if on_cpu else 1.0
