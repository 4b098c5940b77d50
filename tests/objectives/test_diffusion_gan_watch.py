"""What a one-step distillation warns of, and what it stops for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.diffusion_gan import DiffusionGanObjective
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from tests.objectives.gan_toy import Folder, make, pairs, run


def test_it_warns_of_a_discriminator_that_tells_all(
    tiny_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    method = make(tiny_folder("sd-v"))
    capsys.readouterr()
    for accuracy, said in ((0.9, ""), (1.0, "tells 100%")):
        for _ in range(600):
            method.stepped("discriminator", {"accuracy": torch.tensor(accuracy)})
        for _ in range(2):
            method.inspect()
        told = capsys.readouterr().err
        assert told.count("warning") == (said != "") and said in told


@pytest.mark.parametrize(
    ("options", "begun", "warned"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"weight": 0.1}, True, False),
        ({"regression": "none"}, True, False),  # its only loss, which nothing holds up
    ],
)
def test_it_warns_of_a_discriminator_at_chance(
    options: dict[str, Any],
    begun: bool,
    warned: bool,
    tiny_folder: Folder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first run of the whole method a share of a gradient that said nothing was noise, and
    pictures got worse."""
    method = make(tiny_folder("sd-v"), warmup=1, **options)
    method.begin(1 if begun else 0)
    capsys.readouterr()
    for _ in range(200):
        method.stepped("discriminator", {"accuracy": torch.tensor(0.5)})
    method.inspect()
    said = capsys.readouterr().err
    assert ("tells 50%" in said) == ("a fixed --gan.weight" in said) == warned


def test_pictures_are_watched_for_collapse(tiny_folder: Folder) -> None:
    torch.manual_seed(0)
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    model.denoiser.requires_grad_(True)
    method = DiffusionGanObjective(model, GanConfig("mse", discriminator="none"), DmdConfig(), 4)
    method.meet(["a cat", "a dog"])
    method.place(torch.device("cpu"))
    method.begin(0)
    assert run(method, "generator", pairs())["diversity"][0] > 0.1
    assert sorted(method.state()) == ["diversity", "gan"]
