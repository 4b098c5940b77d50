"""One-step students of the embedded teacher: what they regress on, what a discriminator adds.

    python scripts/reproduce/diffusion_to_gan.py --jobs 2

The teacher has captions that many pictures share (`runner/open_captions.py`). Its noise-image pairs
are made once, by all processes together, and all students of a seed see them in the same order. The
arms of the second table start from the E-LatentLPIPS student of their seed. Everything runs on CUDA
where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_to_gan_parts.arms import (
    ARMS,
    BEST,
    DMD,
    FIRST,
    FULL,
    HUBER,
    MSE,
    ON,
    PLAIN_METRIC,
)
from diffusion_to_gan_parts.report import draw, text
from runner.experiment import Cell, Experiment, digest
from runner.inputs import FEATURES, asset_digests
from runner.judge import Asked
from runner.main import main
from runner.open_captions import TEACHER as TRAINED
from runner.open_captions import asked_of, open_pictures, open_teacher
from runner.pairs import pair_folder
from runner.students import Comparison, decoded, encoded_strip, few_step_latents
from runner.work import INTERRUPTED, Interrupted, claim
from torch import Tensor

from diffkit import assets
from diffkit.data.trajectories import TrajectoryBatch, TrajectoryData
from diffkit.data.trajectory_store import read_header
from diffkit.errors import RunFailed
from diffkit.files import read_jsonl
from diffkit.generation.engine import choose_device
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from diffkit.training.diffusion_gan import GanTraining
from diffkit.training.launch import train

SETTINGS: dict[str, Any] = {
    "data": "t2i-64-open",
    "teacher": TRAINED,
    "assets": asset_digests("model/unet", "model/vae", "model/text_encoder", "latent_lpips"),
    "pairs": {"count": 2048, "seed": 0, "steps": 20, "guidance": 2.0},
    **FIRST,
    "warmup_steps": 30,
    "max_grad_norm": 10.0,
    "ema": 0.99,
}
SCORING: dict[str, Any] = {
    "assets": asset_digests("features", "scorer"),
    "noises": 4,
    "seed": 1,
    "shown": 12,
}


# -- making -------------------------------------------------------------------------------------


def trained_captions(asked: Sequence[Asked]) -> list[str]:
    """Of the pairs in turn: all captions, and looks once more, as they are half as many."""
    return [one.caption for one in (*asked, *(one for one in asked if one.style))]


def training_pairs(cell: Cell, data: Path, teacher: Path) -> Path:
    """The pairs that all students are trained on."""
    captions = trained_captions(asked_of(data))
    return pairs_of(cell, teacher, captions, cell.settings["pairs"], "pairs")


def taught_latents(pairs: Path, asked: Sequence[Asked]) -> Tensor:
    """Of the training pairs' end points, as many of each caption."""
    period = len(trained_captions(asked))
    count = read_header(pairs).count // period * period
    rows = [row for row in range(count) if row % period < len(asked)]
    return TrajectoryData(pairs, batch_size=1, seed=0).pairs(rows).latents


def held_pairs(cell: Cell, data: Path, teacher: Path) -> tuple[TrajectoryBatch, list[Asked]]:
    """Noises that no student has seen with the teacher's end points, and what is asked for."""
    asked, scoring = asked_of(data), cell.scoring
    count = len(asked) * scoring["noises"]
    words = {**cell.settings["pairs"], "count": count, "seed": scoring["seed"]}
    folder = pairs_of(cell, teacher, [one.caption for one in asked], words, "held")
    return TrajectoryData(folder, batch_size=1, seed=0).pairs(range(count)), asked


def pairs_of(
    cell: Cell, teacher: Path, captions: list[str], words: Mapping[str, Any], name: str
) -> Path:
    """A folder that every cell with these pairs has in common."""
    told = [cell.settings["assets"], cell.settings["teacher"], captions, words]
    return pair_folder(cell.work.parent / f"{name}-{digest(told)}", teacher, captions, **words)


def configuration(cell: Cell, pairs: Path, teacher: Path, start: Path) -> GanTraining:
    """The training of a cell, from the model in `start`."""
    settings, gan = cell.settings, dict(cell.settings["gan"])
    if start != teacher and (gan.get("discriminator") != "none" or gan.get("dmd")):
        gan["teacher"] = str(teacher)
    return GanTraining(
        data=str(pairs),
        output=cell.work / "run",
        model=str(start),
        seed=cell.seed,
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_schedule="warmup-stable-decay",
        decay_steps=settings["decay"],
        warmup_steps=settings["warmup_steps"],
        beta1=settings.get("beta1", 0.9),
        max_grad_norm=settings["max_grad_norm"],
        ema=settings["ema"],
        cache_embeddings=True,
        cache=cell.work.parent / "cache",
        workers=1,
        checkpoint_every=250,
        keep=1,
        tracker="none",
        gan=GanConfig(**gan),
        dmd=DmdConfig(**settings.get("dmd", {})),
    )


def student(cell: Cell, data: Path, teacher: Path, experiment: Experiment) -> Path:
    """The folder of the trained model of a cell, trained if it was not, after what it starts from.

    The arms that start from a student wait for whoever trains that one.
    """
    start = teacher
    if "start" in cell.settings:
        first = experiment.cell(cell.settings["start"], cell.seed)
        start = student(first, data, teacher, experiment)
    config = configuration(cell, training_pairs(cell, data, teacher), teacher, start)
    with claim(Path(config.output), wait=True):
        code = train(config)
    if code == INTERRUPTED:
        raise Interrupted
    if code:
        raise RunFailed(f"{config.output}: the training ended with code {code}.")
    return Path(config.output) / "model"


def make(cell: Cell, data: Path, teacher: Path, experiment: Experiment) -> dict[str, Any]:
    """The numbers of a cell; `data` are the pictures that the teacher was trained on."""
    trains = "gan" in cell.settings
    source = student(cell, data, teacher, experiment) if trains else teacher
    held, asked = held_pairs(cell, data, teacher)
    device = choose_device("auto")
    model = LatentDiffusion.load(source, device=device)
    if trains:
        latents = few_step_latents(model, held)
    elif cell.settings["sampling_steps"] is None:
        latents = held.latents
    else:
        words = cell.settings["sampling_steps"], cell.settings["pairs"]["guidance"]
        latents = few_step_latents(model, held, *words)
    images = decoded(model, latents)
    taught = taught_latents(training_pairs(cell, data, teacher), asked)
    networks = FeatureNetwork.load(FEATURES), TextImageScorer.load(assets.path("scorer"))
    judge = Comparison(held, asked, taught, data, model, *networks)
    values: dict[str, Any] = {"device": device, **judge.scores(latents, images)}
    if trains:
        values |= logged(read_jsonl(cell.work / "run" / "metrics.jsonl"))
    if cell.seed == 0:
        values["pictures"] = encoded_strip(images[spread(len(asked), cell.scoring["shown"])])
    return values


def spread(count: int, chosen: int) -> list[int]:
    """That many of `count` places, from the first to the last: concepts and looks."""
    return [round(i * (count - 1) / (chosen - 1)) for i in range(chosen)]


def run(cell: Cell) -> dict[str, Any]:
    """`make` with the emoji pictures, and with the teacher, which is trained if it was not."""
    return make(cell, open_pictures(), open_teacher(), EXPERIMENT)


def logged(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run says of its last quarter, on average: losses, and the discriminator's accuracy."""
    last = rows[-max(1, len(rows) // 4) :]
    numbers = {
        name
        for name, value in last[-1].items()
        if isinstance(value, float) and name.split("/")[-1] in ("loss", "accuracy", "diversity")
    }
    return {f"run {name}": sum(row[name] for row in last) / len(last) for name in sorted(numbers)}


MAIN = (MSE, HUBER, PLAIN_METRIC, BEST, ON, FULL, DMD)
EXPERIMENT = Experiment(
    name="diffusion_to_gan",
    title="One-step students by regression and by a discriminator",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=partial(text, settings=SETTINGS, scoring=SCORING),
    draw=draw,
    fewer={arm: (0,) for arm in ARMS if arm not in MAIN},
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
