"""Discriminators that read the features of a diffusion model: maps of logits from many heads.

- `unet_discriminator`: a trainable copy of the teacher's U-Net on clean latents, told the noise z
  that the latents came from and seeing them at every resolution of its encoder, with three heads at
  every scale of its decoder (Kang et al. 2024, 2405.05967; sizes of heads and convolutions are not
  published).
- `feature_discriminator`: heads on all blocks of the frozen teacher, which sees the latents at
  random noise levels (LADD; Sauer et al. 2024, 2403.12015).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.lora import plain_copy
from diffkit.randomness import uniform

__all__ = [
    "Discriminator",
    "Given",
    "feature_discriminator",
    "twice_differentiable",
    "unet_discriminator",
]

_GROUPS = 32


@dataclass(frozen=True)
class Given:
    """What B latents are judged with.

    Attributes:
        cond: the prompts.
        noise: z (B, C, h, w) that the generator made them of.
        t: (B,) times to which the latents are noised first; None to judge them clean.
        eps: (B, C, h, w) the noise for that.
    """

    cond: Conditioning
    noise: Tensor
    t: Tensor | None = None
    eps: Tensor | None = None

    def twice(self) -> Given:
        """The same for two batches, one after the other."""
        cond = Conditioning.cat([self.cond, self.cond])
        t, eps = (None if x is None else torch.cat([x, x]) for x in (self.t, self.eps))
        return Given(cond, torch.cat([self.noise, self.noise]), t, eps)

    def select(self, rows: Tensor | slice) -> Given:
        """Some rows of the batch."""
        t, eps = (None if x is None else x[rows] for x in (self.t, self.eps))
        return Given(self.cond.select(rows), self.noise[rows], t, eps)


class _Head(nn.Sequential):
    """Features (B, width, h, w) -> logits (B, 1, h, w).

    The convolution starts at addressed draws, uniform in +-1 / sqrt(fan_in), torch's own bound.
    """

    def __init__(self, width: int, kernel: int, seed: int, name: str) -> None:
        conv = nn.Conv2d(width, 1, kernel, padding=kernel // 2)
        bound = 1 / math.sqrt(width * kernel**2)
        with torch.no_grad():
            for part, parameter in conv.named_parameters():
                draws = uniform(parameter.shape, seed, "head", name, part)
                parameter.copy_(bound * (2 * draws - 1))
        super().__init__(nn.GroupNorm(math.gcd(_GROUPS, width), width), nn.SiLU(), conv)


class Discriminator(nn.Module):
    """Heads on features of a denoiser.

    forward(x (B, C, h, w), given) -> K maps of logits (B, 1, h_k, w_k), one value of each its own
    sample's alone.

    Arguments:
        denoiser: the network whose features are read; its parameters stay as trainable as they are.
        widths: channels of the features, by tap name.
        kernel: of the convolution of each head.
        seed: of the heads' first weights.
        guidance: what a network with a guidance embedding is told.
        noise_input: add a convolution of z behind the network's first one.
        scales: add a convolution of the resized latents at the input of each lower level.

    Both kinds of added convolutions start at zero: at the start neither z nor the resized latents
    have an effect.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        widths: Mapping[str, int],
        *,
        kernel: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        noise_input: bool = False,
        scales: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance = guidance
        self.names = tuple(widths)
        self.heads = nn.ModuleList(
            _Head(width, kernel, seed, name) for name, width in widths.items()
        )
        places, channels = denoiser.inputs, denoiser.geometry.channels
        self.noise_input = _zero_conv(channels, places[0].channels) if noise_input else None
        self._scaled = places[1:] if scales else ()
        self.scales = nn.ModuleList(_zero_conv(channels, place.channels) for place in self._scaled)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, ...]:
        """The maps of all heads, in the dtype of their weights."""
        schedule, t = self.denoiser.schedule, given.t
        if t is None:
            t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        else:
            assert given.eps is not None
            x = schedule.add_noise(x, given.eps, t)
        told = None if self.guidance is None else x.new_full((len(x),), self.guidance)
        added = self._added(x, given.noise)
        with self.denoiser.taps(self.names) as found, self.denoiser.added(added):
            self.denoiser(x, t, given.cond, told)
        maps = [self._map(found[name], x) for name in self.names]
        dtype = next(self.heads.parameters()).dtype
        return tuple(head(m.to(dtype)) for head, m in zip(self.heads, maps, strict=True))

    def _added(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What is added inside the network, by place."""
        dtype, found = next(self.heads.parameters()).dtype, {}
        if self.noise_input is not None:
            found[self.denoiser.inputs[0].name] = self.noise_input(noise.to(dtype))
        for place, conv in zip(self._scaled, self.scales, strict=True):
            height, width = (-(-side // place.factor) for side in x.shape[-2:])
            smaller = nn.functional.adaptive_avg_pool2d(x.to(dtype), (height, width))
            found[place.name] = conv(smaller)
        return found

    def _map(self, feature: Tensor, x: Tensor) -> Tensor:
        """(B, width, h', w') of a feature; tokens (B, N, width) go back to their places."""
        if feature.ndim == 4:
            return feature
        patch = self.denoiser.geometry.patch
        height, width = (side // patch for side in x.shape[-2:])
        image = feature[:, -height * width :]  # behind the tokens of the text, if those are there
        return image.transpose(1, 2).unflatten(2, (height, width))


def _zero_conv(channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _widths(denoiser: Denoiser, names: tuple[str, ...], given: Given) -> dict[str, int]:
    """Channels of the named features, from one call with one sample."""
    guidance = None
    if denoiser.family.takes_guidance:
        guidance = torch.ones(1, device=given.noise.device)
    t = torch.zeros(1, dtype=torch.int64, device=given.noise.device)
    with torch.no_grad(), denoiser.taps(names) as found:
        denoiser(given.noise, t, given.cond, guidance)
    return {name: found[name].shape[1 if found[name].ndim == 4 else 2] for name in names}


def _copy(denoiser: Denoiser) -> Denoiser:
    return Denoiser(plain_copy(denoiser.model), denoiser.family, copy.deepcopy(denoiser.schedule))


def unet_discriminator(
    denoiser: Denoiser,
    example: Given,
    *,
    seed: int = 0,
    guidance: float | None = None,
    noise_input: bool = True,
    multiscale: bool = True,
) -> Discriminator:
    """A trainable float32 copy of the teacher's U-Net, without adapters, with fresh heads.

    Heads at every scale of the decoder: on the skip connection, on what it is joined with, and on
    the block's output. Without `multiscale` there is one head, on the output of the last block, and
    the network sees the latents at their own size only. The layers behind the last block have no
    effect and are frozen.

    Arguments:
        denoiser: the teacher; a text-conditioned U-Net.
        example: one sample, of any size, to find the widths of features with.
        seed: of the heads.

    Raises `UserError` for another kind of network.
    """
    if not denoiser.inputs:
        raise UserError(
            f"{denoiser.family.name}: its network has no scales with skip connections to be judged "
            "at; take the discriminator on frozen features."
        )
    network = _copy(denoiser).to(torch.float32)
    network.requires_grad_(True)
    ends = ("skip", "joined", "out")
    names = tuple(name for name in network.tap_names if name.rpartition(":")[2] in ends)
    names = names if multiscale else names[-1:]
    tail: nn.Module = network.model
    for part in ("conv_norm_out", "conv_out"):
        if (layer := getattr(tail, part)) is not None:
            layer.requires_grad_(False)
    added: dict[str, Any] = {"noise_input": noise_input, "scales": multiscale}
    widths = _widths(network, names, example)
    return Discriminator(network, widths, seed=seed, guidance=guidance, **added)


def feature_discriminator(
    denoiser: Denoiser, example: Given, *, seed: int = 0, guidance: float | None = None
) -> Discriminator:
    """A frozen copy of the teacher, without adapters, with trainable heads on all its blocks.

    Arguments:
        denoiser: the teacher, of any family that has features to read.
        example: one sample, of any size, to find the widths of features with.
        seed: of the heads.
    """
    network = _copy(denoiser)
    network.requires_grad_(False)
    names = tuple(name for name in network.tap_names if ":" not in name)
    widths = _widths(network, names, example)
    return Discriminator(network, widths, kernel=3, seed=seed, guidance=guidance)


@contextmanager
def twice_differentiable(network: nn.Module) -> Iterator[None]:
    """What runs within the block has second derivatives, wherever its backward pass is run.

    Attention is computed by torch's plain operations, whose fused forms have a first derivative
    only; nothing is checkpointed, since what is computed again outside the block would be fused
    again; and autocast is off.
    """
    parts: list[Any] = [
        part for part in network.modules() if getattr(part, "gradient_checkpointing", False)
    ]
    device = next(network.parameters()).device.type
    for part in parts:
        part.gradient_checkpointing = False
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
            yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True
