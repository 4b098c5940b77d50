"""What the trainer asks of a method: players, phases, addressed draws, one loss a sample.

An objective never calls `backward`, never sees an optimizer and never reduces a loss: the trainer
does, over the whole global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.randomness import SampleKeys

__all__ = ["HasKeys", "Objective", "Phase", "check_finite", "reduce_loss"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Phase:
    """One kind of optimizer step.

    At training step s = 0, 1, 2, ... the phases run in the order in which the objective lists
    them: a phase runs when `s >= start` and `s % every == 0`, and then makes `repeats` optimizer
    steps of its player, each with its own draws for the same samples, at `rate` times the run's
    learning rate.
    """

    name: str
    player: str
    every: int = 1
    repeats: int = 1
    start: int = 0
    rate: float = 1.0

    def due(self, step: int) -> bool:
        """Whether the phase runs at training step `step`."""
        return step >= self.start and step % self.every == 0


class HasKeys(Protocol):
    """The least a batch has: the address of each of its samples."""

    @property
    def keys(self) -> SampleKeys:
        """(seed, epoch, index) of each sample."""
        ...


class Objective(Protocol):
    """A training method. Its networks in training are the players; all others stay frozen.

    A player is an `nn.Module` whose `forward(phase, draws, shared)` returns a dictionary of
    tensors of shape (B,) in float32:

    - `"loss"` is minimised: the trainer takes its mean over the global batch;
    - `"time"`, if there, is the place of each sample on the noise schedule in [0, 1]: the trainer
      logs the loss in ten bins of it;
    - the mean of every other entry is logged; of a pair of tensors, the ratio of their sums over
      the global batch (null where the second sum is 0).

    Only parameters with `requires_grad` are trained, averaged and kept in checkpoints. A player
    that uses another one in its loss must not register it as a submodule.

    Objectives subclass this protocol. `meet`, `begin`, `shown`, `watched`, `stepped`, `state` and
    `inspect` have defaults that do nothing; they are for what changes from step to step beside the
    weights:
    averages, controllers, views of the weights. Such things may only be computed from what is equal
    on all processes (`means`, weights after a step), so that a run does not depend on how its
    batches are split.
    """

    def players(self) -> Mapping[str, nn.Module]:
        """The trained networks by name; the same modules on every call."""
        ...

    def phases(self) -> Sequence[Phase]:
        """The optimizer steps of one training step, in order."""
        ...

    def averaged(self) -> Sequence[str]:
        """Names of the players whose moving average is kept when EMA is on."""
        ...

    def meet(self, prompts: Sequence[str]) -> None:
        """A few prompts of the run's data, before `place`: to watch what the model makes of them.

        None for data whose prompts are not known at the start.
        """
        return None

    def place(self, device: torch.device) -> None:
        """Move what draws and frozen networks need to `device`."""
        ...

    def begin(self, step: int) -> None:
        """Training step `step` = 0, 1, ... is about to run; after a resume too. Under autocast."""
        return None

    def draw(self, batch: Any, repeat: int) -> Any:
        """All the randomness of one micro-batch, by address; repeat 0, 1, ... differ."""
        ...

    def shared(self, draws: Any) -> Any:
        """What frozen networks say about the draws: no gradient, autocast, once for all phases."""
        ...

    def shown(self) -> Sequence[str]:
        """Names of logged terms that the progress line shows beside the loss."""
        return ()

    def watched(self) -> Sequence[str]:
        """Names of the player's terms whose means `stepped` gets; they must be in every forward."""
        return ()

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """An optimizer step of `phase` was made.

        Arguments:
            means: the mean of each watched term that this phase's player has, over the global
                batch: float32 of no dimension, (2,) of a pair; equal on all processes.
        """
        return None

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Tensors beside the players' own that a resumed run needs, by name and key.

        They exist once `place` was called, are written with every checkpoint and are given their
        values back in place.
        """
        return {}

    def inspect(self) -> None:
        """Numbers were written: the time to warn, or to raise `RunFailed`, if the run goes wrong.

        Called on every process every `log_every` steps; values may be read here.
        """
        return None

    def save(self, folder: Path) -> None:
        """Write the result. The players hold the weights to be saved, whole and not sharded."""
        ...


def reduce_loss(loss: Tensor, global_count: int, processes: int = 1) -> Tensor:
    """The share of a micro-batch in the mean loss of the global batch: sum(loss) P / N.

    Data-parallel training averages gradients over the P processes, so the gradients of these
    shares add up to the gradient of the mean over all N samples, however the samples are split.

    Arguments:
        loss: one value a sample, shape (b,), of this process's micro-batch.
        global_count: N, the samples of one optimizer step over all processes.
        processes: P.
    """
    return loss.sum() * (processes / global_count)


def check_finite(values: DataclassInstance, section: str) -> None:
    """Raise `UserError` for a NaN or an infinity among the flags of `section`."""
    for field in fields(values):
        value = getattr(values, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{section}.{field.name}: {value} must be a finite number.")
