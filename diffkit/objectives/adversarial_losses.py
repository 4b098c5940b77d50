"""Losses between a generator and a conditional discriminator with several heads of logit maps.

A discriminator D gives K maps of logits (B, 1, h_k, w_k). All means are taken over the positions of
a map first, then over the maps, so that a fine map does not outweigh a coarse one; softplus(x) =
ln(1 + e^x) in at least float32.

    L_D = softplus(-D(x, z, c)) + softplus(D(f, z, c)) + penalty
    L_G = softplus(-D(G(z, c), z, c))

is the non-saturating loss (Goodfellow et al. 2014), and

    L_D = softplus(-(D(x, z, c) - D(f, z, c))) + penalty,    L_G the same with x and f exchanged

the relativistic one (Jolicoeur-Martineau 2018; Huang et al. 2024, "The GAN is dead", 2501.05441).
Where x is the teacher's own picture from z, both show the same thing, and what sets pictures apart
in the logits of different prompts is no part of the difference. f are generated latents, of which
mix-and-match (Kang et al. 2024, 2405.05967) replaces some by true latents of other pairs: D then
must read z and c to tell them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffkit.randomness import SampleKeys

__all__ = [
    "approximate_r1",
    "discriminator_loss",
    "distribution_matching_direction",
    "distribution_matching_loss",
    "generator_loss",
    "mean_logit",
    "mix_and_match",
    "r1_penalty",
    "relativistic_loss",
    "replaced_rows",
]

Maps = Sequence[Tensor]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(maps: Maps, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over maps of the mean over positions of function(logits), (B,)."""
    return torch.stack([function(_wide(m)).flatten(1).mean(1) for m in maps]).mean(0)


def mean_logit(maps: Maps) -> Tensor:
    """D as one number a sample, (B,): the mean over maps of the mean over positions."""
    return _mean(maps, lambda logits: logits)


def generator_loss(maps: Maps) -> Tensor:
    """softplus(-D) of generated samples, (B,); ln 2 at logits of 0."""
    return _mean(maps, lambda logits: torch.nn.functional.softplus(-logits))


def relativistic_loss(higher: Maps, lower: Maps) -> Tensor:
    """softplus(-(D_higher - D_lower)), (B,), place by place; ln 2 at equal logits.

    Of true and generated samples for the discriminator, of generated and true ones for the
    generator.
    """
    pairs = zip(higher, lower, strict=True)
    return generator_loss([_wide(above) - _wide(below) for above, below in pairs])


def discriminator_loss(real: Maps, fake: Maps) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake)), (B,); 2 ln 2 at logits of 0."""
    return generator_loss(real) + _mean(fake, torch.nn.functional.softplus)


def r1_penalty(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """|d D(x_b) / d x_b|^2, (B,), itself differentiable (Mescheder et al. 2018).

    The loss has gamma / 2 times it. What the critic is made of must have a second derivative.

    Arguments:
        critic: (B, ...) -> (B,), each value of its own sample alone; without a sigmoid.
        x: real samples (B, ...).
    """
    start = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(start).sum(), start, create_graph=True)
    return _wide(grad).square().flatten(1).sum(1)


def approximate_r1(clean: Maps, noisy: Maps, sigma: float) -> Tensor:
    """(D(x) - D(x + sigma n))^2 / sigma^2, (B,), n standard normal.

    After Lin et al. 2025 (2501.08316), who do not divide: gamma / 2 here is their weight times
    sigma^2, so that 100 at sigma = 0.01 is gamma = 0.02.

    To first order its mean over n is `r1_penalty`'s value, if D is one logit; the square is taken
    of every logit, so that of several it is at least the value of their mean. Both have a gradient.
    """
    differences = [_wide(b) - _wide(a) for a, b in zip(clean, noisy, strict=True)]
    return _mean(differences, torch.square) / sigma**2


def replaced_rows(keys: SampleKeys, places: Sequence[int], share: float, batch_size: int) -> Tensor:
    """Which rows of the fake batch get another pair's true latents, bool (B,), on the CPU.

    round(share batch_size) of the global batch, at least 1 if share > 0 and never all of it; its
    order is random. With a batch of one, it with probability `share`, by address.

    Arguments:
        places: of these rows in the global batch.
    """
    if batch_size == 1:
        return keys.uniform("mix and match") < share
    count = min(max(round(share * batch_size), int(share > 0)), batch_size - 1)
    return torch.tensor(list(places)) < count


def mix_and_match(fake: Tensor, unrelated: Tensor, replaced: Tensor) -> Tensor:
    """The fake batch (B, ...): generated latents, in rows that are `replaced` unrelated true ones.

    Arguments:
        fake, unrelated: (B, ...); row b of `unrelated` belongs to another pair than b.
        replaced: bool (B,).
    """
    rows = replaced.view(-1, *(1 for _ in fake.shape[1:]))
    return torch.where(rows, unrelated.to(fake), fake)


def distribution_matching_direction(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(fake - real) / mean|x - real|: along the gradient of the reverse KL divergence in x.

    Yin et al. 2024 (2405.14867): at a noisy version of a generated sample x, `fake` and `real` are
    the clean estimates of a model of generated samples and of the teacher; the mean is of each
    sample. 0 where the teacher has nothing to correct.

    Arguments:
        x, fake, real: (B, ...).

    Returns:
        (B, ...) in at least float32, without a gradient.
    """
    x, fake, real = (_wide(tensor.detach()) for tensor in (x, fake, real))
    scale = (x - real).abs().flatten(1).mean(1).view(-1, *(1 for _ in x.shape[1:]))
    return torch.where(scale > 0, (fake - real) / scale, 0.0)


def distribution_matching_loss(x: Tensor, direction: Tensor) -> Tensor:
    """mean((x - sg(x - direction))^2) / 2, (B,), whose gradient in x is direction / numel."""
    difference = _wide(x) - (_wide(x) - direction).detach()
    return difference.square().flatten(1).mean(1) / 2
