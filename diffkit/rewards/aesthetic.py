"""LAION's aesthetic predictors: a small head on CLIP's image features, blind to the prompt.

Version 1 is a linear map of ViT-L/14, B/16 or B/32 features, version 2 five linear layers on
ViT-L/14, all of unit vectors of OpenAI's CLIP. They are published as small files in
LAION-AI/aesthetic-predictor (MIT) and christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.clip import Clip, load_clip
from diffkit.models.fingerprint import fingerprint_module
from diffkit.models.named_weights import load_named_weights
from diffkit.rewards.base import Reward, frozen

__all__ = ["AestheticReward", "head_of_weights", "load"]

_V1 = "https://github.com/LAION-AI/aesthetic-predictor"
_TOWERS = {"l": "ViT-L-14:openai", "b_16": "ViT-B-16:openai", "b_32": "ViT-B-32:openai"}
"""By the published file names: ..._vit_l_14_..., ..._vit_b_16_..., ..., and ...-l14-..."""
_BETWEEN = "+"


class AestheticReward(Reward):
    """R = head(f(x)), |f| = 1, about 1 to 10: how much people like such pictures; no prompt counts.

    Arguments:
        pairs: (CLIP, head) of one or more predictors, whose mean R is.
    """

    name = "aesthetic"
    label = "LAION aesthetic predictor"

    def __init__(self, pairs: Sequence[tuple[Clip, nn.Module]]) -> None:
        self.pairs = tuple(pairs)
        self.resize = self.pairs[0][0].resize

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The CLIP models and the heads."""
        return [network for clip, head in self.pairs for network in (clip.model, head)]

    def fingerprint(self) -> str:
        """Digest of all weights and of what the CLIP models do with pictures."""
        parts = [part for clip, head in self.pairs for part in (clip.key, fingerprint_module(head))]
        return "-".join([self.name, *parts])

    def read(self, prompts: list[str]) -> Tensor:
        """Nothing: (B, 0)."""
        return torch.empty(len(prompts), 0, device=self.device)

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """The mean of the heads, (B,)."""
        images = 2 * pixels - 1
        values = [head(clip.embed_images(images)).squeeze(-1) for clip, head in self.pairs]
        return torch.stack(values).mean(0)


def load(place: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """The reward aesthetic:HEAD[+CLIP], several of them joined by "++".

    HEAD is a file, CLIP is ARCH:WEIGHTS as `load_clip` takes it, else the one that the published
    name of the file says, which open_clip fetches. Raises `UserError` when one cannot be had or
    does not fit.
    """
    if not place:
        raise UserError(
            f"aesthetic: give the file of its head, aesthetic:PATH; heads are published in {_V1}, "
            "such as sa_0_4_vit_l_14_linear.pth."
        )
    pairs = [_pair(part, device, dtype) for part in place.split(2 * _BETWEEN)]
    return AestheticReward(pairs)


def _pair(part: str, device: torch.device, dtype: torch.dtype) -> tuple[Clip, nn.Module]:
    # The published file of version 2 has "+" in its name.
    file, _, tower = (part, "", "") if Path(part).is_file() else part.rpartition(_BETWEEN)
    head = head_of_weights(load_named_weights(file), file)
    width = next(head.parameters()).shape[1]
    tower = tower or _published(Path(file).name)
    if not tower:
        raise UserError(f"aesthetic: name the CLIP of {file}, whose features have length {width}.")
    clip = load_clip(f"clip:{tower}", device, dtype)
    if clip.dim != width:
        raise UserError(
            f"aesthetic: {file} takes features of length {width}, {tower} has {clip.dim}."
        )
    return clip, frozen(head, device, torch.float32)


def _published(name: str) -> str:
    mark = re.search(r"vit_(b_16|b_32|l)_|-(l)14-", name)
    return _TOWERS[mark[1] or mark[2]] if mark else ""


def head_of_weights(state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The head of "weight" and "bias", or of "layers.N.weight" and so on with nothing between.

    Raises `UserError`, which names `source`, for other weights.
    """
    names = sorted({name.rpartition(".")[0] for name in state}, key=lambda n: (len(n), n))
    layers = []
    try:
        for name in names:
            prefix = f"{name}." if name else ""
            weight, bias = state[f"{prefix}weight"], state[f"{prefix}bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
        head = nn.Sequential(*layers)
        head(torch.zeros(1, layers[0].in_features))
        right = layers[-1].out_features == 1
    except (KeyError, IndexError, RuntimeError):
        right = False
    if not right:
        raise UserError(
            f"{source}: is no head of an aesthetic predictor, linear layers to 1 value."
        )
    return head
