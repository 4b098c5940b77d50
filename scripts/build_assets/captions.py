"""Captioned picture folders for text-to-image training, made from the rendered emoji.

Every concept of the list x 4 styles x 8 backgrounds. One (concept, style) pair in each four
consecutive concepts is written to a held-out folder and to no training folder.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from common import BACKGROUNDS, STYLES, composite, read_json, stable_fraction
from PIL import Image

CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
SIZES = (64, 128)
"""Numbers of concepts of the nested sets."""


def read_concepts(path: Path = CONCEPTS_FILE) -> dict[str, list[str]]:
    """Concept id -> other words for it, in the order of the file."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition(":") for line in lines if line and not line.startswith("#")]
    return {
        concept.strip(): [word.strip() for word in words.split(",") if word.strip()]
        for concept, _, words in pairs
    }


def heldout_pairs(concepts: list[str]) -> set[tuple[str, str]]:
    """One (concept, style) pair in each full four concepts, the styles taking turns.

    A longer list that begins with a shorter one holds out the pairs of the shorter one too.
    """
    pairs = set()
    for group in range(len(concepts) // 4):
        four = concepts[4 * group : 4 * group + 4]
        pairs.add((min(four, key=stable_fraction), STYLES[group % len(STYLES)]))
    return pairs


def captions(name: str, words: list[str], style: str, background: str) -> list[str]:
    """Caption variants, the canonical one first, then other words, then one other order."""
    main, *others = [f"{noun}, {style} style, {background} background" for noun in (name, *words)]
    return [main, *others, f"{name}, {background} background, {style} style"]


def write_folders(emoji: Path, count: int) -> tuple[int, int]:
    """Write `t2i-COUNT` and `t2i-COUNT-heldout` beside `rgba.npy`; return their row counts."""
    words = read_concepts()
    chosen = list(words)[:count]
    held = heldout_pairs(chosen)
    index = {entry["id"]: (i, entry) for i, entry in enumerate(read_json(emoji / "concepts.json"))}
    rgba = np.load(emoji / "rgba.npy", mmap_mode="r")
    rows: dict[str, list[dict[str, Any]]] = {f"t2i-{count}": [], f"t2i-{count}-heldout": []}
    for folder in rows:
        shutil.rmtree(emoji / f"{folder}.partial", ignore_errors=True)
        (emoji / f"{folder}.partial").mkdir()
    for concept in chosen:
        position, entry = index[concept]
        for s, style in enumerate(STYLES):
            folder = f"t2i-{count}-heldout" if (concept, style) in held else f"t2i-{count}"
            for background, rgb in BACKGROUNDS.items():
                name = f"{concept}-{style}-{background}.png".replace(" ", "-").replace("_", "-")
                picture = Image.fromarray(composite(rgba[position, s], rgb))
                picture.save(emoji / f"{folder}.partial" / name)
                rows[folder].append(
                    {
                        "file_name": name,
                        "text": captions(entry["name"], words[concept], style, background),
                        "concept": concept,
                        "style": style,
                        "background": background,
                    }
                )
    for folder, entries in rows.items():
        publish(emoji / f"{folder}.partial", emoji / folder, entries)
    return len(rows[f"t2i-{count}"]), len(rows[f"t2i-{count}-heldout"])


def publish(partial: Path, folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write the metadata of a finished folder, then give the folder its name."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    (partial / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
