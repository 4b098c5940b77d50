"""A folder of fourteen pictures, two captions each."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(14):
            pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            row = {"file_name": f"{i}.png", "text": [f"picture {i}", f"image {i}"]}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def command(pictures, tmp_path, tiny_folder):
    """`command(*words)` runs `diffkit train denoising` on the tiny v-prediction model."""
    from diffkit.cli import main

    def run(*words, model="sd-v", output=None, data=None):
        flags = ["--model", str(tiny_folder(model)), "--data", str(data or pictures)]
        flags += ["--output", str(output or tmp_path / "out"), "--tracker", "none"]
        flags += ["--max-steps", "6", "--batch-size", "2", "--learning-rate", "1e-3"]
        flags += ["--checkpoint-every", "3"]
        return main(["train", "denoising", *flags, *map(str, words)])

    return run
