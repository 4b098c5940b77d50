"""The offline feature network: shapes, names, ranges, strict loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.feature_network import FeatureNetwork, FeatureNetworkConfig, ImageTrunk

CONFIG = FeatureNetworkConfig(
    concepts=("red apple", "banana", "cat"), styles=("flat", "3d"), widths=(4, 6, 8), depths=(1, 2)
)


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    network = FeatureNetwork(CONFIG)
    for _ in range(3):  # batch statistics that are neither zero nor one
        network.features(torch.rand(8, 3, 64, 64) * 2 - 1)
    return network.eval()


def pictures(count: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_shapes_and_dtypes(network: FeatureNetwork, count: int) -> None:
    images = pictures(count)
    assert network.features(images).shape == (count, network.feature_size) == (count, 8)
    logits = network.classify(images)
    assert logits["concept"].shape == (count, 3)
    assert logits["style"].shape == (count, 2)
    assert all(value.dtype == torch.float32 for value in logits.values())


def test_half_precision_images_are_scored_in_float32(network: FeatureNetwork) -> None:
    images = pictures(2).bfloat16()
    torch.testing.assert_close(network.features(images), network.features(images.float()))
    assert network.features(images).dtype == torch.float32


def test_other_sizes_are_resized_with_antialiasing(network: FeatureNetwork) -> None:
    """A checkerboard of single pixels has to become gray, as its mean is, not black or white."""
    board = torch.ones(1, 3, 256, 256)
    board[..., ::2, ::2] = -1
    board[..., 1::2, 1::2] = -1
    gray = network.features(torch.zeros(1, 3, 64, 64))
    difference = (network.features(board) - gray).abs().max()
    assert difference < 0.05 * gray.abs().max()
    constant = network.features(torch.full((1, 3, 100, 80), 0.25))
    expected = network.features(torch.full((1, 3, 64, 64), 0.25))
    torch.testing.assert_close(constant, expected)


def test_the_whole_range_matters(network: FeatureNetwork) -> None:
    """Values are used as they are in [-1, 1]: nothing is clipped, shifted or rescaled inside."""
    ends = torch.stack([torch.full((3, 64, 64), value) for value in (-1.0, 0.0, 1.0)])
    features = network.features(ends)
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert (features[2] - features[1]).abs().max() > 1e-3


def test_a_picture_does_not_depend_on_its_batch(network: FeatureNetwork) -> None:
    images = pictures(4)
    alone = torch.cat([network.features(image[None]) for image in images])
    torch.testing.assert_close(network.features(images), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [64, 48, 128])
def test_gradient_reaches_the_images(network: FeatureNetwork, size: int) -> None:
    images = pictures(2, size).requires_grad_()
    network.features(images)[0].sum().backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1].abs().sum() == 0


def test_trunk_halves_the_resolution_in_every_stage() -> None:
    trunk = ImageTrunk((4, 6, 8), (1, 2))
    assert len(trunk.blocks) == 3
    assert trunk.blocks(torch.zeros(1, 4, 32, 32)).shape == (1, 8, 8, 8)


def test_pooled_means_belong_to_stem_and_blocks() -> None:
    trunk = ImageTrunk((4, 6, 8), (1, 2)).eval()
    images = pictures(2)
    means = trunk.pooled(images)
    assert [mean.shape for mean in means] == [(2, size) for size in trunk.pooled_sizes]
    assert trunk.pooled_sizes == [4, 6, 8, 8]
    stem = torch.relu(trunk.norm(trunk.stem(images)))
    torch.testing.assert_close(means[0], stem.mean((2, 3)))
    assert torch.equal(means[-1], trunk(images))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(2, 4, 64, 64),
        torch.zeros(3, 64, 64),
    ],
)
def test_wrong_images_are_refused(network: FeatureNetwork, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"float tensor of shape \(B, 3, H, W\)"):
        network.features(images)


def test_class_names_select_columns(network: FeatureNetwork) -> None:
    assert network.concept_indices(["cat", "red apple"]).tolist() == [2, 0]
    assert network.style_indices(["3d"]).tolist() == [1]
    with pytest.raises(UserError, match=r"concept 'dog'.*knows 3.*'red apple'"):
        network.concept_indices(["cat", "dog"])
    with pytest.raises(UserError, match="style 'oil'"):
        network.style_indices(["oil"])


def test_save_and_load(network: FeatureNetwork, tmp_path: Path) -> None:
    """Weights are rounded to float16 once; after that a round trip changes no bit."""
    network.save(tmp_path / "one")
    first = FeatureNetwork.load(tmp_path / "one")
    first.save(tmp_path / "two")
    second = FeatureNetwork.load(tmp_path / "two")
    images = pictures(3)
    torch.testing.assert_close(first.features(images), network.features(images), atol=5e-3, rtol=0)
    assert torch.equal(first.features(images), second.features(images))
    assert first.config == second.config == CONFIG
    assert not second.training
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert stored["trunk.stem.weight"].dtype == torch.float16
    assert stored["trunk.norm.running_var"].dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in second.parameters())


def test_save_keeps_an_existing_folder(network: FeatureNetwork, tmp_path: Path) -> None:
    network.save(tmp_path / "model")
    with pytest.raises(UserError, match="exists already"):
        network.save(tmp_path / "model")
    network.save(tmp_path / "model", overwrite=True)


def test_loading_is_strict(network: FeatureNetwork, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        FeatureNetwork.load(tmp_path / "absent")
    folder = tmp_path / "model"
    network.save(folder)
    weights = load_file(folder / "model.safetensors")

    save_file({**weights, "extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="extra"):
        FeatureNetwork.load(folder)
    del weights["style_head.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"style_head\.bias"):
        FeatureNetwork.load(folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        FeatureNetwork.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        FeatureNetwork.load(folder)


def test_config_keys_are_strict(network: FeatureNetwork, tmp_path: Path) -> None:
    network.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "width": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: has .*'width'.* must have"):
        FeatureNetwork.load(tmp_path / "model")
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="has list"):
        FeatureNetwork.load(tmp_path / "model")
