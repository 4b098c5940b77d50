"""Fixtures of the whole suite: offline, single-threaded, tiny models of the true classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a tiny model -> its diffusers folder, built once.

    Names: `tests.tiny.BUILDERS`, and `tests.tiny_labels.BUILDERS` for models without text and EDM.
    """
    from tests import tiny, tiny_labels

    builders = tiny.BUILDERS | tiny_labels.BUILDERS
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            builders[name](root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def tiny_sd(tiny_folder: Callable[[str], Path]) -> Path:
    """Folder of a tiny Stable Diffusion 1 (epsilon)."""
    return tiny_folder("sd")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_folder: Callable[[str], Path]) -> Path:
    """Folder of a tiny Stable Diffusion XL."""
    return tiny_folder("sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tiny_folder: Callable[[str], Path]) -> Path:
    """Folder of a tiny Stable Diffusion 3."""
    return tiny_folder("sd3")
