"""The arms of the loss-weighting experiment at tiny size, on the embedded architecture itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import loss_weighting
import pytest
import torch
from diffkit.assets import path
from runner import ROOT
from runner.experiment import Cell
from runner.inputs import untrained_model
from runner.scores import BINS, loss_by_time
from runner.stages import stage_folder

from diffkit.files import read_jsonl
from diffkit.models.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture of each second pair of the sample; the held-out folder holds the same."""
    root = tmp_path_factory.mktemp("emoji")
    rows = read_jsonl(path("sample") / "metadata.jsonl")[::16]
    for folder in (root / "t2i", root / "t2i-heldout"):
        folder.mkdir()
        for row in rows:
            shutil.copy(path("sample") / row["file_name"], folder)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "t2i"


@pytest.fixture
def cell(tmp_path: Path) -> Callable[[str, int], Cell]:
    settings = {**loss_weighting.SETTINGS, "stages": [1, 2], "batch_size": 4, "warmup_steps": 1}
    experiment = replace(loss_weighting.EXPERIMENT, settings=settings, work=tmp_path)
    return experiment.cell


def rows_of(cell: Cell) -> list[dict]:
    return read_jsonl(cell.work / "run" / "metrics.jsonl")


def test_arms_of_a_seed_differ_in_the_weights_alone(
    cell: Callable[[str, int], Cell], data: Path
) -> None:
    """Same start, pictures, noise and times: the first min-SNR loss is the weighted uniform one."""
    cells = [cell("uniform", 0), cell("min-SNR", 0)]
    for one in cells:
        loss_weighting.train(one, data)
    first, second = (rows_of(one)[0] for one in cells)
    assert first["count_by_time"] == second["count_by_time"]
    uniform, weighted = first["loss_by_time"], second["loss_by_time"]
    ratios = [b / a for a, b in zip(uniform, weighted) if a is not None]
    assert all(0 <= ratio <= 5 / 6 + 1e-6 for ratio in ratios)  # min(snr, 5) / (snr + 1)
    assert ratios != pytest.approx([ratios[0]] * len(ratios))


def test_stages_lie_on_one_run_and_are_kept(cell: Callable[[str, int], Cell], data: Path) -> None:
    one = cell("uniform", 1)
    folders = loss_weighting.train(one, data)
    assert folders == [stage_folder(one.work / "run", steps) for steps in (1, 2)]
    assert [row["step"] for row in rows_of(one)] == [1, 2]
    weights = [folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in folders]
    times = [file.stat().st_mtime_ns for file in weights]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert loss_weighting.train(one, data) == folders
    assert [file.stat().st_mtime_ns for file in weights] == times


def test_another_seed_starts_elsewhere(tmp_path: Path) -> None:
    models = [LatentDiffusion.load(untrained_model(tmp_path / str(s), s)) for s in (0, 1)]
    unets = [next(model.denoiser.model.parameters()) for model in models]
    assert not torch.equal(*unets)
    embedded = LatentDiffusion.load("embedded")
    assert models[0].codec.fingerprint() == embedded.codec.fingerprint()
    assert models[0].conditioner.fingerprint() == embedded.conditioner.fingerprint()
    shapes = [{k: v.shape for k, v in m.denoiser.state_dict().items()} for m in (*models, embedded)]
    assert shapes[0] == shapes[2]


def test_the_measures_of_a_known_model(data: Path) -> None:
    """The embedded model has seen these pictures' concepts: it scores far above chance."""
    scoring = {"samples": [1], "steps": 5, "guidance": 2.0, "loss_pictures": 4}
    values = loss_weighting.measure([path("model")], scoring, data)
    rows = read_jsonl(data / "metadata.jsonl")
    assert values["n"] == [len({(row["concept"], row["style"]) for row in rows})]
    assert values["concept"][0] >= 0.5
    assert len(values["loss_trained_by_time"][0]) == BINS
    assert values["loss_trained"] == values["loss_heldout"], "the two folders hold the same"
    assert json.loads(json.dumps(values)) == values


def test_the_held_out_draws_are_the_same_for_every_call(data: Path) -> None:
    model = LatentDiffusion.load("embedded")
    assert loss_by_time(model, data, 4) == loss_by_time(model, data, 4)


INTERRUPTIBLE = """
import sys
from dataclasses import replace
from pathlib import Path
import loss_weighting
from runner.main import main

settings = {**loss_weighting.SETTINGS, "stages": [2, 12], "batch_size": 4, "warmup_steps": 1}
work, data = Path(sys.argv[1]), Path(sys.argv[2])
experiment = replace(
    loss_weighting.EXPERIMENT,
    settings=settings,
    work=work,
    run=lambda cell: {"folders": len(loss_weighting.train(cell, data))},
)
words = ["--only", "min-SNR", "--seeds", "0", "--results", str(work / "results"), "--worker"]
sys.exit(main(experiment, words))
"""


@pytest.mark.slow
def test_an_interrupted_arm_ends_with_the_same_bytes(tmp_path: Path, data: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", INTERRUPTIBLE, str(tmp_path / name), str(data)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "reproduce")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    stopped = start("stopped")
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if line.startswith("going on after step 2"):
            stopped.terminate()
    assert stopped.wait() == 130
    assert not (tmp_path / "stopped" / "results").exists()
    for name in ("stopped", "whole"):
        again = start(name)
        _, said = again.communicate()
        assert again.returncode == 0, said
    weights = [
        file.read_bytes()
        for name in ("stopped", "whole")
        for file in (tmp_path / name).glob("loss_weighting/*/run-12/unet/*.safetensors")
    ]
    assert len(weights) == 2
    assert weights[0] == weights[1]
