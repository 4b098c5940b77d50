"""PickScore, a CLIP of transformers that was fitted to choices of people (Kirstain et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.models.clip import CLIP_RULE, prepare
from diffkit.models.loading import is_hub_id, quiet_libraries
from diffkit.rewards.base import Reward, frozen

__all__ = ["PickScoreReward", "load"]

REPOSITORY = "yuvalkirstain/PickScore_v1"


class PickScoreReward(Reward):
    """R = <f(x), g(c)> in [-1, 1]; its `logit_scale` makes log odds of it (arXiv 2305.01569).

    Arguments:
        model: a `CLIPModel`; its config says the sizes.
        tokenizer: the tokenizer that belongs to it.
    """

    name = "pickscore"
    label = "PickScore v1"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.logit_scale = float(model.logit_scale.exp())
        self._size = model.config.vision_config.image_size
        self.resize = (
            f"resized to {self._size}x{self._size} "
            "(bicubic, antialiased; shortest side, middle cropped)"
        )

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The CLIP model."""
        return (self.model,)

    def read(self, prompts: list[str]) -> Tensor:
        """Unit vectors (B, D)."""
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        features = self.model.get_text_features(**tokens).pooler_output
        return F.normalize(features.float(), dim=-1)

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """The cosine (B,)."""
        x = prepare(2 * pixels - 1, (self._size, self._size), CLIP_RULE).to(self.model.dtype)
        features = self.model.get_image_features(pixel_values=x).pooler_output
        return (F.normalize(features.float(), dim=-1) * embedded).sum(-1)


def load(place: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """The reward pickscore[:PLACE], a folder or hub id of a `CLIPModel` with its tokenizer.

    Raises `UserError` when it cannot be had, or weights or words are missing.
    """
    from transformers import CLIPModel, CLIPTokenizer

    source = place or REPOSITORY
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser())
    elif is_hub_id(source):
        say(f"pickscore: weights from {source}")
    else:
        raise UserError(
            f"pickscore: {source} is no folder or hub id; give a folder with config.json, "
            "model.safetensors and the files of the tokenizer."
        )
    try:
        with quiet_libraries():
            model, report = CLIPModel.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"pickscore: cannot be read from {source} ({first}).") from error
    if report["missing_keys"]:
        raise UserError(f"pickscore: {source} lacks weights: {sorted(report['missing_keys'])[0]}.")
    words = model.config.text_config.vocab_size
    if len(tokenizer) != words:
        raise UserError(
            f"pickscore: the tokenizer of {source} has {len(tokenizer)} words, the network "
            f"{words}; a file may be missing."
        )
    return PickScoreReward(frozen(model, device, dtype), tokenizer)
