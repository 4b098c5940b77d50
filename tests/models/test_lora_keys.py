"""Names of LoRA weights, in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as stock

from diffkit.errors import UserError
from diffkit.models import lora
from diffkit.models.lora_keys import (
    LoraLayer,
    LoraWeights,
    diffusers_to_kohya,
    guess_architecture,
    kohya_to_diffusers,
    parse_keys,
    to_kohya,
)
from diffkit.models.lora_layers import plain_modules
from diffkit.models.lora_names import kohya_path, unet_path
from tests.models.lora_helpers import (
    load,
)

SDXL_NAMES = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0"
    ),
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_1_transformer_blocks_1_ff_net_2": (
        "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.2"
    ),
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}


@pytest.mark.parametrize(("name", "path"), SDXL_NAMES.items())
def test_names_of_the_original_unet(name: str, path: str) -> None:
    assert unet_path(name) == path and kohya_path(path) == name


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_layer_of_the_models_keeps_its_name(
    tiny_folder: Callable[[str], Path], name: str
) -> None:
    model = load(tiny_folder(name))
    for path in plain_modules(model.denoiser.model):
        assert unet_path(path.replace(".", "_")) == path
        assert unet_path(kohya_path(path, 1), 1) == path


def test_kohya_keys_and_back_keep_every_number() -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    layer = LoraLayer(torch.randn(4, 8), torch.randn(8, 4), 2.0)
    weights: LoraWeights = {
        "unet": {path: layer},
        "text_encoder": {text: layer},
        "text_encoder_2": {text: layer},
    }
    xl = to_kohya(weights, "sdxl")
    assert set(xl) == {
        f"{name}.{end}"
        for name in (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        )
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    del weights["text_encoder_2"]
    one = to_kohya(weights, "sd")
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in one
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in one
    for tensors in (xl, one):
        back = parse_keys(tensors)
        assert back["unet"][path].alpha == 2.0
        assert torch.equal(back["unet"][path].up, layer.up)
        assert torch.equal(back["text_encoder"][text].down, layer.down)
    scaled = kohya_to_diffusers(one)[f"unet.{path}.lora_B.weight"]
    assert torch.equal(scaled, 0.5 * layer.up)
    assert parse_keys(diffusers_to_kohya(kohya_to_diffusers(xl), "sdxl"))["unet"][path].alpha == 4.0
    with pytest.raises(UserError, match="kohya's sd files have no 'transformer'"):
        to_kohya({"transformer": {"x": layer}}, "sd")


def test_conversion_agrees_with_that_of_diffusers(tiny_sdxl: Path) -> None:
    from diffusers.utils import convert_unet_state_dict_to_peft

    model = load(tiny_sdxl)
    lora.add_lora(model, rank=2)
    kohya = to_kohya(lora.lora_weights(model), "sdxl", 1)
    mapped = stock._maybe_map_sgm_blocks_to_diffusers(dict(kohya), model.denoiser.model.config)
    theirs, _ = stock._convert_non_diffusers_lora_to_diffusers(mapped)
    theirs = convert_unet_state_dict_to_peft(theirs)
    ours = kohya_to_diffusers(kohya, 1)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize(
    "key",
    [
        "unet.mid_block.attn1.to_out.0.lora_A.weight",
        "unet.mid_block.attn1.to_out.0.lora.down.weight",
        "unet.mid_block.attn1.processor.to_out_lora.down.weight",
        "lora_unet_mid_block_attn1_to_out_0.lora_down.weight",
    ],
)
def test_layouts_of_one_layer(key: str) -> None:
    up = key.replace("down", "up").replace("lora_A", "lora_B")
    weights = parse_keys({key: torch.ones(2, 4), up: torch.ones(4, 2)})
    assert weights["unet"]["mid_block.attn1.to_out.0"].rank == 2


def test_text_encoder_and_peft_layouts() -> None:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    for middle, path in (
        ("self_attn.q_proj.lora_linear_layer.{}", "self_attn.q_proj"),
        ("self_attn.to_q_lora.{}", "self_attn.q_proj"),
        ("self_attn.to_out_lora.{}", "self_attn.out_proj"),
    ):
        keys = [f"text_encoder.{middle.format(role)}.weight" for role in ("down", "up")]
        assert path in parse_keys({keys[0]: down, keys[1]: up})["text_encoder"]
    peft = {"base_model.model.a.lora_A.weight": down, "base_model.model.a.lora_B.weight": up}
    assert list(parse_keys(peft)) == [""] and list(parse_keys(peft)[""]) == ["a"]


def test_architecture_is_seen_by_its_text_channels(tmp_path: Path) -> None:
    for width, expected in ((768, "sd"), (1024, "sd"), (2048, "sdxl")):
        layer = LoraLayer(torch.ones(1, width), torch.ones(4, 1), 1.0)
        assert guess_architecture({"unet": {"mid.attn2.to_k": layer}}) == expected
