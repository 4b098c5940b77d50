"""What the experiments start from: the emoji pictures, and the embedded model before training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gates import name_of, read_pairs, read_pictures
from untrained import assemble

from diffkit.errors import RunFailed
from diffkit.files import sha256
from diffkit.models.latent_diffusion import LatentDiffusion
from runner import ROOT
from runner.work import claim

__all__ = [
    "ASSETS",
    "FEATURES",
    "asset_digests",
    "name_of",
    "pictures",
    "read_pairs",
    "read_pictures",
    "untrained_model",
]

ASSETS = ROOT / "assets"
FEATURES = ASSETS / "features"
EMOJI = Path(".build/emoji")


def asset_digests(*folders: str) -> dict[str, str]:
    """Folder below `assets/` -> 12 hexadecimal digits of its weights."""
    return {
        folder: sha256(next((ASSETS / folder).glob("*.safetensors")))[:12] for folder in folders
    }


def pictures(folder: Path = EMOJI) -> Path:
    """The training folder of 64 concepts, fetched and rendered if it is not there yet.

    Its held-out pairs lie beside it with the suffix `-heldout`. Raises `RunFailed` when the
    pictures cannot be made: it takes npm and a network.
    """
    target = folder / "t2i-64"
    with claim(folder, wait=True):
        if not target.is_dir():
            script = ROOT / "scripts" / "build_assets" / "emoji.py"
            command = [sys.executable, str(script), "--output", str(folder)]
            if subprocess.run(command).returncode:
                raise RunFailed(f"{folder}: the emoji pictures could not be fetched; see above.")
    return target


def untrained_model(folder: Path, seed: int) -> Path:
    """A folder with the embedded model's architecture, VAE and text encoder, and a U-Net at the
    random start that `seed` gives.
    """
    with claim(folder, wait=True):
        if not folder.is_dir():
            embedded = ASSETS / "model"
            LatentDiffusion(assemble(embedded / "vae", embedded, seed)).save(folder)
    return folder
