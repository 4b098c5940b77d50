"""All metrics by name. A new one is a function with its table entry, and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from diffkit.errors import UserError
from diffkit.evaluation.metrics import captions, pixels, sets, text
from diffkit.evaluation.metrics.base import Metric

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
        pixels.LPIPS,
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "quality": ("frechet", "kernel", "precision", "recall", "density", "coverage"),
    "text": ("alignment", "retrieval", "concept", "style", "background"),
    "variety": ("diversity", "vendi"),
    "pairs": ("psnr", "ssim", "lpips"),
    "all": tuple(METRICS),
}


def select(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of names and groups, each once, in the order of the table; none means all.

    Raises `UserError` for an unknown name.
    """
    wanted: set[str] = set()
    for name in names or ("all",):
        if name not in METRICS and name not in GROUPS:
            raise UserError(
                f"--metrics {name}: unknown. Metrics: {', '.join(METRICS)}; "
                f"groups: {', '.join(GROUPS)}."
            )
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(metric for name, metric in METRICS.items() if name in wanted)
