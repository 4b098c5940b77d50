"""Fitting a latent proxy reward to the expert that it stands for, as pure functions.

For one prompt there are J candidates, J = 3: the student's estimate, its target, and the latents of
the real picture. Expert and proxy give each a logit, r_j and s_j, and the proxy learns the expert's
preference of every pair (Li et al. 2024, "Reward Guided Latent Consistency Distillation"):

    L = sum_{i<j} KL( softmax([r_i, r_j]) || softmax([s_i, s_j]) )

Only differences within a prompt count, so neither the level of the expert nor that of the proxy
does. One value a prompt; nothing is averaged here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkit.rewards.proxy import LatentProxy, Told

__all__ = [
    "RunningMedian",
    "contrastive_loss",
    "expert_logits",
    "gap_accuracy",
    "pair_accuracy",
    "pair_kl",
    "proxy_logits",
]


def pair_kl(expert: Tensor, proxy: Tensor, real: int | None = None) -> Tensor:
    """L (B,), the sum over the J (J - 1) / 2 pairs, in at least float32.

    With p = sigmoid(r_i - r_j) and q = sigmoid(s_i - s_j),

        KL = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),    dL/ds_i = q - p,

    which is softmax(s)_i - softmax(r)_i.

    Arguments:
        expert: r (B, J), logits; no gradient flows into them.
        proxy: s (B, J), logits.
        real: the column of the real picture: where the expert prefers another candidate to it, p
            is 1/2 in place of the expert's word, so that a real picture is never taught to be the
            worse one. None takes the expert at its word.
    """
    expert, proxy = _wide(expert.detach()), _wide(proxy)
    left, right = _pairs(expert.shape[1], expert.device)
    r, s = expert[:, left] - expert[:, right], proxy[:, left] - proxy[:, right]
    if real is not None:
        # r > 0 means that the left one is preferred.
        lost = ((right == real) & (r > 0)) | ((left == real) & (r < 0))
        r = torch.where(lost, 0.0, r)
    p = torch.sigmoid(r)
    each = p * (F.logsigmoid(r) - F.logsigmoid(s))
    each = each + (1 - p) * (F.logsigmoid(-r) - F.logsigmoid(-s))
    return each.sum(1)


def pair_accuracy(expert: Tensor, proxy: Tensor) -> Tensor:
    """Share (B,) of the pairs that the proxy (B, J) orders as the expert (B, J) does.

    A pair in which one of them sees no difference counts as half a hit.
    """
    hits, _ = _ordered(expert, proxy)
    return hits.mean(1)


def gap_accuracy(expert: Tensor, proxy: Tensor) -> tuple[Tensor, Tensor]:
    """The same share with each pair counted by its gap |r_i - r_j|, as a pair of (B,), (B,).

    A student's estimate and its target are nearly the same picture: to order those rightly or not
    costs no reward. The ratio of the sums over all prompts, hits times gaps over gaps, is the share
    of the differences in reward that the proxy gets right: 1/2 by chance, in any scale of r.
    """
    hits, gaps = _ordered(expert, proxy)
    return (hits * gaps).mean(1), gaps.mean(1)


def _ordered(expert: Tensor, proxy: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, gaps) (B, pairs): 1, 1/2 or 0, and |r_i - r_j|."""
    left, right = _pairs(expert.shape[1], expert.device)
    r, s = expert[:, left] - expert[:, right], proxy[:, left] - proxy[:, right]
    return ((r.sign() * s.sign()).float() + 1) / 2, _wide(r).abs()


def proxy_logits(
    proxy: LatentProxy, latents: Tensor, told: Told, text: Tensor | None = None
) -> Tensor:
    """s (B, J) float32 = exp(log_scale) S(z_j, c) of candidates (B, J, C, h, w), scaled latents.

    The candidates are constants: the gradient is in the proxy alone.

    Arguments:
        told: what the proxy is told of the B prompts, see `LatentProxy.told`.
        text: its text features, computed once for all candidates when not given.
    """
    text = proxy.embed_text(told) if text is None else text
    columns = [proxy(candidate, told, text) for candidate in latents.detach().unbind(1)]
    return proxy.logit_scale * torch.stack(columns, 1)


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, excused: Tensor | None = None
) -> Tensor:
    """CLIP's contrastive loss (B,), float32 (Radford et al. 2021), of each pair against the others.

        l_b = -(log softmax_m(k <u_b, v_m>)_b + log softmax_m(k <v_b, u_m>)_b) / 2

    Unlike other losses it depends on what is given at once, so that must not be a matter of how a
    batch is split.

    Arguments:
        images, texts: u, v (B, D), unit vectors.
        scale: k (), exp of the logarithm that is learned.
        excused: (B, B), symmetric, true where m is no wrong answer to b, such as one of the same
            caption; its own pair counts all the same.
    """
    logits = scale.float() * images.float() @ texts.float().T
    own = torch.arange(len(images), device=images.device)
    if excused is not None:
        others = excused & ~torch.eye(len(images), dtype=torch.bool, device=images.device)
        logits = logits.masked_fill(others, -torch.inf)
    both = [F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)]
    return (both[0] + both[1]) / 2


class RunningMedian:
    """The running median of |r_i - r_j|: the temperature of an expert without a logit scale.

        log m <- log m + gain (share of gaps above m - 1/2)

    stops where half of the gaps lie above m, so that a typical pair differs by one logit. Both
    means that it needs, of the gaps and of the share above m, are taken over the global batch, so
    the median is the same however that is split. It starts at the mean of the first gaps.

    Arguments:
        gain: how fast it moves, in parts of itself at most gain / 2 a step.
    """

    def __init__(self, gain: float = 0.1) -> None:
        self._gain = gain
        self.tensors = {"median": torch.zeros(())}

    def place(self, device: torch.device) -> None:
        """Move the number there."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    @property
    def value(self) -> Tensor:
        """The median (), 0 until the first gaps were seen."""
        return self.tensors["median"]

    @property
    def known(self) -> Tensor:
        """1. () once gaps were seen; before, a refit has to be left out: a weight of its loss."""
        return (self.value > 0).float()

    def logits(self, rewards: Tensor) -> Tensor:
        """r / m (B, J) of rewards, less the mean of each prompt; 0 before the first gaps."""
        rewards = _wide(rewards)
        centred = rewards - rewards.mean(1, keepdim=True)
        return torch.where(self.value > 0, centred / self.value.clamp(min=1e-12), 0.0)

    def terms(self, rewards: Tensor) -> dict[str, Tensor]:
        """What `update` wants the means of: "gap" and "gap_above", (B,) each, of rewards (B, J)."""
        left, right = _pairs(rewards.shape[1], rewards.device)
        gaps = (_wide(rewards)[:, left] - _wide(rewards)[:, right]).abs()
        return {"gap": gaps.mean(1), "gap_above": (gaps > self.value).float().mean(1)}

    def watched(self) -> tuple[str, ...]:
        """The names of the terms."""
        return ("gap", "gap_above")

    def update(self, means: Mapping[str, Tensor]) -> None:
        """Take in the means () of one step's terms over the global batch; finite ones alone."""
        gap, above = (means[name].to(self.value) for name in self.watched())
        moved = self.value * torch.exp(self._gain * (above - 0.5))
        found = torch.where(self.value > 0, moved, gap)
        self.value.copy_(torch.where(gap.isfinite(), found, self.value))


def expert_logits(rewards: Tensor, logit_scale: float | None, median: RunningMedian) -> Tensor:
    """r (B, J) as logits: times the reward's own scale, or in units of the running median.

    A weighted sum of rewards has no scale of its own.
    """
    return median.logits(rewards) if logit_scale is None else rewards * logit_scale


def _pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = torch.triu_indices(n, n, 1, device=device)
    return left, right


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
