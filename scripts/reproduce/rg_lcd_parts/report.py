"""Text and figure of the experiment on few-step distillation, from its result files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.experiment import Results
from runner.intervals import Difference, paired_difference
from runner.judge import SHADED_MEANING
from runner.report import MORE, interval_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ABLATIONS", "LARGE", "LCD", "LONG", "TEACHER_ARM", "draw", "text"]

TEACHER_ARM, LCD, LONG, DIRECT = "teacher", "LCD", "LCD, long", "direct"
LARGE = "direct, large"
ACCURACIES = ("accuracy", "gap_accuracy")
REWARDED = (DIRECT, LARGE, "proxy")
ABLATIONS = {
    "online target": "the student itself in place of its moving average as the target",
    "L2": "squared distance in place of pseudo-Huber",
    "E-LatentLPIPS": "perceptual distance of latents in place of pseudo-Huber",
    "random embedding": "the guidance's new input as torch initialises it",
    "two segments": "consistency inside two segments, two steps from edge to edge",
    "LoRA": "rank 16, one guidance scale, online target",
    "full resolution": "direct reward of the whole 64x64 picture",
    "proxy of towers": "the proxy is a network of its own, trained on pictures and captions before",
}


@dataclass(frozen=True)
class Kind:
    """One measure: its key, its label, how it is printed, whether arms are told apart by ratios."""

    key: str
    label: str
    form: str
    ratio: bool = False


KERNEL = Kind("kernel", "kernel distance to the pictures", ".4f", ratio=True)
TAUGHT = Kind("kernel_taught", "to the teacher's samples", ".4f", ratio=True)
SCORER = Kind("scorer", "by the scorer: to the pictures", ".4f", ratio=True)
SCORER_TAUGHT = Kind("scorer_taught", "by the scorer: to the teacher's samples", ".4f", ratio=True)
DISTANCES = (KERNEL, TAUGHT, SCORER, SCORER_TAUGHT)
REWARD = Kind("reward", "reward, pictures at 16x16", ".4f")
DETAIL = Kind("detail", "power above half of Nyquist", ".3g", ratio=True)
CONCEPT = Kind("concept", "concept, by the feature network", ".1%")
SHADED = Kind("shaded", "taken for the shaded style", ".1%")
DIVERSITY = Kind("diversity", "diversity within a prompt", ".3f")
END = Kind("endpoint", "squared distance to the teacher's endpoint", ".4f")
REWARD_FULL = Kind("reward_full", "the same scorer at 64x64", ".4f")
KINDS = (*DISTANCES, REWARD, REWARD_FULL, CONCEPT, SHADED, DETAIL, DIVERSITY, END)


def column(results: Results, arm: str, kind: Kind, steps: int, seeds: Sequence[int]) -> list[float]:
    """One measure of samples of so many steps, seed by seed."""
    return [float(results.values[arm, s]["steps"][str(steps)][kind.key]) for s in seeds]


def steps_of(results: Results, arm: str) -> list[int]:
    """The numbers of steps that an arm was sampled with."""
    first = next(values for (name, _), values in results.values.items() if name == arm)
    return [int(steps) for steps in first["steps"]]


def contrast(
    results: Results, arm: tuple[str, int], other: tuple[str, int], kind: Kind
) -> Difference | None:
    """arm - other paired by seed, of logarithms where ratios count; None without a common seed."""
    seeds = results.seeds(arm[0], other[0])
    if not seeds:
        return None
    columns = [column(results, name, kind, steps, seeds) for name, steps in (arm, other)]
    if kind.ratio:
        # An unbiased estimate of a small distance may fall below 0.
        columns = [[math.log(max(value, 1e-6)) for value in values] for values in columns]
    return paired_difference(*columns)


def told(found: Difference, kind: Kind) -> str:
    """`+0.012 [0.002, 0.022]`, or `x 0.31 [0.22, 0.43]` of ratios."""
    if not kind.ratio:
        return interval_text(found, kind.form)
    if not math.isfinite(found.low):
        return f"x {math.exp(found.mean):.3g} (1 seed)"
    return "x {:.3g} [{:.3g}, {:.3g}]".format(*map(math.exp, (found.mean, found.low, found.high)))


def mean(results: Results, arm: str, kind: Kind, steps: int) -> str:
    """The mean over the seeds of an arm, printed."""
    values = column(results, arm, kind, steps, results.seeds(arm))
    return format(sum(values) / len(values), kind.form)


def curve_table(results: Results) -> Iterator[str]:
    """Kernel distance and distance to the endpoint by steps, teacher and students."""
    arms = [arm for arm in (TEACHER_ARM, LCD, LONG) if results.seeds(arm)]
    kinds = (*DISTANCES, END, DETAIL, SHADED)
    yield "| arm | seeds | steps | " + " | ".join(kind.label for kind in kinds) + " |"
    yield "| --- | --- | --- |" + " --- |" * len(kinds)
    for arm in arms:
        for steps in steps_of(results, arm):
            cells = [mean(results, arm, kind, steps) for kind in kinds]
            count = len(results.seeds(arm))
            yield f"| {arm} | {count} | {steps} | " + " | ".join(cells) + " |"


PAIRS = ((1, 1), (2, 2), (4, 4), (4, 10), (4, 20))
"""Steps of the student against steps of the teacher."""


def distillation(results: Results) -> Iterator[str]:
    """The student against its teacher, in all kernel distances."""
    if not results.seeds(LCD, TEACHER_ARM):
        yield f"No seed has both {TEACHER_ARM} and {LCD} yet."
        return
    yield f"Kernel distances, {LCD} / teacher, 95 % interval:"
    yield ""
    heads = (KERNEL.label, TAUGHT.label, SCORER.label, SCORER_TAUGHT.label)
    yield f"| student's steps | teacher's | {' | '.join(heads)} |"
    yield "| --- | --- |" + " --- |" * len(heads)
    for ours, theirs in PAIRS:
        cells = []
        for kind in DISTANCES:
            found = contrast(results, (LCD, ours), (TEACHER_ARM, theirs), kind)
            assert found is not None
            # To samples like its own the teacher's distance is 0, with which nothing is compared.
            compared = kind in (KERNEL, SCORER) or ours == theirs
            cells.append(told(found, kind) if compared else "")
        yield f"| {ours} | {theirs} | {' | '.join(cells)} |"


def rewards_table(results: Results, steps: int) -> Iterator[str]:
    """Every measure of LCD and of the arms with a reward, against LCD."""
    arms = [arm for arm in REWARDED if results.seeds(arm, LCD)]
    if not arms:
        yield f"No seed has both {LCD} and a reward yet."
        return
    yield f"| measure, {steps} step(s) | {LCD} | " + " | ".join(arms) + " |"
    yield "| --- | --- |" + " --- |" * len(arms)
    for kind in KINDS:
        cells = [mean(results, LCD, kind, steps)]
        for arm in arms:
            found = contrast(results, (arm, steps), (LCD, steps), kind)
            assert found is not None
            cells.append(f"{mean(results, arm, kind, steps)}; {told(found, kind)}")
        yield f"| {kind.label} | " + " | ".join(cells) + " |"


def orders(results: Results, steps: int) -> Iterator[str]:
    """Whether reward(direct) > reward(proxy) > reward(LCD), by their intervals."""
    for higher, lower in (("direct", "proxy"), ("proxy", LCD), ("direct", LCD)):
        found = contrast(results, (higher, steps), (lower, steps), REWARD)
        if found is None:
            continue
        word = "undecided"
        if found.clear:
            word = "shown" if found.mean > 0 else "contradicted"
        claim = f"reward({higher}) > reward({lower}), {steps} step(s)"
        yield f"- {claim}: {told(found, REWARD)}, {word}."


def accuracy(results: Results) -> str:
    """How often the proxy orders pairs as the reward does, and how much of it that is."""
    parts = []
    for arm in ("proxy", "proxy of towers"):
        seeds = results.seeds(arm)
        if seeds:
            each = zip(*(results.column(arm, key, seeds) for key in ACCURACIES), strict=True)
            told = ", ".join(f"{plain:.1%} and {gaps:.1%}" for plain, gaps in each)
            parts.append(f"{arm} {told}")
    if not parts:
        return "No proxy was fitted yet."
    return (
        "Pairs of student, target and real picture that the proxy orders as the reward does, over "
        "the last 100 steps, before the step that is made on them; and the same with each pair "
        "counted by its difference in reward (student and target are nearly the same picture): "
        f"{'; '.join(parts)}."
    )


def ablation_table(results: Results) -> Iterator[str]:
    """One row an ablation, one seed: samples of 1, 2 and 4 steps as far as there are any."""
    kinds = (KERNEL, SCORER, REWARD, DETAIL, DIVERSITY)
    yield "| arm | what | steps | " + " | ".join(kind.label for kind in kinds) + " |"
    yield "| --- | --- | --- |" + " --- |" * len(kinds)
    rows = [(LCD, "the defaults"), ("direct", "reward of 16x16, share 0.3"), *ABLATIONS.items()]
    for arm, meaning in rows:
        if 0 not in results.seeds(arm):
            continue
        for steps in steps_of(results, arm):
            cells = [format(column(results, arm, k, steps, [0])[0], k.form) for k in kinds]
            yield f"| {arm} | {meaning} | {steps} | " + " | ".join(cells) + " |"


def text(results: Results, settings: Mapping[str, Any], proxy: Mapping[str, Any], long: int) -> str:
    """Distillation against the teacher, then what a reward adds and costs.

    Arguments:
        settings: of all arms.
        proxy: flags of the reward in the arm with one.
        long: steps of the longest run.
    """
    low, high = settings["guidance"]
    known = next(iter(results.values.values()))
    devices = ", ".join(sorted({values["device"] for values in results.values.values()}))
    return "\n".join(
        [
            "The teacher is the embedded model trained on with captions that leave things open; "
            "its own steps are DDIM's with guidance 2. Students: all weights, "
            f"{settings['stages'][-1]} steps of {settings['batch_size']} ({LONG}: the same run "
            f"after {long}), guidance drawn from {low:g} to {high:g} and told to "
            f"the student, sampled at {settings['told']:g}. Each measure is of "
            f"{known['n']} samples, all captions with the same noises for all arms of a seed; "
            "kernel distance to all pictures with the embedded features, and in those of the "
            "text-image scorer, which is the reward too. Intervals are t-intervals "
            "of differences paired by seed, of logarithms for ratios (x). "
            "Less is better of distances. "
            f"{SHADED_MEANING} Made on {devices}.",
            "",
            *curve_table(results),
            "",
            *distillation(results),
            "",
            f"The reward is the embedded scorer's, of pictures averaged down to 16x16: `{DIRECT}`, "
            f"a gradient of 0.3 of the distillation's, of 2 in `{LARGE}`; `proxy` is a head on the "
            f"teacher's encoder, with `--reward.refit-rate {proxy['refit_rate']:g} "
            f"--reward.refit-temperature {proxy['refit_temperature']}`. Beside each mean the "
            f"contrast with {LCD} over the seeds of both:",
            "",
            *rewards_table(results, 1),
            "",
            *rewards_table(results, 4),
            "",
            *orders(results, 1),
            *orders(results, 4),
            "",
            accuracy(results),
            "",
            f"The figure: {KERNEL.label} by steps, a line a seed; the reward at one step beside "
            f"{DETAIL.label}.",
            "",
            MORE,
            "",
            *rewards_table(results, 2),
            "",
            "Ablations, seed 0:",
            "",
            *ablation_table(results),
        ]
    )


def draw(results: Results, figure: Figure) -> None:
    """Kernel distance by steps; reward against high-frequency power at one step."""
    panels = figure.subplots(1, 2)
    colours = {TEACHER_ARM: "black", LCD: "tab:blue", LONG: "tab:cyan", "direct": "tab:orange"}
    colours |= {"direct, large": "tab:red", "proxy": "tab:green"}
    for arm, colour in colours.items():
        for i, seed in enumerate(results.seeds(arm)):
            style = {"color": colour, "alpha": 0.7, "label": arm if i == 0 else None}
            steps = steps_of(results, arm)
            values = [column(results, arm, KERNEL, n, [seed])[0] for n in steps]
            panels[0].plot(steps, values, marker="o", markersize=3, **style)
            if arm != TEACHER_ARM:
                place = (column(results, arm, kind, 1, [seed]) for kind in (DETAIL, REWARD))
                panels[1].scatter(*place, s=18, **style)
    panels[0].set(xscale="log", yscale="symlog", xlabel="steps", ylabel=KERNEL.label)
    panels[0].set_yscale("symlog", linthresh=1e-3)
    panels[1].set(xscale="log", xlabel=f"{DETAIL.label}, one step", ylabel=REWARD.label)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
