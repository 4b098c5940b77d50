"""A small text-image model: how well does a picture fit a caption?

The offline stand-in of CLIP for the pictures the embedded model draws. Its text tower is a stock
`CLIPTextModel` with a stock `CLIPTokenizer`, so that the same tower serves as the text encoder of
a `StableDiffusionPipeline`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffkit.errors import UserError
from diffkit.files import atomic_directory
from diffkit.models.feature_network import (
    ImageTrunk,
    half_parameters,
    load_strictly,
    read_config,
)
from diffkit.models.loading import quiet_libraries

__all__ = ["TextImageScorer", "TextImageScorerConfig", "load_text_tower"]


@dataclass(frozen=True)
class TextImageScorerConfig:
    """Sizes of a `TextImageScorer`, kept in its `config.json`."""

    widths: tuple[int, ...] = (24, 48, 96, 192)
    depths: tuple[int, ...] = (1, 2, 2)
    embedding_size: int = 128


class ImageTower(nn.Module):
    """The image half: a residual trunk and a projection to the common space.

    `log_scale` is the logarithm of the inverse temperature of the contrastive training.
    """

    def __init__(self, config: TextImageScorerConfig, text_width: int) -> None:
        super().__init__()
        self.trunk = ImageTrunk(config.widths, config.depths)
        self.image_projection = nn.Linear(config.widths[-1], config.embedding_size, bias=False)
        self.text_projection = nn.Linear(text_width, config.embedding_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.5))


class TextImageScorer(nn.Module):
    """Cosine similarity of pictures and captions in a common space of unit vectors.

    score(x, c) = <f(x), g(c)>, |f| = |g| = 1, after Radford et al., "Learning Transferable Visual
    Models From Natural Language Supervision" (2021).

    Arguments:
        config: sizes of the image half and of the common space.
        text_encoder: a `CLIPTextModel`; its pooled output is projected to the common space.
        tokenizer: the tokenizer that belongs to it; `model_max_length` bounds a prompt.
    """

    def __init__(
        self, config: TextImageScorerConfig, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
    ) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.tower = ImageTower(config, text_encoder.config.hidden_size)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D), float32, of images (B, 3, H, W) in [-1, 1] of any size."""
        return F.normalize(self.tower.image_projection(self.tower.trunk(images)), dim=-1)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors (B, D), float32, of prompts; a longer one than the tokenizer's is cut."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.tower.log_scale.device)
        pooled = self.text_encoder(ids).pooler_output.float()
        return F.normalize(self.tower.text_projection(pooled), dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarity (B,) in [-1, 1], float32, of picture i and prompt i.

        Differentiable with respect to `images` (B, 3, H, W) in [-1, 1]. Raises `UserError` when
        the numbers of pictures and prompts differ.
        """
        if len(images) != len(prompts):
            raise UserError(
                f"score: {len(images)} images and {len(prompts)} prompts; give one prompt an image."
            )
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    forward = score

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json`, `model.safetensors`, `text_encoder/` and `tokenizer/`.

        Weights are float16, batch statistics float32; the two subfolders are what
        `StableDiffusionPipeline` expects under these names. Raises `UserError` when `folder`
        exists and `overwrite` is false.
        """
        with atomic_directory(folder, overwrite=overwrite) as temporary:
            text = json.dumps(asdict(self.config), indent=1)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
            save_file(half_parameters(self.tower), temporary / "model.safetensors")
            half = CLIPTextModel(self.text_encoder.config)
            half.load_state_dict(self.text_encoder.state_dict())
            half.half().save_pretrained(temporary / "text_encoder")
            self.tokenizer.save_pretrained(temporary / "tokenizer")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TextImageScorer:
        """Read what `save` wrote, in float32 and evaluation mode, every weight required.

        Raises `UserError` when the folder, a subfolder, a key of the configuration or a weight is
        missing or does not fit.
        """
        path = Path(folder)
        values = read_config(path, TextImageScorerConfig)
        config = TextImageScorerConfig(
            widths=tuple(values["widths"]),
            depths=tuple(values["depths"]),
            embedding_size=values["embedding_size"],
        )
        text_encoder, tokenizer = load_text_tower(path)
        scorer = cls(config, text_encoder, tokenizer)
        load_strictly(scorer.tower, path / "model.safetensors")
        return scorer.eval()


def load_text_tower(path: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Read `text_encoder/` and `tokenizer/` of a folder, in float32, every weight required.

    transformers would fill missing weights at random and make an empty tokenizer where files are
    absent. Raises `UserError` for both.
    """
    try:
        with quiet_libraries():
            text_encoder, report = CLIPTextModel.from_pretrained(
                path / "text_encoder",
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the folders text_encoder and tokenizer cannot be read: {error}"
        ) from error
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise UserError(f"{path / 'text_encoder'}: weights missing or unknown: {', '.join(wrong)}.")
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise UserError(
            f"{path / 'tokenizer'}: has {len(tokenizer)} tokens, "
            f"the text encoder knows {text_encoder.config.vocab_size}; a file may be missing."
        )
    return text_encoder, tokenizer
