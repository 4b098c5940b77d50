"""LatentLPIPS: a learned perceptual distance of latents, without decoding them, and its ensemble.

Kang et al., "Distilling Diffusion Models into Conditional GANs" (ECCV 2024, 2405.05967). A VGG16
that was trained on latents gives features f^l in five stages, and with 1x1 heads w^l >= 0

    d(a, b) = sum_l mean_hw sum_c w^l_c (g^l_c(a) - g^l_c(b))^2,   g = f / sqrt(sum_c f^2 + 1e-8)

    E-LatentLPIPS(a, b) = E_T d(T a, T b)

over random maps T of both sides (`diffkit.perceptual.latent_augment`); one draw a step is the
estimator. Latents are scaled and shifted as a denoiser sees them. Values of different networks are
on different scales: weights of a loss are not to be carried over.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.eager import without_autocast
from diffkit.perceptual.latent_augment import Augmentation, check_kinds, draw
from diffkit.randomness import SampleKeys

__all__ = [
    "ELatentLpips",
    "LatentLpips",
    "LatentLpipsConfig",
    "LatentTrunk",
    "Layout",
    "NormKind",
    "e_latentlpips",
    "unit_features",
]

Layout = Literal["official", "pre_pool"]
NormKind = Literal["bn", "gn", "none"]

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Of each stage, as in VGG16."""

NORM_EPS = 1e-8


@dataclass(frozen=True)
class LatentLpipsConfig:
    """What a `LatentLpips` is, kept in its `config.json`.

    Attributes:
        channels: C of the latents.
        width: of the first stage; the five have 1, 2, 4, 8 and 8 times as many. VGG16 has 64.
        layout: "official" pools behind the fourth and the fifth stage, and takes these two stages'
            features after the pool. "pre_pool" pools before them: the same sides of the features,
            (1, 1, 1, 1/2, 1/4) of the latents', for 0.4 of the arithmetic.
        norm: "bn" (batch normalisation by the stored statistics), "gn" (groups of at least two
            channels, 32 where they divide) or "none".
        augmentation: the kinds of `latent_augment` that the network is meant to be used with; ""
            for latents that need no ensemble.
        provenance: where the network comes from: autoencoder, data, scores.
    """

    channels: int
    width: int = 64
    layout: Layout = "official"
    norm: NormKind = "bn"
    augmentation: str = "bg"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in ("official", "pre_pool"):
            raise UserError(f"layout {self.layout!r}: unknown; use 'official' or 'pre_pool'.")
        if self.norm not in ("bn", "gn", "none"):
            raise UserError(f"norm {self.norm!r}: unknown; use 'bn', 'gn' or 'none'.")
        check_kinds(self.augmentation)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the five features."""
        return tuple(self.width * factor for factor in (1, 2, 4, 8, 8))


class LatentTrunk(nn.Module):
    """VGG16's convolutions on latents: five features, an `nn.Module` like any other in training.

    The layers are counted as torchvision counts `vgg16_bn().features`, the left out pools too
    ("official"), so `slice4.24` is its `features.24`.
    """

    def __init__(self, config: LatentLpipsConfig) -> None:
        super().__init__()
        self.config = config
        channels, index = config.channels, 0
        for stage, (width, depth) in enumerate(zip(config.widths, CONVOLUTIONS, strict=True)):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            pooled = stage >= 3
            if config.layout == "pre_pool" and pooled:
                layers[str(index)] = nn.MaxPool2d(2)
                index += 1
            for _ in range(depth):
                for layer in _block(channels, width, config.norm):
                    layers[str(index)] = layer
                    index += 1
                channels = width
            if config.layout == "official":
                if pooled:
                    layers[str(index)] = nn.MaxPool2d(2)
                index += 1
            self.add_module(f"slice{stage + 1}", nn.Sequential(layers))

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Features of latents (B, C, h, w): (B, width_l, h_l, w_l) of each stage."""
        features = []
        for stage in self.children():
            latents = stage(latents)
            features.append(latents)
        return features


def _block(channels: int, width: int, norm: NormKind) -> list[nn.Module]:
    """Convolution, normalisation and rectifier, initialised as torchvision's VGG."""
    convolution = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    layers: list[nn.Module] = [convolution]
    if norm == "bn":
        layers.append(nn.BatchNorm2d(width))
    elif norm == "gn":
        layers.append(nn.GroupNorm(math.gcd(32, width // 2), width))
    return [*layers, nn.ReLU(inplace=True)]


class LatentLpips(nn.Module):
    """d(a, b): frozen, in evaluation mode and in float32 whatever is done to a module around it.

    Moving it to a device works as usual; `train()` and casts to half precision leave it as it is,
    casts to float64 do not. The heads start at 1, the sum that nobody calibrated.
    """

    def __init__(self, config: LatentLpipsConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = LatentTrunk(config)
        self.heads = nn.ParameterList([torch.ones(width) for width in config.widths])
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LatentLpips:
        """Stay in evaluation mode: statistics of a batch would move with every call."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentLpips:
        wide = (torch.float32, torch.float64)

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast_down = moved.is_floating_point() and moved.dtype not in wide
            return tensor.to(moved.device) if cast_down else moved

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def features(self, latents: Tensor) -> list[Tensor]:
        """The trunk's five features of latents (B, C, h, w) in its dtype, without autocast.

        Raises `UserError` for latents of another number of channels.
        """
        weight = self.heads[0]
        expected = self.config.channels
        if latents.ndim != 4 or latents.shape[1] != expected:
            raise UserError(
                f"latents of shape {tuple(latents.shape)}: this LatentLPIPS network takes (B, "
                f"{expected}, h, w); use one that was trained for this autoencoder."
            )
        x = latents.to(weight.dtype)
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        with without_autocast(x.device.type):
            features: list[Tensor] = self.trunk(x)
        return features

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """d(a, b) of latents (B, C, h, w) each: (B,), at least float32, 0 for equal ones.

        Symmetric, and not negative. Gradients reach the sides that ask for one; the other is
        computed without. Raises `UserError` for latents of two shapes, or of other channels.
        """
        if a.shape != b.shape:
            raise UserError(f"latents of shapes {tuple(a.shape)} and {tuple(b.shape)}: no pairs.")
        parts = []
        pairs = zip(self._normed(a), self._normed(b), self.heads, strict=True)
        for x, y, head in pairs:
            change = (x - y).square()
            parts.append((change * head[:, None, None]).sum(1).mean((1, 2)))
        return torch.stack(parts).sum(0)

    def _normed(self, latents: Tensor) -> list[Tensor]:
        return [unit_features(f) for f in self.features(latents)]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """`distance` in the shape of other LPIPS networks, (B, 1, 1, 1)."""
        return self.distance(a, b)[:, None, None, None]


def unit_features(features: Tensor) -> Tensor:
    """f / sqrt(sum_c f^2 + 1e-8) of maps (B, C, h, w): finite gradients at zero features too."""
    return features * (features.square().sum(1, keepdim=True) + NORM_EPS).rsqrt()


def e_latentlpips(
    network: LatentLpips,
    a: Tensor,
    b: Tensor,
    augmentation: Augmentation | None,
    l1_weight: float = 0.0,
) -> Tensor:
    """d(T a, T b) + l1_weight mean |a - b|, (B,), at least float32.

    Samples do not see each other: parts of a batch with their rows of the augmentation give the
    same values. `eager` functions may therefore take `augmentation.parameters` apart.

    Arguments:
        network: d; it gets no gradient.
        a, b: latents (B, C, h, w), scaled as the network's; gradients reach the sides that ask.
        augmentation: T, one a sample, on the latents' device; None for d(a, b) itself.
        l1_weight: 0 as in the paper; the authors' package adds the term with weight 1, on the
            latents as they are.

    Raises `UserError` for latents of two shapes, or of other channels than the network's.
    """
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    with without_autocast(a.device.type):
        pair = (a, b) if augmentation is None else augmentation.apply(a, b)
        value = network.distance(*pair)
        if l1_weight:
            value = value + l1_weight * (a - b).abs().flatten(1).mean(1)
    return value


class ELatentLpips(nn.Module):
    """E-LatentLPIPS with its settings: a network, the kinds of maps, the weight of the L1 term.

    Arguments:
        network: d.
        kinds: of `latent_augment`; the network's own if None, "" for plain LatentLPIPS.
        l1_weight: see `e_latentlpips`.
    """

    def __init__(
        self, network: LatentLpips, kinds: str | None = None, l1_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.network = network
        self.kinds = network.config.augmentation if kinds is None else kinds
        check_kinds(self.kinds)
        self.l1_weight = l1_weight

    def draw(
        self,
        source: SampleKeys | torch.Generator,
        shape: Sequence[int],
        purpose: str = "latent augmentation",
    ) -> Augmentation:
        """T of each sample of latents of `shape`, on the CPU; see `latent_augment.draw`."""
        return draw(source, shape, self.kinds, purpose)

    def distance(self, a: Tensor, b: Tensor, augmentation: Augmentation) -> Tensor:
        """`e_latentlpips` of latents (B, C, h, w) each, (B,); T on their device."""
        return e_latentlpips(self.network, a, b, augmentation, self.l1_weight)

    def rows(self, a: Tensor, b: Tensor, parameters: Tensor) -> Tensor:
        """`distance` of tensors alone, for `eager`: `parameters` are those of a draw of ours."""
        return self.distance(a, b, Augmentation(self.kinds, parameters))

    def forward(self, a: Tensor, b: Tensor, augmentation: Augmentation) -> Tensor:
        """`distance` in the shape of other LPIPS networks, (B, 1, 1, 1)."""
        return self.distance(a, b, augmentation)[:, None, None, None]
