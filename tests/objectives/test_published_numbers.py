"""Numbers that the published implementations gave once, for inputs that are written here.

Preference losses: fanfanffff1/Adaptive-DPO, commit a64ae01, `dpo_train_un.py`, its lines from the
annotators' logits to the loss, in float64. It takes the mean over the pairs.
Features: huggingface/diffusers, examples/research_projects/lpl/lpl_loss.py, commit 071190d.
"""

from __future__ import annotations

import pytest
import torch

from diffkit.objectives.adaptive_dpo import (
    adaptive_dpo_loss,
    adaptive_margin,
    annotator_logits,
    batch_statistics,
    minority,
    weights,
)
from diffkit.objectives.preference_losses import (
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    rdpo_loss,
)
from diffkit.perceptual.feature_distance import feature_distance
from diffkit.perceptual.outliers import outlier_mask
from diffkit.randomness import normal

KAPPA = 1000.0
# s of six pairs by three annotators: the policy, the slow and the fast average.
S = [
    [0.8e-3, -0.3e-3, 0.1e-3, -1.2e-3, 0.05e-3, 0.6e-3],
    [0.7e-3, -0.5e-3, 0.2e-3, -0.2e-3, 0.0, 0.1e-3],
    [0.5e-3, -0.4e-3, -0.1e-3, -0.9e-3, 0.3e-3, 0.2e-3],
]
U = [
    0.0007188448467650987,
    0.979266991032722,
    0.3666931152952023,
    0.988054497662385,
    0.30173005103886597,
    0.07868109365827214,
]
W = {
    "linear": [0.9928628565204579, 0.09265547897866555, 0.21427357019557905],
    "quadratic": [0.9999948326475644, 0.09443193076908821, 0.4265049981980415],
    "sqrt": [0.4333704533084178, 5.038372384199483e-05, 0.0023393989624693823],
    "sigmoid": [0.49820289562168035, 5.585643787234295e-05, 0.024917999591731875],
}
# (weighting, margin) -> the mean loss and the gradients in s_0 of the first two pairs.
ADAPTIVE = {
    ("linear", "linear"): (0.18853494194842083, -51.30240657534416, -8.86720881922119),
    ("linear", "quadratic"): (0.1885458934847771, -51.30243200220006, -8.867285475924907),
    ("quadratic", "quadratic"): (0.27071658152304356, -51.67094988752459, -9.037294905842405),
    ("sqrt", "quadratic"): (0.03169100684618216, -22.39277868701256, -0.004821807275422999),
    ("sigmoid", "linear"): (0.06151652641498508, -25.742737116554178, -0.00534550901869455),
}
PLAIN = {
    "dpo": (0.7398471060545132, -51.67091981206459, -95.74041946860982),
    "cdpo": (0.7415137727211798, -18.337586478731257, -62.40708613527649),
    "rdpo": (0.7370693282767354, -107.22647536762017, -151.2959750241654),
    "hinge": (0.9916666666666667, -166.66666666666666, -166.66666666666666),
    "ipo": (2.5340416666666666e-05, -0.0013999999999999998, -0.0017666666666666666),
}


def annotators():
    return torch.tensor(S, dtype=torch.float64)


def judged(s):
    norm, mean = batch_statistics(s)
    return minority(annotator_logits(s, norm, 15.0), "std"), mean


def test_minority_and_weights():
    u, _ = judged(annotators())
    assert u.tolist() == pytest.approx(U, rel=1e-12)
    for kind, first in W.items():
        assert weights(u, kind, 10.0, 1.0)[:3].tolist() == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize(("weighting", "margin"), ADAPTIVE)
def test_adaptive_loss(weighting, margin):
    """Its margin is -u^2 / kappa + mean(s): ours with k2 = 1 / kappa and a mean without kappa."""
    s = annotators()
    u, mean = judged(s)
    policy = s[0].clone().requires_grad_()
    weight = weights(u, weighting, 10.0, 1.0)
    loss = adaptive_dpo_loss(policy, KAPPA, weight, adaptive_margin(u, margin, 1 / KAPPA, mean))
    loss.mean().backward()
    found = (float(loss.mean().detach()), *policy.grad[:2].tolist())
    assert found == pytest.approx(ADAPTIVE[weighting, margin], rel=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_losses(name):
    policy = annotators()[0].requires_grad_()
    loss = {
        "dpo": lambda: dpo_loss(policy, KAPPA),
        "cdpo": lambda: cdpo_loss(policy, KAPPA, 0.2),
        "rdpo": lambda: rdpo_loss(policy, KAPPA, 0.2),
        "hinge": lambda: hinge_loss(policy, KAPPA),
        "ipo": lambda: ipo_loss(policy, 100.0),
    }[name]()
    loss.mean().backward()
    found = (float(loss.mean().detach()), *policy.grad[:2].tolist())
    assert found == pytest.approx(PLAIN[name], rel=1e-9)


def test_features_divided_by_the_norm_of_the_true_ones():
    predicted = normal((2, 6, 9, 7), "golden maps", "x")
    target = predicted + 0.3 * normal((2, 6, 9, 7), "golden maps", "d")
    value = feature_distance(predicted, target, norm="channel_norm_target")
    assert value.tolist() == pytest.approx([0.019088272005319595, 0.023392552509903908], rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "removed"), [(4, [[36, 0, 104], [0, 16, 9]]), (8, [[36, 0, 0], [0, 0, 0]])]
)
def test_outliers(ratio, removed):
    """The script's masks of the third and of the later features of an 8x decoder."""
    maps = normal((2, 3, 48, 40), "golden maps", ratio)
    maps[0, 0, 10:14, 20:24] += 40
    maps[1, 2, 5, 5] -= 60
    maps[1, 1, 30:32, 7:9] += 50
    maps[0, 2] *= maps[0, 2].abs()
    keep = outlier_mask(maps, ratio)
    assert (~keep).sum((2, 3)).tolist() == removed
