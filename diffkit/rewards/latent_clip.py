"""A CLIP whose image tower reads latents: the proxy that needs pictures and captions to be trained.

After the latent reward model of Li et al. 2024 (arXiv 2403.11027): a ViT with patches of 4 latent
pixels, or a ResNet-50 with attention pooling, beside the text tower of a CLIP. Both are built of
transformers' and open_clip's own layers, with as many input channels as the latents have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffkit.errors import UserError
from diffkit.files import atomic_directory, write_json
from diffkit.models.conditioner import Conditioning
from diffkit.models.feature_network import load_strictly, read_config
from diffkit.models.loading import quiet_libraries
from diffkit.models.named_weights import optional_module
from diffkit.models.text_image_scorer import load_text_tower
from diffkit.rewards.proxy import LatentProxy, Told

__all__ = ["LatentClip", "LatentClipConfig", "TextTower"]

Tower = Literal["vit", "resnet"]

_TEXT_BLOCKS = 5
"""Last blocks of the text tower that a refit trains."""


@dataclass(frozen=True)
class LatentClipConfig:
    """Sizes of a `LatentClip`, kept in its `config.json`.

    Attributes:
        tower: "vit", or "resnet" with the widths of CLIP's RN50 and group norms in place of its
            batch norms, for sides of multiples of 32.
        channels, side: of the latents; a ViT takes other sizes by resizing its position embedding.
        scale, shift: one number, or one a channel: raw = z / scale + shift are the latents of the
            autoencoder, as its decoder takes them.
        patch, width, layers: of the ViT; `width` of the ResNet's stem is an eighth of it.
        embedding_size: D of the common space.
    """

    channels: int
    side: int
    embedding_size: int
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    tower: Tower = "vit"
    patch: int = 4
    width: int = 512
    layers: int = 12

    def check(self) -> None:
        """Raise `UserError` for sizes that do not fit."""
        if self.tower == "vit" and (self.side % self.patch or self.width % 64):
            raise UserError(
                f"latent ViT: {self.side} latent pixels in patches of {self.patch}, width "
                f"{self.width}: the side must be a multiple of the patch, the width one of 64."
            )
        if self.tower == "resnet" and self.side % 32:
            raise UserError(
                f"latent ResNet: latents of {self.side}x{self.side} are too small or odd for five "
                "halvings; take the ViT, or latents whose side is a multiple of 32."
            )


class TextTower(nn.Module):
    """A `CLIPTextModel` with its tokenizer and a projection of the pooled state."""

    def __init__(
        self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, projection: Tensor
    ) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.projection = nn.Linear(projection.shape[1], projection.shape[0], bias=False)
        self.projection.weight.data.copy_(projection)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokens (B, L) int64, padded and cut to the length L that the tower reads."""
        length = min(self.encoder.config.max_position_embeddings, self.tokenizer.model_max_length)
        found = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids: Tensor = found.input_ids
        return ids.to(self.projection.weight.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, D), float32."""
        pooled = self.encoder(tokens).pooler_output
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def unlocked(self) -> list[str]:
        """The last five blocks, the last norm and the projection; no embedding of tokens."""
        layers = len(self.encoder.encoder.layers)
        prefixes = [
            *(f"encoder.encoder.layers.{i}." for i in range(max(0, layers - _TEXT_BLOCKS), layers)),
            "encoder.final_layer_norm.",
            "projection.",
        ]
        return _starting(self, prefixes)


class LatentClip(LatentProxy):
    """S(z, c): cosine of a tower of latents and a tower of text; see `LatentProxy`.

    A refit trains the image tower's last block, last norm and projection (of the ResNet the
    attention pool without its positions), the text tower's part of `TextTower.unlocked`, and the
    temperature. The ResNet has group norms: statistics of batches would depend on how a batch is
    shared out, and during refits on the student.

    Arguments:
        config: sizes.
        text: the text tower, whose projection decides D.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: LatentClipConfig, text: TextTower) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.text = text
        self.image = _vit(config) if config.tower == "vit" else _resnet(config)
        self.register_buffer("scale", torch.tensor(config.scale).view(1, -1, 1, 1), False)
        self.register_buffer("shift", torch.tensor(config.shift).view(1, -1, 1, 1), False)
        self.eval()

    def told(self, prompts: Sequence[str], cond: Conditioning) -> Told:
        """Tokens (B, L) of the prompts."""
        return self.text.tokens(prompts)

    def embed_text(self, told: Told) -> Tensor:
        """Unit vectors (B, D) of tokens (B, L)."""
        features: Tensor = self.text(told)
        return features

    def raw(self, latents: Tensor) -> Tensor:
        """What the autoencoder's decoder takes, of scaled latents: z / scale + shift."""
        return latents / self.scale + self.shift

    def embed_latents(self, latents: Tensor, told: Told | None = None) -> Tensor:
        """Unit vectors (B, D) of scaled latents (B, C, h, w); the prompt does not count here."""
        raw = self.raw(latents.float()).to(self.log_scale.dtype)
        if self.config.tower == "resnet":
            return F.normalize(self.image(raw).float(), dim=-1)
        odd = raw.shape[-2:] != (self.config.side, self.config.side)
        features = self.image(raw, interpolate_pos_encoding=odd).image_embeds
        return F.normalize(features.float(), dim=-1)

    def unlocked(self) -> list[str]:
        """What a refit trains, see the class."""
        if self.config.tower == "vit":
            last = self.config.layers - 1
            prefixes = [
                f"image.vision_model.encoder.layers.{last}.",
                "image.vision_model.post_layernorm.",
                "image.visual_projection.",
            ]
        else:
            prefixes = [f"image.attnpool.{name}_proj." for name in "kqvc"]
        return [
            "log_scale",
            *_starting(self, prefixes),
            *(f"text.{name}" for name in self.text.unlocked()),
        ]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json`, `model.safetensors`, `text_encoder/` and `tokenizer/`, in float32.

        Raises `UserError` when `folder` exists and `overwrite` is false.
        """
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("text.encoder.")}
        with atomic_directory(folder, overwrite=overwrite) as place, quiet_libraries():
            write_json(place / "config.json", asdict(self.config))
            save_file(
                {name: value.float().contiguous() for name, value in own.items()},
                place / "model.safetensors",
            )
            self.text.encoder.save_pretrained(place / "text_encoder")
            self.text.tokenizer.save_pretrained(place / "tokenizer")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LatentClip:
        """Read what `save` wrote, on the CPU.

        Raises `UserError` when a file, a key of the configuration or a weight is missing or does
        not fit.
        """
        path = Path(folder)
        values = dict(read_config(path, LatentClipConfig))
        values |= {name: tuple(values[name]) for name in ("scale", "shift")}
        config = LatentClipConfig(**values)
        encoder, tokenizer = load_text_tower(path)
        empty = torch.empty(config.embedding_size, encoder.config.hidden_size)
        proxy = cls(config, TextTower(encoder, tokenizer, empty))
        text, proxy.text.encoder = proxy.text.encoder, nn.Identity()
        load_strictly(proxy, path / "model.safetensors")
        proxy.text.encoder = text
        return proxy


def _vit(config: LatentClipConfig) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            num_channels=config.channels,
            image_size=config.side,
            patch_size=config.patch,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // 64,
            projection_dim=config.embedding_size,
            hidden_act="gelu",
        )
    )


def _resnet(config: LatentClipConfig) -> nn.Module:
    network = optional_module(
        "open_clip.modified_resnet", "rewards", "the latent ResNet"
    ).ModifiedResNet(
        layers=(3, 4, 6, 3),
        output_dim=config.embedding_size,
        heads=config.width // 16,
        image_size=config.side,
        width=config.width // 8,
    )
    first = network.conv1
    network.conv1 = nn.Conv2d(config.channels, first.out_channels, 3, 2, 1, bias=False)
    module: nn.Module = network
    for parent in tuple(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _group_norm(child))
    return module


def _group_norm(norm: nn.BatchNorm2d) -> nn.GroupNorm:
    """With the same scale and shift, which are 0 and 0 where a residual branch starts without
    effect; at least 8 channels a group."""
    channels = norm.num_features
    groups = max(
        n for n in (1, 2, 4, 8, 16, 32) if channels % n == 0 and (n == 1 or channels >= 8 * n)
    )
    found = nn.GroupNorm(groups, channels, norm.eps)
    found.load_state_dict({"weight": norm.weight.detach(), "bias": norm.bias.detach()})
    return found


def _starting(module: nn.Module, prefixes: Sequence[str]) -> list[str]:
    return [n for n, _ in module.named_parameters() if n.startswith(tuple(prefixes))]
