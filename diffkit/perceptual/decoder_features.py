"""The latent perceptual loss of two latents: a distance between what the decoder makes of them.

Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives" (ICLR 2025, 2411.04873): with
phi_0 the output of the decoder's mid block and phi_l that of its l-th up block,

    LPL(b) = sum_l omega_l L_l(b),    omega_l = 1 / r_l,    r_l = side of phi_l / side of phi_0

where L_l is a layer's `feature_distance` under its `outlier_mask`. The sum is not divided by the
number of layers, and the decoder starts where decoding does: at the model's scale and shift, with
`post_quant_conv` where the autoencoder has one. The features of the true latents have no gradient.

Under bfloat16 autocast the value of an almost right estimate is partly a floor of rounding, as that
of decoded pictures is (`diffkit.perceptual.decoded`, with numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.models.eager import eager_terms
from diffkit.perceptual.feature_distance import FeatureTerms, Norm, Stats, feature_terms
from diffkit.perceptual.outliers import outlier_mask

__all__ = ["FeatureLoss", "PerceptualTerms", "latent_perceptual_loss", "layer_weights"]


@dataclass(frozen=True)
class FeatureLoss:
    """Which features are compared, and how.

    Attributes:
        blocks: K, up blocks behind the mid block; a decoder of fewer gives all that it has.
        norm, stats: of `feature_distance`.
        masked: whether outliers of the true features are left out.
    """

    blocks: int = 4
    norm: Norm = "spatial"
    stats: Stats = "prediction"
    masked: bool = True

    def names(self, codec: Codec) -> tuple[str, ...]:
        """The codec's names of the features."""
        return codec.feature_names[: self.blocks + 1]

    def unit(self, codec: Codec) -> int:
        """About how many times smaller the loss is than with the spatial norm, for the weight.

        A pixel's norm over C channels is as large as sqrt(C) deviations of one, so the squared
        distance over it is C times smaller: C of the mid block, whose layer weighs most.
        """
        return 1 if self.norm == "spatial" else int(codec.vae.config.block_out_channels[-1])


class PerceptualTerms(NamedTuple):
    """The loss of each sample and what is worth watching, float32.

    Attributes:
        value: LPL(b), (B,), the only one with a gradient.
        predicted_variance, target_variance: (B, layers), the sum over channels of the variance over
            kept pixels. Their ratio must move towards 1; above it the loss was lowered by inflating
            the prediction's.
        largest: (B,), the largest (mean squared difference) / (variance + 1e-6) of a channel: a
            nearly constant channel can outweigh all others.
    """

    value: Tensor
    predicted_variance: Tensor
    target_variance: Tensor
    largest: Tensor


def layer_weights(sides: Sequence[int]) -> tuple[float, ...]:
    """omega_l = 1 / r_l from the sides of the feature maps, the first of which is phi_0's.

    (1, 1/2, 1/4, 1/8, 1/8) for the five maps of a decoder of factor 8, (1, 1/2, 1/4, 1/4) for the
    four of one of factor 4.
    """
    return tuple(sides[0] / side for side in sides)


def latent_perceptual_loss(
    codec: Codec, predicted: Tensor, target: Tensor, loss: FeatureLoss, *, lean: bool = False
) -> PerceptualTerms:
    """LPL of predicted and true latents (B, C, h, w), B at least 1, scaled and shifted.

    Both decodes go side by side, block by block, and stop behind the last feature.

    Arguments:
        codec: its parameters must be frozen.
        predicted: the estimate of z_0, in at least float32; gradients flow to it.
        target: z_0.
        loss: see `FeatureLoss`.
        lean: take the gradient at once, one sample at a time, and keep nothing of the decoder for
            the backward pass (`eager`). Meanwhile there are the inputs of the decoder's layers, the
            gradient of each layer's features, and one ResNet's activations. Same value and
            gradient, at the cost of a further decode without a graph.
    """
    if not lean:
        return _terms(codec, predicted, target, loss, lean=False)
    found = eager_terms(lambda p, t: _terms(codec, p, t, loss, lean=True), predicted, target)
    return PerceptualTerms(*found)


def _terms(
    codec: Codec, predicted: Tensor, target: Tensor, loss: FeatureLoss, lean: bool
) -> PerceptualTerms:
    names = loss.names(codec)
    ours = codec.features(predicted, names, checkpoint="resnet" if lean else None)
    theirs = codec.features(target, names)
    layers, sides = [], []
    for _ in names:
        with torch.no_grad():
            true = next(theirs)
        sides.append(true.shape[-1])
        layers.append(_layer(next(ours), true, sides[-1] // sides[0], loss, lean))
    weights = torch.tensor(layer_weights(sides)).to(layers[0].value)
    found = PerceptualTerms(*(torch.stack(column, dim=1) for column in zip(*layers, strict=True)))
    return found._replace(value=(found.value * weights).sum(1), largest=found.largest.amax(1))


def _layer(
    predicted: Tensor, target: Tensor, ratio: int, loss: FeatureLoss, lean: bool
) -> PerceptualTerms:
    """One layer: L_l and its numbers, each (B,)."""
    keep = outlier_mask(target, ratio) if loss.masked else None

    def terms(p: Tensor, t: Tensor, m: Tensor | None) -> FeatureTerms:
        return feature_terms(p, t, m, norm=loss.norm, stats=loss.stats)

    if lean:
        # What is kept of the true features and the mask is the gradient; both end here.
        found = FeatureTerms(*eager_terms(terms, predicted, target, keep))
    else:
        found = terms(predicted, target, keep)
    return PerceptualTerms(*found)
