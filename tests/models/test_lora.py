"""LoRA: identities on tiny true-class models, agreement with stock diffusers, keys in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import lora_conversion_utils as stock
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models import lora
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora_file import read_lora, write_lora
from diffkit.models.lora_keys import (
    LoraLayer,
    LoraWeights,
    diffusers_to_kohya,
    guess_architecture,
    kohya_to_diffusers,
    parse_keys,
    to_diffusers,
    to_kohya,
)
from diffkit.models.lora_names import kohya_path, unet_path
from diffkit.models.weights import load_safetensors, save_safetensors

EVERY_KIND = (
    "to_q",
    "to_out.0",
    "ff.net.2",
    "proj_in",
    "conv1",
    "time_emb_proj",
    "conv_in",
    "conv",
)


def load(folder: Path, **options: Any) -> LatentDiffusion:
    return LatentDiffusion.load(folder, **options)


def predict(model: LatentDiffusion, dtype: torch.dtype = torch.float32) -> Tensor:
    cond = model.conditioner.encode(["a red apple"], (32, 32))
    channels, h, w = model.latent_shape(32, 32)
    z_t = torch.randn(1, channels, h, w, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.denoiser(z_t.to(dtype), torch.tensor([500]), cond).float()


def randomise(model: LatentDiffusion, name: str = "default", size: float = 0.3) -> None:
    """Adapters begin at zero; give B values that matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in lora.lora_parameters(model, name).items():
            if key.endswith("lora_B"):
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# -- adapters on a model --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_new_adapter_changes_nothing_then_matters_then_merges(
    tiny_folder: Callable[[str], Path], name: str
) -> None:
    model = load(tiny_folder(name))
    before = predict(model)
    classes = [type(m) for m in model.denoiser.model.modules()]
    parameters = lora.add_lora(model, rank=2, alpha=3.0)
    assert torch.equal(predict(model), before)
    assert lora.active_adapters(model) == {"default": 1.0}
    randomise(model)
    adapted = predict(model)
    assert difference(adapted, before) > 1e-2
    with lora.disable_lora(model):
        assert torch.equal(predict(model), before)
    assert torch.equal(predict(model), adapted)
    lora.merge_lora(model)
    assert difference(predict(model), adapted) < 1e-5
    assert [type(m) for m in model.denoiser.model.modules()] == classes
    assert parameters and not lora.lora_parameters(model)


def test_gradients_reach_the_adapter_alone(tiny_sd: Path) -> None:
    model = load(tiny_sd)
    cond = model.conditioner.encode(["a red apple"])
    parameters = lora.add_lora(model, rank=2)
    trainable = [p for p in model.denoiser.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters.values()}
    out = model.denoiser(torch.randn(1, 4, 16, 16), torch.tensor([10]), cond)
    out.square().mean().backward()  # type: ignore[no-untyped-call]
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        # B = 0 lets no gradient through to A at the first step
        assert bool(parameter.grad.abs().max() > 0) == key.endswith("lora_B"), key
    others = [p for p in model.denoiser.parameters() if all(p is not q for q in trainable)]
    assert all(p.grad is None and not p.requires_grad for p in others)


def test_reference_view_inside_a_step_keeps_gradients(tiny_sd: Path) -> None:
    model = load(tiny_sd)
    cond = model.conditioner.encode(["a red apple"])
    parameters = lora.add_lora(model, rank=2)
    z_t, t = torch.randn(1, 4, 16, 16), torch.tensor([10])
    out = model.denoiser(z_t, t, cond)
    with lora.disable_lora(model), lora.disable_lora(model), torch.no_grad():
        reference = model.denoiser(z_t, t, cond)
    (out - 0.5 * reference).square().mean().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.requires_grad for p in parameters.values())


def test_new_weights_depend_on_seed_and_path_only(tiny_sd: Path) -> None:
    torch.manual_seed(5)
    first = lora.add_lora(load(tiny_sd), rank=2, seed=1)
    torch.manual_seed(6)
    few = lora.add_lora(load(tiny_sd), rank=2, seed=1, targets=["to_q"])
    other = lora.add_lora(load(tiny_sd), rank=2, seed=2)
    down = next(key for key in few if key.endswith("lora_A"))
    assert set(few) < set(first) and all(torch.equal(few[key], first[key]) for key in few)
    assert not torch.equal(other[down], first[down])
    fan_in = first[down].shape[1]
    assert float(first[down].detach().abs().max()) <= fan_in**-0.5


def test_weights_are_float32_on_a_bfloat16_base_that_is_not_copied(tiny_sd: Path) -> None:
    model = load(tiny_sd, dtype=torch.bfloat16)
    base = {p.data_ptr() for p in model.denoiser.parameters()}
    before = predict(model)
    parameters = lora.add_lora(model, rank=2)
    assert all(p.dtype == torch.float32 for p in parameters.values())
    own = {p.data_ptr() for p in parameters.values()}
    assert {p.data_ptr() for p in model.denoiser.parameters()} - own == base
    assert model.denoiser.dtype == torch.bfloat16
    randomise(model)
    adapted = predict(model)
    assert difference(adapted, before) > 1e-2
    with lora.disable_lora(model):
        assert torch.equal(predict(model), before)
    lora.merge_lora(model)
    assert {p.data_ptr() for p in model.denoiser.parameters()} == base
    assert difference(predict(model), adapted) < 0.05


def test_several_weighted_adapters_add_up(tiny_sd: Path, tmp_path: Path) -> None:
    """One layer's update is the weighted sum of its adapters', as the merged weights show."""
    model = load(tiny_sd)
    for number, name in enumerate(("one", "two")):
        lora.add_lora(model, rank=2 + number, alpha=5.0, name=name, targets=EVERY_KIND)
        randomise(model, name, size=0.1 * (number + 1))
    with pytest.raises(UserError, match="'three'.*'one', 'two'"):
        lora.set_adapters(model, {"three": 1.0})
    lora.set_adapters(model, {"one": 0.5, "two": -0.25})
    assert lora.active_adapters(model) == pytest.approx({"one": 0.5, "two": -0.25})
    plain = load(tiny_sd)
    names = ("one", "two")
    updates = {n: lora.lora_weights(model, n)["unet"] for n in names}
    adapted = predict(model)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = plain.denoiser.model.get_submodule(path).weight
    for name, w in (("one", 0.5), ("two", -0.25)):
        layer = updates[name][path]
        weight = weight + w * layer.alpha / layer.rank * layer.up @ layer.down
    lora.merge_lora(model)
    assert difference(predict(model), adapted) < 1e-5
    merged = model.denoiser.model.get_submodule(path).weight
    assert torch.allclose(merged, weight, atol=1e-6)


def test_set_adapters_switches_and_keeps_what_is_trainable(tiny_sd: Path) -> None:
    model = load(tiny_sd)
    before = predict(model)
    lora.add_lora(model, rank=2, name="one")
    randomise(model, "one")
    one = predict(model)
    lora.add_lora(model, rank=2, name="two")
    assert not any(p.requires_grad for p in lora.lora_parameters(model, "one").values())
    assert torch.equal(predict(model), one)
    lora.set_adapters(model, {"two": 1.0})
    assert torch.equal(predict(model), before)
    lora.set_adapters(model, {})
    assert torch.equal(predict(model), before) and lora.active_adapters(model) == {}
    lora.set_adapters(model, {"one": 1.0})
    assert torch.equal(predict(model), one)
    assert not any(p.requires_grad for p in lora.lora_parameters(model, "one").values())
    assert all(p.requires_grad for p in lora.lora_parameters(model, "two").values())
    lora.remove_lora(model)
    assert torch.equal(predict(model), before) and lora.active_adapters(model) == {}


def test_wrong_requests_are_refused_by_name(tiny_sd: Path) -> None:
    model = load(tiny_sd)
    with pytest.raises(UserError, match="'nowhere'.*no layer of the unet"):
        lora.add_lora(model, rank=2, targets=["nowhere"])
    with pytest.raises(UserError, match="rank 0"):
        lora.add_lora(model, rank=0)
    with pytest.raises(UserError, match="'a.b': use letters"):
        lora.add_lora(model, rank=2, name="a.b")
    lora.add_lora(model, rank=2)
    with pytest.raises(UserError, match="'default' is taken"):
        lora.add_lora(model, rank=2)
    with pytest.raises(UserError, match=r"no adapter 'other'; this model has \['default'\]"):
        lora.save_lora(model, "nowhere", "other")


# -- files ----------------------------------------------------------------------------------------


def whole_adapter(model: LatentDiffusion, name: str = "default") -> LoraWeights:
    """An adapter on the denoiser and on the text encoders, ranks and alphas differing."""
    from diffkit.models.lora_layers import inject, new_layer, plain_modules

    lora.add_lora(model, rank=4, alpha=6.0, name=name, targets=EVERY_KIND)
    for number, network in enumerate(model.conditioner.encoders.values()):
        paths = {
            p: m
            for p, m in plain_modules(network).items()
            if p.endswith(("q_proj", "out_proj", "fc1"))
        }
        layers = {p: new_layer(m, 2 + number, 1.0, 0, p) for p, m in paths.items()}
        inject(network, name, layers)
    randomise(model, name)
    return lora.lora_weights(model, name)


def stock_images(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipeline(
        "a red apple",
        num_inference_steps=2,
        height=32,
        width=32,
        generator=generator,
        output_type="pt",
    )
    return out.images


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


# -- keys -----------------------------------------------------------------------------------------

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
    from diffkit.models.lora_layers import plain_modules

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
