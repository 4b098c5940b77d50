"""Render further drawings of the emoji's concepts, which only the feature network learns from.

    python scripts/build_assets/more_drawings.py --emoji .build/emoji

Writes `more.npy` (uint8, drawings x 64 x 64 x 4, straight alpha) and `more.json` (concept and set
of each) beside `rgba.npy`. No set here is drawn by the artists of another, but for noto v1, of
which no drawing is used whose concept has its noto drawing held out (see `features.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from common import read_json
from emoji import PACKAGES, IconifySet, code_points, fetch
from numpy.typing import NDArray

MORE_PACKAGES = {
    "noto v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
}
LICENCES = {"Apache-2.0", "CC-BY-4.0", "MIT"}
NAMED_BY_CHARACTER = ("noto", "twemoji", "fluent flat")
"""Sets that list the character of each icon, and so its names in other sets too."""


def letters(name: str) -> str:
    """Small letters and digits alone, so that `red-apple`, `red_apple`, `RED APPLE` agree."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def known_names(concept: dict[str, Any], sets: list[IconifySet]) -> list[str]:
    """What a concept is called: its name, its icons' names, and its characters' Unicode name."""
    key = code_points(concept["char"])
    names = [concept["name"], concept["id"], *(one.names[key] for one in sets)]
    if "-" not in key:
        names.append(unicodedata.name(chr(int(key, 16)), ""))
    # Older sets say "bear face" where the concept is now a "bear", and the reverse.
    plain = concept["name"].removesuffix(" face")
    names += [plain, f"{plain} face"]
    return list(dict.fromkeys(letters(name) for name in names if name))


def matches(concepts: list[dict[str, Any]], sets: list[IconifySet], icons: Any) -> dict[str, int]:
    """Icon name -> concept index for every icon whose name is that of one concept.

    A number after the name (`cactus-2`) marks a further drawing of the same thing, unless the
    whole name is a concept's own. Where two concepts claim a name, the one with the fewer other
    names before it has it.
    """
    owner: dict[str, tuple[int, int]] = {}
    for index, concept in enumerate(concepts):
        for rank, name in enumerate(known_names(concept, sets)):
            owner[name] = min(owner.get(name, (rank, index)), (rank, index))
    found: dict[str, int] = {}
    for icon in icons:
        for name in (letters(icon), letters(re.sub(r"-\d$", "", icon))):
            if name in owner:
                found[icon] = owner[name][1]
                break
    return found


def render_set(
    folder: Path, concepts: list[dict[str, Any]], sets: list[IconifySet]
) -> tuple[list[int], NDArray[np.uint8]]:
    """Concept indices and pictures (N, 64, 64, 4) of one package; each picture once.

    Raises `SystemExit` for a package whose licence is not in `LICENCES`.
    """
    licence = read_json(folder / "info.json")["license"]["spdx"]
    if licence not in LICENCES:
        raise SystemExit(f"{folder.name}: licence {licence} is none of {sorted(LICENCES)}")
    drawn = IconifySet(folder)
    everything = [*drawn.data["icons"], *drawn.data.get("aliases", {})]
    found = matches(concepts, sets, everything)
    drawings: dict[tuple[int, bytes], NDArray[np.uint8]] = {}
    for icon, concept in found.items():
        picture = drawn.render_icon(icon)
        drawings.setdefault((concept, picture.tobytes()), picture)
    return [concept for concept, _ in drawings], np.stack(list(drawings.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emoji", type=Path, default=Path(".build/emoji"))
    folder = parser.parse_args().emoji
    concepts = read_json(folder / "concepts.json")
    sets = [IconifySet(fetch(PACKAGES[style], folder / "npm")) for style in NAMED_BY_CHARACTER]
    rows: list[dict[str, Any]] = []
    pictures = []
    for name, package in MORE_PACKAGES.items():
        indices, drawn = render_set(fetch(package, folder / "npm"), concepts, sets)
        rows += [{"concept": concepts[index]["id"], "set": name} for index in indices]
        pictures.append(drawn)
        print(f"{name}: {len(drawn)} drawings of {len(set(indices))} concepts")
    np.save(folder / "more.npy", np.concatenate(pictures))
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
    (folder / "more.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
