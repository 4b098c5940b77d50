"""Fixtures of the tests of protection: tiny models, loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffkit.models.latent_diffusion import LatentDiffusion

Loader = Callable[[str], LatentDiffusion]


@pytest.fixture(scope="session")
def tiny_model(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Loader:
    """Name of a tiny model -> the model, loaded once; an attack leaves it as it was.

    Names: those of `tiny_folder`, and "inpaint", Stable Diffusion with 2C + 1 channels.
    """
    from tests.protection.attacks import build_inpaint

    loaded: dict[str, LatentDiffusion] = {}

    def load(name: str) -> LatentDiffusion:
        if name not in loaded:
            if name == "inpaint":
                folder = build_inpaint(tiny_folder("sd"), tmp_path_factory.mktemp("inpaint"))
            else:
                folder = tiny_folder(name)
            loaded[name] = LatentDiffusion.load(folder)
        return loaded[name]

    return load
