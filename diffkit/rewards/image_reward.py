"""ImageReward on transformers' BLIP (Xu et al. 2023, arXiv 2304.05977); no package of its own.

A picture goes through a ViT-L/16, its prompt through a BERT that attends to the picture in every
layer, and the state of the first token through five linear layers to one number. Code and weights
are Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.models.clip import CLIP_RULE, prepare
from diffkit.models.loading import quiet_libraries
from diffkit.models.named_weights import load_named_weights
from diffkit.rewards.base import Reward, frozen
from diffkit.rewards.places import find_weights

__all__ = ["BlipScorer", "ImageReward", "load", "of_weights"]

REPOSITORY = "zai-org/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
_FILES = ("ImageReward.safetensors", "model.safetensors", "ImageReward.pt")

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over the authors' training pictures."""

_LENGTH = 35
_ADDED = 2  # words that BLIP adds to BERT's and ImageReward does not use
_HEAD = 64  # channels of an attention head, in both networks
_WIDTHS = (1024, 128, 64, 16, 1)
_PLACES = (0, 2, 4, 6, 7)  # of the linear layers between dropouts, in the names of the weights

# The names of the original BLIP against those of transformers.
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


class BlipScorer(nn.Module):
    """The three networks of ImageReward; r = (mlp(h_CLS) - mean) / std.

    Arguments:
        vision: config of the image tower.
        text: config of the text tower, a decoder in transformers' sense: it attends to the picture.
    """

    def __init__(self, vision: Any, text: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        sizes = (text.hidden_size, *_WIDTHS)
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """r (B,), float32, of normalised pixels and tokens, mask (B, L)."""
        states = self.vision(pixel_values=pixels).last_hidden_state
        found = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=states,
            is_decoder=False,  # no causal mask
        )
        raw = self.mlp(found.last_hidden_state[:, 0]).float()[:, 0]
        return (raw - MEAN) / STD


class ImageReward(Reward):
    """R = -relu(2 - r) = min(r, 2) - 2 <= 0: beyond r = 2 there is nothing to gain.

    Reports give r itself, `measure`. R has no logit scale. A prompt is cut to 35 tokens.
    """

    name = "imagereward"
    label = "ImageReward v1.0"

    def __init__(self, scorer: BlipScorer, tokenizer: Any) -> None:
        self.scorer, self.tokenizer = scorer, tokenizer
        self._size = scorer.vision.config.image_size
        self.resize = (
            f"resized to {self._size}x{self._size} "
            "(bicubic, antialiased; shortest side, middle cropped)"
        )

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The scorer."""
        return (self.scorer,)

    def read(self, prompts: list[str]) -> Tensor:
        """Tokens and their mask (B, 2, 35), int64."""
        found = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=_LENGTH,
            return_tensors="pt",
        )
        return torch.stack([found.input_ids, found.attention_mask], dim=1).to(self.device)

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """-relu(2 - r) (B,)."""
        return -torch.relu(2 - self.published(pixels, embedded))

    def published(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """r (B,)."""
        x = prepare(2 * pixels - 1, (self._size, self._size), CLIP_RULE)
        tokens, mask = embedded.unbind(1)
        r: Tensor = self.scorer(x.to(next(self.scorer.parameters()).dtype), tokens, mask)
        return r


def load(place: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """The reward imagereward[:PLACE]: a file of weights, or a folder or hub id that holds it.

    The words come from the tokenizer beside the file, where there is one, else from bert-base-
    uncased of the hub. Raises `UserError` when one of them cannot be had or does not fit.
    """
    file = find_weights("imagereward", place or REPOSITORY, _FILES)
    scorer = of_weights(load_named_weights(file), file)
    return ImageReward(frozen(scorer, device, dtype), _tokenizer(file.parent, scorer))


def of_weights(state: Mapping[str, Tensor], source: str | Path) -> BlipScorer:
    """The scorer with weights by their original names; sizes are read off their shapes.

    Heads have 64 channels. Raises `UserError`, which names `source`, when weights are missing or do
    not fit.
    """
    own = _renamed(state)
    try:
        scorer = BlipScorer(*_configs(own))
        scorer.load_state_dict(own)
    except (KeyError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: are not the weights of ImageReward ({first}).") from error
    return scorer


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `BlipScorer`; projections that only pretraining used drop out."""
    found = {}
    for name, value in state.items():
        part, _, rest = name.removeprefix("blip.").partition(".")
        if part == "visual_encoder":
            for pattern, replacement in _VISION:
                rest = re.sub(pattern, replacement, rest)
            found[f"vision.{rest}"] = value
        elif part == "text_encoder" and not rest.endswith("position_ids"):
            found[f"text.{rest}"] = value
        elif part == "mlp":
            _, place, kind = rest.split(".")
            found[f"mlp.{_PLACES.index(int(place))}.{kind}"] = value
    return found


def _configs(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    from transformers import BlipTextConfig, BlipVisionConfig

    patches = state["vision.embeddings.patch_embedding.weight"]
    positions = state["vision.embeddings.position_embedding"].shape[1] - 1
    side = round(positions**0.5) * patches.shape[-1]
    words = state["text.embeddings.word_embeddings.weight"]
    cross = state["text.encoder.layer.0.crossattention.self.key.weight"]
    vision = BlipVisionConfig(
        hidden_size=len(patches),
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(state, r"vision\.encoder\.layers\.(\d+)\."),
        num_attention_heads=len(patches) // _HEAD,
        image_size=side,
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        encoder_hidden_size=cross.shape[1],
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(state, r"text\.encoder\.layer\.(\d+)\."),
        num_attention_heads=words.shape[1] // _HEAD,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
        is_decoder=True,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return vision, text


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in state)
    return 1 + max(int(match[1]) for match in found if match)


def _tokenizer(folder: Path, scorer: BlipScorer) -> Any:
    from transformers import BertTokenizer

    here = (folder / "vocab.txt").is_file()
    source = str(folder) if here else TOKENIZER
    if not here:
        say(f"imagereward: words from {source}")
    try:
        with quiet_libraries():
            tokenizer = BertTokenizer.from_pretrained(source)
        words = len(tokenizer)  # transformers makes an empty one where files are absent
    except (OSError, ValueError):
        words = 0
    known = scorer.text.config.vocab_size
    if not known - _ADDED <= words <= known:
        raise UserError(
            f"imagereward: the words of {source} cannot be had or are not its own ({words} in "
            f"place of {known - _ADDED}); put the vocab.txt of {TOKENIZER} beside the weights, in "
            f"{folder}."
        )
    return tokenizer
