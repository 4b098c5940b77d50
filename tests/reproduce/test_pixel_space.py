"""The arms of the pixel-space experiment at tiny size, on the embedded model itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pixel_space
import pytest
import torch
from diffkit.assets import path
from matplotlib.figure import Figure
from runner.experiment import Cell, Results
from runner.scores import BINS

from diffkit.files import read_json, read_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some pictures of the sample; the held-out folder holds the same."""
    root = tmp_path_factory.mktemp("emoji")
    rows = read_jsonl(path("sample") / "metadata.jsonl")[::32]
    for folder in (root / "t2i", root / "t2i-heldout"):
        folder.mkdir()
        for row in rows:
            shutil.copy(path("sample") / row["file_name"], folder)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "t2i"


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cell]:
    tiny = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "taught_steps": 1}
    settings = {**pixel_space.SETTINGS, **tiny}
    work = tmp_path_factory.mktemp("work")
    experiment = replace(pixel_space.EXPERIMENT, settings=settings, work=work)
    return lambda arm: experiment.cell(arm, 0)


def test_the_energy_of_edges_by_hand() -> None:
    """A bright pixel on black, inner 3 x 3 places: 4 in the middle, -1 beside it: 20 / 9."""
    image = torch.zeros(1, 2, 5, 5)
    image[..., 2, 2] = 1
    assert pixel_space.laplacian_energy(image).item() == pytest.approx(20 / 9)
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    assert pixel_space.laplacian_energy(ramp).item() == 0


def test_the_summary_by_hand() -> None:
    """Weight in the parts 4 and 5 alone: the ratio there, and that of the first two."""
    by_time = {
        "latent_by_time": [1.0, 3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0],
        "decoded_by_time": [0.5, 0.5, 9.0, 9.0, 1.0, 3.0, 9.0, 9.0, 9.0, 9.0],
        "weight_by_time": [0.0, 0.1, 0.1, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1],
    }
    found = pixel_space.summary(by_time)
    assert found["ratio"] == pytest.approx(1.0) and found["ratio_low"] == pytest.approx(0.25)
    assert found["latent_weighted"] == pytest.approx(2.0)
    assert found["latent"] == pytest.approx(1.4) and found["decoded"] == pytest.approx(5.9)


def test_arms_of_a_seed_share_start_pictures_noise_and_times(
    cell: Callable[[str], Cell], data: Path
) -> None:
    """Before the first step all arms have one latent loss; later they part."""
    firsts, models = [], []
    for arm in ("latent", "pixel", "control"):
        one = cell(arm)
        folder = pixel_space.train(one, data)
        models.append((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
        row = read_jsonl(one.work / "run" / "metrics.jsonl")[0]
        firsts.append((row["count_by_time"], row.get("latent_loss", row["loss"])))
    assert firsts[0] == firsts[1] == firsts[2]
    assert len(set(models)) == 3


@pytest.mark.slow
def test_the_noise_predictor_is_made_once_and_is_one(
    cell: Callable[[str], Cell], data: Path
) -> None:
    one, other = cell("eps-latent"), cell("eps-pixel")
    start = pixel_space.noise_predictor(one, data)
    weights = start / "unet" / "diffusion_pytorch_model.safetensors"
    made = weights.stat().st_mtime_ns
    assert pixel_space.noise_predictor(other, data) == start
    assert weights.stat().st_mtime_ns == made
    scheduler = read_json(pixel_space.train(other, data) / "scheduler" / "scheduler_config.json")
    assert scheduler["prediction_type"] == "epsilon"
    assert not scheduler["rescale_betas_zero_snr"]


@pytest.mark.slow
def test_the_measures_of_a_known_model(data: Path) -> None:
    """The embedded model: its weight in time is ab (1 - ab); both folders hold the same."""
    scoring = {"loss_pictures": 4, "samples": 4, "steps": 4, "guidance": 2.0}
    values = pixel_space.measure(path("model"), scoring, data)
    weight = values["weight_by_time"]
    assert len(weight) == BINS and 0.2 < max(weight) <= 0.25
    assert 2 <= weight.index(max(weight)) <= 5
    for key in ("ratio", "latent", "decoded_by_time"):
        assert values[key] == values[f"trained_{key}"]
    assert 0 < values["laplacian"] < 10
    assert json.loads(json.dumps(values)) == values


def test_the_report_tells_every_contrast() -> None:
    row = {f"{prefix}{m.key}": 0.1 for prefix in ("", "trained_") for m in pixel_space.MEASURES}
    row |= {f"{name}_by_time": [1.0 + k for k in range(BINS)] for name in pixel_space.NAMES}
    experiment = pixel_space.EXPERIMENT
    cells = experiment.cells(experiment.arms, experiment.seeds)
    results = Results({(c.arm, c.seed): {**row, "lambda": 8.0} for c in cells})
    text = pixel_space.text(results)
    assert text.count("95 % interval") == 5 and "lambda came to 8.00, 8.00, 8.00" in text
    figure = Figure()
    pixel_space.draw(results, figure)
    assert len(figure.axes) == 2
