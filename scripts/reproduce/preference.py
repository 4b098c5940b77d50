"""Preference optimisation from right and from partly wrong labels, with a colour for the reward.

    python scripts/reproduce/preference.py --jobs 2

The reward of a picture is its redness. A pair shows one emoji on two backgrounds, with a caption
that names no background; a label is drawn from the rewards by Bradley and Terry's model, and some
labels are then turned round. (Two pictures that the embedded model makes of one caption differ in
redness by a hundredth only, so the pairs are of its training pictures.)

All arms start from the embedded model; those of one seed see the same pairs, noise and times.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from runner.experiment import Cell, Experiment, Results, digest
from runner.inputs import (
    ASSETS,
    FEATURES,
    asset_digests,
    name_of,
    pictures,
    read_pairs,
    read_pictures,
)
from runner.intervals import paired_difference
from runner.main import main
from runner.report import Measure, contrast_table, interval_text
from runner.work import INTERRUPTED, Interrupted, claim
from scipy.stats import mannwhitneyu
from torch import Tensor

from diffkit.data.preferences import PreferenceData
from diffkit.errors import RunFailed
from diffkit.files import append_jsonl, atomic_directory, read_jsonl
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.preference import PreferenceConfig, PreferenceObjective
from diffkit.randomness import normal, permutation, uniform
from diffkit.training.devices import make_accelerator, release_accelerator
from diffkit.training.folder import RunFolder
from diffkit.training.launch import (
    build_data,
    build_model,
    build_objective,
    fill_caches,
    train,
)
from diffkit.training.preference import PreferenceTraining
from diffkit.training.trackers import make_tracker
from diffkit.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLIPS = 0.3
ARMS: dict[str, dict[str, Any]] = {
    "base": {"loss": None},
    "DPO, no flips": {"loss": "dpo", "flips": 0.0},
    "DPO": {"loss": "dpo", "flips": FLIPS},
    "cDPO": {"loss": "cdpo", "flip_rate": FLIPS, "flips": FLIPS},
    "rDPO": {"loss": "rdpo", "flip_rate": FLIPS, "flips": FLIPS},
    "Adaptive, std": {"loss": "adaptive_dpo", "stability": "std", "flips": FLIPS},
    "Adaptive, none": {"loss": "adaptive_dpo", "stability": "none", "flips": FLIPS},
    "alpha-DPO": {"loss": "alpha_dpo", "flips": FLIPS},
}
SOFT: dict[str, Any] = {"kappa": 20.0, "learning_rate": 5e-5}
"""With which logits stay near 1 here: s is about 0.05 between two backgrounds."""
SOFTLY = ("DPO, no flips", "DPO", "rDPO", "Adaptive, none")
ARMS |= {f"{arm}, kappa 20": {**ARMS[arm], **SOFT} for arm in SOFTLY}
FEWER = {"cDPO": (0,), "alpha-DPO": (0,)}
SETTINGS: dict[str, Any] = {
    "data": "t2i-64",
    "assets": asset_digests("model/unet", "model/vae", "model/text_encoder"),
    "pairs": 1024,
    "temperature": 0.1,
    "max_steps": 60,
    "batch_size": 16,
    "kappa": 200.0,
    "learning_rate": 1e-4,
    "warmup_steps": 6,
}
SCORING: dict[str, Any] = {
    "assets": asset_digests("features"),
    "samples": 128,
    "steps": 20,
    "judged_pairs": 384,
}
BATCH = 32


def redness(images: Tensor) -> Tensor:
    """The reward, (n,): mean R - (G + B) / 2 of pixels (n, 3, H, W) in [0, 1]; in [-1, 1]."""
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def bare(caption: str) -> str:
    """A caption without its background."""
    return ", ".join(part for part in caption.split(", ") if not part.endswith("background"))


# -- pairs --------------------------------------------------------------------------------------


def rows_of_pairs(data: Path, settings: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """The table of pairs: two pictures of one concept and style, their rewards and a label.

    Labels are drawn at addresses of the pair, so that sets with more flips hold those of sets with
    fewer.
    """
    images, rows = read_pictures(data)
    rewards = redness((images + 1) / 2).tolist()
    groups: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((name_of(row), row["style"]), []).append(number)
    every = [pair for members in groups.values() for pair in combinations(members, 2)]
    table = []
    for place in permutation(len(every), seed, "preference pairs")[: settings["pairs"]].tolist():
        i, j = every[place]
        chance = torch.tensor((rewards[i] - rewards[j]) / settings["temperature"]).sigmoid()
        first = bool(uniform((), seed, place, "preference label") < chance)
        flipped = bool(uniform((), seed, place, "preference flip") < settings["flips"])
        row = {"image_0": rows[i]["file_name"], "image_1": rows[j]["file_name"]}
        row |= {"label_0": float(first != flipped), "text": bare(rows[i]["text"][0])}
        row |= {"reward_0": rewards[i], "reward_1": rewards[j], "flipped": flipped}
        table.append(row)
    return table


def pair_folder(folder: Path, data: Path, settings: Mapping[str, Any], seed: int) -> Path:
    """A folder of the pairs, made if it is not there yet; its pictures are links."""
    with claim(folder, wait=True):
        if not folder.is_dir():
            write_pairs(folder, data, rows_of_pairs(data, settings, seed))
    return folder


def write_pairs(folder: Path, data: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """The folder with links to the pictures of the table."""
    with atomic_directory(folder, overwrite=True) as new:
        for name in {row[key] for row in table for key in ("image_0", "image_1")}:
            (new / name).symlink_to((data / name).resolve())
        append_jsonl(new / "metadata.jsonl", *table)


# -- training -----------------------------------------------------------------------------------


def configuration(cell: Cell, data: Path) -> PreferenceTraining:
    """The run of a cell."""
    settings = cell.settings
    chosen = {key: settings[key] for key in ("data", "pairs", "temperature", "flips", "seed")}
    pairs = cell.work.parent / f"pairs-{digest(chosen)}"
    adaptive = AdaptiveConfig()
    if "stability" in settings:
        adaptive = AdaptiveConfig(stability=settings["stability"])
    return PreferenceTraining(
        data=str(pair_folder(pairs, data, settings, cell.seed)),
        output=cell.work / "run",
        model=str(ASSETS / "model"),
        seed=cell.seed,
        max_steps=settings["max_steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
        lora_rank=settings.get("lora_rank"),
        cache_latents=True,
        cache_embeddings=True,
        cache=cell.work.parent / "cache",
        workers=1,
        checkpoint_every=20,
        keep=1,
        tracker="none",
        preference=PreferenceConfig(
            loss=settings["loss"],
            kappa=settings["kappa"],
            flip_rate=settings.get("flip_rate"),
            drift_limit=None,
        ),
        adaptive=adaptive,
    )


def finished(config: PreferenceTraining) -> PreferenceObjective:
    """The objective of a finished run as it was at its end."""
    accelerator, folder = make_accelerator(config), RunFolder(config)
    try:
        model = build_model(config)
        data = build_data(config, model)
        objective = build_objective(config, model)
        fill_caches(config, folder, model, data, accelerator)
        silent = partial(make_tracker, "none", folder.path, config={})
        Trainer(
            objective, data, config, accelerator, folder, silent, data_identity=data.fingerprint()
        ).resume()
    finally:
        release_accelerator(accelerator)
    assert isinstance(objective, PreferenceObjective)
    return objective


# -- measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def sampled(model: LatentDiffusion, captions: Sequence[str], steps: int, seed: int) -> Tensor:
    """Pictures (n, 3, H, W) in [-1, 1] without guidance; noise i is at an address of the seed."""
    size = model.default_size
    shape = model.latent_shape(size, size)
    model.denoiser.eval()
    images = []
    for start in range(0, len(captions), BATCH):
        texts = captions[start : start + BATCH]
        places = range(start, start + len(texts))
        noise = torch.stack([normal(shape, seed, place, "preference sample") for place in places])
        cond = model.conditioner.encode(texts, (size, size))
        latents = sample(model.denoiser, noise, cond, steps=steps)
        images.append(model.codec.decode(latents).clamp(-1, 1))
    return torch.cat(images)


def picture_scores(
    model: LatentDiffusion, data: Path, scoring: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Redness of samples, and the share of them that still show the concept of their caption."""
    pairs = read_pairs(data, False)
    chosen = [pairs[i * len(pairs) // scoring["samples"]] for i in range(scoring["samples"])]
    captions = [bare(pair.caption) for pair in chosen]
    images = sampled(model, captions, scoring["steps"], seed)
    network = FeatureNetwork.load(FEATURES)
    concepts = sorted({pair.concept for pair in pairs})
    with torch.no_grad():
        logits = network.classify(images)["concept"][:, network.concept_indices(concepts)]
    truth = torch.tensor([concepts.index(pair.concept) for pair in chosen])
    rewards = redness((images + 1) / 2)
    return {
        "n": len(chosen),
        "reward": float(rewards.mean()),
        "concept": float((logits.argmax(1) == truth).float().mean()),
    }


def run_scores(config: PreferenceTraining) -> dict[str, float]:
    """What the last quarter of a run logged, on average."""
    rows = read_jsonl(RunFolder(config).metrics)[-max(1, config.max_steps // 4) :]
    names = ("accuracy", "winner_drift", "win_rate", "weight")
    return {name: sum(row[name] for row in rows) / len(rows) for name in names if name in rows[-1]}


def unseen_pairs(config: PreferenceTraining, data: Path, cell: Cell, count: int) -> PreferenceData:
    """The `count` pairs that come after those of the run, labelled alike."""
    more = {**cell.settings, "pairs": cell.settings["pairs"] + count}
    table = rows_of_pairs(data, more, cell.seed)[-count:]
    folder = cell.work / "unseen"
    write_pairs(folder, data, table)
    found = build_data(replace(config, data=str(folder)), LatentDiffusion.load(ASSETS / "model"))
    assert isinstance(found, PreferenceData)
    return found


def detection(objective: PreferenceObjective, data: PreferenceData, count: int) -> float:
    """Area under the curve of u for labels that were turned round, over `count` pairs."""
    flipped: list[bool] = []
    doubts: list[Tensor] = []
    step = 0
    while len(flipped) < count:
        batch = data.batch(step)
        doubts.append(objective.minority(batch))
        flipped += [bool(extras["flipped"]) for extras in batch.winners.extras]
        step += 1
    u, wrong = torch.cat(doubts), torch.tensor(flipped)
    area = mannwhitneyu(u[wrong].numpy(), u[~wrong].numpy()).statistic
    return float(area) / (int(wrong.sum()) * int((~wrong).sum()))


def run(cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    return measured(cell, pictures())


def measured(cell: Cell, data: Path) -> dict[str, Any]:
    """The numbers of a cell; `data` are the emoji pictures."""
    if cell.settings["loss"] is None:
        return picture_scores(LatentDiffusion.load(ASSETS / "model"), data, cell.scoring, cell.seed)
    config = configuration(cell, data)
    with claim(Path(config.output), wait=True):
        code = train(config)
    if code == INTERRUPTED:
        raise Interrupted
    if code:
        raise RunFailed(f"{config.output}: the training ended with code {code}.")
    objective = finished(config)
    values = picture_scores(objective.model, data, cell.scoring, cell.seed) | run_scores(config)
    if config.preference.adaptive:
        count = cell.scoring["judged_pairs"]
        unseen = unseen_pairs(config, data, cell, count)
        values["detection"] = detection(objective, unseen, count)
    return values


# -- telling ------------------------------------------------------------------------------------

CLEAN = "DPO, no flips"
CLEANS = tuple(arm for arm, values in ARMS.items() if values.get("flips") == 0)
MEASURES = (
    Measure("reward", "redness of samples", ".4f"),
    Measure("concept", "concept, by the feature network", ".1%"),
)
FLIPPED = tuple(arm for arm, values in ARMS.items() if values.get("flips") == FLIPS)


def text(results: Results) -> str:
    """DPO's gain from right labels, then what is left of it when some are wrong."""
    known = next(iter(results.values.values()))
    settings = EXPERIMENT.settings
    lines = [
        f"The embedded model, all weights, {settings['max_steps']} steps of "
        f"{settings['batch_size']} pairs out of {settings['pairs']}, kappa "
        f"{settings['kappa']:g}, learning rate {settings['learning_rate']:g}. A pair is one emoji "
        "on two backgrounds, its caption names none; the redder one is preferred with the odds of "
        f"Bradley and Terry at temperature {settings['temperature']:g}. Arms of one seed share "
        f"pairs, their order, noise and times. Redness, mean R - (G + B) / 2, of {known['n']} "
        f"samples (DDIM, {SCORING['steps']} steps, no guidance, the same noise for all arms); "
        "t-interval of the differences, paired by seed.",
        "",
        *contrast_table(results, CLEAN, "base", MEASURES),
        "",
        f"With {FLIPS:.0%} of the labels turned round. The gain is that over the base; accuracy, "
        "drift (winners' error over the base's) and weight are those of the last quarter of the "
        "steps, against the labels that the run was given; AUC is that of u for the labels that "
        f"were turned round, over {SCORING['judged_pairs']} pairs that no step has seen. cDPO and "
        "rDPO are told the true share of wrong labels.",
        "",
        "| arm | seeds | gain in redness, 95 % interval | of DPO's without flips | concept | "
        "accuracy | winners' drift | weight | AUC |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [line for arm in FLIPPED if (line := row_of(results, arm))]
    lines += [
        "",
        f"Arms of kappa {SOFT['kappa']:g} have that and the rate {SOFT['learning_rate']:g}: with "
        "the kappa of the others logits pass 20, so that all that is left of the gradient is that "
        "of pairs whose label the model contradicts, and these are the wrong ones. Without flips, "
        f"at kappa {SOFT['kappa']:g}:",
        "",
        *contrast_table(results, clean_of(FLIPPED[-1]), "base", MEASURES),
    ]
    return "\n".join(lines)


def clean_of(arm: str) -> str:
    """The arm without wrong labels that goes with one: of the same kappa."""
    return next(name for name in CLEANS if ARMS[name].get("kappa") == ARMS[arm].get("kappa"))


def row_of(results: Results, arm: str) -> str:
    """One arm with wrong labels; empty without results."""
    seeds = results.seeds(arm, "base")
    if not seeds:
        return ""
    gain = paired_difference(*(results.column(a, "reward", seeds) for a in (arm, "base")))
    both = results.seeds(arm, "base", clean_of(arm))
    rewards = [results.column(a, "reward", both) for a in (arm, "base", clean_of(arm))]
    share = "-"
    if both:
        own, base, clean = (sum(column) / len(both) for column in rewards)
        share = f"{(own - base) / (clean - base):.0%}"
    cells = [arm, str(len(seeds)), interval_text(gain, ".4f"), share]
    forms = {"concept": ".1%", "accuracy": ".1%", "winner_drift": ".3f", "weight": ".2f"}
    for name, form in (forms | {"detection": ".3f"}).items():
        found = [values[name] for s in seeds if name in (values := results.values[arm, s])]
        cells.append(format(sum(found) / len(found), form) if found else "-")
    return f"| {' | '.join(cells)} |"


def draw(results: Results, figure: Figure) -> None:
    """Gain in redness and in implicit accuracy of every arm, a mark a seed; AUC of u."""
    trained = [arm for arm in ARMS if arm != "base" and results.seeds(arm, "base")]
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    heads = ("gain in redness over the base", "implicit accuracy", "AUC of u for turned labels")
    for panel, name, head in zip(panels, ("reward", "accuracy", "detection"), heads, strict=True):
        for row, arm in enumerate(trained):
            for seed in results.seeds(arm, "base"):
                values = results.values[arm, seed]
                if name in values:
                    base = results.values["base", seed]["reward"] if name == "reward" else 0.0
                    colour = "tab:green" if arm in CLEANS else "tab:blue"
                    panel.scatter([values[name] - base], [row], color=colour, s=18, alpha=0.8)
        panel.axvline(0.0 if name == "reward" else 0.5, color="black", linewidth=0.8)
        panel.set(xlabel=head)
        panel.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(trained)), trained)
    panels[0].invert_yaxis()


EXPERIMENT = Experiment(
    name="preference",
    title="Preferences with wrong labels",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=text,
    draw=draw,
    fewer=FEWER,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
