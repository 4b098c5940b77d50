"""The cost of a picture; a skeleton on the meta device says what real tensors say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffkit.evaluation.cost import model_cost
from diffkit.models.cost import Rates
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.skeleton import skeleton


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
