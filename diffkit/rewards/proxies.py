"""Latent proxy rewards made anew for a model, and read from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffkit.errors import UserError
from diffkit.files import read_json
from diffkit.models.codec import Codec
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.loading import is_hub_id, quiet_libraries
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.randomness import address
from diffkit.rewards.latent_clip import LatentClip, LatentClipConfig, TextTower, Tower
from diffkit.rewards.proxy import LatentProxy
from diffkit.rewards.tap_proxy import TapProxy

__all__ = ["load_proxy", "load_text", "new_latent_clip", "new_tap_proxy"]

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose text tower the paper's proxy has."""


def new_tap_proxy(
    denoiser: Denoiser, cond: Conditioning, seed: int = 0, **options: Any
) -> TapProxy:
    """A head with initial weights of `seed` on a frozen teacher; see `TapProxy.on`."""
    with _drawn_from(seed):
        return TapProxy.on(denoiser, cond, **options)


def new_latent_clip(
    codec: Codec,
    side: int,
    text: str = CLIP_H,
    tower: Tower = "vit",
    seed: int = 0,
    **sizes: int,
) -> LatentClip:
    """An image tower with initial weights of `seed` beside a trained text tower; to be pretrained.

    Arguments:
        codec: whose latents it reads; their scale and shift are kept with it.
        side: of the latents. From 32 on the sizes are the paper's, below those of a small network.
        text: see `load_text`.
        sizes: `patch`, `width`, `layers`, in place of the usual ones.
    """
    usual = (
        {"patch": 4, "width": 512, "layers": 12}
        if side >= 32
        else {"patch": 2, "width": 128, "layers": 4}
    )
    scale, shift = codec.space()
    with _drawn_from(seed):
        towers = load_text(text)
    config = LatentClipConfig(
        channels=codec.channels,
        side=side,
        embedding_size=towers.projection.out_features,
        scale=scale,
        shift=shift,
        tower=tower,
        **(usual | sizes),
    )
    with _drawn_from(seed):
        return LatentClip(config, towers)


def load_text(source: str) -> TextTower:
    """A trained text tower: "embedded", or a folder or hub id of a CLIP of transformers.

    Raises `UserError` when it cannot be had, or is no CLIP.
    """
    if source == "embedded":
        from diffkit.assets import path

        scorer = TextImageScorer.load(path("scorer"))
        weight = scorer.tower.text_projection.weight.detach()
        return TextTower(scorer.text_encoder, scorer.tokenizer, weight)
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    if not Path(source).expanduser().is_dir() and not is_hub_id(source):
        raise UserError(f"{source}: give 'embedded', or a folder or hub id of a CLIP model.")
    try:
        with quiet_libraries():
            network, report = CLIPTextModelWithProjection.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: cannot be read as the text tower of a CLIP ({first})."
        ) from error
    if report["missing_keys"]:
        raise UserError(
            f"{source}: has no text tower of a CLIP; {report['missing_keys'][0]} lacks."
        )
    words = (
        network.config.vocab_size
    )  # transformers makes an empty tokenizer where files are absent
    if len(tokenizer) != words:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} words, the text tower {words}; a file "
            "may be missing."
        )
    return TextTower(network.text_model, tokenizer, network.text_projection.weight.detach())


def load_proxy(folder: str | os.PathLike[str], teacher: Callable[[], Denoiser]) -> LatentProxy:
    """The proxy of a folder that `LatentClip.save` or `TapProxy.save` wrote.

    Arguments:
        teacher: gives the frozen teacher, whose features a `TapProxy` reads; others do not ask.

    Raises `UserError` for another folder, and where files do not fit.
    """
    path = Path(folder).expanduser()
    file = path / "config.json"
    values = read_json(file) if file.is_file() else None
    with _drawn_from(0):  # initial weights, which those of the file replace
        if isinstance(values, dict) and "taps" in values:
            return TapProxy.load(path, teacher())
        if isinstance(values, dict) and "tower" in values:
            return LatentClip.load(path)
    raise UserError(f"{path}: is no latent proxy reward; `diffkit train proxy_reward` makes one.")


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Initial weights are functions of the seed; torch's own generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(address(seed, "proxy reward"))
        yield
