"""Latent perceptual loss against training without it, branched from the embedded model.

    python scripts/reproduce/lpl.py --jobs 2

All arms of a seed start from the embedded model and see the same pictures, captions, noise and
times in the same order. 240 steps of 16 samples; two to three minutes an arm and seed on a thread.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.experiment import Cell, Experiment, Results
from runner.inputs import asset_digests, pictures
from runner.intervals import paired_difference
from runner.main import main
from runner.perception import estimate_errors, sample_detail
from runner.report import MORE
from runner.stages import train_stages

from diffkit.files import read_jsonl, sha256
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.latent_perceptual_config import LatentPerceptualConfig
from diffkit.training.denoising import DenoisingTraining
from diffkit.training.latent_perceptual import LatentPerceptualTraining

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, LPL, STRONG, CONTROL = "no LPL", "LPL", "LPL at half", "weight 0"
DETACHED = "detached"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"lpl": None},
    LPL: {"lpl": {"share": 0.2}},
    STRONG: {"lpl": {"share": 0.5}},
    CONTROL: {"lpl": {"weight": 0.0}},
    DETACHED: {"lpl": {"share": 0.2, "stats": "prediction_detached"}},
    "channel norm": {"lpl": {"share": 0.2, "norm": "channel_norm_target"}},
    "wide gate": {"lpl": {"share": 0.2, "gate": "noise_to_signal"}},
}
MEANING = {
    LPL: "the defaults: the share of LPL in the loss kept at 0.2, gate at an SNR of 3",
    STRONG: "a share of 0.5",
    CONTROL: "LPL computed and added with weight 0",
    DETACHED: "no gradient through the deviation that divides, share 0.2",
    "channel norm": "the normalisation of diffusers' script, share 0.2",
    "wide gate": "the other reading of the threshold, sigma / alpha <= 3, share 0.2",
}
SETTINGS: dict[str, Any] = {
    "data": "t2i-64",
    "assets": asset_digests("model/unet", "model/vae", "model/text_encoder"),
    "steps": 240,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "warmup_steps": 20,
    "ema": 0.99,
}
SCORING: dict[str, Any] = {
    "times": [20, 60, 120, 190],
    "noises": 2,
    "samples": 120,
    "sampling_steps": 20,
    "guidance": [1.0, 2.0],
}
# key, label
MEASURES = (
    ("latent_error", "latent error of the estimate"),
    ("feature_error", "feature error of the estimate"),
    ("relative", "feature error over latent error"),
    ("variance", "feature variance over the true one"),
    ("detail", "detail of samples over real ones, no guidance"),
    ("detail_guided", "detail of samples over real ones, guidance 2"),
)


def configuration(cell: Cell, data: Path) -> DenoisingTraining:
    """The training of one arm."""
    settings = cell.settings
    common: dict[str, Any] = {
        "data": str(data),
        "output": cell.work / "run",
        "seed": cell.seed,
        "batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "warmup_steps": settings["warmup_steps"],
        "ema": settings["ema"],
        "cache_latents": True,
        "cache_embeddings": True,
        "cache": cell.work.parent / "cache",
        "workers": 1,
        "checkpoint_every": 80,
        "keep": 1,
        "tracker": "none",
    }
    if settings["lpl"] is None:
        return DenoisingTraining(**common)
    return LatentPerceptualTraining(**common, lpl=LatentPerceptualConfig(**settings["lpl"]))


def make(cell: Cell, data: Path) -> dict[str, Any]:
    """Train one arm with one seed on the pictures of `data` and measure its model."""
    scoring = cell.scoring
    (folder,) = train_stages(configuration(cell, data), [cell.settings["steps"]])
    model = LatentDiffusion.load(folder)
    held = data.with_name(f"{data.name}-heldout")
    values: dict[str, Any] = dict(estimate_errors(model, held, scoring["times"], scoring["noises"]))
    for name, guidance in zip(("detail", "detail_guided"), scoring["guidance"], strict=True):
        values[name] = sample_detail(
            model,
            data,
            samples=scoring["samples"],
            steps=scoring["sampling_steps"],
            guidance=guidance,
        )
    values |= logged(read_jsonl(cell.work / "run" / "metrics.jsonl"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return values | {"weights": sha256(weights)}


def run(cell: Cell) -> dict[str, Any]:
    """`make` with the emoji pictures."""
    return make(cell, pictures())


def logged(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the run says of itself: its last weight, and means over its last half."""
    half = rows[len(rows) // 2 :]
    found = {"weight": float(rows[-1].get("lpl_weight", 0.0))}
    for key, name in (("lpl", "lpl"), ("lpl_gated", "gated"), ("denoising_loss", "denoising")):
        # Plain training has neither LPL nor a gate, and its loss is the denoising loss.
        found[name] = sum(row.get(key, row["loss"] * (name == "denoising")) for row in half)
        found[name] /= len(half)
    added = found["weight"] * found["lpl"]
    return found | {"share": added / (added + found["denoising"])}


def average(value: float | Sequence[float]) -> float:
    """The geometric mean of a list over times; a number as it is."""
    values = [value] if isinstance(value, int | float) else value
    return math.exp(sum(map(math.log, values)) / len(values))


def columns(results: Results, key: str, arm: str, seeds: Sequence[int]) -> list[float]:
    """One measure, seed by seed."""
    return [average(value) for value in results.column(arm, key, seeds)]


def ratio_table(results: Results, arm: str) -> list[str]:
    """Markdown rows: both means, the ratio with its interval (of logarithms), and each seed's."""
    seeds = results.seeds(arm, PLAIN)
    if not seeds:
        return [f"No seed has both {PLAIN} and {arm} yet."]
    lines = [
        f"| measure | {PLAIN} | {arm} | {arm} / {PLAIN}, 95 % interval | seed by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, label in MEASURES:
        ours, base = (columns(results, key, name, seeds) for name in (arm, PLAIN))
        found = paired_difference([math.log(x) for x in ours], [math.log(x) for x in base])
        mean, low, high = (
            math.exp(x) if x < math.inf else x for x in (found.mean, found.low, found.high)
        )
        means = [sum(column) / len(seeds) for column in (base, ours)]
        by_seed = ", ".join(f"{math.exp(x):.4f}" for x in found.values)
        lines.append(
            f"| {label} | {means[0]:.5f} | {means[1]:.5f} | {mean:.4f} [{low:.4f}, {high:.4f}] | "
            f"{by_seed} |"
        )
    return lines


def verdict(results: Results, arm: str) -> str:
    """Which measures rise and which fall against the plain arm, by their intervals."""
    seeds = results.seeds(arm, PLAIN)
    if len(seeds) < 2:
        return "Fewer than two seeds have no interval."
    told: dict[str, list[str]] = {"rise": [], "fall": [], "are undecided": []}
    for key, label in MEASURES:
        logs = ([math.log(x) for x in columns(results, key, name, seeds)] for name in (arm, PLAIN))
        found = paired_difference(*logs)
        word = "rise" if found.low > 0 else "fall" if found.high < 0 else "are undecided"
        told[word].append(f'"{label}"')
    parts = [f"{', '.join(labels) or 'none'} {word}" for word, labels in told.items()]
    return f"By these intervals: {'; '.join(parts)}."


def denominator(results: Results) -> str:
    """What is left of the effects when no gradient passes the deviation."""
    seeds = results.seeds(LPL, DETACHED, PLAIN)
    if not seeds:
        return f"No seed has {LPL}, {DETACHED} and {PLAIN} yet."
    parts = []
    for key, label in (MEASURES[3], MEASURES[4]):
        base = columns(results, key, PLAIN, seeds)
        ratios = []
        for arm in (LPL, DETACHED):
            logs = [math.log(a / b) for a, b in zip(columns(results, key, arm, seeds), base)]
            ratios.append(f"{math.exp(sum(logs) / len(logs)):.4f}")
        parts.append(f"{label}: {ratios[0]}, and {ratios[1]}")
    return (
        f"Over {PLAIN}, with the gradient through the deviation that divides, and without it "
        f"({DETACHED}, {len(seeds)} seeds each): {'; '.join(parts)}. What is lost without it came "
        "through the denominator, which rewards variance."
    )


def arms_table(results: Results) -> list[str]:
    """Every arm with its weight and its ratios to the plain one, over the seeds that it has."""
    heads = [label for _, label in MEASURES[:5]]
    lines = [
        f"| arm | what | seeds | weight | share | {' | '.join(heads)} |",
        "| --- " * (5 + len(heads)) + "|",
    ]
    for arm, meaning in MEANING.items():
        seeds = results.seeds(arm, PLAIN)
        if not seeds:
            continue
        cells = []
        for key, _ in MEASURES[:5]:
            ours, base = (columns(results, key, name, seeds) for name in (arm, PLAIN))
            logs = [math.log(a / b) for a, b in zip(ours, base, strict=True)]
            cells.append(f"{math.exp(sum(logs) / len(logs)):.4f}")
        weight, share = (
            sum(results.column(arm, key, seeds)) / len(seeds) for key in ("weight", "share")
        )
        told = [arm, meaning, str(len(seeds)), f"{weight:.3g}", f"{share:.0%}", *cells]
        lines.append(f"| {' | '.join(told)} |")
    return lines


def control(results: Results) -> str:
    """Whether the arm with weight 0 ended with the weights of the plain one."""
    seeds = results.seeds(CONTROL, PLAIN)
    if not seeds:
        return f"No seed has both {PLAIN} and {CONTROL} yet."
    ours, base = (results.column(arm, "weights", seeds) for arm in (CONTROL, PLAIN))
    equal = "the same bits as" if ours == base else "OTHER weights than"
    fall = ""
    if both := [seed for seed in results.seeds(CONTROL, LPL) if seed in seeds]:
        with_it, without = (
            sum(results.column(arm, "lpl", both)) / len(both) for arm in (LPL, CONTROL)
        )
        fall = (
            f" Over the last half of training the gated LPL averages {without:.5f} in this control "
            f"and {with_it:.5f} in {LPL}: a fall of LPL alone is no result."
        )
    return f"The arm with LPL at weight 0 ends with {equal} the arm without it.{fall}"


def text(results: Results) -> str:
    """The claim, its numbers and what they are."""
    seeds = results.seeds(PLAIN, LPL)
    times = ", ".join(map(str, SCORING["times"]))
    return "\n".join(
        [
            f"The embedded model trained on for {SETTINGS['steps']} steps of "
            f"{SETTINGS['batch_size']} samples, {len(seeds)} seeds of the main arms; arms of one "
            "seed share the start, the order of pictures, noise and times. Errors of the one-step "
            f"estimate of z_0 at times {times}, all inside the gate, on held-out pairs, "
            f"{SCORING['noises']} noises a picture; features by the deviation of the true ones; "
            "geometric mean over the times. Detail is the energy of the Laplacian of "
            f"{SCORING['samples']} samples of {SCORING['sampling_steps']} steps over that of "
            "decoded real latents. t-interval of paired logarithms.",
            "",
            *ratio_table(results, LPL),
            "",
            verdict(results, LPL),
            "",
            denominator(results),
            "",
            MORE,
            "",
            f"With {MEANING[STRONG]}:",
            "",
            *ratio_table(results, STRONG),
            "",
            verdict(results, STRONG),
            "",
            f"With {MEANING[DETACHED]}:",
            "",
            *ratio_table(results, DETACHED),
            "",
            control(results),
            "",
            f"Ratios to {PLAIN} of every arm:",
            "",
            *arms_table(results),
        ]
    )


def draw(results: Results, figure: Figure) -> None:
    """Feature and latent errors by time, and detail, as ratios to the plain arm."""
    panels = figure.subplots(1, 3)
    heads = ("feature error", "latent error", "feature variance")
    keys = ("feature_error", "latent_error", "variance")
    for colour, arm in zip(("tab:blue", "tab:orange", "tab:green"), (LPL, STRONG, DETACHED)):
        for i, seed in enumerate(results.seeds(arm, PLAIN)):
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3, "alpha": 0.7}
            style["label"] = arm if i == 0 else None
            for panel, key in zip(panels, keys, strict=True):
                ours, base = (results.values[name, seed][key] for name in (arm, PLAIN))
                ratios = [a / b for a, b in zip(ours, base, strict=True)]
                panel.plot(SCORING["times"], ratios, **style)
    for panel, head in zip(panels, heads, strict=True):
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"{head}, over {PLAIN}", xlabel="time")
        panel.grid(alpha=0.3)
    panels[0].legend()


EXPERIMENT = Experiment(
    name="lpl",
    title="Latent perceptual loss",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=text,
    draw=draw,
    fewer={arm: (0,) for arm in ARMS if arm not in (PLAIN, LPL, STRONG, DETACHED)},
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
