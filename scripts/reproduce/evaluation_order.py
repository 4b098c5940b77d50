"""`diffkit evaluate` recovers the order of models whose quality is known.

    python scripts/reproduce/evaluation_order.py --jobs 2

The models are the embedded U-Net after 10 %, 50 % and 100 % of a short training, which
`loss_weighting.py` makes (its uniform arm; it is trained here if it was not yet), each against the
one before; the embedded model against itself; and with 4 sampling steps against its 25.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import loss_weighting
from runner.experiment import Cell, Experiment, Results, digest
from runner.inputs import ASSETS, asset_digests, pictures
from runner.main import main
from runner.work import INTERRUPTED, Interrupted

from diffkit.cli import main as diffkit
from diffkit.errors import RunFailed
from diffkit.files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINED = {"loss_weighting": digest(loss_weighting.SETTINGS)}
EMBEDDED = asset_digests("model/unet", "model/vae", "model/text_encoder")
ARMS: dict[str, dict[str, Any]] = {
    "half-against-tenth": {"model": 320, "against": 64, "assets": TRAINED},
    "whole-against-half": {"model": 640, "against": 320, "assets": TRAINED},
    "itself": {"model": "embedded", "against": "embedded", "assets": EMBEDDED},
    "four-steps": {"model": "embedded", "against": "embedded", "steps": 4, "assets": EMBEDDED},
}
LABELS = {
    "half-against-tenth": "50 % against 10 %",
    "whole-against-half": "100 % against 50 %",
    "itself": "embedded against itself",
    "four-steps": "4 steps against 25",
}
EXPECTED = {"half-against-tenth": 1, "whole-against-half": 1, "itself": 0, "four-steps": -1}
"""Whether the model is better than its baseline (1), as good (0), or worse (-1)."""

SETTINGS: dict[str, Any] = {"data": "t2i-64", "num": 96, "steps": 25, "guidance": 2.0}
SCORING: dict[str, Any] = {
    "assets": asset_digests("features", "scorer"),
    "metrics": ["frechet", "kernel", "precision", "density", "alignment", "concept"],
}
FORMS = {
    "frechet": ".2f",
    "kernel": ".4f",
    "precision": ".3f",
    "density": ".3f",
    "alignment": ".3f",
    "concept": ".1%",
}


def command(cell: Cell, folders: dict[int, str], data: str) -> list[str]:
    """The words of the `diffkit evaluate` that makes a cell.

    Arguments:
        folders: number of training steps -> model folder.
        data: folder of the training pictures.
    """
    settings = cell.settings
    embedded = str(ASSETS / "model")
    model, against = (folders.get(settings[name], embedded) for name in ("model", "against"))
    words: dict[str, Any] = {
        "against": against,
        "data": data,
        "num": settings["num"],
        "per-prompt": 1,
        "steps": settings["steps"],
        "against-steps": SETTINGS["steps"],
        "guidance": settings["guidance"],
        "seed": 1000 * cell.seed,  # picture i has seed + i, so seeds share no noise
        "batch-size": 32,
        "device": "cpu",
        "output": cell.work / "evaluation",
    }
    flags = [text for key, value in words.items() for text in (f"--{key}", str(value))]
    return ["evaluate", model, *flags, "--metrics", *cell.scoring["metrics"]]


def run(cell: Cell) -> dict[str, Any]:
    """Evaluate one pair; metric -> values of both, their difference and its interval."""
    data, folders = pictures(), {}
    if cell.settings["model"] != "embedded":
        made = loss_weighting.train(loss_weighting.EXPERIMENT.cell("uniform", cell.seed), data)
        folders = dict(zip(loss_weighting.STAGES, map(str, made), strict=True))
    code = diffkit(command(cell, folders, str(data)))
    if code == INTERRUPTED:
        raise Interrupted
    if code:
        raise RunFailed(f"diffkit evaluate ended with code {code}; see above.")
    return values(read_json(cell.work / "evaluation" / "report.json"))


def values(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report."""
    return {
        metric["name"]: {
            "label": metric["label"],
            "better": metric["better"],
            "n": metric["n"],
            "model": metric["values"]["model"]["value"],
            "against": metric["values"]["against"]["value"],
            **{f"difference_{key}": value for key, value in metric["difference"].items()},
        }
        for metric in report["metrics"]
    }


def verdict(value: dict[str, Any]) -> int:
    """1, 0 or -1: better, not told apart, worse, by the interval of the difference."""
    sign = 1 if value["better"] == "higher" else -1
    if value["difference_low"] > 0:
        return sign
    return -sign if value["difference_high"] < 0 else 0


def text(results: Results) -> str:
    """The claim and a table of verdicts."""
    lines = [
        f"`diffkit evaluate` with {SETTINGS['num']} captions, one picture each from the same noise "
        f"for both models, {SETTINGS['steps']} steps, guidance {SETTINGS['guidance']:g}: the "
        "difference model - baseline (mean over the seeds), and for how many seeds its own 95 % "
        "interval (bootstrap over captions) says what is known: better, no difference, worse.",
        "",
        "| metric | " + " | ".join(LABELS.values()) + " |",
        "| --- |" + " --- |" * len(LABELS),
    ]
    label = {}
    for (_, _), metrics in sorted(results.values.items()):
        label |= {name: f"{value['label']}, {value['better']}" for name, value in metrics.items()}
    for name, form in FORMS.items():
        cells = [told(results, arm, name, form) for arm in ARMS]
        lines.append(f"| {label[name]} is better | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(results: Results, arm: str, metric: str, form: str) -> str:
    """`-12.34 (3 of 3)`."""
    found = results.column(arm, metric, results.seeds(arm))
    if not found:
        return ""
    right = sum(verdict(value) == EXPECTED[arm] for value in found)
    mean = sum(value["difference_value"] for value in found) / len(found)
    return f"{format(mean, f'+{form}')} ({right} of {len(found)})"


def draw(results: Results, figure: Figure) -> None:
    """The difference of each metric with its interval, a mark for each arm and seed."""
    panels = figure.subplots(1, len(FORMS), sharey=True)
    for panel, name in zip(panels, FORMS, strict=True):
        for row, arm in enumerate(ARMS):
            for k, value in enumerate(results.column(arm, name, results.seeds(arm))):
                low, mid, high = (value[f"difference_{key}"] for key in ("low", "value", "high"))
                right = verdict(value) == EXPECTED[arm]
                panel.plot([low, high], [row + 0.2 * (k - 1)] * 2, color="tab:gray", zorder=1)
                colour = "tab:green" if right else "tab:red"
                panel.scatter([mid], [row + 0.2 * (k - 1)], color=colour, s=14, zorder=2)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(title=name, xlabel="difference")
        panel.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(ARMS)), list(LABELS.values()))
    panels[0].invert_yaxis()


EXPERIMENT = Experiment(
    name="evaluation_order",
    title="Evaluation recovers a known order of models",
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
