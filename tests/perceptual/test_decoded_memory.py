"""What decoding with gradients costs at the sizes of Stable Diffusion, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.models.cost import GradientCost, Live, count_gradient, saved_for_backward
from diffkit.models.tiny_decoder import TinyDecoder
from diffkit.perceptual.decoded import decoded_error

MIB = 2**20
SLOW = pytest.mark.slow


def sd_codec(dtype: torch.dtype) -> Codec:
    """The decoder of Stable Diffusion, 49.5 million parameters, in `dtype`."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            force_upcast=False,
        )
    return Codec(vae.requires_grad_(False)).to(dtype=dtype)


def latents(edge: int) -> Tensor:
    return torch.empty(1, 4, edge, edge, device="meta")


def saved_mib(decoder: Any, network: Any, edge: int) -> float:
    with saved_for_backward([network]) as saved:
        decoder.decode(latents(edge).requires_grad_())
    return saved.bytes / MIB


@SLOW
@pytest.mark.parametrize(
    ("edge", "half", "single", "tflop"),
    [(16, 178, 355, 0.155), (32, 717, 1424, 0.622), (64, 2916, 5744, 2.515)],
)
def test_a_decode_of_stable_diffusion(edge: int, half: int, single: int, tflop: float) -> None:
    """MiB that wait for the backward pass in fp16 and fp32, and TFLOP of the forward pass."""
    for dtype, expected in ((torch.float16, half), (torch.float32, single)):
        codec = sd_codec(dtype)
        assert saved_mib(codec, codec.vae, edge) == pytest.approx(expected, rel=0.005)
    z = latents(edge).requires_grad_()
    cost = count_gradient(lambda: codec.decode(z), z, [codec.vae])
    assert cost.forward.flops / 1e12 == pytest.approx(tflop, abs=5e-4)


def test_a_tiny_decode() -> None:
    """A tenth and less: 69, 275 and 1100 MiB in fp16 at 256, 512 and 1024 pixels."""
    with torch.device("meta"):
        network = AutoencoderTiny().half()
    assert sum(p.numel() for p in network.decoder.parameters()) == 1_222_531
    decoder = TinyDecoder(network)
    assert decoder.factor == 8
    for edge, expected in ((32, 69), (64, 275), (128, 1100)):
        assert saved_mib(decoder, network, edge) == pytest.approx(expected, rel=0.005)


def step(codec: Codec, edge: int, checkpoint: Any) -> GradientCost:
    delta = latents(edge).requires_grad_()
    call = lambda: decoded_error(codec, latents(edge), delta, checkpoint=checkpoint)  # noqa: E731
    return count_gradient(call, delta, [codec.vae])


@SLOW
def test_the_pixel_loss_of_one_sample_at_512_pixels() -> None:
    """Two decodes and a backward pass: 2.5 TFLOP each, at most as much again with checkpoints."""
    codec = sd_codec(torch.float16)
    plain, spared = (step(codec, 64, checkpoint) for checkpoint in (None, "resnet"))
    assert plain.forward.flops == spared.forward.flops
    assert plain.forward.flops / 1e12 == pytest.approx(2 * 2.515, abs=0.01)
    assert plain.backward.flops / 1e12 == pytest.approx(2.57, abs=0.01)
    assert spared.backward.flops / 1e12 < 2 * 2.515
    peak = max(spared.forward.peak_elements, spared.backward.peak_elements) * 2 / MIB
    assert peak < 1.15 * 1024
    window = step(codec, 32, None)
    assert window.forward.flops < plain.forward.flops / 4
    assert window.saved_elements == pytest.approx(plain.saved_elements / 4, rel=0.001)
    window = step(codec, 32, "resnet")
    assert max(window.forward.peak_elements, window.backward.peak_elements) * 2 / MIB < 0.4 * 1024


@SLOW
def test_the_low_memory_mode_keeps_one_tensor_of_the_latents_shape() -> None:
    """Four samples at 256 pixels: nothing of the decoder lives on; the peak is that of one."""
    codec, peaks = sd_codec(torch.float16), []
    for batch in (1, 4):
        z = torch.empty(batch, 4, 32, 32, device="meta")
        with Live() as live:
            delta = z.clone().requires_grad_()
            before = live.live
            error = decoded_error(codec, z, delta, lean=True)
            # The gradient in delta, the latents in its dtype, and the value itself.
            assert live.live - before <= 2 * z.numel() + error.numel()
        peaks.append(live.peak)
    assert peaks[1] < 1.01 * peaks[0]
    assert peaks[0] * 2 / MIB < 300
