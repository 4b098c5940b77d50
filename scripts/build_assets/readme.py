"""Write the embedded model's part of README.md: `python scripts/build_assets/readme.py`.

Draws one picture for each of 64 captions through `diffkit generate`'s own engine, saves the contact
sheet to `assets/contact_sheet.png`, and fills the text between the markers from the committed
`assets/gates.json`, which `gates.py` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffkit.files import atomic_write, read_json
from diffkit.generation.card import read_card

BEGIN, END = "<!-- embedded:begin -->", "<!-- embedded:end -->"
ROWS = (
    ("concept, by the feature network", "concept"),
    ("concept in its top 5", "concept_top5"),
    ("concept, by the nearest real picture", "concept_nearest"),
    ("style, by the feature network", "style"),
    ("background colour", "background"),
)


def section(gates: dict[str, Any], card_steps: int) -> str:
    """Markdown of the contact sheet and the scores."""
    trained, heldout = gates["trained_pairs"], gates["heldout_pairs"]
    lines = [
        BEGIN,
        "![64 captions, one picture each](assets/contact_sheet.png)",
        "",
        f"One picture for each of 64 captions, {card_steps} steps, guidance "
        f"{gates['guidance_scale']:g}. Scores over {gates['samples_per_caption']} samples a caption "
        f"(n = {trained['n']} on pairs of concept and style that were trained on, n = "
        f"{heldout['n']} on pairs held out of training), printed by "
        "`python scripts/build_assets/gates.py`:",
        "",
        "| the picture shows its caption's | trained pairs | held-out pairs |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {trained[key]:.1%} | {heldout[key]:.1%} |" for name, key in ROWS]
    return "\n".join([*lines, "", gates["note"], END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=Path, default=Path("assets/gates.json"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    text = args.readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    part = section(read_json(args.gates), read_card("embedded").steps)
    with atomic_write(args.readme, "w") as file:
        file.write(before + part + after)


if __name__ == "__main__":
    main()
