"""LoRA adapters on tiny true-class models: identities, gradients, merging, several at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffkit.errors import UserError
from diffkit.models import lora
from tests.models.lora_helpers import (
    EVERY_KIND,
    difference,
    load,
    predict,
    randomise,
)


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


def test_one_adapter_of_several_comes_off(tiny_sd: Path) -> None:
    """The others stay as they were; layers that only it had are plain again."""
    model = load(tiny_sd)
    lora.add_lora(model, rank=2, name="one", targets=["to_q"])
    randomise(model, "one")
    lora.set_adapters(model, {"one": 0.5})
    before, classes = predict(model), [type(m) for m in model.denoiser.model.modules()]
    lora.add_lora(model, rank=2, name="two", targets=["to_q", "ff.net.2"])
    randomise(model, "two")
    assert difference(predict(model), before) > 1e-3
    with pytest.raises(UserError, match=r"no adapter 'three'; this model has \['one', 'two'\]"):
        lora.remove_lora(model, "three")
    lora.remove_lora(model, "two")
    assert torch.equal(predict(model), before)
    assert lora.active_adapters(model) == {"one": 0.5}
    assert [type(m) for m in model.denoiser.model.modules()] == classes
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    lora.remove_lora(model, "one")
    assert not hasattr(model.denoiser.model, "peft_config")
    assert torch.equal(predict(model), predict(load(tiny_sd)))


def test_text_encoders_are_adapted_on_request(tiny_sdxl: Path) -> None:
    """Both encoders; an untrained adapter changes no prompt, a trained one does."""
    model = load(tiny_sdxl)
    before = predict(model)
    found = lora.add_lora(model, rank=2, text_targets=["q_proj", "out_proj"])
    components = {key.split(".")[0] for key in found}
    assert components == {"unet", "text_encoder", "text_encoder_2"}
    ends = {key.removesuffix(".lora_A").rsplit(".", 1)[1] for key in found if key.endswith("_A")}
    assert {"q_proj", "out_proj"} <= ends and not {"k_proj", "v_proj"} & ends
    assert torch.equal(predict(model), before)
    randomise(model)
    cond = model.conditioner.encode(["a red apple"], (32, 32))
    with lora.disable_lora(model):
        plain = model.conditioner.encode(["a red apple"], (32, 32))
    assert cond.tokens is not None and plain.tokens is not None
    assert difference(cond.tokens, plain.tokens) > 1e-3
    lora.remove_lora(model)
    assert torch.equal(predict(model), before)


def test_a_passing_adapter_needs_no_loader(tiny_folder: Callable[[str], Path]) -> None:
    """diffusers loads no LoRA into PixArt, so none is to be saved; one that comes off again may."""
    model = load(tiny_folder("pixart-sigma"))
    with pytest.raises(UserError, match="lora"):
        lora.add_lora(model, rank=2, targets=["to_q"])
    before = predict(model)
    assert lora.add_lora(model, rank=2, targets=["to_q"], lasting=False)
    randomise(model)
    assert difference(predict(model), before) > 1e-4
    lora.remove_lora(model, "default")
    assert torch.equal(predict(model), before)
