"""Losses of preference pairs, as functions of how much more a model prefers the winner.

    s = (e_ref(w) - e_th(w)) - (e_ref(l) - e_th(l)),    x = kappa s

e is the mean squared error of a network's output over C, h, w; winner w and loser l have the same
prompt, time and noise (Diffusion-DPO, Wallace et al. 2023, arXiv:2311.12908, equation 14). Without
a reference s = e_th(l) - e_th(w).

kappa is what multiplies the difference of means, nothing else. "beta" is not: it is 2 kappa in
Salesforce's code, in diffusers' script for SDXL and in flow_grpo, and kappa in diffusers' script
for Stable Diffusion 1 and in Adaptive-DPO's. So Salesforce's beta 5000 is kappa 2500.

    loss   value at x = 0    slope in x at 0
    DPO    ln 2              -1/2
    cDPO   ln 2              -(1 - 2q) / 2
    rDPO   ln 2              -1 / (2 (1 - 2q))
    hinge  1                 -1
    IPO    1 / (4 beta^2)    -1 / beta in s

All take s (B,) of at least float32 and return (B,) in its dtype; kappa is above 0, a number or a
tensor without dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

__all__ = [
    "alpha_dpo_loss",
    "cdpo_loss",
    "dpo_loss",
    "hinge_loss",
    "implicit_accuracy",
    "ipo_loss",
    "loser_scale",
    "preference_logit",
    "rdpo_loss",
    "scale_gradient",
]

ALPHA_RANGE = (1e-3, 0.999)
"""Beyond it float32 rounds alpha-DPO's difference away."""


def preference_logit(
    winner: Tensor, loser: Tensor, reference: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """s, (B,): above 0 where the model prefers the winner, more so than the reference does.

    What is subtracted first are the errors of two models at one picture, which are close: s is
    exactly 0 where the models are equal, and keeps its digits where they nearly are.

    Arguments:
        winner, loser: e_th(w) and e_th(l), (B,).
        reference: e_ref(w) and e_ref(l); None for losses without a reference (SimPO).
    """
    if reference is None:
        return loser - winner
    return (reference[0] - winner) - (reference[1] - loser)


def dpo_loss(s: Tensor, kappa: float | Tensor) -> Tensor:
    """-log sigmoid(kappa s); of the s without a reference this is SimPO's.

    For pixel-space post-training SimPO has neither a margin nor a norm by length (Zhang et al.
    2024, arXiv:2409.17565).
    """
    return softplus(-kappa * s)


def cdpo_loss(s: Tensor, kappa: float | Tensor, flip_rate: float) -> Tensor:
    """-(1 - q) log sigmoid(x) - q log sigmoid(-x): labels smoothed by q (Mitchell 2023).

    Smallest at x = ln((1 - q) / q). `flip_rate` is q in [0, 1/2).
    """
    x = kappa * s
    return (1 - flip_rate) * softplus(-x) + flip_rate * softplus(x)


def rdpo_loss(s: Tensor, kappa: float | Tensor, flip_rate: float) -> Tensor:
    """[-(1 - q) log sigmoid(x) + q log sigmoid(-x)] / (1 - 2q) (Chowdhury et al. 2024).

    Unbiased under labels flipped with probability q: (1 - q) L(s) + q L(-s) is the DPO loss of s.
    Not bounded below: for large x the slope stays at -q / (1 - 2q). `flip_rate` is q in [0, 1/2).
    """
    x = kappa * s
    return ((1 - flip_rate) * softplus(-x) - flip_rate * softplus(x)) / (1 - 2 * flip_rate)


def hinge_loss(s: Tensor, kappa: float | Tensor) -> Tensor:
    """max(0, 1 - kappa s)."""
    return (1 - kappa * s).clamp_min(0)


def ipo_loss(s: Tensor, beta: float) -> Tensor:
    """(s - 1 / (2 beta))^2 (Azar et al. 2023).

    Its slope at s = 0 is -1 / beta, DPO's -kappa / 2: multiply it by kappa beta / 2 before it meets
    other terms, the clipping of gradients or Adam's epsilon.
    """
    return (s - 1 / (2 * beta)).square()


def alpha_dpo_loss(s: Tensor, kappa: float | Tensor, alpha: float | Tensor) -> Tensor:
    """[p^a - (1 - a) - a p] / (a (a - 1)) with p = sigmoid(kappa s) (alpha-DPO, ICLR 2026).

    Never negative, 0 at p = 1, with slope -(1 - p) (p^a - p) / (1 - a) in x, which vanishes at both
    ends: pairs that the model firmly contradicts are let go. a -> 1 is p ln p - p + 1.

    Arguments:
        alpha: a, limited to [1e-3, 0.999]; no gradient.
    """
    a = torch.as_tensor(alpha, dtype=s.dtype, device=s.device).detach().clamp(*ALPHA_RANGE)
    log_p = logsigmoid(kappa * s)
    # p^a - 1 - a (p - 1): powers through the logarithm, so that p = 0 has a gradient.
    return (torch.expm1(a * log_p) - a * torch.expm1(log_p)) / (a * (a - 1))


def implicit_accuracy(s: Tensor) -> Tensor:
    """1 where s > 0, 1/2 where s = 0, else 0: its mean is 1/2 for a model that is the reference."""
    return (s.sign() + 1) / 2


def loser_scale(winner: Tensor, loser: Tensor) -> Tensor:
    """min(1, |g_w|^2 / <g_w, g_l>) where the product is positive, else 1: (B,), no gradient.

    The part of the loser's gradient that, to first order, does not raise the winner's error: a
    step along -(g_w - c g_l) changes it by -(|g_w|^2 - c <g_w, g_l>). This is the rule of
    Diffusion-SDPO (2025, arXiv:2511.03317), per pair in the space of outputs.

    Arguments:
        winner, loser: g_w and g_l, gradients of the two errors with one common factor, such as
            output - target, (B, ...).
    """
    winner, loser = (x.detach().flatten(1) for x in (winner, loser))
    square, product = winner.square().sum(1), (winner * loser).sum(1)
    # max(product, square) is above 0 wherever it divides something that is not 0.
    return torch.where(product > square, square / product.clamp_min(1e-30), torch.ones_like(square))


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself, with its gradient multiplied by `factor`, both (B,)."""
    fixed = x.detach()
    return fixed + factor.detach() * (x - fixed)
