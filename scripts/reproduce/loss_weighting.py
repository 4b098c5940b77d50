"""Uniform v-loss against min-SNR weighting, all else equal: the loss of the embedded model.

    python scripts/reproduce/loss_weighting.py --jobs 2

Both arms start from the same random U-Net and see the same pictures, captions, noise and times in
the same order. 640 steps of 32 samples, about 25 minutes an arm and seed on one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.experiment import Cell, Experiment, Results, digest
from runner.inputs import FEATURES, asset_digests, pictures, untrained_model
from runner.main import main
from runner.report import Measure, contrast_table
from runner.scores import loss_by_time, picture_scores
from runner.stages import train_stages

from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.training.denoising import DenoisingTraining

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, dict[str, Any]] = {"uniform": {"min_snr": None}, "min-SNR": {"min_snr": 5.0}}
STAGES = (64, 320, 640)
SETTINGS: dict[str, Any] = {
    "data": "t2i-64",
    "assets": asset_digests("model/vae", "model/text_encoder"),
    "stages": list(STAGES),
    "batch_size": 32,
    "learning_rate": 8e-4,
    "warmup_steps": 60,
    "ema": 0.99,
}
SCORING: dict[str, Any] = {
    "assets": asset_digests("features"),
    "samples": [1, 1, 1],
    "steps": 25,
    "guidance": 2.0,
    "loss_pictures": 256,
}
MEASURES = (
    Measure("concept", "concept, by the feature network", ".1%", -1),
    Measure("concept_nearest", "concept, by the nearest real picture", ".1%", -1),
    Measure("style", "style, by the feature network", ".1%", -1),
    Measure("background", "background colour", ".1%", -1),
    Measure("kernel", "kernel distance (diffkit feature network)", ".4f", -1),
    Measure("loss_trained", "v-loss, training pictures, unseen noise", ".4f", -1),
    Measure("loss_heldout", "v-loss, held-out pairs", ".4f", -1),
)


def train(cell: Cell, data: Path) -> list[Path]:
    """The folders of the models after each stage."""
    settings = cell.settings
    start = cell.work.parent / f"start-{cell.seed}-{digest(settings['assets'])[:8]}"
    config = DenoisingTraining(
        data=str(data),
        output=cell.work / "run",
        model=str(untrained_model(start, cell.seed)),
        seed=cell.seed,
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
        ema=settings["ema"],
        cache_latents=True,
        cache_embeddings=True,
        cache=cell.work.parent / "cache",
        workers=1,
        checkpoint_every=64,
        keep=1,
        tracker="none",
        denoising=DenoisingConfig(min_snr=settings["min_snr"]),
    )
    return train_stages(config, settings["stages"])


def measure(models: Sequence[Path], scoring: dict[str, Any], data: Path) -> dict[str, list[Any]]:
    """Every measure, a list over the stages."""
    network = FeatureNetwork.load(FEATURES)
    held = data.with_name(f"{data.name}-heldout")
    rows = []
    for folder, samples in zip(models, scoring["samples"], strict=True):
        model = LatentDiffusion.load(folder)
        options = {"samples": samples, "steps": scoring["steps"], "guidance": scoring["guidance"]}
        row: dict[str, Any] = dict(picture_scores(model, data, network, **options))
        for name, place in (("trained", data), ("heldout", held)):
            losses = loss_by_time(model, place, scoring["loss_pictures"])
            row[f"loss_{name}"] = sum(losses) / len(losses)
            row[f"loss_{name}_by_time"] = losses
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]}


def run(cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed and measure its stages."""
    data = pictures()
    return measure(train(cell, data), dict(cell.scoring), data)


def text(results: Results) -> str:
    """The claim, its numbers and what they are."""
    seeds = results.seeds(*ARMS)
    n = next(iter(results.values.values()))["n"][-1]
    return "\n".join(
        [
            f"The embedded model's U-Net from its random start, {STAGES[-1]} steps of "
            f"{SETTINGS['batch_size']} samples, {len(seeds)} seeds an arm; arms of one seed share "
            "the start, the order of pictures, noise and times. Scores over "
            f"{n} pictures of trained pairs a model, {SCORING['steps']} steps, guidance "
            f"{SCORING['guidance']:g}; t-interval of the paired differences.",
            "",
            *contrast_table(results, "min-SNR", "uniform", MEASURES),
        ]
    )


def draw(results: Results, figure: Figure) -> None:
    """Concept accuracy and kernel distance over the steps, and the loss by time."""
    panels = figure.subplots(1, 3)
    for colour, arm in zip(("tab:blue", "tab:orange"), ARMS, strict=True):
        for i, seed in enumerate(results.seeds(arm)):
            values = results.values[arm, seed]
            style: dict[str, Any] = {"color": colour, "alpha": 0.7, "marker": "o", "markersize": 3}
            style["label"] = arm if i == 0 else None
            panels[0].plot(STAGES, values["concept"], **style)
            panels[1].plot(STAGES, values["kernel"], **style)
            losses = values["loss_trained_by_time"][-1]
            panels[2].plot([(k + 0.5) / len(losses) for k in range(len(losses))], losses, **style)
    heads = ("concept accuracy", "kernel distance", "v-loss after the last step")
    feet = ("training steps", "training steps", "time (1 is pure noise)")
    for panel, head, foot in zip(panels, heads, feet, strict=True):
        panel.set(title=head, xlabel=foot)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(0, 1)
    panels[1].set_yscale("log")
    panels[0].legend()


EXPERIMENT = Experiment(
    name="loss_weighting",
    title="Loss weighting: uniform against min-SNR",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=text,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
