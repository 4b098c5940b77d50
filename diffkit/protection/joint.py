"""Protect a set of pictures with a surrogate that is trained on them.

ACE and ACE+ (Zheng et al. 2023, arXiv:2310.04687): rounds of sign steps on all pictures, the first
against the model itself, then a few steps of training the surrogate on what they have become; not
after the last round, where it would change nothing. One surrogate, one optimizer for all rounds,
and the change of the pictures is carried over.

FSMG (Van Le et al. 2023, arXiv:2303.15433): a surrogate is fine-tuned on clean pictures, then
attacked like any fixed model.

ASPL (the same): in each round a copy of the surrogate learns from clean pictures and is attacked;
then the surrogate itself learns from what the pictures have become.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.budget import as_signed
from diffkit.protection.joint_training import Examples, Prior, Training
from diffkit.protection.learner import Learner, learner
from diffkit.protection.protect import Attack, ProtectionResult, plan_for, prepared
from diffkit.protection.settings import Settings
from diffkit.randomness import address

__all__ = ["attack_rounds", "prior_weight", "protect_set", "training_steps", "work_of"]

_ACE_ROUNDS = 5
_ASPL_STEPS = 6
_TRAIN_STEPS = {"ace": 5, "aspl": 3, "fsmg": 1000}


def protect_set(
    pixels: Sequence[Tensor],
    model: LatentDiffusion,
    settings: Settings,
    *,
    seeds: Sequence[int],
    alphas: Sequence[Tensor | None] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    clean: Sequence[Tensor] | None = None,
    class_images: Sequence[Tensor] | None = None,
    lean: bool = False,
    batch_size: int | None = None,
    each: Callable[[int], None] | None = None,
) -> list[ProtectionResult]:
    """Protect the pictures of one artist or subject together.

    The result does not depend on the order of any of the pictures. The model comes back as it was.

    Arguments:
        pixels: uint8 (C, H, W) each, C = 3, or 1 for grey ones; sizes may differ.
        model: the attacked model.
        settings: a method that trains a surrogate, and its options.
        seeds: one a picture.
        alphas: uint8 (1, H, W) or None each, see `protect`.
        masks: float (1, H, W) in [0, 1] or None each, see `protect`.
        clean: uint8 (C, H, W) each, unprotected pictures of the subject for fsmg and aspl; without
            it the pictures themselves.
        class_images: uint8 (C, H, W) each, pictures of the class prompt; needed where there is one
            and `prior_weight` is not 0.
        lean: two passes and recomputed activations, for less memory.
        batch_size: most pictures of one size that are attacked at once; all without.
        each: called after every sign step with the number of pictures that took it, and after every
            training step with 1; in all `work_of` times.

    Returns:
        One a picture, in the order given. Beside the entries of `protect` its stats have
        "surrogate_change", for each round the norm by which it moved what trains, and scores that
        are both read under the surrogate of the last round.

    Raises:
        UserError: options that the method or the model cannot use, or no pictures.
        RunFailed: gradients or losses were not finite.
    """
    settings.check()
    _check(pixels, settings, clean, class_images)
    count = len(pixels)
    rows = [
        _Row(pixels[i], seeds[i], (alphas or [None] * count)[i], (masks or [None] * count)[i], i)
        for i in range(count)
    ]
    rows.sort(key=_Row.key)
    seed = address("set", settings.seed, *(row.seed for row in rows))
    with (
        prepared(model, settings, lean=lean) as surrogates,
        learner(model, settings, surrogates[0], seed) as trained,
    ):
        job = _Set(model, settings, trained, rows, seed, each)
        job.prepare(lean, batch_size or count)
        job.clean = job.originals() if clean is None else job.still(clean)
        job.prior = job.prior_of(class_images)
        _WALKS[settings.row.joint or ""](job)
        return job.finish()


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


def _check(
    pixels: Sequence[Tensor],
    settings: Settings,
    clean: Sequence[Tensor] | None,
    class_images: Sequence[Tensor] | None,
) -> None:
    row = settings.row
    if row.joint is None:
        raise UserError(f"{row.name}: trains no surrogate; use protect.")
    if len(pixels) == 0:
        raise UserError(f"{row.name}: no picture to protect.")
    if clean is not None and row.joint == "ace":
        raise UserError(
            f"clean: {row.name} learns from the protected pictures alone; leave it out."
        )
    if clean is not None and len(clean) == 0:
        raise UserError("clean: there is no picture in it.")
    if class_images is not None and settings.class_prompt is None:
        raise UserError("class_images: say what they show with a class prompt.")


@dataclass(frozen=True)
class _Row:
    """A picture, and its place in the caller's list."""

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
class _Set:
    """Everything of one job while it runs."""

    model: LatentDiffusion
    settings: Settings
    learner: Learner
    rows: Sequence[_Row]
    seed: int
    each: Callable[[int], None] | None
    attacks: list[tuple[Attack, list[_Row]]] = field(default_factory=list)
    clean: Examples = field(init=False)
    prior: Prior | None = None
    change: list[float] = field(default_factory=list)

    def prepare(self, lean: bool, batch_size: int) -> None:
        """The attack of every batch of pictures of one kind."""
        kinds: dict[tuple[object, ...], list[_Row]] = {}
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        for group in kinds.values():
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                self.attacks.append((self._attack(batch, lean), batch))

    def _attack(self, batch: list[_Row], lean: bool) -> Attack:
        alphas = [row.alpha for row in batch if row.alpha is not None]
        masks = [row.mask for row in batch if row.mask is not None]
        pixels = torch.stack([row.pixels for row in batch]).to(self.model.device)
        return Attack.prepare(
            pixels,
            [self.learner.surrogate],
            self.settings,
            seeds=[row.seed for row in batch],
            plan=plan_for(self.model, self.settings, *pixels.shape[-2:]),
            alpha=torch.stack(alphas) if alphas else None,
            mask=torch.stack(masks) if masks else None,
            lean=lean,
        )

    # -- what is learned from ------------------------------------------------------------------

    def still(self, pictures: Sequence[Tensor]) -> Examples:
        """Pictures that do not change, ordered by content."""
        ordered = sorted(pictures, key=_digest)
        shown = [as_signed(x.to(self.model.device))[None].expand(-1, 3, -1, -1) for x in ordered]
        plans = [plan_for(self.model, self.settings, *x.shape[-2:]) for x in ordered]
        return Examples(self.model.codec, shown, plans)

    def originals(self) -> Examples:
        """The pictures themselves."""
        return self._examples(lambda attack: attack.pgd.origin)

    def pictures(self) -> Examples:
        """What the protected pictures have become, unrounded."""
        return self._examples(lambda attack: attack.x)

    def _examples(self, of: Callable[[Attack], Tensor]) -> Examples:
        """One picture a row, in their order, which is not that of the batches."""
        found = {}
        for attack, batch in self.attacks:
            seen = attack.pictures.shown(of(attack))
            plan = plan_for(self.model, self.settings, *seen.shape[-2:])
            for i, row in enumerate(batch):
                found[row.place] = (seen[i : i + 1], plan)
        shown, plans = zip(*(found[row.place] for row in self.rows), strict=True)
        return Examples(self.model.codec, shown, plans)

    def prior_of(self, class_images: Sequence[Tensor] | None) -> Prior | None:
        """Class pictures with their weight, or None where it is 0."""
        weight = prior_weight(self.settings, self.model.device.type == "cpu")
        prompt = self.settings.class_prompt
        if prompt is None or weight == 0:
            return None
        if not class_images:
            raise UserError("class_prompt: needs class_images, pictures of it.")
        return Prior(self.still(class_images), prompt, weight)

    def training(self, purpose: str) -> Training:
        """A new stream of training steps."""
        tick = None if self.each is None else self._ticker(1)
        return Training(self.learner, self.prior, (self.seed, purpose), tick)

    @property
    def count(self) -> int:
        """Training steps of a round."""
        return training_steps(self.settings)

    # -- attacking -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Start every walk, before any training."""
        for attack, _ in self.attacks:
            attack.advance(0)

    def advance(self, steps: int) -> None:
        """Sign steps of all pictures against the surrogate as it is."""
        for attack, batch in self.attacks:
            self._refresh(attack)
            tick = None if self.each is None else self._ticker(len(batch))
            attack.advance(steps, tick)

    def _refresh(self, attack: Attack) -> None:
        assert attack.gradient is not None
        attack.gradient.surrogates = [self.learner.surrogate]

    def _ticker(self, count: int) -> Callable[[int], None]:
        def tick(step: int) -> None:
            assert self.each is not None
            self.each(count)

        return tick

    def note(self, before: Sequence[Tensor]) -> None:
        """Record how far a round moved what trains."""
        pairs = zip(before, self.learner.weights(), strict=True)
        self.change.append(float(torch.stack([(a - b).norm() for a, b in pairs]).norm()))

    def finish(self) -> list[ProtectionResult]:
        """Results in the caller's order."""
        results: dict[int, ProtectionResult] = {}
        for attack, batch in self.attacks:
            self._refresh(attack)
            for row, result in zip(batch, attack.finish(), strict=True):
                stats = {**result.stats, "surrogate_change": list(self.change)}
                results[row.place] = ProtectionResult(result.pixels, stats)
        return [results[place] for place in sorted(results)]


def _ace(job: _Set) -> None:
    job.begin()
    training = job.training("surrogate")
    for last, steps in _rounds(job.settings):
        job.advance(steps)
        before = job.learner.weights()
        if not last:
            training.run(job.pictures(), job.count)
        job.note(before)


def _fsmg(job: _Set) -> None:
    before = job.learner.weights()
    job.training("surrogate").run(job.clean, job.count)
    job.note(before)
    job.begin()
    for _, steps in _rounds(job.settings):
        job.advance(steps)


def _aspl(job: _Set) -> None:
    job.begin()
    on_clean, on_protected = job.training("copy"), job.training("surrogate")
    for last, steps in _rounds(job.settings):
        kept = job.learner.weights()
        on_clean.run(job.clean, job.count)
        job.advance(steps)
        if last:
            job.note(job.learner.weights())
        else:
            job.learner.restore(kept)
            on_protected.run(job.pictures(), job.count)
            job.note(kept)


_WALKS = {"ace": _ace, "fsmg": _fsmg, "aspl": _aspl}


def _rounds(settings: Settings) -> Iterator[tuple[bool, int]]:
    """(is it the last, sign steps) of each round."""
    lengths = attack_rounds(settings)
    for number, steps in enumerate(lengths):
        yield number == len(lengths) - 1, steps


def _digest(x: Tensor) -> str:
    plain = x.cpu().contiguous()
    return hashlib.sha256(repr(tuple(x.shape)).encode() + plain.numpy().tobytes()).hexdigest()
