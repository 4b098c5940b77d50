"""The plots of the report page, see `svg`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from diffkit.evaluation.svg import COLOUR, STYLE, figure, inline
from diffkit.evaluation.wording import role_names

__all__ = [
    "STAGES",
    "cost_plot",
    "difference_histogram",
    "spectra_plot",
    "spectrum_difference_plot",
    "value_histogram",
]

# The timed stages of a picture, in the order they run.
STAGES = {
    "text": "text encoding",
    "denoiser": "one denoising step",
    "decode": "decoding",
    "picture": "whole picture",
}


def spectra_plot(spectra: Mapping[str, Any]) -> str:
    """Mean log10 power of each set over the frequency, 0 to 1 of Nyquist."""
    roles = role_names(spectra["sets"])
    with mpl.rc_context(STYLE):
        drawn, axes = figure(5.4, 3.1)
        for role, power in spectra["sets"].items():
            dashes = (4, 2) if role == "reference" else (None, None)
            axes.plot(
                spectra["frequency"],
                power,
                color=COLOUR[role],
                linewidth=1.8,
                dashes=dashes,
                label=roles[role],
            )
        axes.set(xlabel="frequency, share of Nyquist", ylabel="mean log10 power", xlim=(0, 1))
        axes.legend()
        names = " and ".join(roles[role] for role in spectra["sets"])
        return inline(drawn, "spectra", f"Power spectra of {names}")


def spectrum_difference_plot(spectra: Mapping[str, Any]) -> str:
    """The spectra minus that of the reference, or of the baseline; "" with only one set."""
    sets = spectra["sets"]
    base = next((role for role in ("reference", "against") if role in sets), None)
    others = [role for role in sets if role != base]
    if base is None or not others:
        return ""
    against = role_names(sets)[base]
    with mpl.rc_context(STYLE):
        drawn, axes = figure(5.4, 3.1)
        axes.axhline(0, color=COLOUR["soft"], linewidth=1)
        for role in others:
            gap = np.subtract(sets[role], sets[base])
            axes.plot(spectra["frequency"], gap, color=COLOUR[role], linewidth=1.8)
        axes.set(xlabel="frequency, share of Nyquist", ylabel=f"log10 power minus {against}'s")
        axes.set_xlim(0, 1)
        reach = 1.15 * max(0.1, *np.abs(axes.get_ylim()))
        axes.set_ylim(-reach, reach)
        axes.text(0.02, 0.97, "more detail", ha="left", va="top", transform=axes.transAxes)
        axes.text(0.02, 0.03, "less detail", ha="left", va="bottom", transform=axes.transAxes)
        alt = f"Difference of the power spectra from the {against}'s"
        return inline(drawn, "spectrum-difference", alt)


def difference_histogram(name: str, differences: Sequence[float], better: str | None) -> str:
    """How the differences of a metric are spread over the pictures, zero in the middle.

    Args:
        name: of the metric; makes the plot's ids unlike those of the page's other plots.
        differences: candidate minus baseline, one a picture; infinite ones are left out.
        better: "higher", "lower" or None: the side of zero that is drawn as better.
    """
    finite = np.asarray([value for value in differences if math.isfinite(value)], dtype=float)
    reach = float(np.abs(finite).max(initial=0)) or 1.0
    half = _bins(finite.size)
    # An odd number of bins around zero: the middle one holds what hardly changed.
    counts, edges = np.histogram(finite, bins=2 * half + 1, range=(-reach, reach))
    colours = [_side(centre, better) for centre in (edges[:-1] + edges[1:]) / 2]
    colours[half] = COLOUR["soft"]
    with mpl.rc_context(STYLE):
        drawn, axes = figure(3.4, 2.1)
        axes.bar(edges[:-1], counts, 0.94 * np.diff(edges), align="edge", color=colours)
        axes.axvline(0, color=COLOUR["ink"], linewidth=1)
        _count_axes(axes, "candidate − baseline")
        return inline(drawn, f"histogram-{name}", "Histogram of the differences by picture")


def value_histogram(name: str, values: Mapping[str, Sequence[float]]) -> str:
    """How the values of a metric are spread over the pictures of each set.

    `values` are one a picture by set; infinite ones are left out. See `difference_histogram`.
    """
    finite = {key: [v for v in found if math.isfinite(v)] for key, found in values.items()}
    every = [value for found in finite.values() for value in found]
    edges = np.histogram_bin_edges(every, bins=2 * _bins(len(every)))
    roles = role_names(values)
    width = 0.94 * np.diff(edges) / len(finite)
    with mpl.rc_context(STYLE):
        drawn, axes = figure(3.4, 2.1)
        for place, (key, found) in enumerate(finite.items()):
            counts, _ = np.histogram(found, bins=edges)
            left = edges[:-1] + place * width
            axes.bar(left, counts, width, align="edge", color=COLOUR[key], label=roles[key])
        if len(finite) > 1:
            axes.legend()
        _count_axes(axes, "value")
        return inline(drawn, f"histogram-{name}", "Histogram of the values by picture")


def _bins(count: int) -> int:
    return min(15, max(3, math.ceil(math.sqrt(count))))


def _count_axes(axes: Axes, label: str) -> None:
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=label, ylabel="pictures")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def cost_plot(cost: Mapping[str, Mapping[str, Any]], roles: Mapping[str, str]) -> str:
    """Seconds of each stage for one picture, with intervals, one bar a set.

    `roles` names the sets. The scale is logarithmic: stages differ by orders of magnitude, and
    ratios are what counts.
    """
    keys = [key for key in STAGES if any(key in entry["seconds"] for entry in cost.values())]
    height = 0.8 / len(cost)
    with mpl.rc_context(STYLE):
        drawn, axes = figure(5.4, 0.9 + 0.28 * len(keys) * (1 + len(cost)) / 2 + 0.5)
        for place, (role, entry) in enumerate(cost.items()):
            found = [
                (row, entry["seconds"][k]) for row, k in enumerate(keys) if k in entry["seconds"]
            ]
            y = np.array([row for row, _ in found]) + (place - (len(cost) - 1) / 2) * height
            value, low, high = np.array([[s["value"], s["low"], s["high"]] for _, s in found]).T
            axes.barh(y, value, 0.86 * height, color=COLOUR[role], label=roles[role])
            reach = (value - low, high - value)
            axes.errorbar(value, y, xerr=reach, fmt="none", ecolor=COLOUR["ink"], elinewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(keys)), [STAGES[key] for key in keys])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds, logarithmic")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        if len(cost) > 1:
            drawn.legend(loc="outside upper right", ncols=2)
        return inline(drawn, "cost", "Seconds of each stage for one picture")


def _side(centre: float, better: str | None) -> str:
    if better is None:
        return COLOUR["candidate"]
    return COLOUR["better" if (centre > 0) == (better == "higher") else "worse"]
