"""The latent perceptual loss of two latents: invariants, weights, routing, what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.models.codec_kinds import VqCodec
from diffkit.models.cost import Live, saved_for_backward
from diffkit.perceptual.decoder_features import (
    FeatureLoss,
    latent_perceptual_loss,
    layer_weights,
)
from diffkit.perceptual.feature_distance import feature_distance
from diffkit.perceptual.outliers import outlier_mask
from tests.tiny import vae
from tests.tiny_labels import vqvae

VARIANTS = [
    FeatureLoss(),
    FeatureLoss(masked=False),
    FeatureLoss(stats="prediction_detached"),
    FeatureLoss(stats="target"),
    FeatureLoss(stats="own"),
    FeatureLoss(norm="channel_norm_target"),
]


def deep(**config: Any) -> Codec:
    """Factor 8: four up blocks, as most latent diffusion models have."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    kinds |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    return Codec(vae(**widths, **kinds, **config).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return deep()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Predicted and true latents of three samples."""
    true = normal(3, 4, 4, 4)
    return true + 0.2 * normal(3, 4, 4, 4, seed=2), true


@pytest.mark.parametrize("loss", VARIANTS, ids=str)
@pytest.mark.parametrize("lean", [False, True])
def test_equal_latents_have_no_distance(
    loss: FeatureLoss, lean: bool, codec: Codec, pair: tuple[Tensor, Tensor]
) -> None:
    """Exactly 0, also under the mask: the public script multiplies one branch by it."""
    _, true = pair
    leaf = true.clone().requires_grad_()
    terms = latent_perceptual_loss(codec, leaf, true, loss, lean=lean)
    assert terms.value.tolist() == [0.0] * 3
    (grad,) = torch.autograd.grad(terms.value.sum(), leaf)
    assert not grad.any()
    assert torch.equal(terms.predicted_variance, terms.target_variance)


def test_the_value_is_the_weighted_sum_over_layers(
    codec: Codec, pair: tuple[Tensor, Tensor]
) -> None:
    """Weights 1, 1/2, 1/4, 1/8, 1/8, not divided by the number of layers."""
    features = [list(codec.features(z, codec.feature_names)) for z in pair]
    expected = torch.zeros(3)
    for p, t, weight, ratio in zip(*features, (1, 0.5, 0.25, 0.125, 0.125), (1, 2, 4, 8, 8)):
        expected += weight * feature_distance(p, t, outlier_mask(t, ratio))
    found = latent_perceptual_loss(codec, *pair, FeatureLoss())
    torch.testing.assert_close(found.value, expected)
    variances = [f.var((2, 3), correction=0).sum(1) for f in features[0][:2]]
    torch.testing.assert_close(found.predicted_variance[:, :2], torch.stack(variances, 1))


def test_layer_weights_come_from_shapes() -> None:
    assert layer_weights([64, 128, 256, 512, 512]) == (1, 0.5, 0.25, 0.125, 0.125)
    assert layer_weights([16, 32, 64, 64]) == (1, 0.5, 0.25, 0.25)


def test_samples_stand_alone(codec: Codec, pair: tuple[Tensor, Tensor]) -> None:
    """Permuted with the batch, and the same beside any other: no statistics over the batch."""
    order = torch.tensor([2, 0, 0, 1])
    whole = latent_perceptual_loss(codec, *pair, FeatureLoss())
    other = latent_perceptual_loss(codec, *(z[order] for z in pair), FeatureLoss())
    for a, b in zip(whole, other, strict=True):
        assert len(b) == 4
        torch.testing.assert_close(b, a[order], rtol=1e-4, atol=1e-6)


def test_blocks_are_truncated_and_clamped(codec: Codec, pair: tuple[Tensor, Tensor]) -> None:
    calls: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(codec.vae.decoder.up_blocks)
    ]
    resnets = [
        block.resnets[0].register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(codec.vae.decoder.up_blocks)
    ]
    found = latent_perceptual_loss(codec, *pair, FeatureLoss(blocks=2))
    for handle in (*handles, *resnets):
        handle.remove()
    assert sorted(calls) == [0, 0, 1, 1] and found.predicted_variance.shape == (3, 3)
    few = Codec(vae().eval().requires_grad_(False))
    assert FeatureLoss(blocks=4).names(few) == ("mid", "up_0", "up_1")
    assert FeatureLoss(blocks=0).names(few) == ("mid",)


@pytest.mark.parametrize("loss", VARIANTS, ids=str)
def test_the_lean_gradient_is_the_plain_one(
    loss: FeatureLoss, codec: Codec, pair: tuple[Tensor, Tensor]
) -> None:
    predicted, true = pair
    weights = torch.tensor([1.0, 0.0, -2.0])
    found = []
    for lean in (False, True):
        leaf = predicted.clone().requires_grad_()
        terms = latent_perceptual_loss(codec, 2 * leaf, true, loss, lean=lean)
        assert not any(term.requires_grad for term in terms[1:])
        (grad,) = torch.autograd.grad((weights * terms.value).sum(), leaf)
        found.append((*(term.detach() for term in terms), grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0][-1][0].any() and not found[0][-1][1].any()


def test_no_gradient_reaches_the_decoder_or_the_true_latents(pair: tuple[Tensor, Tensor]) -> None:
    for codec in (deep(), VqCodec(vqvae().eval().requires_grad_(False))):
        leaf, true = (z[:, : codec.channels].clone().requires_grad_() for z in pair)
        latent_perceptual_loss(codec, leaf, true, FeatureLoss()).value.sum().backward()
        assert leaf.grad is not None and leaf.grad.any() and true.grad is None
        assert all(p.grad is None for p in codec.vae.parameters())


def test_statistics_detached_or_not_have_equal_values(
    codec: Codec, pair: tuple[Tensor, Tensor]
) -> None:
    predicted, true = pair
    found = []
    for stats in ("prediction", "prediction_detached"):
        leaf = predicted.clone().requires_grad_()
        value = latent_perceptual_loss(codec, leaf, true, FeatureLoss(stats=stats)).value
        found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1], rtol=0.01)


def test_the_largest_channel_is_told(codec: Codec, pair: tuple[Tensor, Tensor]) -> None:
    """The largest of all layers and channels: mean (phi_hat - phi)^2 / (var phi_hat + 1e-6)."""
    found = latent_perceptual_loss(codec, *pair, FeatureLoss(masked=False)).largest
    features = [list(codec.features(z, codec.feature_names)) for z in pair]
    channels = [
        (p - t).square().mean((2, 3)) / (p.var((2, 3), correction=0) + 1e-6)
        for p, t in zip(*features, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(channels, 1).amax(1))


# -- memory -------------------------------------------------------------------------------------

MIB = 2**20
STAGES = (140, 88, 352, 800, 1344)
"""MiB that autograd keeps of mid, up_0, ..., up_3 of Stable Diffusion's decoder in 16 bits, for a
picture of 512 pixels."""
MAPS = (4, 16, 64, 128, 64)
"""MiB of their outputs."""
MASKS = (0, 0, 32, 64, 32)
WORKING = (228, 228, 512, 912, 1296)
"""MiB that there are at most while the gradient is taken at once, for K = 0, ..., 4."""


def stable_diffusion() -> Codec:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    kinds |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        network = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **kinds
        )
    codec = Codec(network.eval().requires_grad_(False))
    return codec.to(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "blocks", [0, 4, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3))]
)
def test_memory_at_512_pixels(blocks: int, record_property: pytest.RecordProperty) -> None:
    """Beside the decoder's own graph the loss keeps the maps of both and the masks, as they are.

    Plain autograd would keep 5484 MiB at K = 4, the decoder's own graph included. With the gradient
    taken at once nothing is left after the forward pass but one tensor of the latents' size; while
    it is taken there are at most 1296 MiB. Checkpoints around blocks and around each layer's loss
    need about as much, 694 that wait for the backward pass and 576 of the block that is then made
    anew, but for all samples at once.
    """
    codec, loss = stable_diffusion(), FeatureLoss(blocks)
    true = torch.empty(1, 4, 64, 64, device="meta")
    predicted = torch.empty_like(true).requires_grad_()
    with saved_for_backward([codec.vae]) as plain:
        latent_perceptual_loss(codec, predicted, true, loss)
    parts = (STAGES, MAPS, MASKS)
    expected = sum(sum(part[: blocks + 1]) for part in parts) + MAPS[blocks]
    assert plain.bytes / MIB == pytest.approx(expected, abs=1)
    with Live() as live:
        value = latent_perceptual_loss(codec, predicted, true, loss, lean=True).value
    assert value.grad_fn is not None
    kept = sum(t.numel() * t.element_size() for t in value.grad_fn.saved_tensors)  # type: ignore[attr-defined]
    working = live.peak_bytes
    told = [f"{size / MIB:.4g}" for size in (plain.bytes, kept, working)]
    record_property("mib", "plain {}, lean {}, lean while it works {}".format(*told))
    assert kept == 4 * 64 * 64 * 4
    assert working / MIB == pytest.approx(WORKING[blocks], abs=1)
