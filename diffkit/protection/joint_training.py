"""Training the surrogate of a set of pictures: a few DreamBooth steps at a time.

    loss = L(x, c) + w L(x_class, c_class),    L(x, c) = mean (f(z_t, t, c) - y)^2

each with its own time over the whole axis, its own noise and its own sample of the posterior, one
picture of each kind a step (Ruiz et al. 2022, arXiv:2208.12242). Pictures are taken in a random
order, each once before any comes again, and are seen as the attack sees them: in the whole view,
as floats. AdamW goes on over all rounds; gradients are clipped to norm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffkit.errors import RunFailed
from diffkit.models.codec import Codec
from diffkit.models.conditioner import Sizes
from diffkit.protection.learner import Learner
from diffkit.protection.losses import prior_preservation
from diffkit.protection.scene import Scene
from diffkit.protection.scene_losses import semantic
from diffkit.protection.surrogate import Surrogate
from diffkit.protection.views import ViewPlan
from diffkit.randomness import integers, normal, permutation, uniform

__all__ = ["Examples", "Prior", "Training", "picture_loss"]

_LONGEST = 1.0


class Examples:
    """Pictures to train on, encoded when they are first wanted.

    Arguments:
        codec: of the attacked model.
        shown: makes what the model sees of each picture, (1, 3, H, W), float32 in [-1, 1]; only
            when it is encoded, for floats of a whole folder would be large.
        plans: the views of each; of several windows one is taken at random.
    """

    def __init__(
        self, codec: Codec, shown: Sequence[Callable[[], Tensor]], plans: Sequence[ViewPlan]
    ) -> None:
        self._codec = codec
        self._shown = list(shown)
        self._plans = list(plans)
        self._encoded: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._shown)

    def at(self, index: int, *address: int | str) -> tuple[Tensor, Sizes]:
        """Moments (1, 2C, h, w) of picture `index` in its whole view, and the view's sizes."""
        plan = self._plans[index]
        windows = len(plan.whole)
        number = int(integers(0, windows, (), *address, "window")) if windows > 1 else 0
        view = plan.whole[number]
        if (index, number) not in self._encoded:
            with torch.no_grad():
                seen = view.apply(self._shown[index]()).to(self._codec.device)
                self._encoded[index, number] = self._codec.encode_moments(seen)
        return self._encoded[index, number], view.sizes(plan.height, plan.width)


@dataclass(frozen=True)
class Prior:
    """What keeps the surrogate's knowledge of the class.

    Attributes:
        examples: class pictures.
        prompt: of all of them.
        weight: w, above 0.
    """

    examples: Examples
    prompt: str
    weight: float


@dataclass
class Training:
    """A stream of training steps of one learner, which may be cut anywhere and gone on with.

    Attributes:
        learner: what trains.
        prior: class pictures, or None.
        address: of all draws.
        each: called after every step with its number.
        done: steps so far.
    """

    learner: Learner
    prior: Prior | None
    address: tuple[int | str, ...]
    each: Callable[[int], None] | None = None
    done: int = 0
    _optimizer: torch.optim.AdamW | None = field(default=None, repr=False)

    def run(self, examples: Examples, steps: int) -> None:
        """`steps` more steps on these pictures.

        Raises:
            RunFailed: a loss was not finite.
        """
        if self._optimizer is None:
            self._optimizer = self.learner.optimizer()
        losses = []
        with self.learner.training(), torch.enable_grad():
            for _ in range(steps):
                losses.append(self._step(examples, self._optimizer))
                if self.each is not None:
                    self.each(self.done)
                self.done += 1
        if not bool(torch.stack(losses).isfinite().all()):
            raise RunFailed(
                "the surrogate's loss was not finite; in half precision some models overflow: try "
                "--dtype fp32 or bf16."
            )
        self.learner.settle()

    def _step(self, examples: Examples, optimizer: torch.optim.AdamW) -> Tensor:
        here = (*self.address, self.done)
        told = self.learner.told(self.learner.prompt)
        moments, sizes = examples.at(self._index(len(examples), "pictures"), *here, "pictures")
        loss = picture_loss(told, moments, sizes, (*here, "pictures"))
        if self.prior is not None:
            prior = self.prior
            index = self._index(len(prior.examples), "class")
            moments, sizes = prior.examples.at(index, *here, "class")
            told = self.learner.told(prior.prompt)
            of_class = picture_loss(told, moments, sizes, (*here, "class"))
            loss = prior_preservation(loss, of_class, prior.weight)
        # Gradients of a mean over many elements fall below what float16 can hold.
        scale = float(moments.numel()) if self.learner.compute == torch.float16 else 1.0
        (scale * loss).sum().backward()
        for parameter in self.learner.parameters:
            if parameter.grad is not None and scale != 1:
                parameter.grad /= scale
        torch.nn.utils.clip_grad_norm_(self.learner.parameters, _LONGEST)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def _index(self, count: int, purpose: str) -> int:
        """Without replacement: a new permutation whenever all were taken."""
        turn, place = divmod(self.done, count)
        return int(permutation(count, *self.address, turn, purpose, "order")[place])


def picture_loss(
    told: Surrogate, moments: Tensor, sizes: Sizes, address: tuple[int | str, ...]
) -> Tensor:
    """L of one encoded picture (1, 2C, h, w) at the time and noises of an address: (1,)."""
    shape = (1, told.codec.channels, *moments.shape[-2:])
    eps, eta = (normal(shape, *address, purpose).to(moments) for purpose in ("eps", "eta"))
    t = told.times(uniform((1,), *address, "time")).to(moments.device)
    return semantic(Scene(told, moments, eta, t, eps, [sizes], [address]))
