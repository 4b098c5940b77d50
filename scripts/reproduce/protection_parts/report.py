"""The experiment's text and tables, from the result files."""

from __future__ import annotations

import numpy as np
from runner.experiment import Results
from runner.intervals import paired_difference
from runner.report import MORE, interval_text

from diffkit.audit.intervals import Interval, is_clear, mean, ratio
from protection_parts import plan
from protection_parts.cause_report import cause_table, cause_words
from protection_parts.claims import claims
from protection_parts.tables import array, effects, retention, table

__all__ = ["text"]


def edit_table(results: Results, levels: int) -> list[str]:
    """A row a method: the effect on edits as a multiple of random noise's."""
    rows = []
    for method in (*plan.METHODS, plan.LATENT):
        if (row := edit_row(results, method, levels)) is not None:
            rows.append(row)
    head = ["method", "seeds", "encoder, x random"]
    head += [f"edit {s:g}" + (", x random" if i == 0 else "") for i, s in enumerate(plan.STRENGTHS)]
    head += ["1 - SSIM of edit 0.3, x random", "L_S, unseen draws", "distance to ACE's pattern"]
    return table(head, rows)


def edit_row(results: Results, method: str, levels: int) -> list[str] | None:
    """One row of `edit_table`."""
    shown = f"{plan.SHOWN}"
    pair = effects(results, method, levels, "latent", shown)
    if pair is None:
        return None
    name = "latents moved as far" if method == plan.LATENT else method
    seeds = results.seeds(plan.edit_arm(method, levels))
    row = [name, f"{len(seeds)}"]
    if method == plan.LATENT:
        row.append("")
    else:
        amplified = effects(results, method, levels, "amplification")
        assert amplified is not None
        row.append(f"{amplified[0].mean() / amplified[1].mean():.1f}")
    for strength in map(str, plan.STRENGTHS):
        both = effects(results, method, levels, "latent", strength)
        assert both is not None
        if strength == shown:
            row.append(ratio(*both).text(".2f"))
        else:
            row.append(f"{both[0].mean() / both[1].mean():.2f}")
    both = effects(results, method, levels, "ssim", shown)
    assert both is not None
    row.append(ratio(*both).text(".2f"))
    for key in ("loss", "pull"):
        change = array(results, plan.edit_arm(method, levels), seeds, key)
        row.append(signed(mean(change)))
    return row


def signed(interval: Interval) -> str:
    """`+0.012 [+0.010, +0.014]`."""
    return interval.text("+.4f")


def purifier_table(results: Results, levels: int) -> list[str]:
    """A row a method: the share of its effect on edits that is left behind each purifier."""
    rows = []
    for method in plan.METHODS:
        pair = effects(results, method, levels, "latent", f"{plan.SHOWN}")
        if pair is None:
            continue
        row = [method]
        for purifier in plan.PURIFIERS:
            left = retention(results, method, levels, purifier)
            clear = method == "random" or is_clear(*pair)
            row.append(interval_percent(left) if clear and left is not None else "n/a")
        rows.append(row)
    return table(["effect left after", *plan.PURIFIERS], rows)


def interval_percent(interval: Interval) -> str:
    """`54% [50%, 58%]`."""
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


MIMICRY = (
    ("kernel_style", ".3f"),
    ("kernel", ".3f"),
    ("frechet", ".1f"),
    ("style", ".1%"),
)


def mimicry_table(results: Results) -> list[str]:
    """A row a set that was learnt from: distances to the artist's own drawings."""
    rows = []
    for arm, settings in plan.ARMS.items():
        seeds = results.seeds(arm) if settings["kind"] == "mimic" else []
        if not seeds:
            continue
        row = [learnt_from(settings), f"{len(seeds)}"]
        for key, form in MIMICRY:
            row.append(f"{np.mean(results.column(arm, key, seeds)):{form}}")
        both = results.seeds(arm, "lora-clean")
        if arm in ("lora-clean", "lora-none") or not both:
            row.append("")
        else:
            columns = [results.column(one, "kernel_style", both) for one in (arm, "lora-clean")]
            difference = paired_difference(*columns)
            lone = len(both) == 1
            row.append(f"{difference.mean:+.3f}" if lone else interval_text(difference, ".3f"))
        rows.append(row)
    head = ["learnt from", "seeds", "style distance", "kernel distance", "Fréchet distance"]
    return table([*head, "drawn in the style", "style distance - clean's"], rows)


def learnt_from(settings: object) -> str:
    """The first column of the mimicry table."""
    assert isinstance(settings, dict)
    method = settings["method"]
    if method == "none":
        return "nothing (the model as it is)"
    if method == "clean":
        return "clean pictures"
    half = "half of them " if settings["share"] < 1 else ""
    return f"{half}{method}, {settings['levels']} levels"


def text(results: Results) -> str:
    """What was done, what was expected and came, and all tables."""
    return "\n".join(
        [
            "The embedded model attacks, edits and imitates sixteen OpenMoji drawings (CC BY-SA "
            "4.0, fetched when this runs), a style that it never saw; 50 steps of every method. It "
            "says nothing about photographs or large models.",
            "",
            *claims(results, plan.MIMICRY_BUDGET),
            *cause_words(results),
            "",
            MORE,
            *edit_sections(results),
            "",
            "**Mimicry.** A LoRA of rank 4 learns from eight of the pictures for 200 steps, then "
            "draws 64 other things in the style; distances to the artist's own drawings of these "
            "things (diffkit feature network; t-intervals of paired differences over seeds). "
            "Larger distances and fewer pictures in the style mean worse imitation.",
            "",
            *mimicry_table(results),
            *cause_table(results),
        ]
    )


def edit_sections(results: Results) -> list[str]:
    """The tables of edits and purifiers, the larger budget first."""
    lines = []
    for levels in reversed(plan.BUDGETS):
        lines += [
            "",
            f"**Edits, {levels} levels.** Distance between the edits of a protected picture and of "
            "the clean one from the same noise (latents), divided by the same for random noise of "
            "the same size; 95 % intervals (bootstrap over pictures and seeds).",
            "",
            *edit_table(results, levels),
            "",
            f"**Purification, {levels} levels.** Share of the effect on edits of strength 0.3 that "
            "is left when both pictures are purified first; n/a where the effect is not clear of "
            "random noise.",
            "",
            *purifier_table(results, levels),
        ]
    return lines
