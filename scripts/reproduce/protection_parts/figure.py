"""The experiment's figure: edits by strength, what purifiers leave, mimicry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.experiment import Results

from protection_parts import plan
from protection_parts.tables import effects, retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

SHOWN = ("photoguard", "mist", "sdst-", "pid", "advdm", "sds-", "ace+")
LEVELS = 16


def draw(results: Results, figure: Figure) -> None:
    """Three panels at 16 levels."""
    edits, left, mimics = figure.subplots(1, 3)
    for i, method in enumerate(SHOWN):
        colour = f"C{i}"
        ratios = []
        for strength in map(str, plan.STRENGTHS):
            pair = effects(results, method, LEVELS, "latent", strength)
            if pair is not None:
                ratios.append(float(pair[0].mean() / pair[1].mean()))
        if ratios:
            edits.plot(plan.STRENGTHS, ratios, color=colour, marker="o", markersize=3, label=method)
        kept = [retention(results, method, LEVELS, purifier) for purifier in plan.PURIFIERS]
        found = [one.value for one in kept if one is not None]
        if found:
            left.plot(range(len(found)), found, color=colour, marker="o", markersize=3)
    edits.axhline(1, color="black", linewidth=0.8)
    edits.set(title=f"edits, {LEVELS} levels", xlabel="strength", ylabel="effect, x random noise")
    edits.legend(fontsize=6)
    left.set_xticks(range(len(plan.PURIFIERS)), plan.PURIFIERS)
    left.set(title="effect left after purification")
    left.set_ylim(bottom=0)
    arms = [plan.mimic_arm("none"), plan.mimic_arm("clean")]
    arms += [plan.mimic_arm(method, LEVELS) for method in plan.METHODS]
    arms = [arm for arm in arms if results.seeds(arm)]
    for row, arm in enumerate(arms):
        values = results.column(arm, "kernel_style", results.seeds(arm))
        mimics.scatter(values, [row] * len(values), s=12, color="tab:blue")
    mimics.set_yticks(range(len(arms)), [a.removeprefix("lora-") for a in arms], fontsize=6)
    mimics.invert_yaxis()
    mimics.set(title="mimicry", xlabel="distance to the style")
    for panel in (edits, left, mimics):
        panel.grid(alpha=0.3)
