"""Codecs without a posterior: VQ latents beside `VQModel`, pixels that are their own latents."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.codec_kinds import PixelCodec, VqCodec, open_codec
from diffkit.randomness import normal
from tests.tiny import vae
from tests.tiny_labels import vqvae


def images(*shape):
    return normal(shape, 0, "images").clamp(-1, 1)


@pytest.fixture(scope="module")
def vq():
    torch.manual_seed(0)
    return VqCodec(vqvae(vq_embed_dim=2).eval())


def test_the_kind_follows_from_the_network():
    assert type(open_codec(vae(), 4)) is Codec
    assert type(open_codec(vqvae(), 3)) is VqCodec
    assert type(open_codec(None, 3)) is PixelCodec
    with pytest.raises(UserError, match="norm_type 'spatial'"):
        open_codec(vqvae(norm_type="spatial", block_out_channels=(32, 32)), 3)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("AutoencoderDC", "is a AutoencoderDC, .* AutoencoderKL, VQModel"),
        ("AutoencoderKLQwenImage", "AutoencoderKLQwenImage, which diffkit cannot take apart"),
        ("AutoencoderKLWan", "AutoencoderKLWan, .* give a model whose autoencoder"),
        ("AsymmetricAutoencoderKL", "AsymmetricAutoencoderKL"),
        ("AutoencoderTiny", "AutoencoderTiny, .* the AutoencoderKL that it was made from"),
    ],
)
def test_other_autoencoders_are_refused_by_name(network, message):
    """All went to the codec of `AutoencoderKL`, and broke at the first attribute they lack."""
    kind = getattr(diffusers, network)
    with torch.device("meta"), pytest.raises(UserError, match=message):
        open_codec(kind(), 4)


def test_vq_equals_the_stock_model(vq):
    network, pictures = vq.vae, images(2, 3, 16, 12)
    assert (vq.factor, vq.channels, vq.latent_shape(16, 12)) == (2, 2, (2, 8, 6))
    with torch.no_grad():
        expected = network.encode(pictures).latents
        moments = vq.encode_moments(pictures)
        assert torch.allclose(moments, expected, atol=1e-6)
        latents = vq.encode(pictures, eps=normal(moments.shape, 1))
        assert torch.allclose(latents, expected * network.config.scaling_factor, atol=1e-6)
        stock = network.decode(latents / network.config.scaling_factor).sample
        assert torch.equal(vq.decode(latents), stock)
        for checkpoint in ("block", "resnet"):
            assert torch.equal(vq.decode(latents, checkpoint), stock)
        assert torch.equal(vq.decoder_features(latents)["out"], stock)
        assert vq.feature_names == ("mid", "up_0", "up_1")


def test_gradients_pass_through_the_codes(vq):
    """Straight through: d(code) = d(latent), so that the gradient is the decoder's at the code."""
    latents, cotangent = normal((1, 2, 8, 8), 2, "z"), normal((1, 3, 16, 16), 2, "c")
    found = vq.vjp(latents, cotangent)
    scale = vq.vae.config.scaling_factor
    with torch.no_grad():
        code = vq.vae.quantize(latents / scale)[0]
    code.requires_grad_()
    image = vq.vae.decode(code, force_not_quantize=True).sample
    (expected,) = torch.autograd.grad((image * cotangent).sum(), code)
    assert torch.allclose(found, expected / scale, atol=1e-5)
    assert found.abs().max() > 0


def test_vq_has_no_tiles(vq):
    with pytest.raises(UserError, match="VQModel: there is no tiled decoding"):
        vq.decode(normal((1, 2, 8, 8), 0), tiled=True)


def test_pixels_are_their_own_latents():
    codec, pictures = PixelCodec(), images(2, 3, 5, 7)
    assert (codec.factor, codec.channels, codec.context) == (1, 3, 0)
    assert codec.latent_shape(5, 7) == (3, 5, 7)
    for latents in (codec.encode(pictures), codec.encode(pictures, eps=normal((2, 3, 5, 7), 1))):
        assert torch.equal(latents, pictures)
    assert torch.equal(codec.decode(pictures, "resnet"), pictures)
    part = codec.decode(pictures, crop=(1, 2, 3, 4))
    assert torch.equal(part, pictures[..., 1:4, 2:6])
    cotangent = normal((2, 3, 5, 7), 3)
    assert torch.equal(codec.vjp(pictures, cotangent), cotangent)
    assert torch.equal(codec.encode_vjp(pictures, cotangent), cotangent)
    assert list(codec.decoder_features(pictures)) == ["out"] and codec.feature_names == ()
    assert codec.decode(pictures.bfloat16()).dtype == torch.float32


def test_grey_pictures_have_one_channel():
    codec, grey = PixelCodec(1), images(2, 1, 4, 4)
    pictures = grey.expand(2, 3, 4, 4)
    assert torch.allclose(codec.encode(pictures), grey, atol=1e-6)
    assert torch.equal(codec.decode(grey), pictures)
    assert torch.allclose(codec.vjp(grey, torch.ones(2, 3, 4, 4)), torch.full((2, 1, 4, 4), 3.0))
    assert codec.fingerprint() != PixelCodec(3).fingerprint()


def test_what_is_no_picture_is_refused():
    codec = PixelCodec()
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        codec.encode(images(1, 1, 4, 4))
    with pytest.raises(UserError, match=r"\(B, 3, h, w\)"):
        codec.decode(images(1, 4, 4, 4))
    with pytest.raises(UserError, match="1 or 3 channels, not 2"):
        PixelCodec(2)
    with pytest.raises(UserError, match="pixels: there is no tiled"):
        codec.decode(images(1, 3, 4, 4), tiled=True)
