"""Fetch four emoji sets and render every concept they share to 64x64 RGBA.

    python scripts/build_assets/emoji.py --output .build/emoji

Writes `rgba.npy` (uint8, concepts x styles x 64 x 64 x 4, straight alpha), `concepts.json`, and the
captioned folders `t2i-64` and `t2i-128` with their held-out (concept, style) pairs.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from captions import SIZES, write_folders
from common import SIZE, STYLES, read_json, stable_fraction
from numpy.typing import NDArray
from PIL import Image

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent 3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "names": "unicode-emoji-json@0.9.0",
    "keywords": "emojilib@4.0.3",
}
SKIPPED_GROUPS = {"Flags", "People & Body"}
VAE_HELDOUT_FRACTION = 0.1


def fetch(package: str, folder: Path) -> Path:
    """Download one pinned npm package with `npm pack`; return the folder it is unpacked in."""
    name, version = package.removeprefix("@").replace("/", "-").rsplit("@", 1)
    target = folder / f"{name}-{version}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
        with tarfile.open(folder / f"{name}-{version}.tgz") as archive:
            archive.extractall(folder / "unpacking", filter="data")
        (folder / "unpacking" / "package").rename(target)
    return target


def code_points(char: str) -> str:
    """`"❤️"` -> `"2764"`: hexadecimal code points without variation selectors."""
    return "-".join(f"{ord(c):04x}" for c in char if c != "\ufe0f")


class IconifySet:
    """One iconify-json package: SVG bodies found by code points."""

    def __init__(self, folder: Path) -> None:
        self.names = {
            key.replace("-fe0f", ""): name for key, name in read_json(folder / "chars.json").items()
        }
        self.data = read_json(folder / "icons.json")

    def __contains__(self, key: str) -> bool:
        return key in self.names

    def render(self, key: str) -> NDArray[np.uint8]:
        """The picture of some code points, shape (64, 64, 4)."""
        return self.render_icon(self.names[key])

    def render_icon(self, name: str) -> NDArray[np.uint8]:
        """One picture by its name in the package, shape (64, 64, 4)."""
        flip = False
        while name in self.data.get("aliases", {}):
            alias = self.data["aliases"][name]
            name, flip = alias["parent"], flip != alias.get("hFlip", False)
        icon = self.data["icons"][name]
        width = icon.get("width", self.data["width"])
        height = icon.get("height", self.data["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg, width=SIZE, height=SIZE, skip_system_fonts=True))
        picture = square(Image.open(io.BytesIO(png)))
        return picture[:, ::-1] if flip else picture


class PictureSet:
    """The 3d package: one WebP file per code point sequence."""

    def __init__(self, folder: Path) -> None:
        self.paths = {
            path.stem.replace("-fe0f", ""): path for path in (folder / "assets").glob("*.webp")
        }

    def __contains__(self, key: str) -> bool:
        return key in self.paths

    def render(self, key: str) -> NDArray[np.uint8]:
        """One picture, shape (64, 64, 4)."""
        return square(Image.open(self.paths[key]))


def square(image: Image.Image) -> NDArray[np.uint8]:
    """Straight-alpha 64x64 RGBA; resized with premultiplied alpha so that edges do not darken."""
    if image.size != (SIZE, SIZE):
        image = image.convert("RGBA").convert("RGBa")
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGBA"))


def shared_concepts(
    names: dict[str, Any], keywords: dict[str, list[str]], sets: list[IconifySet | PictureSet]
) -> list[dict[str, Any]]:
    """The concepts that every set draws, in Unicode order, without flags and people."""
    concepts = []
    for char, entry in names.items():
        key = code_points(char)
        if entry["group"] in SKIPPED_GROUPS or not all(key in one for one in sets):
            continue
        concepts.append(
            {
                "id": entry["slug"],
                "char": char,
                "name": entry["name"],
                "keywords": [word.replace("_", " ") for word in keywords.get(char, [])],
                "group": entry["group"],
                "vae_heldout": stable_fraction(entry["slug"]) < VAE_HELDOUT_FRACTION,
            }
        )
    return concepts


def render_all(
    concepts: list[dict[str, Any]], sets: list[IconifySet | PictureSet]
) -> NDArray[np.uint8]:
    """Every concept in every style, shape (concepts, styles, 64, 64, 4)."""

    def one(concept: dict[str, Any]) -> NDArray[np.uint8]:
        return np.stack([each.render(code_points(concept["char"])) for each in sets])

    with ThreadPoolExecutor(4) as pool:
        return np.stack(list(pool.map(one, concepts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(".build/emoji"))
    args = parser.parse_args()
    folders = {key: fetch(package, args.output / "npm") for key, package in PACKAGES.items()}
    sets: list[IconifySet | PictureSet] = [
        PictureSet(folders[style]) if style == "fluent 3d" else IconifySet(folders[style])
        for style in STYLES
    ]
    names = read_json(folders["names"] / "data-by-emoji.json")
    keywords = read_json(folders["keywords"] / "dist" / "emoji-en-US.json")
    concepts = shared_concepts(names, keywords, sets)
    np.save(args.output / "rgba.npy", render_all(concepts, sets))
    text = json.dumps(concepts, ensure_ascii=False, indent=1)
    (args.output / "concepts.json").write_text(text, encoding="utf-8")
    heldout = sum(concept["vae_heldout"] for concept in concepts)
    print(f"{len(concepts)} concepts x {len(STYLES)} styles, {heldout} concepts held out")
    for count in SIZES:
        training, held = write_folders(args.output, count)
        print(f"t2i-{count}: {training} training and {held} held-out pictures")


if __name__ == "__main__":
    main()
