"""Errors that a decoder shows: exact weights, exact zeros, crops, memory modes, routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.codec_kinds import PixelCodec
from diffkit.models.schedule import Schedule
from diffkit.models.tiny_decoder import TinyDecoder
from diffkit.perceptual.decoded import (
    LatentCrop,
    check_decoder,
    decoded_error,
    draw_crop,
    noise_only_delta,
    noisy_inputs,
)
from diffkit.randomness import SampleKeys, normal
from tests import tiny
from tests.models.test_tiny_decoder import network


class Orthonormal:
    """A linear decoder D with D^T D = 1: a channel rotation 12 -> 12, then a pixel shuffle."""

    def __init__(self, channels: int = 12, gain: float = 1.0) -> None:
        self.matrix = gain * torch.linalg.qr(normal((channels, channels), 5).double())[0]

    def decode(self, latents: Tensor, checkpoint: Any = None) -> Tensor:
        mixed = torch.einsum("dc,bchw->bdhw", self.matrix, latents)
        return nn.functional.pixel_shuffle(mixed, 2)


def schedule(kind: str) -> Schedule:
    if kind == "velocity":
        return Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    return Schedule.from_scheduler(DDIMScheduler(prediction_type=kind, clip_sample=False))


def codec(**config: Any) -> Codec:
    torch.manual_seed(0)
    return Codec(tiny.vae(**config).eval().requires_grad_(False))


def material(seed: int = 1) -> tuple[Tensor, Tensor]:
    shape = (3, 4, 8, 8)
    return normal(shape, seed, "z"), 0.3 * normal(shape, seed, "delta")


WEIGHTS = {
    "epsilon": lambda ab: 1 - ab,
    "v_prediction": lambda ab: ab * (1 - ab),
    "sample": lambda ab: ab,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_orthonormal_decoder_weighs_the_latent_loss_exactly(kind: str) -> None:
    """Sum-form L_pix / L_lat = 1 - ab (eps), ab (1 - ab) (v), ab (x0), in float64."""
    noise, t = schedule(kind), torch.tensor([0, 500, 999])
    z0, eps, error = (normal((3, 12, 4, 4), 2, name).double() for name in ("z", "eps", "error"))
    z_t, target = noise.add_noise(z0, eps, t), noise.target(z0, eps, t)
    delta = noise_only_delta(noise, target + error, target, t)
    pixel = decoded_error(Orthonormal(), z_t, delta)
    latent = error.square().flatten(1).mean(1)
    weight = WEIGHTS[kind](noise.alpha_sigma(t, torch.float64)[0] ** 2)
    assert torch.allclose(pixel / latent, weight, rtol=1e-10)


def test_an_orthonormal_decoder_weighs_a_flow_exactly() -> None:
    """t^2 (1 - t)^2; a decoder of gain g, such as one that divides by its scale, g^2 times that."""
    noise, t = schedule("velocity"), torch.tensor([100.0, 500.0, 900.0]).double()
    z0, eps, error = (normal((3, 12, 4, 4), 2, name).double() for name in ("z", "eps", "error"))
    z_t, target = noise.add_noise(z0, eps, t), noise.target(z0, eps, t)
    delta = noise_only_delta(noise, target + error, target, t)
    weight = (t / 1000 * (1 - t / 1000)) ** 2
    latent = error.square().flatten(1).mean(1)
    assert torch.allclose(decoded_error(Orthonormal(), z_t, delta) / latent, weight, rtol=1e-10)
    wide = decoded_error(Orthonormal(gain=1 / 0.18215), z_t, delta)
    assert torch.allclose(wide / latent, weight / 0.18215**2, rtol=1e-10)


@pytest.mark.parametrize("kind", [*WEIGHTS, "velocity"])
def test_both_parts_replaced_would_give_back_the_noisy_latents(kind: str) -> None:
    """The silent bug: alpha x0_theta + sigma eps_theta is z_t whatever the network says.

    So the second input must keep the true data. It is alpha z_0 + sigma eps_theta, and differs.
    """
    noise, t = schedule(kind), torch.tensor([500])
    z0, eps, error = (normal((1, 4, 4, 4), 3, name).double() for name in ("z", "eps", "error"))
    z_t, target = noise.add_noise(z0, eps, t), noise.target(z0, eps, t)
    said = noise.prediction(target + error, z_t, t)
    assert torch.allclose(said.alpha_t * said.x0 + said.sigma_t * said.eps, z_t, atol=1e-12)
    second = z_t + noise_only_delta(noise, target + error, target, t)
    assert torch.allclose(second, said.alpha_t * z0 + said.sigma_t * said.eps, atol=1e-12)
    assert (second - z_t).abs().max() > 0.1


def test_latents_of_edm_are_decoded_at_the_scale_of_others() -> None:
    """Its z_t went in with a deviation of up to 80. Over sqrt(1 + sigma^2) it is a DDPM's.

    For eps-prediction of the same abar = 1 / (1 + sigma^2), with the same noise said, both inputs
    are the same; for other schedules they are z_t and delta themselves.
    """
    ddpm, edm = schedule("epsilon"), Schedule.from_scheduler(EDMEulerScheduler())
    t = torch.tensor([20, 500, 990])
    alpha, sigma = ddpm.alpha_sigma(t, torch.float64)
    z0, eps, error = (normal((3, 4, 4, 4), 3, name).double() for name in ("z", "eps", "error"))
    expected = noisy_inputs(ddpm, ddpm.add_noise(z0, eps, t), eps + error, eps, t)
    time = torch.log(sigma / alpha) / 4
    z_t, target = edm.add_noise(z0, eps, time), edm.target(z0, eps, time)
    wrong = (edm.noise_gain(time, torch.float64) / (sigma / alpha)).view(-1, 1, 1, 1)
    found = noisy_inputs(edm, z_t, target + error / wrong, target, time)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert z_t.std() > 8 and found[0].std() < 1.2
    assert torch.equal(expected[1], noise_only_delta(ddpm, eps + error, eps, t))


def test_a_decoder_is_frozen_or_refused() -> None:
    """Seventy parameters of a VAE got gradients that no optimizer cleared."""
    for decoder in (Codec(tiny.vae()), TinyDecoder(network().requires_grad_(True))):
        check_decoder(decoder, "any")
        z, delta = material()
        decoded_error(decoder, z, delta.requires_grad_()).sum().backward()
        held = decoder.vae if isinstance(decoder, Codec) else decoder.network
        assert all(p.grad is None and not p.requires_grad for p in held.parameters())
    half = Codec(tiny.vae(force_upcast=False)).to(dtype=torch.float16)
    for decoder in (half, TinyDecoder(network().half())):
        with pytest.raises(UserError, match="float16, in which small gradients vanish"):
            check_decoder(decoder, "any")
    check_decoder(Codec(tiny.vae(force_upcast=True)).to(dtype=torch.float16), "any")
    with pytest.raises(UserError, match="this DDPM model works on pixels"):
        check_decoder(PixelCodec(), "DDPM")


def test_a_compiled_denoiser_does_not_take_the_decoder_along() -> None:
    """With --compile the graph held the decoder, and broke at the gradient inside the forward."""
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    z, delta = material()
    decoder = codec()

    def loss(leaf: Tensor, lean: bool) -> Tensor:
        return decoded_error(decoder, z, 2 * leaf, lean=lean).sum()

    for lean in (False, True):
        grads = []
        for function in (loss, torch.compile(loss, backend=look)):
            leaf = delta.clone().requires_grad_()
            function(leaf, lean).backward()
            grads.append(leaf.grad)
        assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("mul" in target for target in targets)
    assert not any("conv" in target or "grad" in target for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lean", [False, True])
def test_a_perfect_prediction_has_exactly_no_error(dtype: torch.dtype, lean: bool) -> None:
    """In the decoder's own dtype too: both inputs are the same numbers."""
    z, delta = material()
    delta = torch.zeros_like(delta).requires_grad_()
    error = decoded_error(codec().to(dtype=dtype), z, delta, lean=lean)
    assert torch.equal(error, torch.zeros(3))


def test_gradients_reach_the_prediction_alone() -> None:
    """None of the decoder, none of z_t through either decode, some of delta."""
    z, delta = material()
    z, delta = z.requires_grad_(), delta.requires_grad_()
    decoder = codec()
    decoded_error(decoder, z, delta).sum().backward()
    assert delta.grad is not None and delta.grad.abs().min() > 0
    assert z.grad is None
    assert all(p.grad is None for p in decoder.vae.parameters())


def test_the_target_decode_is_a_constant() -> None:
    """dE/ddelta = 2 J^T (D(z + delta) - D(z)) / n: nothing of the first decode is in it."""
    z, delta = material()
    decoder = codec()
    leaf = delta.clone().requires_grad_()
    decoded_error(decoder, z, leaf).sum().backward()
    count = 3 * 16 * 16
    expected = decoder.vjp(z + delta, lambda image: 2 / count * (image - decoder.decode(z)))
    assert leaf.grad is not None and torch.allclose(leaf.grad, expected, atol=1e-6)


@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("checkpoint", ["resnet", "block"])
@pytest.mark.parametrize("lean", [False, True])
def test_every_memory_mode_has_the_plain_gradient(
    cropped: bool, checkpoint: Any, lean: bool
) -> None:
    z, delta = material()
    crop = LatentCrop(torch.tensor([0, 3, 4]), torch.tensor([1, 0, 4]), 4, 4) if cropped else None
    decoder, found = codec(), []
    for mode in ({"checkpoint": None}, {"checkpoint": checkpoint, "lean": lean}):
        leaf = delta.clone().requires_grad_()
        error = decoded_error(decoder, z, leaf, crop=crop, **mode)
        (error * torch.tensor([1.0, -0.5, 2.0])).sum().backward()
        found.append((error.detach(), leaf.grad))
    for plain, other in zip(*found, strict=True):
        assert torch.allclose(plain, other, atol=1e-6)


def test_two_errors_one_after_the_other_are_the_joint_backward() -> None:
    """Winner and loser of a pair: each decode by itself, gradients as of the joint loss."""
    (z_w, d_w), (z_l, d_l) = (
        material(),
        (normal((3, 4, 8, 8), 7, "z"), normal((3, 4, 8, 8), 7, "d")),
    )
    decoder, found = codec(), []
    for lean in (False, True):
        leaves = [d.clone().requires_grad_() for d in (d_w, d_l)]
        e_w = decoded_error(decoder, z_w, leaves[0], checkpoint=None, lean=lean)
        e_l = decoded_error(decoder, z_l, leaves[1], checkpoint=None, lean=lean)
        nn.functional.logsigmoid(-3.0 * (e_w - e_l)).mean().backward()
        found.append([leaf.grad for leaf in leaves])
    for joint, sequential in zip(*found, strict=True):
        assert joint.abs().max() > 0 and torch.allclose(joint, sequential, atol=1e-6)


def test_a_crop_of_everything_is_no_crop() -> None:
    z, delta = material()
    whole = LatentCrop(torch.zeros(3).long(), torch.zeros(3).long(), 8, 8)
    decoder = codec()
    assert torch.equal(
        decoded_error(decoder, z, delta, crop=whole), decoded_error(decoder, z, delta)
    )


def test_a_crop_decodes_the_same_window_of_both() -> None:
    z, delta = material()
    crop = LatentCrop(torch.tensor([0, 3, 4]), torch.tensor([1, 0, 4]), 4, 3)
    found = decoded_error(codec(), z, delta, crop=crop)
    for i, (top, left) in enumerate(((0, 1), (3, 0), (4, 4))):
        window = (slice(i, i + 1), slice(None), slice(top, top + 4), slice(left, left + 3))
        alone = decoded_error(codec(), z[window], delta[window])
        assert torch.allclose(found[i], alone[0], atol=1e-6)


def test_a_relative_error_does_not_know_contrast() -> None:
    """A linear decoder: latents and error twice as large have the same share of the variance."""
    z, error = (normal((2, 12, 4, 4), 4, name).double() for name in ("z", "error"))
    decoder = Orthonormal()
    found = decoded_error(decoder, z, error, relative=True)
    variance = decoder.decode(z).flatten(1).var(1)
    assert torch.allclose(found, decoded_error(decoder, z, error) / variance)
    assert torch.allclose(found, decoded_error(decoder, 2 * z, 2 * error, relative=True))


def test_crops_are_drawn_by_address() -> None:
    """Inside the latents, all places alike, and the same for any split of the batch."""
    keys = SampleKeys(0, (0,) * 400, tuple(range(400)))
    crop = draw_crop(keys, 12, 8, 8, "crop")
    assert crop is not None and (crop.height, crop.width) == (8, 8)
    assert crop.left.eq(0).all() and set(crop.top.tolist()) == set(range(5))
    part = draw_crop(keys.select(slice(100, 200)), 12, 8, 8, "crop")
    assert part is not None and torch.equal(part.top, crop.top[100:200])
    assert draw_crop(keys, 8, 8, 8, "crop") is None and draw_crop(keys, 9, 9, None, "crop") is None
