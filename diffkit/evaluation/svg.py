"""Figures for pages: SVG text that takes its colours from the page.

Figures are drawn without a display in placeholder colours; each placeholder then becomes a CSS
variable, so that one plot serves the light and the dark scheme.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOUR", "STYLE", "figure", "inline"]

_VARIABLES = {
    "#010101": "ink",
    "#020202": "soft",
    "#030303": "line",
    "#040404": "candidate",
    "#050505": "baseline",
    "#060606": "better",
    "#070707": "worse",
}
COLOUR = {name: placeholder for placeholder, name in _VARIABLES.items()}
COLOUR |= {"model": COLOUR["candidate"], "against": COLOUR["baseline"]}
COLOUR |= {"reference": COLOUR["soft"]}
# Any: matplotlib 3.11 types the keys of rcParams, older ones do not.
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["soft"],
    "axes.edgecolor": COLOUR["line"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLOUR["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOUR["soft"],
    "ytick.color": COLOUR["soft"],
    "legend.frameon": False,
}


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A transparent figure of so many inches with one plot."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_visible(False)
    axes = drawn.add_subplot()
    axes.patch.set_visible(False)
    return drawn, axes


def inline(drawn: Figure, name: str, alt: str) -> str:
    """The figure as an <svg> element: named for screen readers, its ids prefixed by `name`."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S
    )
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub("#0[0-9]0[0-9]0[0-9]", lambda found: f"var(--{_VARIABLES[found[0]]})", text)
    label = html.escape(alt, quote=True)
    return text.replace("<svg", f'<svg class="plot" role="img" aria-label="{label}"', 1)
