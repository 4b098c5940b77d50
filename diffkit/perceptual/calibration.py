"""Weights of a perceptual distance's 1x1 heads: by least squares, or from which of two is nearer.

With the trunk frozen, d = sum_k w_k m_k is linear in the heads, and m, the channels' mean squared
differences, is computed once a pair. Everything here works on rows of such numbers.

- A target distance of each pair, such as a pixel LPIPS: w >= 0 by non-negative least squares.
- Triples (reference, p0, p1) with the share h of people who find p1 nearer: a small ranking network
  on both distances, thrown away afterwards (Zhang et al. 2018, section 3; BAPPS, 2AFC).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkit.models.feature_network import ImageTrunk
from diffkit.perceptual.latent_lpips import LatentLpips, unit_features
from diffkit.perceptual.unit_distance import unit_distance

__all__ = [
    "channel_distances",
    "fit_heads",
    "fit_ranking",
    "set_heads",
    "trunk_distance",
    "two_afc_score",
]


@torch.no_grad()
def channel_distances(network: LatentLpips, a: Tensor, b: Tensor) -> Tensor:
    """m (B, K): mean over space of (g_c(a) - g_c(b))^2, all channels of all stages in their order.

    `network.distance` is m times the heads.
    """
    pairs = zip(network.features(a), network.features(b), strict=True)
    return torch.cat(
        [(unit_features(x) - unit_features(y)).square().mean((2, 3)) for x, y in pairs], 1
    )


@torch.no_grad()
def set_heads(network: LatentLpips, weights: Tensor) -> None:
    """Write w (K,) into the network's heads."""
    parts: Sequence[Tensor] = weights.split(network.config.widths)
    for head, part in zip(network.heads, parts, strict=True):
        head.copy_(part)


@torch.no_grad()
def trunk_distance(trunk: ImageTrunk, x: Tensor, y: Tensor) -> Tensor:
    """LPIPS without learned weights on a picture network: (B,), the mean over its features.

    Arguments:
        trunk: in evaluation mode.
        x, y: pictures (B, 3, H, W) in [-1, 1].
    """
    pairs = zip(trunk.maps(trunk.prepare(x)), trunk.maps(trunk.prepare(y)), strict=True)
    parts = [unit_distance(p, q, p.new_ones(p.shape[1])) for p, q in pairs]
    return torch.stack(parts).mean(0)


def fit_heads(rows: Tensor, targets: Tensor, prior: float = 0.0, sweeps: int = 2000) -> Tensor:
    """w >= 0 that minimises |m w - t|^2 / N + prior v sum_k (w_k - u)^2: (K,) float64.

    u is the best common weight of all channels and v = mean of sum_k m_k^2. Plain least squares
    leaves few channels above 0, and gives those that hardly move enormous weights; a distance with
    few channels has many directions that it does not see. Channels that never move keep u. Solved
    by coordinate descent on the normal equations, up to a relative step of 1e-9.

    Arguments:
        rows: m, (N, K).
        targets: t, (N,).
        prior: how strongly the weights are drawn to u, compared with the data.
        sweeps: bound of the passes over all channels.
    """
    m, t = rows.double(), targets.double()
    gram, right = m.T @ m / len(m), m.T @ t / len(m)
    summed = m.sum(1)
    common = (summed @ t / summed.square().sum()).clamp_min(0)
    size = gram.diagonal().sum()
    # What is there of a channel that never moves, so that it has a weight without a prior too.
    pull = max(prior, 1e-14) * size
    gram = gram + pull * torch.eye(len(gram), dtype=gram.dtype)
    right = right + pull * common
    w = torch.full_like(right, float(common))
    slope, diagonal = gram @ w - right, gram.diagonal()
    for _ in range(sweeps):
        largest = 0.0
        for k in range(len(w)):
            new = (w[k] - slope[k] / diagonal[k]).clamp_min(0)
            step = new - w[k]
            if step != 0:
                slope.add_(gram[k], alpha=float(step))
                w[k] = new
                largest = max(largest, abs(float(step)))
        if largest <= 1e-9 * float(w.max()):
            break
    return w


class _Ranking(nn.Module):
    """Logit that p1 is nearer, from both distances (N,)."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, d0: Tensor, d1: Tensor) -> Tensor:
        eps = 0.1
        numbers = torch.stack([d0, d1, d0 - d1, d0 / (d1 + eps), d1 / (d0 + eps)], -1)
        logit: Tensor = self.layers(numbers)[..., 0]
        return logit


def fit_ranking(
    m0: Tensor,
    m1: Tensor,
    judge: Tensor,
    *,
    start: Tensor,
    epochs: int = 10,
    batch: int = 50,
    rate: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    """w >= 0, (K,) float32, from triples: binary cross-entropy of the ranking network against h.

    Adam with betas (0.5, 0.999); the rate stays for half of the epochs and falls to 0 linearly. A
    half of the channels, drawn anew for each triple, is left out in each step (the published recipe
    drops single places of the maps); w is clamped to >= 0 after each.

    Arguments:
        m0, m1: `channel_distances` of the reference to p0 and to p1, (N, K).
        judge: h, (N,) in [0, 1].
        start: w at the start, (K,).
        seed: of the order, of what is left out and of the ranking network.
    """
    generator = torch.Generator().manual_seed(seed)
    w = nn.Parameter(start.detach().float().clone())
    ranking = _Ranking()
    for parameter in ranking.parameters():
        fan = parameter.shape[-1] if parameter.ndim == 2 else len(parameter)
        with torch.no_grad():
            parameter.uniform_(-(fan**-0.5), fan**-0.5, generator=generator)
    optimizer = torch.optim.Adam([w, *ranking.parameters()], lr=rate, betas=(0.5, 0.999))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (epochs - epoch) / (epochs + 1))
        for part in torch.randperm(len(judge), generator=generator).split(batch):
            kept = torch.rand((2, len(part), len(w)), generator=generator) < 0.5
            d0, d1 = ((2 * k * m[part]) @ w for k, m in zip(kept, (m0, m1), strict=True))
            loss = F.binary_cross_entropy_with_logits(ranking(d0, d1), judge[part].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                w.clamp_min_(0)
    return w.detach()


def two_afc_score(d0: Tensor, d1: Tensor, judge: Tensor) -> Tensor:
    """How many people agree with the distance, (N,): h if d1 < d0, 1 - h if d0 < d1, else 1/2."""
    score = torch.where(d1 < d0, judge, 1 - judge)
    return torch.where(d0 == d1, torch.full_like(score, 0.5), score)
