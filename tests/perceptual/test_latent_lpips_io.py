"""Networks in and out of three formats, and the numbers of the package with made-up weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.vgg import make_layers

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig, e_latentlpips
from diffkit.perceptual.latent_lpips_io import (
    check_latent_space,
    from_package,
    from_pre_pool,
    from_torchvision,
    load_latent_lpips,
    save_latent_lpips,
    to_package,
    to_pre_pool,
    to_torchvision,
)
from tests.perceptual.test_latent_augment import latents

WIDTHS = (4, 8, 16, 32, 32)
PLAN = [4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M"]
POOLS_LEFT_OUT = (6, 13, 23)


def random_network(layout="official", norm="bn", channels: int = 4) -> LatentLpips:
    torch.manual_seed(0)
    network = LatentLpips(LatentLpipsConfig(channels, 4, layout, norm))
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if name.endswith("var") else 0))
    return network


def same(a: LatentLpips, b: LatentLpips) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_torchvisions_vgg_gives_the_same_taps() -> None:
    torch.manual_seed(0)
    features = make_layers(PLAN, batch_norm=True)
    features[0] = nn.Conv2d(4, 4, 3, padding=1)
    for module in features:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for index in POOLS_LEFT_OUT:
        features[index] = nn.Identity()
    features.eval()
    network, x = from_torchvision(features.state_dict()), latents()
    expected = []
    for index, layer in enumerate(features):
        x = layer(x)
        if index in (6, 13, 23, 33, 43):
            expected.append(x)
    for found, tap in zip(network.features(latents()), expected, strict=True):
        torch.testing.assert_close(found, tap)
    back = to_torchvision(network)
    assert all(torch.equal(back[name], value) for name, value in features.state_dict().items())


def test_the_packages_format_round_trip(tmp_path: Path) -> None:
    network = random_network()
    state = to_package(network)
    assert len(state) == 101
    assert state["lins.3.model.1.weight"].shape == (1, 32, 1, 1)
    assert same(from_package(state), network)
    torch.save(state, tmp_path / "sd15_latest_vgg16_tuned.pth")
    assert same(load_latent_lpips(tmp_path / "sd15_latest_vgg16_tuned.pth"), network)
    with pytest.raises(UserError, match="holds layout 'official' and norm 'bn' only"):
        to_package(random_network("pre_pool", "gn"))


def test_the_other_format_round_trip() -> None:
    network = random_network("pre_pool", "gn")
    state = to_pre_pool(network)
    assert len(state) == 57
    assert {"slice4.22.weight", "slice5.39.bias", "linear5.model.1.weight"} <= state.keys()
    assert same(from_pre_pool(state), network)
    with pytest.raises(UserError, match="holds layout 'pre_pool' and norm 'gn' only"):
        to_pre_pool(random_network())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lin2.model.1.weight", None, "lin2.model.1.weight of shape"),
        ("lin2.model.1.weight", -torch.ones(1, 16, 1, 1), "must not be negative"),
        ("lins.2.model.1.weight", torch.ones(1, 16, 1, 1), "must be equal"),
        ("net.slice1.0.weight", None, "slice1.0.weight of shape"),
        ("net.slice3.14.weight", torch.zeros(2), "do not fit layout 'official'"),
    ],
)
def test_broken_weights_are_refused(name, value, message) -> None:
    state = to_package(random_network())
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(UserError, match=message):
        from_package(state)


def test_our_folder_round_trip(tmp_path: Path) -> None:
    network = random_network("pre_pool", "gn", channels=8)
    network.config.provenance["data"] = "none"
    save_latent_lpips(network, tmp_path / "net")
    found = load_latent_lpips(tmp_path / "net")
    assert found.config == network.config
    x = torch.cat([latents(), latents(phase=1.0)], 1)
    torch.testing.assert_close(found.distance(x, -x), network.distance(x, -x), rtol=2e-2, atol=0)
    with pytest.raises(UserError):
        save_latent_lpips(network, tmp_path / "net")


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no LatentLPIPS network"):
        load_latent_lpips(tmp_path / "other.pth")
    with pytest.raises(UserError, match="no such folder"):
        load_latent_lpips(tmp_path / "nothing")


def test_the_numbers_of_the_package() -> None:
    """elatentlpips 0.2 around a narrow VGG with these weights, without its maps."""
    state = to_package(LatentLpips(LatentLpipsConfig(4, 4)))
    state = {k: v for k, v in sorted(state.items()) if not k.startswith("lins")}
    for i, (name, value) in enumerate(state.items()):
        k = torch.arange(value.numel(), dtype=torch.float64)
        u = (torch.sin(12.9898 * (k + 1) + 78.233 * i) * 43758.5453) % 1 - 0.5
        if name.startswith("lin"):
            u = u + 0.5
        elif name.endswith("num_batches_tracked"):
            u = torch.zeros(1)
        elif value.ndim == 4:
            u = u * (24 / (9 * value.shape[1])) ** 0.5
        elif name.endswith(("running_var", "weight")):
            u = 1 + u
        state[name] = u.view(value.shape).to(value.dtype)
    for stage in range(5):
        state[f"lins.{stage}.model.1.weight"] = state[f"lin{stage}.model.1.weight"]
    network, a, b = from_package(state), latents(), latents(phase=1.3)
    torch.testing.assert_close(
        network.distance(a, b), torch.tensor([0.8937359, 0.7970831]), atol=2e-5, rtol=0
    )
    with_l1 = e_latentlpips(network, a, b, None, l1_weight=1.0)
    torch.testing.assert_close(with_l1, torch.tensor([1.6782186, 1.5677607]), atol=2e-5, rtol=0)


def test_a_network_of_other_latents_is_refused_where_it_says_so(tiny_folder, capsys) -> None:
    """Equally many channels are no proof: Stable Diffusion's 4 and SDXL's are scaled otherwise."""
    codec = LatentDiffusion.load(tiny_folder("sd")).codec
    scale, shift = codec.space()
    network = random_network()
    check_latent_space(network, codec, "flag: it")
    assert "flag: it: does not say whose latents it reads" in capsys.readouterr().err
    network.config.provenance.update(scale=list(scale), shift=list(shift))
    check_latent_space(network, codec, "flag: it")
    assert not capsys.readouterr().err
    network.config.provenance["scale"] = [scale[0] * 0.7]
    with pytest.raises(UserError, match="flag: it: reads latents of 4 channels, scaled by"):
        check_latent_space(network, codec, "flag: it")
    with pytest.raises(UserError, match="reads latents of 8 channels"):
        check_latent_space(load_latent_lpips("embedded"), codec, "flag: it")
    check_latent_space(load_latent_lpips("embedded"), LatentDiffusion.load().codec, "flag: it")
