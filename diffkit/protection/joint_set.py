"""The pictures of a joint job while it runs: their attacks, and what the surrogate learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.budget import as_signed
from diffkit.protection.joint_training import Examples, Prior, Training
from diffkit.protection.learner import Learner
from diffkit.protection.protect import Attack, ProtectionResult, plan_for
from diffkit.protection.rounds import prior_weight, training_steps
from diffkit.protection.settings import Settings

__all__ = ["JointSet", "Row"]


@dataclass(frozen=True)
class Row:
    """A picture, and its place in the caller's list; see `protect_set`."""

    pixels: Tensor
    seed: int
    alpha: Tensor | None
    mask: Tensor | None
    place: int

    def key(self) -> tuple[int, str]:
        """By seed, then by content: no order of files comes in."""
        parts = (self.pixels, self.alpha, self.mask)
        return self.seed, "".join("-" if part is None else _digest(part) for part in parts)

    @property
    def kind(self) -> tuple[object, ...]:
        """Pictures of one kind can be attacked at once."""
        return self.pixels.shape, self.alpha is None, self.mask is None


@dataclass
class JointSet:
    """One job, from its first step to its results.

    Attributes:
        model: the attacked model.
        settings: method and options.
        learner: the surrogate that trains.
        rows: the pictures in their own order.
        seed: of all draws that belong to no single picture.
        each: told of finished steps, see `protect_set`.
        lean, batch_size: likewise.
        change: for each round the norm by which it moved what trains.

    What is not attacked just now waits in the memory of the CPU, as its 8-bit pictures and x:
    pictures may be large and many.
    """

    model: LatentDiffusion
    settings: Settings
    learner: Learner
    rows: Sequence[Row]
    seed: int
    each: Callable[[int], None] | None
    lean: bool
    batch_size: int
    change: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds: dict[tuple[object, ...], list[Row]] = {}
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        self._attacks: list[tuple[Attack, list[Row]]] = []
        for group in kinds.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                self._attacks.append((self._attack(batch), batch))
        self.prior: Prior | None = None

    def _attack(self, batch: list[Row]) -> Attack:
        alphas = [row.alpha for row in batch if row.alpha is not None]
        masks = [row.mask for row in batch if row.mask is not None]
        pixels = torch.stack([row.pixels for row in batch])
        return Attack.prepare(
            pixels,
            [self.learner.surrogate],
            self.settings,
            seeds=[row.seed for row in batch],
            plan=plan_for(self.model, self.settings, *pixels.shape[-2:]),
            alpha=torch.stack(alphas) if alphas else None,
            mask=torch.stack(masks) if masks else None,
            lean=self.lean,
        )

    # -- what is learned from ------------------------------------------------------------------

    def unprotected(self, clean: Sequence[Tensor] | None) -> Examples:
        """Clean pictures, uint8 (C, H, W) each; without any the pictures of the job themselves."""
        if clean is not None:
            return self._still(clean)
        return self._examples(lambda attack, rows: as_signed(attack.pgd.pixels[rows]))

    def _still(self, pictures: Sequence[Tensor]) -> Examples:
        """Pictures that do not change, ordered by content."""
        ordered = sorted(pictures, key=_digest)
        shown = [partial(_as_shown, x) for x in ordered]
        plans = [plan_for(self.model, self.settings, *x.shape[-2:]) for x in ordered]
        return Examples(self.model.codec, shown, plans)

    def pictures(self) -> Examples:
        """What the protected pictures have become, unrounded."""
        return self._examples(lambda attack, rows: attack.x[rows])

    def _examples(self, of: Callable[[Attack, slice], Tensor]) -> Examples:
        """One picture a row, in their order, which is not that of the batches."""

        def seen(attack: Attack, rows: slice) -> Tensor:
            return attack.pictures.select(rows).shown(of(attack, rows))

        found = {}
        for attack, batch in self._attacks:
            plan = plan_for(self.model, self.settings, *attack.pgd.pixels.shape[-2:])
            for i, row in enumerate(batch):
                found[row.place] = (partial(seen, attack, slice(i, i + 1)), plan)
        shown, plans = zip(*(found[row.place] for row in self.rows), strict=True)
        return Examples(self.model.codec, shown, plans)

    def set_prior(self, class_images: Sequence[Tensor] | None) -> None:
        """Take class pictures into the training, where they have a weight.

        Raises `UserError` where there are none.
        """
        weight = prior_weight(self.settings, self.model.device.type == "cpu")
        prompt = self.settings.class_prompt
        if prompt is None or weight == 0:
            return
        if not class_images:
            raise UserError("class_prompt: needs class_images, pictures of it.")
        self.prior = Prior(self._still(class_images), prompt, weight)

    def training(self, purpose: str) -> Training:
        """A new stream of training steps."""
        tick = None if self.each is None else self._ticker(1)
        return Training(self.learner, self.prior, (self.seed, purpose), tick)

    @property
    def count(self) -> int:
        """Training steps of a round."""
        return training_steps(self.settings)

    # -- attacking -----------------------------------------------------------------------------

    def advance(self, steps: int) -> None:
        """Sign steps of all pictures against the surrogate as it is; 0 starts their walks."""
        for attack, batch in self._attacks:
            self._meet(attack)
            attack.advance(steps, None if self.each is None else self._ticker(len(batch)))
            attack.to("cpu")

    def _meet(self, attack: Attack) -> None:
        """Bring an attack to the device and before the surrogate as it is."""
        assert attack.gradient is not None
        attack.gradient.surrogates = [self.learner.surrogate]
        attack.to(self.model.device)

    def _ticker(self, count: int) -> Callable[[int], None]:
        def tick(step: int) -> None:
            assert self.each is not None
            self.each(count)

        return tick

    def note(self, before: Sequence[Tensor]) -> None:
        """Record how far a round moved what trains from these weights."""
        pairs = zip(before, self.learner.weights(), strict=True)
        self.change.append(float(torch.stack([(a - b).norm() for a, b in pairs]).norm()))

    def finish(self) -> list[ProtectionResult]:
        """Results in the caller's order."""
        results: dict[int, ProtectionResult] = {}
        for attack, batch in self._attacks:
            self._meet(attack)
            for row, result in zip(batch, attack.finish(), strict=True):
                stats = {**result.stats, "surrogate_change": list(self.change)}
                results[row.place] = ProtectionResult(result.pixels, stats)
            attack.to("cpu")
        return [results[place] for place in sorted(results)]


def _as_shown(pixels: Tensor) -> Tensor:
    """uint8 (C, H, W) -> (1, 3, H, W) float32 in [-1, 1]."""
    return as_signed(pixels[None].expand(-1, 3, -1, -1))


def _digest(x: Tensor) -> str:
    plain = x.cpu().contiguous()
    return hashlib.sha256(repr(tuple(x.shape)).encode() + plain.numpy().tobytes()).hexdigest()
