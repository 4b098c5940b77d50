"""What was expected of the protection experiment, beside what was measured."""

from __future__ import annotations

from runner.experiment import Results
from runner.intervals import paired_difference
from runner.report import interval_text

from diffkit.audit.intervals import ratio
from protection_parts import plan
from protection_parts.tables import effects, retention, table

__all__ = ["claims"]

ENCODER = ("photoguard", "texture", "mist", "sdst-", "ace+")
"""Methods that pull the encoding to a target, alone or beside another term."""

PAIRS = (("sds+", "advdm"), ("sds-", "advdm-"))


def claims(results: Results, levels: int) -> list[str]:
    """Markdown: expected, measured, whether it holds."""
    rows = [
        *_edit_claims(results, levels),
        *_purifier_claims(results, levels),
        *_mimicry_claims(results, levels),
    ]
    return table(["expected", f"measured at {levels} levels", "holds"], rows)


def _edit_claims(results: Results, levels: int) -> list[list[str]]:
    rows = []
    found = {
        method: ratio(*pair)
        for method in ENCODER
        if (pair := effects(results, method, levels, "latent", f"{plan.SHOWN}")) is not None
    }
    if found:
        least = min(found, key=lambda method: found[method].low)
        rows.append(
            [
                "methods of the encoder change edits of strength 0.3 at least twice as much as "
                "random noise",
                f"{', '.join(found)}: least {least}, {found[least].text('.2f')}",
                _word(found[least].low >= 2),
            ]
        )
    for short, whole in PAIRS:
        pair = effects(results, short, levels, "latent", f"{plan.SHOWN}", control=whole)
        if pair is not None:
            between = ratio(*pair)
            rows.append(
                [
                    f"{short} does as much as {whole}, within 25 %",
                    f"{between.text('.2f')} of it",
                    _word(between.low >= 0.75 and between.high <= 1.25),
                ]
            )
    latent = effects(results, plan.LATENT, levels, "latent", f"{plan.SHOWN}", control="advdm")
    if latent is not None:
        between = ratio(*latent)
        rows.append(
            [
                "moving the latents themselves as far changes edits less than moving pixels",
                f"{between.text('.2f')} of advdm",
                _word(between.high < 1),
            ]
        )
    return rows


def _purifier_claims(results: Results, levels: int) -> list[list[str]]:
    rows = []
    for purifier, bound in zip(plan.PURIFIERS, (0.7, 0.7, 0.3), strict=True):
        found = {
            method: left
            for method in ENCODER
            if (left := retention(results, method, levels, purifier)) is not None
        }
        floor = retention(results, "random", levels, purifier)
        if not found or floor is None:
            continue
        values = sorted(left.value for left in found.values())
        below = [method for method, left in found.items() if left.high < bound]
        rows.append(
            [
                f"{purifier} leaves less than {bound:.0%} of the effect",
                f"{values[0]:.0%} to {values[-1]:.0%}; of random noise's {floor.value:.0%}",
                _word(len(below) == len(found))
                if len(below) in (0, len(found))
                # some methods only
                else f"for {', '.join(below)}",
            ]
        )
    return rows


def _mimicry_claims(results: Results, levels: int) -> list[list[str]]:
    rows = []
    for method in plan.REPEATED[1:]:
        both = plan.mimic_arm(method, levels), plan.mimic_arm("random", levels)
        seeds = results.seeds(*both)
        if len(seeds) < 2:
            continue
        gap = paired_difference(*(results.column(arm, "kernel_style", seeds) for arm in both))
        rows.append(
            [
                f"a mimic of {method} ends farther from the style than one of random noise",
                f"style distance {interval_text(gap, '.3f')}",
                _word(gap.low > 0),
            ]
        )
        rows += _half_protected(results, method, levels)
    return rows


def _half_protected(results: Results, method: str, levels: int) -> list[list[str]]:
    """h - c < (w - c) / 2 of the style distances of half, whole and no protection."""
    arms = [plan.mimic_arm(method, levels, share) for share in (0.5, 1.0)]
    seeds = results.seeds("lora-clean", *arms)
    if len(seeds) < 2:
        return []
    clean, half, whole = (
        results.column(arm, "kernel_style", seeds) for arm in ("lora-clean", *arms)
    )
    halfway = [(w + c) / 2 for w, c in zip(whole, clean, strict=True)]
    gap, beyond = paired_difference(whole, clean), paired_difference(half, halfway)
    share = (sum(half) - sum(clean)) / (sum(whole) - sum(clean))
    return [
        [
            f"with half of the pictures protected by {method} the gap to clean ones shrinks by "
            "more than half",
            f"to {share:.0%} of it; half way is passed by {interval_text(beyond, '.3f')}",
            _word(beyond.high < 0) if gap.low > 0 else "n/a, no clear gap",
        ]
    ]


def _word(holds: bool) -> str:
    return "yes" if holds else "no"
