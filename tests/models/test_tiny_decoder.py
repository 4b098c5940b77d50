"""Tiny decoders: agreement with diffusers, memory modes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.cost import saved_for_backward
from diffkit.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from diffkit.perceptual.decoded import LatentCrop, decoded_error
from diffkit.randomness import normal
from tests import tiny


def network(seed: int = 0, **config: Any) -> AutoencoderTiny:
    torch.manual_seed(seed)
    options = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (2, 1),
    }
    return AutoencoderTiny(**(options | config))


def codec(**config: Any) -> Codec:
    return Codec(tiny.vae(**config))


@pytest.mark.parametrize("checkpoint", [None, "block", "resnet"])
def test_it_is_the_stock_decoder(checkpoint: Any) -> None:
    """Pictures and gradients; the input is squashed as the stock forward pass does."""
    stock, z = network(), 2 * normal((2, 4, 8, 8), 1, "z")
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    decoder = TinyDecoder(network())
    image = decoder.decode(first, checkpoint)
    expected = stock.decode(second).sample
    assert image.shape == (2, 3, 16, 16) and torch.equal(image, expected)
    image.square().sum().backward()
    expected.square().sum().backward()
    assert first.grad is not None and torch.allclose(first.grad, second.grad)
    assert all(p.grad is None for p in decoder.network.parameters())


def test_a_scale_of_its_own_is_undone() -> None:
    """As stock pipelines do before they decode: z / scaling_factor + shift_factor."""
    scaled = TinyDecoder(network(scaling_factor=0.5, shift_factor=0.1))
    z = normal((1, 4, 8, 8), 1, "z")
    assert torch.equal(scaled.decode(z), scaled.network.decode(z / 0.5 + 0.1).sample)


def test_images_are_float32_and_checkpoints_keep_less() -> None:
    decoder = TinyDecoder(network().bfloat16())
    assert decoder.decode(normal((1, 4, 8, 8), 1, "z")).dtype == torch.float32
    kept = []
    for checkpoint in (None, "block", "resnet"):
        z = normal((1, 4, 32, 32), 1, "z").requires_grad_()
        with saved_for_backward([decoder.network]) as saved:
            decoder.decode(z, checkpoint)
        kept.append(saved.bytes)
    assert kept[1] < kept[0] / 2


def test_a_crop_is_exact_away_from_its_border() -> None:
    """No normalisation and no attention: the inner pixels are those of the whole picture."""
    decoder, z = TinyDecoder(network()), normal((1, 4, 32, 32), 1, "z")
    whole, part = decoder.decode(z), decoder.decode(z[..., 4:28, 4:28])
    assert torch.allclose(whole[..., 32:34, 32:34], part[..., 24:26, 24:26], atol=1e-6)


def test_it_serves_in_a_decoded_error() -> None:
    z, delta = normal((2, 4, 8, 8), 1, "z"), normal((2, 4, 8, 8), 2, "d").requires_grad_()
    crop = LatentCrop(torch.tensor([0, 2]), torch.tensor([1, 4]), 4, 4)
    decoder = TinyDecoder(network())
    decoded_error(decoder, z, delta, crop=crop, lean=True).sum().backward()
    assert delta.grad is not None and bool(delta.grad.any())
    assert torch.equal(decoded_error(decoder, z, 0 * delta), torch.zeros(2))


def test_it_loads_from_a_folder_and_has_to_fit(tmp_path: Path) -> None:
    network(3).save_pretrained(tmp_path / "tiny")
    decoder = load_tiny_decoder(str(tmp_path / "tiny"), codec())
    z = normal((1, 4, 8, 8), 1, "z")
    assert torch.equal(decoder.decode(z), network(3).decode(z).sample)
    assert not any(p.requires_grad for p in decoder.network.parameters())
    with pytest.raises(UserError, match="latents of 4 channels.*have 16 channels"):
        load_tiny_decoder(str(tmp_path / "tiny"), codec(latent_channels=16))
    three = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3}
    deeper = codec(**three, up_block_types=("UpDecoderBlock2D",) * 3)
    with pytest.raises(UserError, match="square of 2 pixels.*squares of 4"):
        load_tiny_decoder(str(tmp_path / "tiny"), deeper)


def test_what_is_no_tiny_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tiny decoder"):
        load_tiny_decoder(str(tmp_path / "nothing" / "here" / "x"), codec())
    tiny.vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="holds an AutoencoderKL, not an AutoencoderTiny"):
        load_tiny_decoder(str(tmp_path / "vae"), codec())
    network().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match="pickle"):
        load_tiny_decoder(str(tmp_path / "pickled"), codec())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_tiny_decoder(str(tmp_path / "empty"), codec())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(UserError, match="cannot be loaded as an AutoencoderTiny"):
        load_tiny_decoder(str(tmp_path / "bare"), codec())


def test_a_missing_folder_beside_others_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network was asked for "folder/missing" for half a minute, though "folder" is here."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folder/missing: no such tiny decoder"):
        load_tiny_decoder("folder/missing", codec())
