"""Numbers and verdicts as people read them: the words of the report page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

__all__ = [
    "Verdict",
    "amount",
    "command_line",
    "estimate_text",
    "interval_decimals",
    "number",
    "role_names",
    "storage",
    "verdict",
]

Verdict = Literal["better", "worse", "changed", "undecided", "equal"]


def role_names(sets: Collection[str]) -> dict[str, str]:
    """What the page calls the sets "model", "against" and "reference" of a report.

    Only two sets need the names candidate and baseline to be told apart.
    """
    own = "candidate" if "against" in sets else "pictures"
    return {"model": own, "against": "baseline", "reference": "reference"}


def verdict(difference: Mapping[str, float] | None, better: str | None) -> Verdict | None:
    """What a difference with its interval says.

    Args:
        difference: value, low and high of candidate minus baseline; None where there is none.
        better: "higher", "lower", or None where neither side is better.

    Returns:
        "better", "worse" or "changed" when the interval excludes zero, "equal" when it is nothing
        but zero, else "undecided"; None for no difference.
    """
    if difference is None:
        return None
    low, high = difference["low"], difference["high"]
    if low == high == 0:
        return "equal"
    if not (low > 0 or high < 0):
        return "undecided"
    if better is None:
        return "changed"
    return "better" if (low > 0) == (better == "higher") else "worse"


def interval_decimals(low: float, high: float) -> int | None:
    """Decimals that show an interval's width to two digits; None when it has no finite width."""
    width = high - low
    if not (math.isfinite(width) and width > 0):
        return None
    return min(8, max(0, 1 - math.floor(math.log10(width))))


def number(value: float | None, decimals: int | None = None, signed: bool = False) -> str:
    """A number with thousands separators and a true minus; four digits without `decimals`."""
    if value is None or math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if decimals is None:
        large = abs(value) >= 1000
        text = f"{value:,.0f}" if large else f"{value:.4g}"
    else:
        text = f"{value:,.{decimals}f}"
    text = text.replace("-", "−")
    return f"+{text}" if signed and value > 0 else text


def estimate_text(estimate: Mapping[str, float], signed: bool = False) -> tuple[str, str]:
    """("0.312", "0.305 to 0.320"): the value and its interval, rounded to the interval's width."""
    decimals = interval_decimals(estimate["low"], estimate["high"])
    value, low, high = (number(estimate[k], decimals, signed) for k in ("value", "low", "high"))
    return value, f"{low} to {high}"


def amount(count: float) -> str:
    """A count with three digits and a k, M, G, T or P behind it: 12345678 is "12.3 M"."""
    for factor, suffix in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= 0.9995 * factor:
            return f"{count / factor:#.3g}".rstrip(".") + suffix
    return f"{count:.3g}"


def storage(size: float) -> str:
    """Bytes in MiB, or in GiB from 1 GiB on."""
    mebibytes = size / 2**20
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:,.0f} MiB"


# Each of their values needs the flag again.
_REPEATED = {"lora", "against_lora"}


def command_line(flags: Mapping[str, Any]) -> str:
    """The command of the flags that were given, as it can be pasted into a shell."""
    words = ["diffkit", "evaluate", str(flags["model"])]
    for key, value in flags.items():
        flag = "--" + key.replace("_", "-")
        if key == "model":
            continue
        if key in _REPEATED:
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [flag, *(str(item) for item in value)]
        else:
            words += [flag, str(value)]
    return shlex.join(words)
