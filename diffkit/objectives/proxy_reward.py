"""Training of a latent proxy reward on pictures and captions, before a student is guided by it.

CLIP's contrastive loss (Radford et al. 2021) between latents, drawn from the autoencoder's
posterior, and captions: the first stage of Li et al. 2024 (arXiv:2403.11027). A pair is told apart
from the others of its group of G consecutive samples,

    l_b = -(log softmax_m(k <f_b, g_m>)_b + log softmax_m(k <f_m, g_b>)_b) / 2,    m in the group,

where others with the same caption do not count as wrong. Groups are parts of a micro-batch, so
that neither the number of processes nor of parts of a batch decides who is compared with whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import EMBEDDED, LatentDiffusion
from diffkit.objectives.base import Phase
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective, Draws
from diffkit.objectives.reward_guided import prompts_of
from diffkit.rewards.latent_clip import LatentClip
from diffkit.rewards.proxies import CLIP_H, new_latent_clip, new_tap_proxy
from diffkit.rewards.proxy import LatentProxy, Told
from diffkit.rewards.refit import contrastive_loss

__all__ = [
    "ContrastivePlayer",
    "ProxyRewardConfig",
    "ProxyRewardObjective",
    "grouped_contrast",
    "same_prompts",
]

_SIZES = ("patch", "width", "layers")


# -- mathematics --------------------------------------------------------------------------------


def same_prompts(prompts: Sequence[str]) -> Tensor:
    """(B, B) true where two samples have the same caption."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    each = torch.tensor([numbers[prompt] for prompt in prompts])
    return each[:, None] == each


def grouped_contrast(
    images: Tensor, texts: Tensor, scale: Tensor, same: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """l (B,) of the module's head, and the share (B,) of both ways in which a pair finds itself.

    Arguments:
        images, texts: f, g (B, D), unit vectors.
        scale: k ().
        same: (B, B), see `same_prompts`.
        group: G, a divisor of B.
    """
    losses, hits = [], []
    for start in range(0, len(images), group):
        rows = slice(start, start + group)
        one, other, excused = images[rows], texts[rows], same[rows, rows]
        losses.append(contrastive_loss(one, other, scale, excused=excused))
        likeness = (one @ other.T).detach()
        own = likeness.diagonal()
        wrong = likeness.masked_fill(excused, -torch.inf)
        found = (own > wrong.amax(1)).float() + (own > wrong.amax(0)).float()
        hits.append(found / 2)
    return torch.cat(losses), torch.cat(hits)


# -- objective ----------------------------------------------------------------------------------


@dataclass
class ProxyRewardConfig:
    """Which network scores latents, and how it is trained."""

    network: Literal["vit", "resnet", "taps"] = "vit"
    """Of latents: a ViT or CLIP's ResNet beside a text tower, or a head on the features of the
    model itself (taps)."""
    text: str | None = None
    """Text tower to start from: folder or hub id of a CLIP model, or `embedded`. That of CLIP
    ViT-H/14 by default, of the embedded model its own."""
    freeze_text: bool = False
    """Leave the text tower as it is, for few captions."""
    patch: int | None = None
    """Edge of a ViT's patches in latent pixels; 4 by default, 2 for latents below 32x32."""
    width: int | None = None
    """Of the network; 512 by default, 128 for latents below 32x32."""
    layers: int | None = None
    """Of the ViT; 12 by default, 4 for latents below 32x32."""
    group: int | None = None
    """Samples that a pair is told apart from, consecutive ones; the whole batch by default. Must
    divide the samples that a process works off at once."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"proxy.{name}: {value} must be at least 1.")
        if self.group is not None and self.group < 2:
            raise UserError(f"proxy.group: {self.group}; a pair needs others, at least 2 in all.")
        unused = {
            "taps": ("text", "freeze_text", *_SIZES),
            "resnet": ("patch", "layers"),
            "vit": (),
        }[self.network]
        for name in unused:
            if getattr(self, name) not in (None, False):
                raise UserError(f"proxy.{name}: has no effect on --proxy.network {self.network}.")

    def build(self, model: LatentDiffusion, size: int, seed: int) -> LatentProxy:
        """A new proxy for latents of pictures of this edge.

        Raises `UserError` for a model without text, a text tower that cannot be had, and sizes that
        do not fit.
        """
        if self.network == "taps":
            conditioner = model.conditioner
            if conditioner.classes is not None:
                raise UserError(
                    f"proxy.network: {model.family.name} models read no text that a head on them "
                    "could compare; use --proxy.network vit."
                )
            cond = conditioner.encode([conditioner.example], (size, size))
            return new_tap_proxy(model.denoiser, cond.to(model.device), seed)
        text = self.text or ("embedded" if model.source == EMBEDDED else CLIP_H)
        given = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        side = model.latent_shape(size, size)[1]
        return new_latent_clip(model.codec, side, text, self.network, seed, **given)


@dataclass(frozen=True)
class ProxyDraws(Draws):
    """One micro-batch with its randomness.

    Attributes:
        prompts: B captions, or names of classes.
        same: (B, B), see `same_prompts`.
    """

    prompts: list[str]
    same: Tensor


@dataclass(frozen=True)
class ProxyShared:
    """Latents z_0 (B, C, h, w), and what the proxy is told of the prompts."""

    z0: Tensor
    told: Told


class ContrastivePlayer(nn.Module):
    """A proxy with its contrastive loss.

    forward("contrastive", draws, shared) -> "loss", "accuracy" (share of both ways in which a pair
    finds itself in its group) and "scale" (inverse temperature), each (B,).
    """

    def __init__(self, proxy: LatentProxy, group: int) -> None:
        super().__init__()
        self.proxy = proxy
        self.group = group

    def forward(self, phase: str, draws: ProxyDraws, shared: ProxyShared) -> dict[str, Any]:
        """The loss of each sample and what is logged."""
        texts = self.proxy.embed_text(shared.told)
        images = self.proxy.embed_latents(shared.z0, shared.told)
        scale = self.proxy.logit_scale
        loss, hits = grouped_contrast(images, texts, scale, draws.same, self.group)
        return {"loss": loss, "accuracy": hits, "scale": scale.detach().expand_as(loss)}


class ProxyRewardObjective(DenoisingObjective):
    """Contrastive training of a latent proxy reward; the model itself stays as it is.

    Arguments:
        model: whose latents, and features where the proxy reads those, are scored.
        config: see `ProxyRewardConfig`.
        batch_size: samples of an optimizer step, the group where none is given.
        size: edge of the training pictures in pixels, the model's own by default.
        seed: of the first weights.

    Raises `UserError` for a config that does not fit the model.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: ProxyRewardConfig,
        batch_size: int,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        config.check()
        super().__init__(model, DenoisingConfig(condition_dropout=0.0))
        self.proxy = config.build(model, size or model.default_size, seed)
        self.proxy.requires_grad_(True)
        if isinstance(self.proxy, LatentClip) and config.freeze_text:
            self.proxy.text.requires_grad_(False)
        self._contrast = ContrastivePlayer(self.proxy, config.group or batch_size)

    def players(self) -> Mapping[str, nn.Module]:
        """One: the proxy."""
        return {"proxy": self._contrast}

    def phases(self) -> Sequence[Phase]:
        """One step of the proxy."""
        return (Phase("contrastive", "proxy"),)

    def averaged(self) -> Sequence[str]:
        """The proxy."""
        return ("proxy",)

    def place(self, device: torch.device) -> None:
        """Move the denoiser whose features a head reads."""
        super().place(device)
        if not isinstance(self.proxy, LatentClip):
            self.model.denoiser.to(self._device)

    def shown(self) -> Sequence[str]:
        """How many pairs are found."""
        return ("accuracy",)

    def draw(self, batch: Batch, repeat: int) -> ProxyDraws:
        """The posterior noise of each sample, and which captions are the same."""
        draws = super().draw(batch, repeat)
        prompts = prompts_of(batch, self.model.conditioner.classes)
        same = same_prompts(prompts).to(self._device, non_blocking=True)
        return ProxyDraws(**vars(draws), prompts=prompts, same=same)

    def shared(self, draws: Draws) -> Any:
        """Latents, and the prompts as the proxy reads them."""
        assert isinstance(draws, ProxyDraws)
        cond = Conditioning()
        if not isinstance(self.proxy, LatentClip):
            cond = self.condition(draws)
        return ProxyShared(self.latents(draws), self.proxy.told(draws.prompts, cond))

    def save(self, folder: Path) -> None:
        """Write what `--reward.proxy` reads."""
        self.proxy.save(folder, overwrite=True)
