"""Counting against hand arithmetic, forward and backward, on real and on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffkit.models.cost import (
    Cost,
    Rates,
    count,
    count_gradient,
    count_vjp,
    measure_rates,
    parameter_count,
    saved_for_backward,
)
from diffkit.models.latent_diffusion import LatentDiffusion


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_and_convolution_by_hand(device: str) -> None:
    with torch.device(device):
        linear, conv = nn.Linear(5, 7), nn.Conv2d(3, 4, 3, padding=1)
        x, image = torch.empty(2, 5), torch.empty(2, 3, 8, 8)
    assert count(lambda: linear(x)).macs == 2 * 5 * 7
    cost = count(lambda: conv(image))
    assert (cost.matmul_macs, cost.conv_macs) == (0, 2 * 8 * 8 * 4 * 3 * 9)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_by_hand_and_without_its_square_matrix(device: str) -> None:
    query = torch.empty(2, 4, 100, 8, device=device)
    key = torch.empty(2, 4, 50, 8, device=device)
    value = torch.empty(2, 4, 50, 6, device=device)
    cost = count(lambda: F.scaled_dot_product_attention(query, key, value=value))
    assert cost.matmul_macs == 2 * 4 * 100 * 50 * (8 + 6)
    assert cost.peak_elements == 2 * 4 * 100 * 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_what_lives_at_once(device: str) -> None:
    x = torch.empty(1000, device=device)

    def chain() -> torch.Tensor:
        y = x + 1
        y = y + 1  # the first sum lives until this one exists
        y = y.view(10, 100).t()  # views hold nothing of their own
        return y + 1

    assert count(chain).peak_elements == 2000


def test_weights_are_not_activations() -> None:
    linear = nn.Linear(1000, 1000, device="meta")
    assert count(lambda: linear(torch.empty(1, 1000, device="meta"))).peak_elements == 2000


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 3)
    assert parameter_count(nn.ModuleList([layer, layer])) == 12


def test_rates_are_measured() -> None:
    rates = measure_rates("cpu", seconds=0.02)
    assert rates.matmul > 1e8
    assert rates.conv > 1e7


def test_the_u_net_of_stable_diffusion_1_in_no_memory() -> None:
    """859,520,964 parameters, the published count of this config."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert parameter_count(unet) == 859_520_964
    z_t, tokens = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 77, 768, device="meta")
    cost = count(lambda: unet(z_t, torch.ones(1, device="meta"), tokens))
    assert cost.macs / 1e9 == pytest.approx(401, rel=0.02)


def conv_and_input(device: str) -> tuple[nn.Conv2d, Tensor]:
    with torch.device(device):
        return nn.Conv2d(3, 4, 3, padding=1), torch.zeros(2, 3, 8, 8).requires_grad_()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_backward_pass_by_hand(device: str, frozen: bool) -> None:
    """The gradient of the input costs as much as the output, that of the weights once more."""
    conv, image = conv_and_input(device)
    conv.requires_grad_(not frozen)
    inputs = [image] if frozen else [image, *conv.parameters()]
    cost = count_gradient(lambda: conv(image), inputs, [conv])
    one = 2 * 8 * 8 * 4 * 3 * 9
    assert cost.forward.conv_macs == one
    assert cost.backward.conv_macs == (one if frozen else 2 * one)
    assert cost.saved_elements == image.numel()
    assert cost.flops == 2 * one * (2 if frozen else 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_backward_pass_of_attention_by_hand(device: str) -> None:
    query = torch.zeros(2, 4, 100, 8, device=device).requires_grad_()
    key, value = torch.zeros(2, 2, 4, 50, 8, device=device)
    cost = count_gradient(lambda: F.scaled_dot_product_attention(query, key, value), query, [])
    products = 2 * 4 * 100 * 50 * 8
    assert cost.forward.macs == cost.forward.attention_macs == 2 * products
    # scores again, their gradient, and that of the queries
    assert cost.backward.macs == 3 * products
    assert cost.flops_without_attention == 0
    # queries, keys, values, the result, and one number a row
    assert cost.saved_elements == 2 * 4 * (100 * 8 + 2 * 50 * 8 + 100 * 8 + 100)
    q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    call = count_gradient(lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v], [])
    assert call.backward.macs == 5 * products


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_activations_by_hand(device: str) -> None:
    x = torch.zeros(1000, device=device).requires_grad_()
    with saved_for_backward([]) as saved:
        y = (x.exp().view(10, 100) ** 2).sum() * 3
    assert (saved.elements, saved.bytes) == (1000, 4000)  # exp keeps its result, ** its input
    del y


def test_a_checkpointed_block_keeps_its_input_and_runs_again() -> None:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU())
        x = torch.zeros(10, 64).requires_grad_()
    block.requires_grad_(False)
    plain = count_gradient(lambda: block(x), x, [block])
    again = count_gradient(lambda: checkpoint(block, x, use_reentrant=False), x, [block])
    assert plain.saved_elements == 10 * (256 + 64)
    assert again.saved_elements == 10 * 64
    assert again.forward.macs == plain.forward.macs
    # what comes after the last kept activation is not made again
    assert again.backward.macs == plain.forward.macs + plain.backward.macs


def test_a_product_with_the_jacobian_in_two_passes() -> None:
    conv, image = conv_and_input("meta")
    conv.requires_grad_(False)

    def run(cotangent: Callable[[Tensor], Tensor]) -> None:
        result = conv(image)
        torch.autograd.grad(result, image, cotangent(result))

    assert count_vjp(run).forward.macs == count_vjp(run).backward.macs == 2 * 8 * 8 * 4 * 3 * 9


def test_meta_tensors_save_what_real_ones_save(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    for network in model.networks.values():
        network.requires_grad_(False)
    cond = model.conditioner.encode(["a"])
    z = torch.zeros(1, 4, 16, 16).requires_grad_()
    with saved_for_backward([model.denoiser]) as real:
        output = model.denoiser(z, torch.ones(1), cond)
    counted = count_gradient(lambda: model.denoiser(z, torch.ones(1), cond), z, [model.denoiser])
    assert counted.saved_elements == pytest.approx(real.elements, rel=0.02)
    del output


def test_seconds_of_several_calls() -> None:
    costs = [Cost(100, 10, 0), Cost(0, 30, 0, attention_macs=0)]
    assert Rates(matmul=50.0, conv=20.0).seconds(*costs) == 2 + 2
