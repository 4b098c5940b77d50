"""LoRA files: agreement with stock diffusers and peft, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffkit.errors import UserError
from diffkit.models import lora
from diffkit.models.lora_file import read_lora, write_lora
from diffkit.models.lora_keys import (
    LoraLayer,
    to_diffusers,
)
from diffkit.models.weights import load_safetensors, save_safetensors
from tests.models.lora_helpers import (
    difference,
    load,
    predict,
    randomise,
    stock_images,
    whole_adapter,
)

STOCK = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_saved_adapter_loads_in_stock_diffusers_and_here(
    tiny_folder: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    model = load(folder)
    base = stock_images(model.pipeline())
    whole_adapter(model)
    ours = stock_images(model.pipeline())
    assert difference(ours, base) > 1e-2
    path = lora.save_lora(model, tmp_path / "lora")
    assert path.name == "pytorch_lora_weights.safetensors"
    pipeline = STOCK[name].from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert difference(stock_images(pipeline), ours) < 1e-4
    again = load(folder)
    assert lora.load_lora(again, tmp_path / "lora") == "lora"
    assert difference(stock_images(again.pipeline()), ours) < 1e-4
    assert not any(p.requires_grad for p in lora.lora_parameters(again, "lora").values())
    assert lora.load_lora(again, path, weight=-1.0, name="back", trainable=True) == "back"
    assert difference(stock_images(again.pipeline()), base) < 1e-4
    assert all(p.requires_grad for p in lora.lora_parameters(again, "back").values())


def test_saved_sd3_adapter_loads_in_stock_diffusers(tiny_sd3: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    model = load(tiny_sd3)
    lora.add_lora(model, rank=2, alpha=4.0)
    randomise(model)
    lora.save_lora(model, tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.load_lora_weights(tmp_path)
    assert difference(stock_images(pipeline), stock_images(model.pipeline())) < 1e-4


def test_adapter_saved_by_stock_diffusers_keeps_its_alphas(tiny_sd: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=["to_q", "to_out.0"], alpha_pattern={"attn2.to_q": 3}
    )
    pipeline.unet.add_adapter(config)
    torch.manual_seed(0)
    for key, parameter in pipeline.unet.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = stock_images(pipeline)
    metadata = pipeline.unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=metadata,
    )
    model = load(tiny_sd)
    lora.load_lora(model, tmp_path, name="stock")
    assert difference(stock_images(model.pipeline()), expected) < 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohya_file_loads_here_and_in_stock_diffusers(
    tiny_folder: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    model = load(folder)
    weights = whole_adapter(model)
    expected = stock_images(model.pipeline())
    path = tmp_path / "style.v1.safetensors"
    write_lora(path, weights, "kohya", name, layers_per_block=1)  # type: ignore[arg-type]
    again = load(folder)
    assert lora.load_lora(again, path) == "style_v1"
    assert difference(stock_images(again.pipeline()), expected) < 1e-4
    pipeline = STOCK[name].from_pretrained(folder)
    pipeline.load_lora_weights(path)
    assert difference(stock_images(pipeline), expected) < 1e-4


def test_half_precision_file_and_linear_for_convolution(tiny_sd: Path, tmp_path: Path) -> None:
    """SD 1's proj_in is a 1x1 convolution, which files hold as (r, in) or (r, in, 1, 1)."""
    model = load(tiny_sd)
    path = "mid_block.attentions.0.proj_in"
    layer = LoraLayer(torch.randn(2, 16).half(), torch.randn(16, 2).half(), 2.0)
    save_safetensors(tmp_path / "x.safetensors", to_diffusers({"unet": {path: layer}}))
    lora.load_lora(model, tmp_path / "x.safetensors")
    loaded = lora.lora_weights(model, "x")["unet"][path]
    assert loaded.down.shape == (2, 16, 1, 1) and loaded.down.dtype == torch.float32
    assert torch.equal(loaded.down.flatten(1), layer.down.float())


def test_files_that_do_not_fit_are_refused_by_what_they_are(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    sd = load(tiny_folder("sd"))
    other = tmp_path / "other.safetensors"
    layer = LoraLayer(torch.ones(2, 2048), torch.ones(640, 2), 2.0)
    far = "down_blocks.1.attentions.9.transformer_blocks.0.attn2.to_k"
    write_lora(other, {"unet": {far: layer}})
    with pytest.raises(
        UserError, match=rf"no layer of this LoRA fits.*LoRA for unet \(1 layers\).*{far}"
    ):
        lora.load_lora(sd, other)
    near = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    good, more = (LoraLayer(torch.ones(2, 16), torch.ones(16, 2), 2.0) for _ in range(2))
    write_lora(other, {"unet": {far: layer, near: good}, "text_encoder_2": {"x.q_proj": more}})
    with pytest.raises(
        UserError, match=rf"2 of its layers.*text_encoder_2.x.q_proj.*{far}.*strict=False"
    ):
        lora.load_lora(sd, other)
    assert lora.active_adapters(sd) == {}
    lora.load_lora(sd, other, strict=False)
    assert list(lora.lora_weights(sd, "other")["unet"]) == [near]
    write_lora(other, {"unet": {near: layer}})
    with pytest.raises(UserError, match="no layer of this LoRA fits"):
        lora.load_lora(sd, other, name="shape")
    flat = LoraLayer(torch.ones(2, 8 * 9), torch.ones(8, 2), 2.0)
    write_lora(other, {"unet": {near: good, "conv_out": flat}})
    with pytest.raises(
        UserError, match=r"unet.conv_out \(shape \(2, 72\), would have to be \(2, 8, 3, 3\)"
    ):
        lora.load_lora(sd, other, name="shape")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.out.2.weight", "is no LoRA; it looks like a whole checkpoint"),
        ("decoder.up_blocks.0.conv.weight", "is no LoRA; it looks like a VAE"),
        ("emb_params", "is no LoRA; it looks like a textual-inversion embedding"),
        ("lora_unet_mid_block_x.hada_w1_a", "LoHa .LyCORIS. is not supported"),
        ("lora_unet_mid_block_x.dora_scale", "DoRA is not supported"),
        ("lora_unet_mid_block_x.lora_up.weight", "has no 'down' weight"),
        ("lora_unet_mid_block_x.oddity", "belong to no LoRA: lora_unet_mid_block_x.oddity"),
    ],
)
def test_other_files_are_named(tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "file.safetensors"
    save_safetensors(path, {key: torch.ones(2, 2)})
    with pytest.raises(UserError, match=f"file.safetensors: .*{message}"):
        read_lora(path)


def test_places_where_a_lora_may_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such LoRA"):
        read_lora(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no .safetensors"):
        read_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_lora_weights.bin: the weights are a pickle"):
        read_lora(tmp_path)
    layer = LoraLayer(torch.ones(2, 16), torch.ones(16, 2), 2.0)
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", {"unet": {"mid": layer}})
    with pytest.raises(UserError, match="several files.*a.safetensors, b.safetensors"):
        read_lora(tmp_path)
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", {"unet": {"mid": layer}})
    assert list(read_lora(tmp_path)["unet"]) == ["mid"]
    with pytest.raises(
        UserError, match="owner/name: is no local path and cannot be had from the hub"
    ):
        read_lora("owner/name")


def test_peft_folder_gives_its_alpha(tiny_sd: Path, tmp_path: Path) -> None:
    """peft saves `base_model.model.` keys, with r and alpha in adapter_config.json beside them."""
    from peft import LoraConfig, get_peft_model

    model = load(tiny_sd)
    wrapped = get_peft_model(
        model.denoiser.model, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"])
    )
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = predict(model)
    wrapped.save_pretrained(tmp_path)
    again = load(tiny_sd)
    lora.load_lora(again, tmp_path, name="peft")
    assert difference(predict(again), expected) < 1e-5
    assert all(layer.alpha == 6 for layer in lora.lora_weights(again, "peft")["unet"].values())


def test_file_on_disk_is_plain_safetensors(tiny_sd: Path, tmp_path: Path) -> None:
    model = load(tiny_sd)
    lora.add_lora(model, rank=2)
    tensors = load_safetensors(lora.save_lora(model, tmp_path))
    assert all(key.startswith("unet.") for key in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
