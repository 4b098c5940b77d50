"""The experiment of one-step students: its measures, one cell at tiny size, its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusion_to_gan
import pytest
import torch
from diffkit.assets import path
from diffusion_to_gan import EXPERIMENT, asked_of, spread, trained_captions
from diffusion_to_gan_parts.arms import (
    ALONE,
    ARMS,
    BARE,
    BEST,
    FULL,
    HUBER,
    LADDER,
    LPL,
    MEANING,
    MSE,
    ON,
    TEACHERS,
)
from diffusion_to_gan_parts.report import MEASURES
from matplotlib.figure import Figure
from runner.experiment import Cell, Experiment, Results
from runner.judge import Asked
from runner.pairs import pair_folder
from runner.scores import detail
from runner.students import Comparison, encoded_strip, strip

from diffkit.data.trajectories import TrajectoryData
from diffkit.data.trajectory_store import read_header
from diffkit.files import read_jsonl
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.objectives.diffusion_gan_config import GanConfig
from diffkit.perceptual.spectra import high_frequency_energy

EMBEDDED = path("model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every twelfth picture of the sample."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = read_jsonl(path("sample") / "metadata.jsonl")[::24]
    for row in rows:
        (folder / row["file_name"]).symlink_to(path("sample") / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def experiment(tmp_path: Path, data: Path) -> Experiment:
    """Two steps of two pairs; the generator hears of the discriminator in the second."""
    few = {"steps": 2, "decay": 1, "batch_size": 2}
    arms = {}
    for arm, values in ARMS.items():
        gan = dict(values.get("gan", {}))
        if "warmup" in gan:
            gan["warmup"] = 1
        arms[arm] = {**values, **({"gan": gan, **few} if "gan" in values else {})}
    twice = 2 * len(trained_captions(asked_of(data)))
    pairs = {"count": twice, "seed": 0, "steps": 2, "guidance": 2.0}
    return replace(
        EXPERIMENT,
        arms=arms,
        settings={**EXPERIMENT.settings, "pairs": pairs, "warmup_steps": 1},
        scoring={**EXPERIMENT.scoring, "noises": 2, "shown": 2},
        work=tmp_path,
    )


def test_every_arm_is_a_configuration(tmp_path: Path) -> None:
    for arm, values in ARMS.items():
        if "gan" not in values:
            continue
        start = tmp_path / "student" if "start" in values else EMBEDDED
        cell = EXPERIMENT.cell(arm, 0)
        config = diffusion_to_gan.configuration(cell, tmp_path, EMBEDDED, start)
        config.check()
        others = config.gan.discriminator != "none" or config.gan.dmd
        assert (config.gan.teacher is not None) == (others and "start" in values)
    assert set(MEANING) | set(TEACHERS) == set(ARMS)
    assert all(values.get("start") in (None, BEST, MSE) for values in ARMS.values())


def test_captions_are_concepts_and_looks(data: Path) -> None:
    asked = asked_of(data)
    assert len({one.caption for one in asked}) == len(asked)
    assert all((one.concept is None) != (one.style is None) for one in asked)
    concept, look = asked[0], asked[-1]
    assert concept.concept == concept.caption
    assert look.caption == f"{look.style} style, {look.caption.split(', ')[1]}"


@pytest.mark.slow
def test_the_teachers_own_end_points_are_without_fault(data: Path, tmp_path: Path) -> None:
    """And their mirror images are as detailed and diverse, and not where they should be."""
    asked = [Asked("red apple", "red apple"), Asked("noto style, white background", None, "noto")]
    words: dict[str, Any] = {"count": 4, "seed": 1, "steps": 2, "guidance": 2.0}
    folder = pair_folder(tmp_path / "held", EMBEDDED, [one.caption for one in asked], **words)
    assert pair_folder(folder, EMBEDDED, [], **words) == folder  # whole, so not made again
    assert read_header(folder).steps == 2
    held = TrajectoryData(folder, batch_size=1, seed=0).pairs(range(4))
    networks = FeatureNetwork.load(path("features")), TextImageScorer.load(path("scorer"))
    judge = Comparison(held, asked, held.latents, data, LatentDiffusion.load(EMBEDDED), *networks)
    own = judge.scores(held.latents, judge.pictures)
    assert set(own) == {"n", *(measure.key for measure in MEASURES)}
    assert own["detail"] == own["diversity"] == 1
    assert own["latent_error"] == own["perceptual"] == 0
    assert own["concept"] in (0, 0.5, 1) and own["style"] == 1  # the only one that is asked for
    mirrored = judge.scores(held.latents.flip(-1), judge.pictures.flip(-1))
    assert mirrored["detail"] == pytest.approx(1, rel=0.05)  # the window is not its own mirror
    assert mirrored["diversity"] == pytest.approx(1)
    assert mirrored["latent_error"] > 0.01 and mirrored["perceptual"] > 0.01
    grey = judge.scores(torch.zeros_like(held.latents), torch.zeros_like(judge.pictures))
    assert grey["detail"] == grey["diversity"] == 0
    assert grey["kernel_taught"] > own["kernel_taught"]


def test_a_mean_of_pictures_has_less_detail() -> None:
    """The share of high frequencies, which was measured at first, called the mean the sharper."""
    angle = 2 * torch.pi * torch.arange(64) / 64
    coarse = torch.sin(4 * angle).expand(1, 3, 64, 64)
    one, other = (
        scale * coarse + 0.1 * torch.sin(24 * angle + phase)
        for scale, phase in ((1.0, 0.0), (-0.5, 2 * torch.pi / 3))
    )
    mean = (one + other) / 2
    assert high_frequency_energy(mean) > 3 * high_frequency_energy(one)
    assert detail(mean) == pytest.approx(detail(one) / 4, rel=1e-3)


def test_strips_of_pictures_survive_their_text() -> None:
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 0.0]])
    images = colours[:, :, None, None].expand(2, 3, 16, 16)
    pixels = strip(encoded_strip(images))
    assert pixels.shape == (16, 32, 3)
    expected = torch.tensor([[255, 0, 0], [0, 255, 128]])
    found = torch.tensor(pixels[8, [8, 24]].astype(int))
    assert (found - expected).abs().max() < 12


def test_the_pictures_shown_are_of_all_kinds() -> None:
    assert spread(96, 2) == [0, 95] and spread(96, 12)[:3] == [0, 9, 17]
    assert len(set(spread(96, 12))) == 12


@pytest.mark.slow
def test_tiny_cells(experiment: Experiment, data: Path) -> None:
    """The whole method trains what it starts from, which its own cell then only measures."""

    def made(cell: Cell) -> dict[str, Any]:
        return diffusion_to_gan.make(cell, data, EMBEDDED, experiment)

    full = made(experiment.cell(FULL, 0))
    assert full["n"] == 2 * len(asked_of(data)) and full["device"] == "cpu"
    assert {"run generator/loss", "run discriminator/accuracy"} <= set(full)
    first = experiment.cell(BEST, 0)
    log = first.work / "run" / "metrics.jsonl"
    before = log.read_bytes()
    values = made(first)
    assert log.read_bytes() == before and strip(values["pictures"]).shape == (64, 128, 3)
    assert values["latent_error"] > 0 and json.loads(json.dumps(values)) == values
    bare = made(experiment.cell(BARE, 0))
    assert "run loss" not in bare and bare["detail"] > 0


def known() -> Results:
    """Results in which E-LatentLPIPS is 0.1 ahead and the whole method 0.05 more."""
    strips = encoded_strip(torch.zeros(2, 3, 8, 8))
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for arm in ARMS:
        for seed in EXPERIMENT.fewer.get(arm, EXPERIMENT.seeds):
            kernel = 0.2 if arm == BEST else 0.15 if arm == FULL else 0.3
            kernel = 0.19 if arm == ON else kernel
            values = {measure.key: 0.5 for measure in MEASURES}
            values |= {"detail": 0.2 if arm == MSE else 0.9, "kernel": kernel + 0.001 * seed}
            values["scorer"] = 0.4 if arm == HUBER else 0.5
            cells[arm, seed] = {"n": 4, "device": "cuda", "pictures": strips, **values}
    return Results(cells)


def test_the_tables_say_what_the_results_say() -> None:
    lines = EXPERIMENT.text(known()).splitlines()
    rows = {arm: [line for line in lines if line.startswith(f"| {arm} | ")] for arm in ARMS}
    assert all(len(rows[arm]) == 1 for arm in ARMS if arm not in TEACHERS)
    assert rows[MSE][0].startswith("| MSE | 3 | 0.3010 | 0.5000 | 50.0% | 50.0% | 0.200 |")
    assert "| +0.1000 [+0.1000, +0.1000] | +0.0000" in rows[MSE][0]
    assert rows[BEST][0].endswith("|  |  |") and rows[LPL][0].startswith(f"| {LPL} | 1 |")
    said = "\n".join(lines)
    assert f"{BEST} has the least kernel distance by the feature network, {HUBER} by" in said
    assert f"{MSE} the least power at high frequencies" in said
    assert "more, `full`: kernel distance less, -0.0400 [-0.0400, -0.0400] and by the" in said
    assert "more, `full, DMD2`: kernel distance more, +0.1100 [" in said
    assert "Made on cuda." in said


def test_the_figure_is_drawn_from_results_alone() -> None:
    figure = Figure()
    EXPERIMENT.draw(known(), figure)
    assert len(figure.axes) == 6
    EXPERIMENT.draw(Results({}), Figure())


def test_the_ladder_adds_one_thing_at_a_time() -> None:
    steps = [vars(GanConfig(**values["gan"])) for arm, values in LADDER.items() if arm != ON]
    for a, b in zip(steps[:-1], steps[1:], strict=True):
        assert len([name for name in a if a[name] != b[name]]) == 1
    assert ARMS[ON]["gan"] == ALONE
