"""The arms of the LPL experiment at tiny size, on the embedded model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffkit.assets import path
from matplotlib.figure import Figure
from reproduce import lpl
from runner.experiment import Cell, Results
from runner.perception import estimate_errors, laplacian_energy, sample_detail

from diffkit.files import read_jsonl
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.training.latent_perceptual import LatentPerceptualTraining


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture of each sixth pair of the sample; the held-out folder holds the same."""
    root = tmp_path_factory.mktemp("emoji")
    rows = read_jsonl(path("sample") / "metadata.jsonl")[::48]
    for folder in (root / "t2i", root / "t2i-heldout"):
        folder.mkdir()
        for row in rows:
            shutil.copy(path("sample") / row["file_name"], folder)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "t2i"


@pytest.fixture
def cell(tmp_path: Path) -> Callable[[str, int], Cell]:
    settings = {**lpl.SETTINGS, "steps": 2, "batch_size": 4, "warmup_steps": 1}
    scoring = {**lpl.SCORING, "noises": 1, "samples": 2, "sampling_steps": 2}
    return replace(lpl.EXPERIMENT, settings=settings, scoring=scoring, work=tmp_path).cell


def test_every_arm_is_a_configuration(cell: Callable[[str, int], Cell], data: Path) -> None:
    for arm in lpl.ARMS:
        config = lpl.configuration(cell(arm, 0), data)
        config.check()
        assert isinstance(config, LatentPerceptualTraining) == (arm != lpl.PLAIN)
    assert set(lpl.MEANING) == set(lpl.ARMS) - {lpl.PLAIN}


def test_laplacian_energy_by_hand() -> None:
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    assert laplacian_energy(ramp).item() == 0
    assert laplacian_energy(point).item() == pytest.approx((4**2 + 4 * 1) / 9)


def test_true_latents_have_no_error(data: Path) -> None:
    """At the cleanest time the estimate is close, and worse at a noisier one."""
    found = estimate_errors(LatentDiffusion.load("embedded"), data, [5, 190], 1)
    assert found["latent_error"][0] < 0.3 * found["latent_error"][1]
    assert found["feature_error"][0] < 0.3 * found["feature_error"][1]
    ratios = [f / e for f, e in zip(found["feature_error"], found["latent_error"], strict=True)]
    assert found["relative"] == pytest.approx(ratios)
    assert all(0.8 < ratio < 1.2 for ratio in found["variance"])


@pytest.mark.slow
def test_cells_and_report(cell: Callable[[str, int], Cell], data: Path) -> None:
    """The control ends with the plain arm's bits, and the report says so."""
    values = {(arm, 0): lpl.make(cell(arm, 0), data) for arm in (lpl.PLAIN, lpl.LPL, lpl.CONTROL)}
    plain, with_it, control = values.values()
    assert plain["weights"] == control["weights"] != with_it["weights"]
    assert all(control[key] == plain[key] for key, _ in lpl.MEASURES)
    assert math.isfinite(with_it["weight"]) and control["weight"] == plain["weight"] == 0
    told = lpl.text(Results(values))
    assert "ends with the same bits as" in told and told.count("1.0000 [0.0000, inf]") == 0
    lpl.draw(Results(values), Figure())


def test_report_of_numbers_by_hand() -> None:
    """Ratios are of geometric means over the times, and their interval that of logarithms."""

    def numbers(factor: float) -> dict[str, Any]:
        errors = [factor, 4 * factor, factor, 4 * factor]
        base: dict[str, Any] = {"latent_error": errors, "feature_error": errors, "weights": "a"}
        base |= {"relative": [1.0] * 4, "variance": [0.9] * 4}
        logs = {"weight": 2.0, "lpl": 0.01, "gated": 0.2, "denoising": 0.1, "share": 0.2}
        return {**base, **logs, "detail": 0.8, "detail_guided": 1.1}

    values = {(lpl.PLAIN, seed): numbers(1.0) for seed in (0, 1)}
    values |= {(lpl.LPL, 0): numbers(0.5), (lpl.LPL, 1): numbers(0.5)}
    rows = lpl.ratio_table(Results(values), lpl.LPL)
    assert "| 2.00000 | 1.00000 | 0.5000 [0.5000, 0.5000] | 0.5000, 0.5000 |" in rows[2]
    assert "| 1.0000 [1.0000, 1.0000] |" in rows[4]
    assert "No seed has both" in lpl.text(Results(values))
    lpl.draw(Results(values), Figure())


@pytest.mark.slow
def test_detail_of_blurred_pictures_is_lower(data: Path) -> None:
    found = sample_detail(LatentDiffusion.load("embedded"), data, samples=2, steps=2, guidance=1.0)
    assert 0 < found < 1
