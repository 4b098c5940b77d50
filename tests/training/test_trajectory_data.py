"""Noise-image pairs as the data of a training: what is refused, what the harness makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from diffkit.data.trajectories import TrajectoryData
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.training.config import TrainConfig
from diffkit.training.launch import build_data, example_prompts, picture_side
from tests.data.trajectory_folder import PROMPTS, build


@dataclass
class PairTraining(TrainConfig):
    """Any method that trains on pairs."""

    def trajectories(self) -> bool:
        return True


@pytest.fixture
def config(tmp_path):
    folder = build(tmp_path / "pairs")
    return PairTraining(data=str(folder), output=tmp_path / "run", batch_size=4, seed=3)


def test_pairs_are_read_for_the_model(config, tiny_sd):
    model = LatentDiffusion.load(tiny_sd)
    data = build_data(config, model)
    assert isinstance(data, TrajectoryData) and len(data) == 10
    (batch,) = data.batches(0, 1)
    assert batch.latents.shape == (4, *model.latent_shape(32, 32)) and batch.keys.seed == 3
    assert picture_side(config, model, data) == 32
    assert example_prompts(config, model, data) == [prompt.text for prompt in PROMPTS]


def test_what_is_about_pictures_is_refused(config):
    config.check()
    for values in (
        {"flip": True},
        {"crop": "random"},
        {"size": 64},
        {"max_aspect": 2.0},
        {"split": "test"},
        {"streaming": True},
        {"cache_latents": True},
        {"caption_column": "text"},
    ):
        (name,) = values
        with pytest.raises(UserError, match=f"{name}: is about pictures"):
            replace(config, **values).check()


def test_pairs_of_another_latent_space_are_refused(config, tiny_sd, tmp_path):
    model = LatentDiffusion.load(tiny_sd)
    for values in (
        {"space": {"codec": "Codec", "scaling_factor": 0.18215}},
        {"shape": (16, 16, 16)},
        {"size": (64, 64)},
    ):
        folder = build(tmp_path / "other", **values)
        with pytest.raises(UserError, match="are not of this model's kind"):
            build_data(replace(config, data=str(folder)), model)


def test_a_folder_of_pictures_is_refused(config, tiny_sd, tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="made by `diffkit trajectories`.* --gan.pictures"):
        build_data(replace(config, data=str(tmp_path / "pictures")), LatentDiffusion.load(tiny_sd))
