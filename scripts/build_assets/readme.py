"""Say what the embedded model is: `python scripts/build_assets/readme.py`.

Runs `diffkit generate` on 64 captions, one a concept, keeps its contact sheet as
`assets/contact_sheet.png`, fills the text between the markers of README.md from
`assets/gates.json`, which `gates.py` wrote, and writes the model card of `assets/model`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from common import STYLES
from gates import read_pairs

from diffkit.cli import main as diffkit
from diffkit.files import atomic_write, read_json
from diffkit.generation.card import read_card
from diffkit.models.model_card import ModelCard, write_model_card

SHEET = 64  # pictures on the contact sheet
BEGIN, END = "<!-- embedded:begin -->", "<!-- embedded:end -->"
ROWS = (
    ("concept, by the feature network", "concept"),
    ("concept in its top 5", "concept_top5"),
    ("concept, by the nearest real picture", "concept_nearest"),
    ("style, by the feature network", "style"),
    ("style, by the nearest real picture", "style_nearest"),
    ("background colour", "background"),
)


def captions(data: Path) -> list[str]:
    """One caption a concept, the styles in turn, of `SHEET` concepts spread over all."""
    by_concept: dict[str, dict[str, str]] = {}
    for pair in read_pairs(data, heldout=False):
        by_concept.setdefault(pair.concept, {})[pair.style] = pair.caption
    chosen = []
    concepts = list(by_concept.values())
    for i, styles in enumerate(concepts[:: max(1, len(concepts) // SHEET)][:SHEET]):
        turned = [STYLES[(i + k) % len(STYLES)] for k in range(len(STYLES))]
        chosen.append(next(styles[style] for style in turned if style in styles))
    return chosen


def draw_sheet(data: Path, work: Path, target: Path) -> None:
    """The contact sheet of `diffkit generate`, with the seeds 0, 1, 2 ..."""
    prompts = work.with_suffix(".txt")
    with atomic_write(prompts, "w") as file:
        file.write("\n".join(captions(data)) + "\n")
    words = ["generate", "--prompts", prompts, "--batch-size", 16, "--output", work, "--overwrite"]
    if code := diffkit([str(word) for word in words]):
        raise SystemExit(code)
    shutil.copyfile(work / "contact_sheet.png", target)


def model_card(gates: dict[str, Any]) -> ModelCard:
    """The card of the embedded model, with its scores."""
    scores = {
        f"{name}, {pairs} pairs": gates[f"{pairs}_pairs"][key]
        for pairs in ("trained", "heldout")
        for name, key in ROWS
    }
    return ModelCard(
        licence="apache-2.0",
        data=("Noto Emoji (Apache-2.0)", "Twemoji (CC BY 4.0)", "Fluent Emoji flat and 3D (MIT)"),
        objective="Trained from nothing by the scripts of scripts/build_assets, on a CPU: "
        "v-prediction with a uniform loss over time and zero terminal SNR, on renderings of four "
        "emoji sets over coloured backgrounds.",
        metrics={**scores, "samples a caption": gates["samples_per_caption"]},
    )


def section(gates: dict[str, Any], steps: int) -> str:
    """Markdown of the contact sheet and the scores."""
    trained, heldout = gates["trained_pairs"], gates["heldout_pairs"]
    lines = [
        BEGIN,
        "![64 captions, one picture each](assets/contact_sheet.png)",
        "",
        f"One picture for each of 64 captions, seeds 0 to 63, {steps} steps, guidance "
        f"{gates['guidance_scale']:g}. The scores below are over "
        f"{gates['samples_per_caption']} samples a caption: n = {trained['n']} on pairs of concept "
        f"and style that were trained on, n = {heldout['n']} on pairs held out of training. "
        "`python scripts/build_assets/gates.py` prints them.",
        "",
        "| the picture shows its caption's | trained pairs | held-out pairs |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {trained[key]:.1%} | {heldout[key]:.1%} |" for name, key in ROWS]
    return "\n".join([*lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".build/emoji/t2i-128"))
    parser.add_argument("--gates", type=Path, default=Path("assets/gates.json"))
    parser.add_argument("--work", type=Path, default=Path(".build/sheet"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    draw_sheet(args.data, args.work, args.gates.with_name("contact_sheet.png"))
    gates = read_json(args.gates)
    text = args.readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with atomic_write(args.readme, "w") as file:
        file.write(before + section(gates, read_card("embedded").steps) + after)
    folder = args.gates.with_name("model")
    write_model_card(folder, model_card(gates), "The embedded model of diffkit")


if __name__ == "__main__":
    main()
