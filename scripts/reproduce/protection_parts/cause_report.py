"""Why purification leaves what it leaves, in words and a table, from the results of `causes.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.experiment import Results

from protection_parts import plan
from protection_parts.tables import table

__all__ = ["cause_table", "cause_words"]

HALVES = {"low half": "the change's low half alone", "high half": "its high half alone"}


def _found(results: Results) -> dict[str, Mapping[str, Any]]:
    """The values of all arms; nothing before all are made."""
    keys = {method: (plan.cause_arm(method), 0) for method in plan.CAUSE_METHODS}
    if any(key not in results.values for key in keys.values()):
        return {}
    return {method: results.values[key] for method, key in keys.items()}


def cause_words(results: Results) -> list[str]:
    """Markdown: what was found."""
    found = _found(results)
    return ["", _words(found)] if found else []


def cause_table(results: Results) -> list[str]:
    """Markdown: all numbers."""
    found = _found(results)
    if not found:
        return []
    rows = [
        [HALVES.get(name, name), *(_left(values[name]) for values in found.values())]
        for name in (*HALVES, *plan.CAUSE["purifiers"])
    ]
    head = ["size, and part along the attack", *found]
    title = "**Behind each purifier**, 8 levels, one seed: of latents, and of edits."
    return ["", title, "", *table(head, rows)]


def _words(found: Mapping[str, Mapping[str, Any]]) -> str:
    noise = found["random"]
    attacks = [values for method, values in found.items() if method != "random"]

    def of_attacks(purifier: str, key: str) -> str:
        return " and ".join(f"{values[purifier][key]:.0%}" for values in attacks)

    return (
        "**What purification takes, and what only looks like it.** What stronger and stronger "
        "purifiers leave of the difference between a protected picture and its clean twin "
        f"({' and '.join(m for m in found if m != 'random')}, 8 levels, one seed): its size, and "
        "the part that still points where the attack pointed; of latents, and of edits of strength "
        "0.3. Of the latents, SDEdit of strength 0.2 leaves "
        f"{of_attacks('sdedit0.2', 'latents along')} in the attack's direction, but of the edits' "
        f"difference {of_attacks('sdedit0.2', 'edits')} in size, where random noise keeps "
        f"{noise['sdedit0.2']['edits']:.0%}: the edit noises more than the purifier did and takes "
        "much of the same away from unpurified pictures too. JPEG 75 leaves "
        f"{of_attacks('jpeg75', 'latents along')} of the latents' direction, JPEG 10 "
        f"{of_attacks('jpeg10', 'latents along')}, at sizes of "
        f"{of_attacks('jpeg10', 'latents')}: coarse rounding scatters pictures that hardly differ, "
        f"random noise to {noise['jpeg10']['latents']:.0%}. What lies below half of Nyquist has "
        f"{of_attacks('low half', 'energy')} of the change's energy and alone does "
        f"{of_attacks('low half', 'edits')} of the effect on edits; JPEG of usual quality keeps it."
    )


def _left(shares: Mapping[str, float]) -> str:
    parts = [
        f"{name} {shares[name]:.0%}, {shares[f'{name} along']:.0%}" for name in ("latents", "edits")
    ]
    if "energy" in shares:
        parts.append(f"energy {shares['energy']:.0%}")
    return "; ".join(parts)
