"""Rewards that are a CLIP of open_clip: plain CLIP and HPS v2.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffkit.models.clip import Clip, clip_of_weights, load_clip
from diffkit.models.named_weights import optional_module
from diffkit.rewards.base import Reward
from diffkit.rewards.places import find_weights

__all__ = ["ClipReward", "hps", "load", "load_hps"]

USUAL = "ViT-H-14:laion2b_s32b_b79k"
"""The model that HPS v2, PickScore and the paper's CLIP reward start from."""

HPS_REPOSITORY = "xswu/HPSv2"
_HPS_FILES = ("HPS_v2.1_compressed.safetensors", "model.safetensors", "HPS_v2.1_compressed.pt")


class ClipReward(Reward):
    """R = <f(x), g(c)> in [-1, 1], |f| = |g| = 1, of both towers of a CLIP model.

    Pictures are resized (bicubic, antialiased, the shorter side to 224 for most), cut to the middle
    square and normalised by the model's own mean and standard deviation. Radford et al., "Learning
    Transferable Visual Models From Natural Language Supervision" (2021).
    """

    def __init__(self, clip: Clip, name: str = "clip", label: str = "") -> None:
        self.clip = clip
        self.name, self.label, self.resize = name, label or clip.label, clip.resize
        self.logit_scale = clip.logit_scale

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The CLIP model."""
        return (self.clip.model,)

    def fingerprint(self) -> str:
        """Digest of the weights and the preprocessing."""
        return f"{self.name}-{self.clip.key}"

    def read(self, prompts: list[str]) -> Tensor:
        """Unit vectors (B, D)."""
        return self.clip.embed_texts(prompts)

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """The cosine (B,)."""
        return (self.clip.embed_images(2 * pixels - 1) * embedded).sum(-1)


def load(place: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """The reward clip[:ARCH:WEIGHTS]; weights are a tag, a file or TAG=FILE, see `load_clip`.

    Raises `UserError` as that does: a missing package, unknown names, weights that do not fit.
    """
    return ClipReward(load_clip(f"clip:{place or USUAL}", device, dtype))


def load_hps(place: str, device: torch.device, dtype: torch.dtype) -> Reward:
    """The reward hpsv2[:PLACE]: HPS v2.1, a CLIP ViT-H/14 (Wu et al. 2023, arXiv 2306.09341).

    R is the cosine, about 0.2 to 0.35; benchmarks give it times 100. Code and data are Apache-2.0.
    Raises `UserError` for a missing package, and weights that cannot be had or do not fit.
    """
    return hps(find_weights("hpsv2", place or HPS_REPOSITORY, _HPS_FILES), device, dtype)


def hps(file: object, device: torch.device, dtype: torch.dtype, arch: str = "ViT-H-14") -> Reward:
    """HPS v2.1 of a file of weights with the names of open_clip's `arch`.

    Raises `UserError` for a missing package, and weights that cannot be read or do not fit.
    """
    open_clip = optional_module("open_clip", "rewards", "the reward hpsv2")
    model = clip_of_weights(arch, str(file), "the reward hpsv2").to(device, dtype)
    tokenizer = open_clip.get_tokenizer(arch)
    return ClipReward(Clip("hpsv2", "HPS v2.1", model, tokenizer), "hpsv2", "HPS v2.1")
