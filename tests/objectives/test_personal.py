"""DreamBooth and textual inversion: the loss by hand, which weights get a gradient, the draws."""

from __future__ import annotations

import pytest
import torch

from diffkit.data.paired import PairedBatch
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.models.placeholder import PlaceholderEmbedding
from diffkit.models.text_encoders import TEXT_TARGETS, clip_encoders
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from diffkit.objectives.dreambooth import (
    DreamBoothConfig,
    DreamBoothObjective,
    prior_preservation_loss,
)
from diffkit.objectives.textual_inversion import TextualInversionConfig, TextualInversionObjective
from tests.objectives.test_denoising import losses, make_batch

NO_DROPOUT = DenoisingConfig(condition_dropout=0.0)


def frozen(folder):
    model = LatentDiffusion.load(folder)
    for network in model.networks.values():
        network.requires_grad_(False)
    return model


def run(objective, batch):
    objective.place(torch.device("cpu"))
    draws = objective.draw(batch, 0)
    with torch.no_grad():
        shared = objective.shared(draws)
    (player,) = objective.players().values()
    return player("denoising", draws, shared)


def moved(module):
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_prior_preservation_by_hand():
    instance, prior = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 2.0])
    assert prior_preservation_loss(instance, prior, 0.5).tolist() == [1.25, 4.0]
    assert prior_preservation_loss(instance.bfloat16(), prior, 1.0).dtype == torch.float32


def test_the_loss_of_a_pair_is_made_of_plain_denoising_losses(tiny_sd):
    """Each half has its own draws, those of its own samples; w weighs the class pictures."""
    model = frozen(tiny_sd)
    own, prior = make_batch(3), make_batch(3, seed=5)
    plain = DenoisingObjective(model, NO_DROPOUT)
    plain.place(torch.device("cpu"))
    config = DreamBoothConfig(class_prompt="a dog", prior_weight=0.25)
    objective = DreamBoothObjective(model, config, NO_DROPOUT)
    found = run(objective, PairedBatch(own, prior))
    first, second = (losses(plain, batch)["loss"] for batch in (own, prior))
    assert torch.equal(found["instance_loss"], first) and torch.equal(found["prior_loss"], second)
    assert torch.equal(found["loss"], first + 0.25 * second)
    draws = objective.draw(PairedBatch(own, prior), 0)
    assert not torch.equal(draws[0].eps, draws[1].eps) and not torch.equal(draws[0].t, draws[1].t)
    assert torch.equal(run(objective, own)["loss"], first)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_text_encoders_move_when_asked(name, tiny_folder):
    """CLIP only, and no parameter is left trainable that no conditioning depends on."""
    model = frozen(tiny_folder(name))
    encoders = clip_encoders(model.conditioner)
    for network in (model.denoiser.model, *encoders.values()):
        network.requires_grad_(True)
    config = DreamBoothConfig(train_text_encoder=True)
    objective = DreamBoothObjective(model, config, NO_DROPOUT)
    run(objective, make_batch(2))["loss"].mean().backward()
    assert moved(model.denoiser.model)
    for encoder in encoders.values():
        assert moved(encoder)
        assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    others = [n for k, n in model.networks.items() if k not in (*encoders, model.family.denoiser)]
    assert not any(moved(network) for network in others)


def test_encoded_in_the_step_is_encoded_before(tiny_sdxl):
    """Dropped prompts too: the losses are those of plain training."""
    model = frozen(tiny_sdxl)
    denoising = DenoisingConfig(condition_dropout=0.5)
    plain = DenoisingObjective(model, denoising)
    plain.place(torch.device("cpu"))
    model.networks["text_encoder"].requires_grad_(True)
    config = DreamBoothConfig(train_text_encoder=True)
    batch = make_batch(6)
    assert 0 < plain.draw(batch, 0).drop.sum() < 6
    found = run(DreamBoothObjective(model, config, denoising), batch)["loss"]
    assert torch.equal(found, losses(plain, batch)["loss"])


def test_only_adapters_get_gradients(tiny_sd3):
    model = LatentDiffusion.load(tiny_sd3)
    for network in model.networks.values():
        network.requires_grad_(False)
    add_lora(model, 2, text_targets=TEXT_TARGETS)
    config = DreamBoothConfig(train_text_encoder=True)
    objective = DreamBoothObjective(model, config, NO_DROPOUT, lora="default")
    run(objective, make_batch(2))["loss"].mean().backward()
    for part, network in model.networks.items():
        names = moved(network)
        assert all("lora_B" in name for name in names)  # A gets none while B is zero
        assert bool(names) == (part in ("transformer", "text_encoder", "text_encoder_2")), part


def test_only_the_new_rows_get_gradients(tiny_sdxl):
    model = frozen(tiny_sdxl)
    config = TextualInversionConfig("<x>", "ab", vectors=2, prompts=("a {}",))
    objective = TextualInversionObjective(model, config, NO_DROPOUT)
    batch = make_batch(2)
    run(objective, batch_with("a <x>", batch))["loss"].mean().backward()
    (player,) = objective.players().values()
    names = {name for name, p in player.named_parameters() if p.requires_grad}
    assert len(names) == 2 and all(name.endswith("rows") for name in names)
    assert moved(player) == names
    for embedding in objective.embeddings.values():
        assert embedding.rows.grad.abs().sum(1).gt(0).all()


def batch_with(caption, batch):
    from dataclasses import replace

    return replace(batch, captions=[caption] * len(batch))


def test_a_placeholder_is_a_table_with_more_rows():
    table = torch.nn.Embedding(5, 3)
    rows = torch.randn(2, 3)
    both = torch.nn.Embedding.from_pretrained(torch.cat([table.weight.detach(), rows]))
    ids = torch.tensor([[0, 5, 4], [6, 5, 5]])
    assert torch.equal(PlaceholderEmbedding(table, 5, rows)(ids), both(ids))
    assert not table.weight.requires_grad


def test_rows_begin_as_the_initializer(tiny_sd):
    model = frozen(tiny_sd)
    tokenizer = model.conditioner.components["tokenizer"]
    ids = tokenizer.encode("ab", add_special_tokens=False)
    table = model.networks["text_encoder"].get_input_embeddings().weight.clone()
    config = TextualInversionConfig("<x>", "ab", vectors=3, prompts=("a {}",))
    objective = TextualInversionObjective(model, config, NO_DROPOUT)
    rows = objective.embeddings["text_encoder"].rows
    assert torch.equal(rows, table[[ids[0], ids[1], ids[0]]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token": "<x>", "initializer": "abc", "vectors": 2}, "is 3 tokens"),
        ({"token": "a", "initializer": "b"}, "a word of this model already"),
        ({"token": "<x>", "initializer": "b", "vectors": 10}, "tokenizer reads 12"),
        ({"token": "<x>", "initializer": ""}, "initializer: is missing"),
        ({"token": "<x y>", "initializer": "b"}, "one word in lower case"),
        ({"token": "<x>", "initializer": "b", "prompts": ("a b",)}, "must hold {} once"),
    ],
)
def test_words_that_cannot_be_taught(values, message, tiny_sd):
    config = TextualInversionConfig(**{"prompts": ("a {}",)} | values)
    with pytest.raises(UserError, match=message):
        TextualInversionObjective(frozen(tiny_sd), config, NO_DROPOUT)


def test_models_without_clip_are_refused_by_name(tiny_sd3, tiny_folder):
    config = TextualInversionConfig("<x>", "b", prompts=("a {}",))
    with pytest.raises(UserError, match="Stable Diffusion 3 has text_encoder_3"):
        TextualInversionObjective(frozen(tiny_sd3), config, NO_DROPOUT)
    model = frozen(tiny_folder("pixart-sigma"))
    with pytest.raises(UserError, match="PixArt-Sigma models have no CLIP text encoder"):
        DreamBoothObjective(model, DreamBoothConfig(train_text_encoder=True), NO_DROPOUT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prior_weight": 0.5}, "prior_weight: belongs to prior preservation"),
        ({"class_images": "x"}, "class_images: belongs to prior"),
        (
            {"class_prompt": "a", "class_images": "x", "class_steps": 5},
            "no class pictures are made",
        ),
        ({"class_prompt": "a", "prior_weight": 0.0}, "must be above 0"),
        ({"instance_prompt": ""}, "instance_prompt: is empty"),
    ],
)
def test_values_that_would_do_nothing(values, message):
    with pytest.raises(UserError, match=message):
        DreamBoothConfig(**values).check()
