"""What was expected of the protection experiment, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from runner.experiment import Results
from runner.intervals import Difference, paired_difference
from runner.report import interval_text

from diffkit.audit.intervals import mean, ratio
from protection_parts import plan
from protection_parts.tables import array, effects, retention, table

__all__ = ["claims"]

ENCODER = ("photoguard", "texture", "mist", "sdst-", "ace+")
"""Methods that pull the encoding to a target, alone or beside another term."""

AMPLIFIED = ("photoguard", "mist", "sdst-")

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
    shown = f"{plan.SHOWN}"
    rows = _least(
        results,
        levels,
        ENCODER,
        ("latent", shown),
        2,
        "methods of the encoder change edits of strength 0.3 at least twice as much as random "
        "noise",
    )
    rows += _least(
        results,
        levels,
        AMPLIFIED,
        ("amplification",),
        3,
        "they move encodings at least three times as much as random noise",
    )
    rows += _towards_noise(results, levels)
    for short, whole in PAIRS:
        pair = effects(results, short, levels, "latent", shown, control=whole)
        if pair is not None:
            between = ratio(*pair)
            rows.append(
                [
                    f"{short} does as much as {whole}, within 25 %",
                    f"{between.text('.2f')} of it",
                    _word(between.low >= 0.75 and between.high <= 1.25),
                ]
            )
    latent = effects(results, plan.LATENT, levels, "latent", shown, control="advdm")
    if latent is not None:
        between = ratio(*latent)
        rows.append(
            [
                "moving the latents themselves as far changes edits less than moving pixels",
                f"{between.text('.2f')} of advdm",
                _word(between.high < 1),
            ]
        )
    return rows + _held_out(results, levels)


def _least(
    results: Results,
    levels: int,
    methods: Sequence[str],
    keys: Sequence[str],
    bound: float,
    words: str,
) -> list[list[str]]:
    """All methods reach `bound` times the control, with their whole intervals."""
    found = {
        method: ratio(*pair)
        for method in methods
        if (pair := effects(results, method, levels, *keys)) is not None
    }
    if not found:
        return []
    least = min(found, key=lambda method: found[method].low)
    reached = [method for method, one in found.items() if one.low >= bound]
    measured = f"{', '.join(found)}: least {least}, {found[least].text('.2f')}"
    return [[words, measured, _some(reached, list(found))]]


def _towards_noise(results: Results, levels: int) -> list[list[str]]:
    """The ratio to random noise is smaller at the largest strength than at the shown one."""
    falling, parts = [], []
    for method in ENCODER:
        near = effects(results, method, levels, "latent", f"{plan.SHOWN}")
        far = effects(results, method, levels, "latent", f"{plan.STRENGTHS[-1]}")
        if near is None or far is None:
            continue
        before, after = (float(a.mean() / b.mean()) for a, b in (near, far))
        parts.append(f"{method} {before:.1f} to {after:.1f}")
        falling += [method] * (after < before)
    if not parts:
        return []
    words = "towards strength 0.8 the effect falls towards that of random noise"
    return [[words, ", ".join(parts), _some(falling, [p.split()[0] for p in parts])]]


def _held_out(results: Results, levels: int) -> list[list[str]]:
    """Signs of the change on noises and times that no attack has seen."""
    rows = []
    for words, key, sign, methods in (
        ("advdm and sds+ raise the denoising loss on unseen draws", "loss", 1, ("advdm", "sds+")),
        ("advdm- and sds- lower it", "loss", -1, ("advdm-", "sds-")),
        ("ace and ace+ pull the network to the pattern there", "pull", -1, ("ace", "ace+")),
    ):
        found = {}
        for method in methods:
            arm = plan.edit_arm(method, levels)
            if seeds := results.seeds(arm):
                found[method] = mean(array(results, arm, seeds, key))
        if found:
            held = [m for m, one in found.items() if (one.low > 0 if sign > 0 else one.high < 0)]
            parts = [f"{method} {one.text('+.3f')}" for method, one in found.items()]
            rows.append([words, ", ".join(parts), _some(held, list(found))])
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
                _some(below, list(found)),
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
    return rows + _against_advdm(results, levels)


def _against_advdm(results: Results, levels: int) -> list[list[str]]:
    arms = {m: plan.mimic_arm(m, levels) for m in ("mist", "ace+", "advdm")}
    seeds = results.seeds(*arms.values())
    if not seeds:
        return []
    found = {
        m: sum(results.column(arm, "kernel_style", seeds)) / len(seeds) for m, arm in arms.items()
    }
    above = [m for m in ("mist", "ace+") if found[m] >= found["advdm"]]
    parts = ", ".join(f"{m} {value:.2f}" for m, value in found.items())
    measured = f"style distance {parts}; {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return [
        [
            "mist and ace+ protect from mimics at least as much as advdm",
            measured,
            _some(above, ["mist", "ace+"]),
        ]
    ]


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
            _decided(beyond) if gap.low > 0 else "n/a, no clear gap",
        ]
    ]


def _some(held: Sequence[str], asked: Sequence[str]) -> str:
    if not held or len(held) == len(asked):
        return _word(bool(held))
    return f"for {', '.join(held)}"


def _decided(difference: Difference) -> str:
    """Whether a difference is below zero."""
    if difference.low <= 0 <= difference.high:
        return "undecided"
    return _word(difference.high < 0)


def _word(holds: bool) -> str:
    return "yes" if holds else "no"
