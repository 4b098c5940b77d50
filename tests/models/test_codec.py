"""The codec: exact agreement with diffusers, memory of the checkpoint modes, crops, gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.codec import Codec


def build(**overrides: Any) -> Codec:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
    }
    return Codec(AutoencoderKL(**{**settings, **overrides}).eval().requires_grad_(False))


SD3 = {
    "shift_factor": 0.0609,
    "scaling_factor": 1.5305,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("overrides", [{}, SD3, {"mid_block_add_attention": False}])
def test_encode_and_decode_are_those_of_diffusers(overrides: dict[str, Any]) -> None:
    codec = build(**overrides)
    vae, images, eps = codec.vae, normal(2, 3, 32, 24), normal(2, codec.channels, 16, 12, seed=2)
    posterior = vae.encode(images).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    moments = codec.encode_moments(images)
    assert torch.equal(moments, posterior.parameters)
    assert torch.allclose(codec.mean(moments), (posterior.mean - shift) * scale, atol=1e-6)
    expected = (posterior.mean + posterior.std * eps - shift) * scale
    assert torch.allclose(codec.sample(moments, eps), expected, atol=1e-6)
    assert torch.equal(codec.encode(images, eps), codec.sample(moments, eps))
    latents = codec.encode(images)
    assert torch.equal(codec.decode(latents), vae.decode(latents / scale + shift).sample)
    assert codec.latent_shape(32, 24) == (codec.channels, 16, 12) == tuple(latents.shape[1:])


def test_channelwise_statistics_of_latents() -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    codec = build(latents_mean=mean, latents_std=std)
    moments = normal(1, 8, 4, 4)
    unscaled = moments[:, :4]
    expected = (unscaled - torch.tensor(mean).view(1, 4, 1, 1)) / torch.tensor(std).view(1, 4, 1, 1)
    assert torch.allclose(codec.mean(moments), expected * codec.vae.config.scaling_factor)
    image = codec.vae.decode(unscaled).sample
    assert torch.allclose(codec.decode(codec.mean(moments)), image, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_at_least_float32(dtype: torch.dtype) -> None:
    codec = build()
    reference = codec.decode(normal(1, 4, 8, 8))
    codec.to(dtype=dtype)
    moments, image = codec.encode_moments(normal(1, 3, 16, 16)), codec.decode(normal(1, 4, 8, 8))
    expected = torch.promote_types(dtype, torch.float32)
    assert moments.dtype == expected and codec.vae.dtype == dtype
    assert image.dtype == expected
    assert (image - reference).abs().max() < 0.1


def test_force_upcast_computes_in_float32_and_leaves_the_shared_weights() -> None:
    half = build().to(dtype=torch.float16)
    assert half.dtype == torch.float32 and half.vae.dtype == torch.float16
    single = build()
    single.vae.load_state_dict({k: v.float() for k, v in half.vae.state_dict().items()})
    latents = normal(1, 4, 8, 8)
    assert torch.equal(half.decode(latents), single.decode(latents))
    assert build(force_upcast=False).to(dtype=torch.float16).dtype == torch.float16


class Held:
    """A tensor that autograd keeps; it reports its storage to the meter while it lives."""

    def __init__(self, meter: Meter, x: Tensor) -> None:
        self.meter, self.x, self.key = meter, x, x.untyped_storage()._cdata
        meter.add(self.key, x.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.meter.count[self.key] -= 1


class Meter:
    """Bytes that autograd keeps for the backward pass, weights not counted: now, and at most."""

    def __init__(self, codec: Codec) -> None:
        self.weights = {p.untyped_storage()._cdata for p in codec.vae.parameters()}
        self.count: Counter[int] = Counter()
        self.size: dict[int, int] = {}
        self.peak = 0

    def add(self, key: int, nbytes: int) -> None:
        self.count[key] += 1
        self.size[key] = nbytes
        self.peak = max(self.peak, self.now())

    def now(self) -> int:
        return sum(self.size[key] for key, held in self.count.items() if held > 0)

    def watch(self) -> Any:
        def pack(x: Tensor) -> Tensor | Held:
            return x if x.untyped_storage()._cdata in self.weights else Held(self, x)

        def unpack(held: Tensor | Held) -> Tensor:
            return held.x if isinstance(held, Held) else held

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def saved_bytes(codec: Codec, latents: Tensor, **options: Any) -> int:
    meter = Meter(codec)
    with meter.watch():
        image = codec.decode(latents, **options)
    assert image.requires_grad
    return meter.now()


def test_checkpoint_modes_give_equal_gradients_and_keep_less(
    record_property: pytest.RecordProperty,
) -> None:
    codec = build(block_out_channels=(8, 16, 16), layers_per_block=2, **_three_blocks())
    codec.vae.requires_grad_(True)
    cotangent = normal(2, 3, 64, 64, seed=3)

    def gradients(checkpoint: Any) -> tuple[Tensor, ...]:
        latents = normal(2, 4, 16, 16).requires_grad_()
        image = codec.decode(latents, checkpoint=checkpoint)
        weights = [codec.vae.decoder.conv_in.weight, codec.vae.decoder.conv_out.weight]
        return (image, *torch.autograd.grad(image, [latents, *weights], cotangent))

    plain = gradients(None)
    for mode in ("block", "resnet"):
        for a, b in zip(plain, gradients(mode), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6), mode
    latents = normal(2, 4, 16, 16).requires_grad_()
    sizes = {m: saved_bytes(codec, latents, checkpoint=m) for m in (None, "block", "resnet")}
    print("saved bytes", sizes)
    record_property("saved_bytes", str(sizes))
    assert sizes["block"] < 0.2 * sizes[None]
    assert sizes["resnet"] < 0.5 * sizes[None]


def _three_blocks() -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }


def test_memory_of_stable_diffusions_vae_at_512_pixels() -> None:
    """The true shapes, on the meta device: sizes without arithmetic."""
    with torch.device("meta"):
        codec = build(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=32,
        )
        latents = torch.empty(1, 4, 64, 64).requires_grad_()
    crop = {"crop": (28, 28, 8, 8), "context": 4}
    options = {"plain": {}, "block": {"checkpoint": "block"}, "resnet": {"checkpoint": "resnet"}}
    sizes = {k: saved_bytes(codec, latents, **o) for k, o in {**options, "crop": crop}.items()}
    print("kept after the forward pass, MiB:", {k: v >> 20 for k, v in sizes.items()})
    assert sizes["block"] < 0.12 * sizes["plain"]
    assert sizes["resnet"] < 0.25 * sizes["plain"]
    assert sizes["crop"] < 0.15 * sizes["plain"]


def test_attention_inside_up_blocks_runs_unit_by_unit() -> None:
    codec = build(
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    )
    latents, images = normal(1, 4, 8, 8), normal(1, 3, 16, 16)
    expected = codec.vae.decode(latents / codec.vae.config.scaling_factor).sample
    assert torch.equal(codec.decode(latents), expected)
    assert torch.equal(
        codec.encode_moments(images), codec.vae.encode(images).latent_dist.parameters
    )


def test_unknown_checkpoint_mode_is_refused() -> None:
    with pytest.raises(UserError, match="'layer'.*'block' or 'resnet'"):
        build().decode(normal(1, 4, 8, 8), checkpoint="layer")  # type: ignore[arg-type]


# -- crops --------------------------------------------------------------------------------------


def test_crop_is_exact_where_only_convolutions_reach() -> None:
    """Without GroupNorm in the up path a crop equals the full decode; attention may stay on."""
    codec = build()
    for name, module in list(codec.vae.decoder.named_modules()):
        if isinstance(module, nn.GroupNorm) and not name.startswith("mid_block"):
            parent = codec.vae.decoder.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    latents = normal(1, 4, 32, 32)
    full = codec.decode(latents)[..., 2 * 12 : 2 * 20, 2 * 11 : 2 * 21]
    crop = (12, 11, 8, 10)
    assert torch.allclose(codec.decode(latents, crop=crop), full, atol=1e-5)
    less = codec.decode(latents, crop=crop, context=codec.context - 2)
    assert not torch.allclose(less, full, atol=1e-5)


def test_crop_with_normalisation_gets_better_with_context() -> None:
    codec = build()
    latents = normal(1, 4, 32, 32)
    full = codec.decode(latents)
    part = full[..., 20:44, 24:40]
    errors = [
        float((codec.decode(latents, crop=(10, 12, 12, 8), context=c) - part).abs().max())
        for c in (0, 8, 32)
    ]
    print("largest error with 0, 8, 32 pixels of context", errors)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == 0.0
    assert torch.equal(codec.decode(latents, crop=(0, 0, 32, 32)), full)


def test_crop_passes_gradients_and_checkpoints() -> None:
    codec = build()
    grads = []
    for checkpoint in (None, "block", "resnet"):
        latents = normal(1, 4, 16, 16).requires_grad_()
        codec.decode(latents, checkpoint=checkpoint, crop=(2, 2, 4, 4)).sum().backward()  # type: ignore[arg-type, no-untyped-call]
        assert latents.grad is not None
        grads.append(latents.grad)
    assert all(torch.allclose(grads[0], g, atol=1e-6) for g in grads[1:])


@pytest.mark.parametrize("crop", [(-1, 0, 4, 4), (0, 0, 0, 4), (5, 0, 4, 4), (0, 5, 4, 4)])
def test_crop_outside_is_refused(crop: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="does not lie inside latents of 8x8"):
        build().decode(normal(1, 4, 8, 8), crop=crop)


def test_context_without_crop_is_refused() -> None:
    with pytest.raises(UserError, match="crop"):
        build().decode(normal(1, 4, 8, 8), context=2)


# -- features and products ----------------------------------------------------------------------


def test_decoder_features_in_order_and_truncated() -> None:
    codec = build()
    latents = normal(1, 4, 8, 8)
    features = codec.decoder_features(latents)
    assert list(features) == ["mid", "up_0", "up_1", "out"]
    assert torch.equal(features["out"], codec.decode(latents))
    assert [f.shape[-1] for f in features.values()] == [8, 16, 16, 16]
    calls: list[str] = []
    for i, block in enumerate(codec.vae.decoder.up_blocks):
        block.resnets[0].register_forward_hook(lambda *_, i=i: calls.append(f"up_{i}"))
    some = codec.decoder_features(latents, ["up_0", "mid"])
    assert list(some) == ["mid", "up_0"] and calls == ["up_0"]
    assert torch.equal(some["up_0"], features["up_0"])
    with pytest.raises(UserError, match=r"\['up_9'\].*'mid', 'up_0', 'up_1', 'out'"):
        codec.decoder_features(latents, ["up_9"])


def test_features_of_two_decodes_side_by_side() -> None:
    """Each step runs in the grad mode in which it is asked for, and nothing runs ahead."""
    codec, calls = build(), []
    for i, block in enumerate(codec.vae.decoder.up_blocks):
        block.resnets[0].register_forward_hook(lambda *_, i=i: calls.append(i))
    names = codec.feature_names
    assert names == ("mid", "up_0", "up_1")
    first = codec.features(normal(1, 4, 8, 8).requires_grad_(), names)
    second = codec.features(normal(1, 4, 8, 8, seed=5).requires_grad_(), names)
    assert next(first).requires_grad and calls == []
    with torch.no_grad():
        assert not next(second).requires_grad
        next(second)
    assert calls == [0] and next(first).requires_grad and calls == [0, 0]
    with pytest.raises(UserError, match="up_9"):
        codec.features(normal(1, 4, 8, 8), ["up_9"])  # at once, not at the first step


def test_a_feature_goes_on_to_the_picture() -> None:
    """With and without post_quant_conv: what a feature is of is what is decoded.

    Features that start behind post_quant_conv are those of a latent that is never decoded.
    """
    for codec in (build(), build(**SD3)):
        latents, decoder = normal(1, codec.channels, 8, 8), codec.vae.decoder
        *_, x = codec.features(latents, codec.feature_names)
        image = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
        config = codec.vae.config
        stock = codec.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0))
        assert torch.allclose(image, stock.sample, atol=1e-5)


@pytest.mark.parametrize("checkpoint", [None, "resnet"])
def test_decodes_stay_out_of_float16_autocast(checkpoint: Any) -> None:
    """Activations of SDXL's VAE overflow in it; bfloat16 has the range and is used."""
    codec = build()

    def gradient(dtype: torch.dtype | None = None) -> Tensor:
        latents = normal(1, 4, 8, 8).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            image = codec.decode(latents, checkpoint=checkpoint)
        return torch.autograd.grad(image.square().sum(), latents)[0]

    plain, half, wide = gradient(), gradient(torch.float16), gradient(torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        images = normal(1, 3, 16, 16)
        assert next(codec.features(normal(1, 4, 8, 8), ["mid"])).dtype == torch.float32
        moments = codec.encode_moments(images)
        product = codec.vjp(normal(1, 4, 8, 8), lambda image: 2 * image)
    for found in (half, product):
        assert (found - plain).norm() < 1e-5 * plain.norm()
    assert torch.allclose(moments, codec.encode_moments(images), atol=1e-6)
    assert 1e-4 * plain.norm() < (wide - plain).norm() < 0.05 * plain.norm()


def test_decoder_features_pass_gradients() -> None:
    codec, grads = build(), []
    for checkpoint in (None, "resnet"):
        latents = normal(1, 4, 8, 8).requires_grad_()
        features = codec.decoder_features(latents, ["mid", "up_0"], checkpoint=checkpoint)  # type: ignore[arg-type]
        loss = sum((f.square().mean() for f in features.values()), torch.zeros(()))
        grads.append(torch.autograd.grad(loss, latents)[0])
    assert grads[0].abs().max() > 0 and torch.allclose(grads[0], grads[1], atol=1e-7)


@pytest.mark.parametrize("checkpoint", [None, "block", "resnet"])
def test_products_equal_autograd(checkpoint: Any) -> None:
    codec = build(**SD3)
    latents, cotangent = normal(2, 16, 8, 8).requires_grad_(), normal(2, 3, 16, 16, seed=4)
    (expected,) = torch.autograd.grad(codec.decode(latents), latents, cotangent)
    got = codec.vjp(latents.detach(), cotangent, checkpoint=checkpoint)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6) and not got.requires_grad
    images, eps = normal(2, 3, 16, 16).requires_grad_(), normal(2, 16, 8, 8, seed=5)
    weight = normal(2, 16, 8, 8, seed=6)
    (expected,) = torch.autograd.grad(codec.encode(images, eps), images, weight)
    got = codec.encode_vjp(images, weight, eps, checkpoint=checkpoint)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_peak_of_the_products_and_of_checkpointed_backward() -> None:
    """The two passes hold one piece's graph at a time; finer pieces hold less."""
    codec = build(block_out_channels=(8, 16, 16), layers_per_block=2, **_three_blocks())
    latents, cotangent = normal(1, 4, 32, 32), normal(1, 3, 128, 128)
    peaks = {}
    for mode in (None, "block", "resnet"):
        meter = Meter(codec)
        with meter.watch():
            codec.vjp(latents, cotangent, checkpoint=mode)  # type: ignore[arg-type]
        peaks[mode] = meter.peak
        assert meter.now() == 0
    print("peak of saved bytes in vjp", peaks)
    assert peaks["block"] < 0.6 * peaks[None] and peaks["resnet"] < 0.25 * peaks[None]


def test_product_of_a_loss_without_decoding_twice() -> None:
    codec = build()
    target = normal(1, 3, 16, 16, seed=7)
    latents = normal(1, 4, 8, 8).requires_grad_()
    loss = 0.5 * (codec.decode(latents) - target).square().sum()
    (expected,) = torch.autograd.grad(loss, latents)
    got = codec.vjp(latents, lambda image: image - target)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_products_run_under_no_grad_and_in_bfloat16() -> None:
    codec = build().to(dtype=torch.bfloat16)
    with torch.no_grad():
        got = codec.vjp(normal(1, 4, 8, 8), normal(1, 3, 16, 16))
    assert got.dtype == torch.float32 and bool(got.isfinite().all())


# -- tiles, sizes, fingerprints -----------------------------------------------------------------


def test_tiled_is_that_of_diffusers_and_has_no_gradient() -> None:
    codec = build(sample_size=16)
    latents = normal(1, 4, 16, 16)
    expected = codec.vae.tiled_decode(latents / codec.vae.config.scaling_factor).sample
    assert torch.equal(codec.decode(latents, tiled=True), expected)
    with pytest.raises(UserError, match="tiled=True.*no gradients"):
        codec.decode(latents.requires_grad_(), tiled=True)
    with torch.no_grad():
        codec.decode(latents, tiled=True)
    with pytest.raises(UserError, match="neither checkpoint nor crop"):
        codec.decode(latents.detach(), tiled=True, checkpoint="block")
    codec.vae.enable_tiling()
    codec.decode(latents)
    (grad,) = torch.autograd.grad(codec.decode(latents).sum(), latents)
    assert bool(grad.isfinite().all())


def test_sizes_and_shapes_are_refused_with_the_right_ones() -> None:
    codec = build(block_out_channels=(8, 8, 16), **_three_blocks())
    with pytest.raises(UserError, match="30x33.*multiples of 4.*32x32"):
        codec.encode(torch.zeros(1, 3, 30, 33))
    with pytest.raises(UserError, match=r"\(B, 3, H, W\), not \(1, 4, 8, 8\)"):
        codec.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UserError, match=r"\(B, 4, h, w\), not \(1, 3, 8, 8\)"):
        codec.decode(torch.zeros(1, 3, 8, 8))


def test_fingerprint_follows_weights_config_and_dtype_only() -> None:
    codec = build()
    first = codec.fingerprint()
    assert first == build().fingerprint() and len(first) == 32
    assert build(scaling_factor=0.2).fingerprint() != first
    codec.vae.register_to_config(_name_or_path="elsewhere")
    assert codec.fingerprint() == first
    with torch.no_grad():
        codec.vae.decoder.conv_out.bias[0] += 1e-6
    changed = codec.fingerprint()
    assert changed != first and codec.to(dtype=torch.bfloat16).fingerprint() != changed
