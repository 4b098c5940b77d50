"""All metrics by name. A new one is a function with its table entry, and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from diffkit.errors import UserError
from diffkit.evaluation.metrics import captions, pixels, sets, text
from diffkit.evaluation.metrics.base import Metric
from diffkit.evaluation.metrics.rewards import reward_metric
from diffkit.evaluation.metrics.tools import REWARD

__all__ = ["GROUPS", "METRICS", "select"]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        sets.FRECHET,
        sets.KERNEL,
        sets.PRECISION,
        sets.RECALL,
        sets.DENSITY,
        sets.COVERAGE,
        text.ALIGNMENT,
        text.RETRIEVAL,
        captions.CONCEPT,
        captions.STYLE,
        captions.BACKGROUND,
        sets.DIVERSITY,
        sets.VENDI,
        pixels.HIGH_FREQUENCY,
        pixels.PSNR,
        pixels.SSIM,
        pixels.LATENT_LPIPS,
        pixels.LPIPS,
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "quality": ("frechet", "kernel", "precision", "recall", "density", "coverage"),
    "text": ("alignment", "retrieval", "concept", "style", "background"),
    "variety": ("diversity", "vendi"),
    "pairs": ("psnr", "ssim", "latent_lpips", "lpips"),
    "all": tuple(METRICS),
}


def select(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of names and groups, each once, in the order of the table; none means all.

    "reward:SPEC" is a reward; rewards come last and belong to no group. Raises `UserError` for an
    unknown name, and for the same reward with weights of two places.
    """
    wanted: set[str] = set()
    rewards: dict[str, Metric] = {}
    for name in names or ("all",):
        if name.startswith(REWARD):
            metric: Metric = reward_metric(name)
            if rewards.setdefault(metric.name, metric).needs != metric.needs:
                raise UserError(f"--metrics {name}: {metric.name} is named with other weights too.")
            continue
        if name not in METRICS and name not in GROUPS:
            raise UserError(
                f"--metrics {name}: unknown. Metrics: {', '.join(METRICS)}; "
                f"groups: {', '.join(GROUPS)}; rewards: {REWARD}NAME."
            )
        wanted.update(GROUPS.get(name, (name,)))
    chosen = (metric for name, metric in METRICS.items() if name in wanted)
    return (*chosen, *rewards.values())
