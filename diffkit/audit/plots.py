"""The plots of the audit's page: effects by edit, and what purifiers leave of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from diffkit.audit.measures import CONTROL, PROTECTED
from diffkit.audit.pictures import JPEG, LABELS
from diffkit.evaluation.svg import COLOUR, STYLE, figure, inline

__all__ = ["effect_plot", "retention_plot"]

_COLOURS = {
    PROTECTED: COLOUR["candidate"],
    CONTROL: COLOUR["baseline"],
    JPEG: COLOUR["soft"],
}


def effect_plot(
    name: str, settings: Sequence[str], effects: Sequence[Mapping[str, Any]], label: str
) -> str:
    """Effect of each version by edit, with intervals, beside that of the controls.

    Args:
        name: makes the plot's ids unlike those of the page's other plots.
        settings: one an edit, the places of the axis.
        effects: by version, value, low and high.
        label: of the number.
    """
    with mpl.rc_context(STYLE):
        drawn, axes = figure(1.6 + 0.8 * max(3, len(settings)), 3.0)
        for place, (version, colour) in enumerate(_COLOURS.items()):
            found = [(x, row[version]) for x, row in enumerate(effects) if version in row]
            _points(axes, [x + 0.12 * (place - 1) for x, _ in found], [v for _, v in found],
                    colour, LABELS[version])  # fmt: skip
        axes.axhline(0, color=COLOUR["soft"], linewidth=1)
        axes.set_xticks(range(len(settings)), list(settings))
        axes.set(ylabel=label)
        axes.grid(axis="x", visible=False)
        drawn.legend(loc="outside upper right", ncols=3)
        return inline(drawn, name, f"Effect by edit: {label}")


def retention_plot(name: str, purifiers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Share of the effect that is left behind each purifier; the control's share is the floor.

    Args:
        name: makes the plot's ids unlike those of the page's other plots.
        purifiers: one a row.
        rows: "protected" (None where it is undefined) and "random".
    """
    with mpl.rc_context(STYLE):
        drawn, axes = figure(5.4, 0.9 + 0.36 * len(purifiers))
        for place, version in enumerate((PROTECTED, CONTROL)):
            found = [
                (y, row[version])
                for y, row in enumerate(rows)
                if row[version] is not None and row[version]["value"] is not None
            ]
            y = [y + 0.24 * (place - 0.5) for y, _ in found]
            _points(axes, y, [v for _, v in found], _COLOURS[version], LABELS[version], across=True)
        axes.axvline(1, color=COLOUR["ink"], linewidth=1)
        axes.set_yticks(range(len(purifiers)), list(purifiers))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(purifiers) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.set(xlabel="share of the effect that is left; the line is all of it")
        axes.grid(axis="y", visible=False)
        if axes.containers:  # no share of anything may be defined
            drawn.legend(loc="outside upper right", ncols=2)
        return inline(drawn, name, "Share of the effect that is left behind each purifier")


def _points(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[Mapping[str, Any]],
    colour: str,
    label: str,
    across: bool = False,
) -> None:
    """Dots with intervals; along x with `across`, else along y."""
    if not values:
        return
    middle = np.array([v["value"] for v in values])
    low, high = (
        np.array([middle[i] if v[key] is None else v[key] for i, v in enumerate(values)])
        for key in ("low", "high")
    )
    reach = np.abs(np.stack([middle - low, high - middle]))
    options: Any = {"fmt": "o", "color": colour, "markersize": 5, "elinewidth": 1.8, "label": label}
    if across:
        axes.errorbar(middle, places, xerr=reach, **options)
    else:
        axes.errorbar(places, middle, yerr=reach, **options)
