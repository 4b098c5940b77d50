"""Text and figure of the experiment on one-step students, from its result files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.experiment import Results
from runner.intervals import paired_difference
from runner.judge import SHADED_MEANING
from runner.report import MORE, Measure, contrast_table, interval_text
from runner.students import strip

from diffusion_to_gan_parts.arms import (
    BEST,
    DMD,
    FULL,
    LADDER,
    MATCHED,
    MEANING,
    MSE,
    ON,
    REGRESSIONS,
    SECOND,
    TEACHER,
    TEACHERS,
    VARIANTS,
    WARMED,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "draw", "text"]

DISTANCES = (
    Measure("kernel", "kernel distance", ".4f"),
    Measure("scorer", "by the scorer", ".4f"),
)
SHORT = (
    *DISTANCES,
    Measure("style", "style", ".1%"),
    Measure("shaded", "shaded", ".1%"),
    Measure("detail", "detail", ".3f"),
    Measure("latent_error", "error of latents", ".4f"),
    Measure("diversity", "diversity", ".3f"),
)
"""The columns of the tables; what they mean is said in `MEASURES`."""

MEASURES = (
    Measure("kernel", "kernel distance to the pictures", ".4f"),
    Measure("kernel_taught", "kernel distance to the teacher's samples", ".4f"),
    Measure("kernel_looks", "of captions that name a style, to the teacher's", ".4f"),
    Measure("scorer", "by the scorer: to the pictures", ".4f"),
    Measure("scorer_taught", "by the scorer: to the teacher's samples", ".4f"),
    Measure("scorer_looks", "by the scorer: of captions that name a style", ".4f"),
    Measure("concept", "concept, by the feature network", ".1%"),
    Measure("style", "style, by the feature network", ".1%"),
    Measure("shaded", "taken for the shaded style", ".1%"),
    Measure("detail", "power from half Nyquist on, over the teacher's", ".3f"),
    Measure("latent_error", "squared error to the teacher's latents", ".4f"),
    Measure("perceptual", "perceptual distance to the teacher's picture", ".3f"),
    Measure("diversity", "diversity of a caption, over the teacher's", ".3f"),
)


def table(results: Results, arms: Sequence[str], baseline: str) -> Iterator[str]:
    """A line an arm: means over its seeds, and how both distances differ from a baseline's."""
    heads = [measure.label for measure in SHORT] + [f"{m.label} - {baseline}" for m in DISTANCES]
    yield f"| student | seeds | {' | '.join(heads)} |"
    yield "| --- " * (len(heads) + 2) + "|"
    for arm in arms:
        if not (seeds := results.seeds(arm)):
            continue
        cells = []
        for measure in SHORT:
            column = results.column(arm, measure.key, seeds)
            cells.append(format(sum(column) / len(column), measure.form))
        cells += [against(results, arm, baseline, measure) for measure in DISTANCES]
        yield f"| {arm} | {len(seeds)} | {' | '.join(cells)} |"


def against(results: Results, arm: str, baseline: str, measure: Measure) -> str:
    """The difference of a measure with its interval; empty for the baseline itself."""
    seeds = results.seeds(arm, baseline)
    if arm == baseline or not seeds:
        return ""
    columns = [results.column(name, measure.key, seeds) for name in (arm, baseline)]
    return interval_text(paired_difference(*columns), measure.form)


def mean(results: Results, arm: str, key: str) -> float:
    """Of one measure over the seeds of an arm."""
    column = results.column(arm, key, results.seeds(arm))
    return float(sum(column) / len(column))


def verdicts(results: Results) -> list[str]:
    """Which regression is nearest to the pictures, which blurs most, and what the whole adds."""
    found = [arm for arm in REGRESSIONS if results.seeds(arm)]
    lines = []
    if found:
        near, scored, blurred, closest = (
            min(found, key=lambda arm, key=key: mean(results, arm, key))
            for key in ("kernel", "scorer", "detail", "latent_error")
        )
        lines.append(
            f"Of the regressions {near} has the least kernel distance by the feature network, "
            f"{scored} by the scorer, {blurred} the least power at high frequencies, {closest} the "
            "least error of latents."
        )
    for arm in (FULL, DMD, MATCHED):
        if len(results.seeds(arm, ON)) > 1:
            told = " and ".join(said(results, arm, measure) for measure in DISTANCES)
            lines.append(f"Against as many steps of regression more, `{arm}`: {told}.")
    return lines


def said(results: Results, arm: str, measure: Measure) -> str:
    """Whether a distance of an arm is less than that of regression alone."""
    columns = [results.column(name, measure.key, results.seeds(arm, ON)) for name in (arm, ON)]
    found = paired_difference(*columns)
    word = "less" if found.high < 0 else "more" if found.low > 0 else "undecided"
    return f"{measure.label} {word}, {interval_text(found, measure.form)}"


def text(results: Results, settings: Mapping[str, Any], scoring: Mapping[str, Any]) -> str:
    """The two ladders with their intervals, then the arms of one seed and every contrast.

    Arguments:
        settings, scoring: of all arms.
    """
    pairs = settings["pairs"]
    devices = sorted({values["device"] for values in results.values.values()})
    lines = [
        "The teacher is the embedded model trained on with captions that name a concept alone, or "
        "a style and a background alone. One-step students of it, all weights, are trained on "
        f"{pairs['count']} pairs of noise and end point of its DDIM sampler ({pairs['steps']} "
        f"steps, guidance {pairs['guidance']:g}): {settings['steps']} steps of "
        f"{settings['batch_size']} pairs by regression alone; then, from the {BEST} student of "
        f"the same seed, {SECOND['steps']} steps of {SECOND['batch_size']} more, with what each "
        "arm adds. "
        f"Measured on all captions with {scoring['noises']} noises each that no student has seen, "
        "beside the teacher's end points of the same noises. "
        f"Made on {', '.join(devices)}. "
        "Kernel distances are to all pictures, in the features of the network that names concepts "
        "and styles, and in those of the text-image scorer. Detail: power from half Nyquist on. "
        "Detail and diversity (of a caption) are over the teacher's. Less is better of distances "
        "and of the error; detail and diversity are best at 1. t-intervals of differences at "
        f"95 %, paired by seed. {SHADED_MEANING}",
        "",
        *table(results, [*TEACHERS, *REGRESSIONS], BEST),
        "",
        *table(results, [*LADDER, MATCHED], ON),
        "",
        f"Each arm goes on from the {BEST} student: "
        + "; ".join(f"`{arm}`, {MEANING[arm]}" for arm in [*LADDER, MATCHED])
        + f". The discriminator's flags are none of the defaults: `{flags(WARMED, 'gan')} --beta1 "
        f"{SECOND['beta1']:g} --learning-rate {SECOND['learning_rate']:g}`, and of distribution "
        f"matching `{flags(LADDER[DMD]['dmd'], 'dmd')}`.",
        "",
        *verdicts(results),
        "",
        f"The figure: the teacher in {pairs['steps']} steps, then students in one, from the same "
        "noises.",
        "",
        MORE,
        "",
        *(f"* {arm}: {meaning}." for arm, meaning in MEANING.items()),
        "",
        "Arms of one seed:",
        "",
        *table(results, [arm for arm in VARIANTS if arm != MATCHED], FULL),
    ]
    steps = list(LADDER)
    contrasts = [
        (BEST, MSE),
        (FULL, ON),
        (DMD, ON),
        (MATCHED, ON),
        *zip(steps[1:], steps[:-1], strict=True),
    ]
    for arm, baseline in contrasts:
        lines += ["", *contrast_table(results, arm, baseline, MEASURES)]
    return "\n".join(lines)


def flags(values: Mapping[str, Any], section: str) -> str:
    """As they are written on the command line."""
    named = ((key.replace("_", "-"), value) for key, value in values.items())
    return " ".join(f"--{section}.{key} {value}" for key, value in named)


SHOWN = (TEACHER, MSE, BEST, FULL, DMD, MATCHED)


def draw(results: Results, figure: Figure) -> None:
    """Rows of pictures from the same noises: the teacher, then students."""
    rows = [arm for arm in SHOWN if (arm, 0) in results.values]
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0] if rows else []
    for panel, arm in zip(panels, rows, strict=True):
        panel.imshow(strip(results.values[arm, 0]["pictures"]), interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.set_ylabel(arm, rotation=0, ha="right", va="center")
