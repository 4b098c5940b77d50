"""Noticing that a few-step model makes the same picture of every noise.

A generator that is trained against a reward or a discriminator can satisfy both with one picture a
prompt. So a few prompts are watched: of each, pictures are made in one step from the same noises
again and again, and

    diversity = mean over prompts of the mean over pairs (i, j) of sqrt(mean((z_i - z_j)^2))

in latents is held against the best that this run has had since its first step. What a teacher makes
in one step is no measure: it is blurred, so that the pictures are alike, or at an earlier time than
the last still full of the noise, so that they differ more than pictures do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffkit.console import warn
from diffkit.errors import RunFailed
from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import normal

__all__ = ["DiversityGuard", "DiversityWatch", "within_prompt_diversity"]

PROMPTS = 4
NOISES = 4
WARN_BELOW = 0.7
STOP_BELOW = 0.4


def within_prompt_diversity(latents: Tensor) -> Tensor:
    """The mean root-mean-square distance of two pictures of one prompt, (), in >= float32.

    Arguments:
        latents: (P, n, ...): n pictures, at least 2, of each of P prompts.
    """
    flat = latents.flatten(2)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    count = flat.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=flat.device)
    return (flat[:, first] - flat[:, second]).square().mean(2).sqrt().mean()


class DiversityGuard:
    """Measures the diversity at intervals, and warns, then stops the run, when it falls off.

    Warns below 0.7 of the best value of the run, stops below 0.4. All processes measure the same
    pictures, so all of them stop.

    Arguments:
        every: training steps from one measurement to the next; the first is at step 0.
        prompts: how many prompts are watched.
        noises: how many pictures of each.
    """

    def __init__(self, every: int, prompts: int = PROMPTS, noises: int = NOISES) -> None:
        self.every = every
        self.prompts = prompts
        self.noises = noises
        self.tensors = {"value": torch.zeros(()), "best": torch.zeros(())}
        self._warned = False

    @property
    def value(self) -> Tensor:
        """The last diversity, (); 0 before the first."""
        return self.tensors["value"]

    def place(self, device: torch.device) -> None:
        """Move the numbers there."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def due(self, step: int) -> bool:
        """Whether training step `step` begins with a measurement."""
        return self.prompts > 0 and step % self.every == 0

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise (prompts x noises, *shape), prompt by prompt; always the same."""
        return normal((self.prompts * self.noises, *shape), "diversity")

    @torch.no_grad()
    def record(self, latents: Tensor, step: int) -> None:
        """Take in what the model made of `noise`, (prompts x noises, C, h, w), before `step`."""
        value = within_prompt_diversity(latents.unflatten(0, (self.prompts, self.noises)))
        self.tensors["value"].copy_(value)
        if step:
            self.tensors["best"].copy_(torch.maximum(value, self.tensors["best"]))

    def inspect(self, method: str) -> None:
        """Warn once, or raise `RunFailed`, if the pictures of a prompt have become alike."""
        value, best = self.tensors["value"].item(), self.tensors["best"].item()
        if value >= WARN_BELOW * best:
            return
        told = (
            f"pictures of one prompt differ by {value:.3g}, {value / best:.0%} of the most that "
            f"this run had ({best:.3g})"
        )
        if value < STOP_BELOW * best:
            raise RunFailed(
                f"{method}: the model has collapsed: {told}. Go back to a checkpoint before that, "
                "with a smaller weight of the reward or of the discriminator."
            )
        if not self._warned:
            self._warned = True
            warn(f"{method}: {told}; below {STOP_BELOW:.0%} the run stops.")


class DiversityWatch:
    """A `DiversityGuard` over the prompts that a few-step objective was told, from step to step.

    Arguments:
        model: in training.
        every: steps from one look to the next; 0 for no look.

    Attributes:
        guard: None while there is nothing to look at.
    """

    def __init__(self, model: LatentDiffusion, every: int) -> None:
        self.guard: DiversityGuard | None = None
        self._model = model
        self._every = every
        self._prompts: tuple[str, ...] = ()
        self._cond: list[Conditioning] = []

    def meet(self, prompts: Sequence[str]) -> DiversityGuard | None:
        """Watch what the model makes of these."""
        if self._every and prompts:
            self._prompts = tuple(prompts)
            self.guard = DiversityGuard(self._every, len(prompts))
        return self.guard

    def place(self, device: torch.device) -> None:
        """Encode the prompts, and move what is measured."""
        if self.guard is None:
            return
        self.guard.place(device)
        side, rows = self._model.default_size, range(len(self._prompts))
        cond = self._model.conditioner.encode(self._prompts, (side, side)).to(device)
        self._cond = [cond.select(slice(row, row + 1)).expand(self.guard.noises) for row in rows]

    @torch.no_grad()
    def look(self, step: int, make: Callable[[Tensor, Conditioning], Tensor]) -> None:
        """Measure before training step `step`, where that is due.

        Arguments:
            make: noises (n, C, h, w) and as many times one prompt -> what the model makes of them
                in one step, (n, C, h, w).
        """
        guard = self.guard
        if guard is None or not guard.due(step):
            return
        side = self._model.default_size
        noise = guard.noise(self._model.latent_shape(side, side)).to(guard.value.device)
        parts = zip(noise.chunk(guard.prompts), self._cond, strict=True)
        guard.record(torch.cat([make(part, cond) for part, cond in parts]), step)

    def inspect(self, method: str) -> None:
        """Warn, or raise `RunFailed`, when pictures of one prompt become alike."""
        if self.guard is not None:
            self.guard.inspect(method)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The diversity so far, as "diversity"."""
        return {} if self.guard is None else {"diversity": self.guard.tensors}
