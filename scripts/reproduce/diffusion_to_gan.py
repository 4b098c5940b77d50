"""One-step students of the embedded teacher: what they regress on, what a discriminator adds.

    python scripts/reproduce/diffusion_to_gan.py --jobs 2

The teacher has captions that many pictures share (`runner/open_captions.py`). Its noise-image pairs
are made once, by all processes together, and all students of a seed see them in the same order. The
arms of the second table start from the E-LatentLPIPS student of their seed. Everything runs on CUDA
where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.experiment import Cell, Experiment, Results, digest
from runner.inputs import FEATURES, asset_digests
from runner.intervals import paired_difference
from runner.main import main
from runner.open_captions import KINDS, open_caption, open_pictures, open_teacher
from runner.open_captions import TEACHER as TRAINED
from runner.pairs import pair_folder
from runner.report import MORE, Measure, contrast_table, interval_text
from runner.students import Asked, Judge, decoded, encoded_strip, few_step_latents, strip
from runner.work import INTERRUPTED, Interrupted, claim

from diffkit.data.trajectories import TrajectoryBatch, TrajectoryData
from diffkit.errors import RunFailed
from diffkit.files import read_jsonl
from diffkit.generation.engine import choose_device
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from diffkit.training.diffusion_gan import GanTraining
from diffkit.training.launch import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEACHER, BARE = "teacher", "teacher, 1 step"
BEST = "E-LatentLPIPS"
MSE, HUBER, PLAIN_METRIC, LPL = "MSE", "pseudo-Huber", "LatentLPIPS", "decoder features"
ON, FULL = "regression on", "full"
ALONE: dict[str, Any] = {"discriminator": "none"}
WARMED: dict[str, Any] = {"warmup": 40}
BARELY: dict[str, Any] = {"noise_input": False, "multiscale": False, "mismatch": 0.0, "r1": "none"}
JUDGED: dict[str, Any] = WARMED | BARELY
SCALES: dict[str, Any] = {**JUDGED, "noise_input": True, "multiscale": True}
WHOLE: dict[str, Any] = {**SCALES, "mismatch": 0.25, "r1": "exact"}

TEACHERS: dict[str, dict[str, Any]] = {
    TEACHER: {"sampling_steps": None},
    BARE: {"sampling_steps": 1},
}
REGRESSIONS: dict[str, dict[str, Any]] = {
    MSE: {"gan": {**ALONE, "regression": "mse"}},
    HUBER: {"gan": {**ALONE, "regression": "huber"}},
    PLAIN_METRIC: {"gan": {**ALONE, "regression": "latentlpips"}},
    BEST: {"gan": ALONE},
    LPL: {"gan": {**ALONE, "regression": "lpl"}},
}
LADDER: dict[str, dict[str, Any]] = {
    ON: {"gan": ALONE},
    "discriminator": {"gan": JUDGED},
    "+ noise": {"gan": {**JUDGED, "noise_input": True}},
    "+ multi-scale": {"gan": SCALES},
    "+ mix-and-match": {"gan": {**WHOLE, "r1": "none"}},
    FULL: {"gan": WHOLE},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "approximated R1": {"gan": {**WHOLE, "r1": "approximate"}},
    "DMD2": {"gan": {**WHOLE, "dmd": True}, "dmd": {"updates": 2}},
    "on MSE": {"gan": {**WHOLE, "regression": "mse"}, "start": MSE},
}
FIRST: dict[str, Any] = {"steps": 1200, "batch_size": 16, "learning_rate": 2e-4}
SECOND: dict[str, Any] = {"steps": 240, "batch_size": 8, "learning_rate": 1e-4}
SECOND |= {"start": BEST, "first": FIRST}
ARMS: dict[str, dict[str, Any]] = {
    **TEACHERS,
    **REGRESSIONS,
    **{arm: {**SECOND, **values} for arm, values in (LADDER | VARIANTS).items()},
}
MEANING = {
    MSE: "squared error of the latents",
    HUBER: "pseudo-Huber of the latents",
    PLAIN_METRIC: "LatentLPIPS, the same network without random maps",
    BEST: "E-LatentLPIPS",
    LPL: "features of the decoder (latent perceptual loss)",
    ON: f"{BEST} alone, for as many steps more",
    "discriminator": "a discriminator with heads at the last scale, told the prompt alone",
    "+ noise": "it is told the noise too",
    "+ multi-scale": "inputs and heads at every scale",
    "+ mix-and-match": "a quarter of what it sees as generated are other pairs' true latents",
    FULL: "and R1 of a single sample at every 16th step: the whole method",
    "approximated R1": "the whole method, R1 by noise and not by second derivatives",
    "DMD2": "the whole method and distribution matching",
    "on MSE": f"the whole method, from the {MSE} student and with that regression",
}
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
    "assets": asset_digests("features"),
    "noises": 4,
    "seed": 1,
    "shown": 12,
}
MEASURES = (
    Measure("kernel", "kernel distance to the pictures", ".4f"),
    Measure("concept", "concept, by the feature network", ".1%"),
    Measure("style", "style, by the feature network", ".1%"),
    Measure("energy", "power from half Nyquist on, over the teacher's", ".3f"),
    Measure("latent_error", "squared error to the teacher's latents", ".4f"),
    Measure("perceptual", "perceptual distance to the teacher's picture", ".3f"),
    Measure("diversity", "diversity of a caption, over the teacher's", ".3f"),
)


# -- making -------------------------------------------------------------------------------------


def asked_of(data: Path) -> list[Asked]:
    """The different captions of the pictures: all concepts, then all looks."""
    found: dict[str, Asked] = {}
    for kind in KINDS:
        for row in read_jsonl(data / "metadata.jsonl"):
            caption = open_caption(row, kind)
            names = {"concept": caption} if kind == "concept" else {"style": row["style"]}
            found.setdefault(caption, Asked(caption, **names))
    return list(found.values())


def training_pairs(cell: Cell, data: Path, teacher: Path) -> Path:
    """The pairs that all students are trained on; looks come twice, as they are half as many."""
    asked = asked_of(data)
    captions = [one.caption for one in (*asked, *(one for one in asked if one.style))]
    return pairs_of(cell, teacher, captions, cell.settings["pairs"], "pairs")


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
    if start != teacher and gan.get("discriminator") != "none":
        gan["teacher"] = str(teacher)
    return GanTraining(
        data=str(pairs),
        output=cell.work / "run",
        model=str(start),
        seed=cell.seed,
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
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
    judge = Judge(held, asked, data, model, FeatureNetwork.load(FEATURES))
    values: dict[str, Any] = {"device": device, **judge.scores(latents, images)}
    if trains:
        values |= logged(read_jsonl(cell.work / "run" / "metrics.jsonl"))
    if cell.seed == 0:
        values["pictures"] = encoded_strip(images[: cell.scoring["shown"]])
    return values


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


# -- telling ------------------------------------------------------------------------------------


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
        blurred = min(found, key=lambda arm: mean(results, arm, "energy"))
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


def text(results: Results) -> str:
    """The two ladders with their intervals, then the arms of one seed and every contrast."""
    settings, scoring = EXPERIMENT.settings, EXPERIMENT.scoring
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
        "t-intervals of differences, paired by seed.",
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


MAIN = (MSE, HUBER, PLAIN_METRIC, BEST, *LADDER)
EXPERIMENT = Experiment(
    name="diffusion_to_gan",
    title="One-step students by regression and by a discriminator",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=text,
    draw=draw,
    fewer={arm: (0,) for arm in ARMS if arm not in MAIN},
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
