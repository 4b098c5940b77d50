"""Counting against hand arithmetic; the meta device says what real tensors say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffkit.evaluation.cost import model_cost
from diffkit.models.cost import Rates, count, measure_rates, parameter_count
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.skeleton import skeleton


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


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl", "sd3"])
def test_a_skeleton_costs_what_the_model_costs(
    tiny_folder: Callable[[str], Path], name: str
) -> None:
    bones, model = skeleton(str(tiny_folder(name))), LatentDiffusion.load(tiny_folder(name))
    assert all(p.is_meta for part in bones.networks.values() for p in part.parameters())
    counted, true = model_cost(bones, 32, 32), model_cost(model, 32, 32)
    assert counted.parameters == true.parameters
    assert counted.text.macs == true.text.macs
    assert (counted.denoiser, counted.decode) == (true.denoiser, true.decode)


def test_a_picture_is_its_stages(tiny_sd: Path) -> None:
    cost = model_cost(skeleton(str(tiny_sd)), 32, 32)
    network = cost.denoiser.macs
    assert cost.macs(10) - cost.macs(9) == 2 * network
    assert cost.macs(10, guided=False) == cost.text.macs + 10 * network + cost.decode.macs
    assert cost.memory(2, bytes_each=2) * 2 == cost.memory(2)
    weights = sum(cost.parameters.values())
    assert cost.memory(3) - 4 * weights == 3 * (cost.memory(1) - 4 * weights)
    one = Rates(matmul=1.0, conv=1.0)
    assert cost.seconds(10, one) == cost.macs(10)


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
