"""The lines in the cards of few-step students: they are run as they stand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffkit.cli import main
from diffkit.generation.card import read_card
from diffkit.models.model_card import ModelCard
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.diffusion_gan_config import GanConfig
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.training.config import TrainConfig
from diffkit.training.consistency import ConsistencyTraining
from diffkit.training.diffusion_gan import GanTraining
from diffkit.training.proxy_reward import ProxyRewardTraining
from diffkit.training.publish import _changed
from diffkit.training.reward_guided import RewardGuidedTraining
from tests.training.card_block import run_card, used, write_student

SLOW = pytest.mark.slow
SMALL = "height=32, width=32"
LCM = {"original_inference_steps": 50, "clip_sample": False, "thresholding": False}
PHASED = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
PHASED |= {"clip_sample": False, "thresholding": False}


@pytest.fixture
def student(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """`student(config class, model, **values)` -> the folder of a result."""

    def made(kind: type[TrainConfig], name: str, **values: Any) -> Path:
        output = tmp_path / "run"
        return write_student(kind("pictures", output, model=str(tiny_folder(name)), **values))

    return made


@pytest.mark.parametrize(
    ("name", "more", "line", "options"),
    [
        ("sd-v", SMALL, '"...", num_inference_steps=4, guidance_scale=7.5', LCM),
        (
            "pixart-alpha",
            f"{SMALL}, use_resolution_binning=False",
            '"...", num_inference_steps=4, guidance_scale=1.0',
            LCM,
        ),
        pytest.param("pixel", "", "num_inference_steps=4", LCM, marks=SLOW),
        ("pixel-ddim", "", "num_inference_steps=4", LCM),
        pytest.param("latent", "", "num_inference_steps=4", LCM, marks=SLOW),
        pytest.param(
            "dit",
            "",
            "class_labels=[0], num_inference_steps=4, guidance_scale=1.0",
            LCM,
            marks=SLOW,
        ),
        pytest.param(
            "sd3",
            SMALL,
            '"...", num_inference_steps=4, guidance_scale=1.0, '
            "sigmas=[1 - i / 4 for i in range(4)]",
            {"shift": 3.0},
            marks=SLOW,
        ),
    ],
)
def test_the_lines_of_a_model_make_a_picture(
    name: str, more: str, line: str, options: dict[str, Any], student: Callable[..., Path]
) -> None:
    """Without the scale that was trained a stock pipeline takes its own, 7.5; those of pixels take
    none, nor a prompt; a `DDIMPipeline` would make the student's scheduler one of DDIM."""
    folder = student(ConsistencyTraining, name)
    assert f"image = pipeline({line}).images[0]" in used(folder)
    pipeline, picture = run_card(folder, more=more)
    kind = "FlowMatchLCMScheduler" if name == "sd3" else "LCMScheduler"
    assert type(pipeline.scheduler).__name__ == kind
    assert pipeline.scheduler.config.items() >= options.items()
    assert picture.size == (32, 32)
    if "guidance_scale" in line:
        assert f"guidance_scale={read_card(str(folder)).guidance_scale}" in line


@pytest.mark.parametrize(
    ("name", "segments", "kind", "options"),
    [
        ("sd", 1, "LCMScheduler", LCM),
        ("sdxl", 2, "DDIMScheduler", PHASED),
        pytest.param(
            "flux-schnell", 2, "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, marks=SLOW
        ),
        pytest.param("sd3", 1, "FlowMatchLCMScheduler", {"shift": 3.0}, marks=SLOW),
    ],
)
def test_the_lines_of_a_lora_make_a_picture(
    name: str,
    segments: int,
    kind: str,
    options: dict[str, Any],
    student: Callable[..., Path],
    tiny_folder: Callable[[str], Path],
) -> None:
    """A scheduler of another class, such as SDXL's of Euler, does not say that nothing is clipped,
    and DDIM clips unless it is told."""
    lcd = ConsistencyConfig(segments=segments)
    folder = student(ConsistencyTraining, name, lora_rank=2, lcd=lcd)
    pipeline, picture = run_card(folder, tiny_folder(name), SMALL)
    assert type(pipeline.scheduler).__name__ == kind
    assert pipeline.scheduler.config.items() >= options.items()
    assert picture.size == (32, 32)
    assert ("pipeline.scheduler =" in used(folder)) == (kind != "FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize(
    ("name", "lora", "guidance"),
    [("sd-v", 2, 1.0), pytest.param("flux", None, 3.5, marks=SLOW)],
)
def test_the_lines_of_a_generator(
    name: str,
    lora: int | None,
    guidance: float,
    student: Callable[..., Path],
    tiny_folder: Callable[[str], Path],
) -> None:
    gan = GanConfig(regression="mse", discriminator="none")
    folder = student(GanTraining, name, lora_rank=lora, gan=gan)
    assert f"num_inference_steps=1, guidance_scale={guidance})" in used(folder)
    pipeline, picture = run_card(folder, tiny_folder(name) if lora else None, SMALL)
    assert picture.size == (32, 32)
    if lora:
        assert pipeline.scheduler.config.items() >= LCM.items()
    else:
        assert read_card(str(folder)).guidance_scale == guidance


def test_classes_are_named_to_diffkit(student: Callable[..., Path], tmp_path: Path) -> None:
    """No stock pipeline tells a U-Net without text its class."""
    folder = student(ConsistencyTraining, "pixel-class")
    program, *words = shlex.split(used(folder), comments=True)
    assert program == "diffkit"
    places = {"THIS": str(folder), "pictures": str(tmp_path / "pictures")}
    assert main([places.get(word, word) for word in words]) == 0
    (picture,) = (tmp_path / "pictures").glob("0*.png")
    assert Image.open(picture).size == (32, 32)


def test_the_line_of_a_proxy_names_its_model(tmp_path: Path) -> None:
    config = ProxyRewardTraining("pictures", tmp_path, model="/somewhere/my model")
    said = config.card(None)["command"]  # type: ignore[arg-type]
    assert "--model 'my model' --data DATA --output RUN" in said
    assert said.endswith("--reward.proxy THIS")


def test_a_lora_of_the_embedded_model_finds_it() -> None:
    text = ModelCard(base_model="embedded", relation="adapter").render("x")
    assert 'from_pretrained(resolve("embedded"))' in text
    assert "from diffkit.models.loading import resolve" in text


def test_settings_tell_no_folder_of_this_machine(tmp_path: Path) -> None:
    """Cards named the files of proxies, teachers and metrics with all folders above them."""
    weights = tmp_path / "weights.pt"
    weights.touch()
    lcd = ConsistencyConfig(distance="e_latentlpips", latent_lpips=str(tmp_path / "metric"))
    reward = RewardConfig(
        proxy=tmp_path / "proxy",
        decoder=str(tmp_path / "taesd"),
        rewards=f"hpsv2:{weights}:1,clip:ViT-H-14:tag={weights}",
    )
    found = _changed(RewardGuidedTraining("x", tmp_path, lcd=lcd, reward=reward))
    assert found["lcd.latent_lpips"] == "metric"
    assert (found["reward.proxy"], found["reward.decoder"]) == ("proxy", "taesd")
    assert found["reward.rewards"] == "hpsv2:weights.pt:1,clip:ViT-H-14:tag=weights.pt"
    gan = GanConfig(teacher=str(tmp_path / "teacher"), latent_lpips="owner/metric")
    found = _changed(GanTraining("x", tmp_path, gan=gan))
    assert (found["gan.teacher"], found["gan.latent_lpips"]) == ("teacher", "owner/metric")
    assert str(tmp_path) not in json.dumps(found)
