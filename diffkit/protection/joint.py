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

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.joint_set import JointSet, Row
from diffkit.protection.learner import learner
from diffkit.protection.protect import ProtectionResult, prepared
from diffkit.protection.rounds import attack_rounds
from diffkit.protection.settings import Settings
from diffkit.randomness import address

__all__ = ["protect_set"]


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
        Row(pixels[i], seeds[i], (alphas or [None] * count)[i], (masks or [None] * count)[i], i)
        for i in range(count)
    ]
    rows.sort(key=Row.key)
    seed = address("set", settings.seed, *(row.seed for row in rows))
    with (
        prepared(model, settings, lean=lean) as surrogates,
        learner(model, settings, surrogates[0], seed) as trained,
    ):
        job = JointSet(model, settings, trained, rows, seed, each, lean, batch_size or count)
        job.set_prior(class_images)
        _WALKS[settings.row.joint or ""](job, clean)
        return job.finish()


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


def _ace(job: JointSet, clean: Sequence[Tensor] | None) -> None:
    job.advance(0)
    training = job.training("surrogate")
    for last, steps in _rounds(job.settings):
        job.advance(steps)
        before = job.learner.weights()
        if not last:
            training.run(job.pictures(), job.count)
        job.note(before)


def _fsmg(job: JointSet, clean: Sequence[Tensor] | None) -> None:
    before = job.learner.weights()
    job.training("surrogate").run(job.unprotected(clean), job.count)
    job.note(before)
    job.advance(job.settings.rule().steps)


def _aspl(job: JointSet, clean: Sequence[Tensor] | None) -> None:
    job.advance(0)
    examples = job.unprotected(clean)
    on_clean, on_protected = job.training("copy"), job.training("surrogate")
    for last, steps in _rounds(job.settings):
        kept = job.learner.weights()
        on_clean.run(examples, job.count)
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
