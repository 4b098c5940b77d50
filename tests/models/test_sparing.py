"""Frozen networks that keep less for their backward pass: the same values, the same gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit.models.codec import Codec
from diffkit.models.cost import count_gradient, saved_for_backward
from diffkit.models.sparing import SparingActivations
from tests.tiny import _unet, vae


def passed(call: Any, x: Tensor, network: nn.Module, spare: bool) -> tuple[Tensor, Tensor, int]:
    """(result, gradient of its sine's sum, bytes kept)."""
    leaf = x.clone().requires_grad_()
    mode = SparingActivations() if spare else contextlib.nullcontext()
    with saved_for_backward([network]) as saved, mode:
        result = call(leaf)
    (g,) = torch.autograd.grad(result.sin().sum(), leaf)
    return result.detach(), g, saved.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_keeps_less_and_has_the_same_gradient(dtype: torch.dtype) -> None:
    network = vae().to(dtype).eval().requires_grad_(False)
    codec = Codec(network)
    x = torch.randn(2, 3, 32, 32)
    plain, spared = (passed(codec.encode_moments, x, network, spare) for spare in (False, True))
    torch.testing.assert_close(spared[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(spared[1], plain[1], rtol=1e-5, atol=1e-6)
    assert spared[2] < 0.45 * plain[2]


def test_a_u_net_too() -> None:
    network = _unet().eval().requires_grad_(False)
    tokens, t = torch.randn(2, 5, 16), torch.tensor([3, 700])
    x = torch.randn(2, 4, 16, 16)

    def call(z: Tensor) -> Tensor:
        return network(z, t, tokens, return_dict=False)[0]

    plain, spared = (passed(call, x, network, spare) for spare in (False, True))
    torch.testing.assert_close(spared[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(spared[1], plain[1], rtol=1e-5, atol=1e-6)
    assert spared[2] < plain[2]


def test_weights_that_train_get_their_gradients() -> None:
    network = vae().eval()
    network.encoder.down_blocks[0].requires_grad_(False)
    x = torch.randn(1, 3, 32, 32)
    found = []
    for mode in (contextlib.nullcontext(), SparingActivations()):
        network.zero_grad()
        with mode:
            moments = Codec(network).encode_moments(x)
        moments.square().sum().backward()
        found.append([p.grad for p in network.encoder.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_no_operation_with_weights_is_made_twice() -> None:
    network = vae().eval().requires_grad_(False)
    codec, x = Codec(network), torch.randn(1, 3, 32, 32).requires_grad_()

    def spared() -> Tensor:
        with SparingActivations():
            return codec.encode_moments(x)

    plain = count_gradient(lambda: codec.encode_moments(x), x, [network])
    spare = count_gradient(spared, x, [network])
    assert spare.flops == plain.flops
    assert spare.saved_elements < 0.45 * plain.saved_elements


def test_without_a_graph_nothing_changes() -> None:
    layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), SparingActivations():
        spared = layers(x)
    assert not spared.requires_grad
    assert torch.equal(spared, layers(x))
