"""`diffkit train denoising` on tiny models of Flux and PixArt: stock diffusers loads the result."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from tests.objectives.test_denoising import losses, make_batch

SHORT = ("--size", 32, "--max-steps", 2, "--checkpoint-every", 2)
CACHED = ("--cache-latents", "--cache-embeddings")


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["flux", "flux-schnell", "pixart-alpha", "pixart-sigma"])
def test_full_training(command, tiny_folder, tmp_path, name):
    assert command(*SHORT, *CACHED, model=name) == 0
    result = tmp_path / "out" / "model"
    stock = DiffusionPipeline.from_pretrained(result, local_files_only=True)
    assert type(stock).__name__ == LatentDiffusion.load(result).family.pipelines["text2image"]
    before, after = weights(tiny_folder(name)), weights(result)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_flux_lora_with_pictures_on_the_way(command, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    pictures = ("--validation-prompts", prompts, "--validation-every", 2, "--validation-steps", 2)
    options = ("--lora-rank", 2, "--gradient-checkpointing")
    assert command(*SHORT, *pictures, *options, model="flux") == 0
    assert list((tmp_path / "out").glob("samples/step-*.png"))
    pipeline = FluxPipeline.from_pretrained(tiny_folder("flux"))
    pipeline.load_lora_weights(tmp_path / "out" / "lora")
    assert pipeline.get_active_adapters()


def test_a_lora_for_pixart_is_refused_by_name(command, capsys):
    assert command(*SHORT, "--lora-rank", 2, model="pixart-sigma") == 2
    assert "PixArt-Sigma models have no 'lora' capability" in capsys.readouterr().err


def test_a_distilled_flux_is_told_one_guidance_scale(tiny_folder):
    """3.5 unless another is given, as in diffusers' Flux scripts; refused where none is told."""
    model = LatentDiffusion.load(tiny_folder("flux"))

    def loss(**values):
        objective = DenoisingObjective(model, DenoisingConfig(**values))
        objective.place(torch.device("cpu"))
        with torch.no_grad():
            return losses(objective, make_batch(2))["loss"]

    assert torch.equal(loss(), loss(guidance=3.5))
    assert not torch.equal(loss(), loss(guidance=1.0))
    plain = LatentDiffusion.load(tiny_folder("flux-schnell"))
    with pytest.raises(UserError, match="denoising.guidance: this Flux model has no guidance"):
        DenoisingObjective(plain, DenoisingConfig(guidance=3.5))
    with pytest.raises(UserError, match="must not be negative"):
        DenoisingConfig(guidance=-1.0).check()
