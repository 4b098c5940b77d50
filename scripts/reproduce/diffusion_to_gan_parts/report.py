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
    BARE,
    BEST,
    FULL,
    LADDER,
    MEANING,
    MSE,
    ON,
    REGRESSIONS,
    SECOND,
    TEACHER,
    VARIANTS,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "draw", "text"]

MEASURES = (
    Measure("kernel", "kernel distance to the pictures", ".4f"),
    Measure("kernel_taught", "to the teacher's samples", ".4f"),
    Measure("kernel_looks", "of looks", ".4f"),
    Measure("concept", "concept, by the feature network", ".1%"),
    Measure("style", "style, by the feature network", ".1%"),
    Measure("shaded", "taken for the shaded style", ".1%"),
    Measure("detail", "power from half Nyquist on, over the teacher's", ".3f"),
    Measure("latent_error", "squared error to the teacher's latents", ".4f"),
    Measure("perceptual", "perceptual distance to the teacher's picture", ".3f"),
    Measure("diversity", "diversity of a caption, over the teacher's", ".3f"),
)


def table(results: Results, arms: Sequence[str], baseline: str) -> Iterator[str]:
    """A line an arm: means over its seeds, and how the kernel distance differs from a baseline."""
    heads = [measure.label for measure in MEASURES]
    yield f"| student | seeds | {' | '.join(heads)} | kernel distance - {baseline}, 95 % |"
    yield "| --- " * (len(heads) + 3) + "|"
    for arm in arms:
        if not (seeds := results.seeds(arm)):
            continue
        cells = []
        for measure in MEASURES:
            column = results.column(arm, measure.key, seeds)
            cells.append(format(sum(column) / len(column), measure.form))
        yield f"| {arm} | {len(seeds)} | {' | '.join(cells)} | {against(results, arm, baseline)} |"


def against(results: Results, arm: str, baseline: str) -> str:
    """The difference of the kernel distance with its interval; empty for the baseline itself."""
    seeds = results.seeds(arm, baseline)
    if arm == baseline or not seeds:
        return ""
    columns = [results.column(name, "kernel", seeds) for name in (arm, baseline)]
    return interval_text(paired_difference(*columns), ".4f")


def mean(results: Results, arm: str, key: str) -> float:
    """Of one measure over the seeds of an arm."""
    column = results.column(arm, key, results.seeds(arm))
    return float(sum(column) / len(column))


def verdicts(results: Results) -> list[str]:
    """Which regression is nearest to the pictures, which blurs most, and what the whole adds."""
    found = [arm for arm in REGRESSIONS if results.seeds(arm)]
    lines = []
    if found:
        nearest = min(found, key=lambda arm: mean(results, arm, "kernel"))
        blurred = min(found, key=lambda arm: mean(results, arm, "detail"))
        closest = min(found, key=lambda arm: mean(results, arm, "latent_error"))
        lines.append(
            f"Of the regressions {nearest} has the least kernel distance, {blurred} the least "
            f"power at high frequencies, {closest} the least error of latents."
        )
    seeds = results.seeds(FULL, ON)
    if len(seeds) > 1:
        columns = [results.column(arm, "kernel", seeds) for arm in (FULL, ON)]
        difference = paired_difference(*columns)
        word = "less" if difference.high < 0 else "more" if difference.low > 0 else "undecided"
        lines.append(
            f"Against as many steps of regression more, the whole method's kernel distance is "
            f"{word}: {interval_text(difference, '.4f')}."
        )
    return lines


def teachers(results: Results) -> list[str]:
    """The teacher's own numbers, as a sentence each."""
    lines = []
    for arm, name in ((TEACHER, "the teacher itself"), (BARE, "the teacher in one step")):
        if (arm, 0) in results.values:
            values = results.values[arm, 0]
            told = [f"{m.label} {format(values[m.key], m.form)}" for m in MEASURES]
            lines.append(f"For {name}: {', '.join(told)}.")
    return lines


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
        f"the same seed, {SECOND['steps']} steps of {SECOND['batch_size']} with a discriminator. "
        f"Measured on all captions with {scoring['noises']} noises each that no student has seen, "
        "beside the teacher's end points of the same noises. "
        f"Made on {', '.join(devices)}. "
        f"t-intervals of differences, paired by seed. {SHADED_MEANING}",
        "",
        *table(results, list(REGRESSIONS), BEST),
        "",
        *table(results, list(LADDER), ON),
        "",
        *verdicts(results),
        *teachers(results),
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
        *table(results, list(VARIANTS), FULL),
    ]
    steps = list(LADDER)
    contrasts = [(BEST, MSE), (FULL, ON), *zip(steps[1:], steps[:-1], strict=True)]
    for arm, baseline in contrasts:
        lines += ["", *contrast_table(results, arm, baseline, MEASURES)]
    return "\n".join(lines)


SHOWN = (TEACHER, MSE, BEST, FULL)


def draw(results: Results, figure: Figure) -> None:
    """Rows of pictures from the same noises: the teacher, then students."""
    rows = [arm for arm in SHOWN if (arm, 0) in results.values]
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0] if rows else []
    for panel, arm in zip(panels, rows, strict=True):
        panel.imshow(strip(results.values[arm, 0]["pictures"]), interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.set_ylabel(arm, rotation=0, ha="right", va="center")
