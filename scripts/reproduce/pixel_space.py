"""Pixel-space post-training of the embedded model, beside plain training and the weight in time.

    python scripts/reproduce/pixel_space.py --jobs 2

Four arms go on from the embedded v-prediction model, three from the same network after it was
taught to predict the noise. Arms of one seed see the same pictures, noise and times in the same
order. What is asked: does the error that the decoder shows fall beside the error of the latents,
where the loss has its weight? 1 to 3 minutes an arm and seed on one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from runner.experiment import Cell, Experiment, Results, digest
from runner.inputs import ASSETS, asset_digests, pictures
from runner.main import main
from runner.perception import laplacian_energy
from runner.report import MORE, Measure, contrast_table
from runner.scores import BATCH, BINS, generate, held_out_draws, read_pairs
from runner.stages import train_stages
from runner.work import claim

from diffkit.files import read_jsonl
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import denoising_loss
from diffkit.objectives.pixel_space import BOUNDS, PixelConfig
from diffkit.perceptual.decoded import decoded_error, noise_only_delta
from diffkit.training.denoising import DenoisingTraining
from diffkit.training.pixel_space import PixelTraining

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATENT: dict[str, Any] = {"pixel": None}
PIXEL: dict[str, Any] = {"pixel": {}}
CONTROL: dict[str, Any] = {"pixel": {"control": True}}
ARMS: dict[str, dict[str, Any]] = {
    "latent": {"predicts": "v_prediction", **LATENT},
    "pixel": {"predicts": "v_prediction", **PIXEL},
    "control": {"predicts": "v_prediction", **CONTROL},
    "pixels-alone": {"predicts": "v_prediction", "pixel": {"latent_weight": 0.0}},
    "eps-latent": {"predicts": "epsilon", **LATENT},
    "eps-pixel": {"predicts": "epsilon", **PIXEL},
    "eps-control": {"predicts": "epsilon", **CONTROL},
}
SETTINGS: dict[str, Any] = {
    "data": "t2i-64",
    "assets": asset_digests("model/unet", "model/vae", "model/text_encoder"),
    "steps": 200,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "ema": 0.98,
    "taught_steps": 400,
    "taught_rate": 4e-4,
}
SCORING: dict[str, Any] = {"loss_pictures": 64, "samples": 64, "steps": 20, "guidance": 2.0}
MEASURES = (
    Measure("ratio", "D-space over latent error, where the loss has its weight", ".4f"),
    Measure("ratio_low", "D-space over latent error, least noise", ".4f"),
    Measure("decoded", "D-space error, all times", ".5f"),
    Measure("latent", "latent error, all times", ".5f"),
    Measure("latent_weighted", "latent error, where the loss has its weight", ".5f"),
    Measure("latent_low", "latent error, least noise", ".5f"),
    Measure("trained_ratio", "D-space over latent error, as above, training pictures", ".4f"),
    Measure("trained_latent", "latent error, all times, training pictures", ".5f"),
    Measure("laplacian", "Laplacian energy of samples over decoded real latents", ".3f"),
)
NAMES = ("latent", "decoded", "weight")
LOW = 2
"""Parts of the schedule that are called the least noise."""


# -- training -----------------------------------------------------------------------------------


def plain(cell: Cell, output: Path, data: Path, model: Path) -> DenoisingTraining:
    """What all runs of the experiment share."""
    return DenoisingTraining(
        data=str(data),
        output=output,
        model=str(model),
        seed=cell.seed,
        batch_size=cell.settings["batch_size"],
        warmup_steps=cell.settings["warmup_steps"],
        ema=cell.settings["ema"],
        cache_latents=True,
        cache_embeddings=True,
        cache=cell.work.parent / "cache",
        workers=1,
        checkpoint_every=50,
        keep=1,
        tracker="none",
    )


def noise_predictor(cell: Cell, data: Path) -> Path:
    """The embedded network after some steps of eps-prediction: one for all cells, made once."""
    settings = cell.settings
    decides = ("data", "assets", "batch_size", "warmup_steps", "ema", "taught_steps", "taught_rate")
    place = cell.work.parent / f"eps-start-{digest({k: settings[k] for k in decides})[:8]}"
    untaught = place.with_name(f"{place.name}-untaught")
    with claim(untaught, wait=True):
        if not untaught.is_dir():
            pipe = LatentDiffusion.load(ASSETS / "model").pipeline()
            changes = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
            LatentDiffusion(pipe).save(untaught)
    config = replace(plain(cell, place, data, untaught), seed=0)
    config = replace(config, learning_rate=settings["taught_rate"])
    return train_stages(config, [settings["taught_steps"]])[0]


def train(cell: Cell, data: Path) -> Path:
    """The folder of the trained model."""
    settings = cell.settings
    start = ASSETS / "model"
    if settings["predicts"] == "epsilon":
        start = noise_predictor(cell, data)
    config = plain(cell, cell.work / "run", data, start)
    config.learning_rate = settings["learning_rate"]
    if settings["pixel"] is not None:
        config = PixelTraining(**vars(config), pixel=PixelConfig(**settings["pixel"]))
    return train_stages(config, [settings["steps"]])[0]


# -- measures -----------------------------------------------------------------------------------


@torch.no_grad()
def errors_by_time(model: LatentDiffusion, data: Path, limit: int) -> dict[str, list[float]]:
    """Latent error, D-space error and weight in time of held-out pictures, part by part.

    The weight is |sigma_t (eps_theta - eps)|^2 over |output - target|^2: what the pixel loss of an
    orthonormal decoder would multiply the latent loss by.
    """
    denoiser, codec = model.denoiser, model.codec
    schedule = denoiser.schedule
    sums, counts = torch.zeros(3, BINS, dtype=torch.float64), torch.zeros(BINS)
    for draw in held_out_draws(model, data, limit):
        z_t = schedule.add_noise(draw.z0, draw.eps, draw.t)
        output = denoiser(z_t, draw.t, draw.cond)
        target = schedule.target(draw.z0, draw.eps, draw.t)
        delta = noise_only_delta(schedule, output, target, draw.t)
        found = (
            denoising_loss(output, target),
            decoded_error(codec, z_t, delta),
            schedule.noise_gain(draw.t).square(),
        )
        sums[:, draw.part] += torch.stack([value.double().sum() for value in found])
        counts[draw.part] += len(draw.t)
    latent, decoded, weight = (sums / counts).tolist()
    return {"latent_by_time": latent, "decoded_by_time": decoded, "weight_by_time": weight}


def summary(by_time: Mapping[str, list[float]]) -> dict[str, float]:
    """The numbers of the table.

    The loss has its weight in the parts whose weight is at least half of the largest.
    """
    latent, decoded, weight = (torch.tensor(by_time[f"{name}_by_time"]) for name in NAMES)
    chosen = weight >= weight.max() / 2
    low = torch.arange(BINS) < LOW
    return {
        "latent": float(latent.mean()),
        "decoded": float(decoded.mean()),
        "latent_weighted": float(latent[chosen].mean()),
        "latent_low": float(latent[low].mean()),
        "ratio": float(decoded[chosen].sum() / latent[chosen].sum()),
        "ratio_low": float(decoded[low].sum() / latent[low].sum()),
    }


@torch.no_grad()
def sharpness(model: LatentDiffusion, data: Path, scoring: Mapping[str, Any]) -> float:
    """Mean Laplacian energy of samples of held-out captions over that of decoded real latents."""
    pairs = read_pairs(data, True)
    samples = -(-scoring["samples"] // len(pairs))
    drawn = generate(model, pairs, samples, scoring["steps"], scoring["guidance"], BATCH)
    real = [
        model.codec.decode(draw.z0).clamp(-1, 1)
        for draw in held_out_draws(model, data, scoring["loss_pictures"])
        if draw.part == 0
    ]
    return float(laplacian_energy(drawn).mean() / laplacian_energy(torch.cat(real)).mean())


def measure(folder: Path, scoring: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """Every measure of one model."""
    model = LatentDiffusion.load(folder)
    held = data.with_name(f"{data.name}-heldout")
    values: dict[str, Any] = {"laplacian": sharpness(model, held, scoring)}
    for prefix, place in (("", held), ("trained_", data)):
        by_time = errors_by_time(model, place, scoring["loss_pictures"])
        values |= {f"{prefix}{key}": x for key, x in {**by_time, **summary(by_time)}.items()}
    return values


def run(cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    data = pictures()
    folder = train(cell, data)
    last = read_jsonl(cell.work / "run" / "metrics.jsonl")[-1]
    logged = {"lambda": last["pixel_weight"]} if "pixel_weight" in last else {}
    return {**measure(folder, cell.scoring, data), **logged}


# -- report -------------------------------------------------------------------------------------


def text(results: Results) -> str:
    """The tables, and what stands in them."""
    seeds = results.seeds("latent", "pixel", "control")
    weights = ", ".join(f"{x:.2f}" for x in results.column("pixel", "lambda", seeds))
    lines = [
        f"The embedded model, {SETTINGS['steps']} further steps of {SETTINGS['batch_size']} "
        f"samples at rate {SETTINGS['learning_rate']:g}, {len(seeds)} seeds an arm; lambda came to "
        f"{weights} ({BOUNDS[1]:g} is its bound: this decoder shrinks errors so much that the "
        'pixel term then still counts less than the latent one). "latent" is plain training, '
        '"pixel" adds the loss of decoded pictures, '
        '"control" adds the latent loss with the same weight in time and no decoder. Errors are '
        f"of {SCORING['loss_pictures']} pictures each at the same noises and times, held-out ones "
        "unless said; the loss has its weight where that is at least half of its largest (middle "
        "noise for v, much noise for eps). t-interval of the paired differences. A ratio can fall "
        "by its denominator, too: read the D-space error beside it.",
        "",
        *contrast_table(results, "pixel", "latent", MEASURES),
        "",
        *contrast_table(results, "pixel", "control", MEASURES),
        "",
        MORE,
        "",
        "One seed of pixels alone, and one of each arm after the network had been taught to "
        f"predict the noise ({SETTINGS['taught_steps']} steps); a single pair has no interval.",
        "",
        *contrast_table(results, "pixels-alone", "latent", MEASURES),
        "",
        *contrast_table(results, "eps-pixel", "eps-latent", MEASURES),
        "",
        *contrast_table(results, "eps-pixel", "eps-control", MEASURES),
    ]
    return "\n".join(lines)


def draw(results: Results, figure: Figure) -> None:
    """The ratio of both errors by time beside that of plain training, and the weight in time."""
    panels = figure.subplots(1, 2)
    branches = (("v-prediction", "latent", ("pixel", "control", "pixels-alone")),)
    branches += (("eps-prediction", "eps-latent", ("eps-pixel", "eps-control")),)
    places = [(k + 0.5) / BINS for k in range(BINS)]
    for panel, (title, baseline, arms) in zip(panels, branches, strict=True):
        for colour, arm in zip(("tab:blue", "tab:orange", "tab:green"), arms, strict=False):
            for number, seed in enumerate(results.seeds(arm, baseline)):
                own, other = (results.values[name, seed] for name in (arm, baseline))
                ratios = [
                    (a / b) / (c / d) - 1
                    for a, b, c, d in zip(
                        own["decoded_by_time"],
                        own["latent_by_time"],
                        other["decoded_by_time"],
                        other["latent_by_time"],
                        strict=True,
                    )
                ]
                label = arm if number == 0 else None
                panel.plot(places, ratios, color=colour, marker="o", markersize=3, label=label)
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set(title=title, xlabel="time (1 is pure noise)")
        panel.set_ylabel(f"D-space over latent error, beside {baseline}")
        panel.yaxis.set_major_formatter("{x:+.1%}")
        panel.grid(alpha=0.3)
        panel.legend()


EXPERIMENT = Experiment(
    name="pixel_space",
    title="Pixel-space post-training: the decoder's errors beside the latents'",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=text,
    draw=draw,
    fewer=dict.fromkeys(("pixels-alone", "eps-latent", "eps-pixel", "eps-control"), (0,)),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
