"""The arms of the few-step experiment at tiny size, on the embedded model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffkit.assets import path
from matplotlib.figure import Figure
from reproduce import rg_lcd
from rg_lcd_parts import report
from rg_lcd_parts.measure import Prompts, Sampler
from runner.experiment import Experiment, Results
from safetensors.torch import load_file

from diffkit.errors import RunFailed
from diffkit.files import read_jsonl
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.training.consistency import ConsistencyTraining
from diffkit.training.reward_guided import RewardGuidedTraining

TEACHER = path("model")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of the sample, their captions as in the pictures of the experiment."""
    folder = tmp_path_factory.mktemp("open")
    rows = read_jsonl(path("sample") / "metadata.jsonl")[
        :: len(list(path("sample").glob("*"))) // 8
    ]
    for row in rows:
        (folder / row["file_name"]).symlink_to(path("sample") / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    tiny = {"batch_size": 4, "warmup_steps": 1}
    pretraining = {**rg_lcd.SETTINGS["pretraining"], **tiny, "steps": 3}
    own = {"sampled": [1, 2], "pretraining": pretraining, "stages": [3]}
    settings = {**rg_lcd.SETTINGS, **tiny, **own}
    arms = {**rg_lcd.ARMS, report.LONG: {**rg_lcd.ARMS[report.LONG], "stages": [3, 5]}}
    scoring = {**rg_lcd.SCORING, "noises": 2, "teacher_steps": [1, 2], "endpoint_steps": 2}
    return replace(rg_lcd.EXPERIMENT, arms=arms, settings=settings, scoring=scoring, work=tmp_path)


def test_every_arm_is_a_configuration(experiment: Experiment, data: Path) -> None:
    for arm, values in rg_lcd.ARMS.items():
        one = experiment.cell(arm, 0)
        if one.settings["lcd"] is None:
            continue
        if "proxy" in values:
            rg_lcd.proxy_configuration(one, data, TEACHER).check()
        config = rg_lcd.configuration(one, data, TEACHER, one.work)
        config.check()
        assert isinstance(config, ConsistencyTraining)
        assert isinstance(config, RewardGuidedTraining) == ("reward" in values)
    main = {report.TEACHER_ARM, report.LCD, report.LONG, *report.REWARDED}
    assert set(rg_lcd.ARMS) == main | set(report.ABLATIONS)


def test_prompts_leave_things_open(data: Path) -> None:
    found = Prompts.read(data, 3)
    captions = found.captions
    assert len(captions) == 3 * len(set(captions)) == 3 * len(found.asked)
    assert captions[0] == captions[2] != captions[3]
    assert {(one.concept is None, one.style is None) for one in found.asked} == {
        (True, False),
        (False, True),
    }
    assert all((", " in one.caption) == (one.concept is None) for one in found.asked)
    places = found.by_caption(torch.arange(len(captions)))
    assert [captions[i] for i in places[1].tolist()] == [found.asked[1].caption] * 3


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    sampler = Sampler(LatentDiffusion.load("embedded"), 1.0, 0)
    one, two = sampler._noise(range(3)), sampler._noise(range(1, 3))
    assert torch.equal(one[1:], two) and not torch.equal(sampler._noise(range(3), 0), one)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["teacher", "proxy", "proxy of towers", "two segments", "LoRA"])
def test_a_tiny_cell(experiment: Experiment, data: Path, arm: str) -> None:
    one = experiment.cell(arm, 0)
    values = rg_lcd.measured(one, data, TEACHER, experiment)
    assert values["device"] and values["n"] == 2 * len(set(Prompts.read(data, 1).captions))
    assert json.loads(json.dumps(values)) == values
    for scores in values["steps"].values():
        assert all(math.isfinite(x) for x in scores.values())
        assert {kind.key for kind in report.KINDS} == set(scores)
    if "proxy" in arm:
        assert 0 <= values["accuracy"] <= 1 and 0 <= values["gap_accuracy"] <= 1
    if arm == "teacher":  # of its own trajectory it is the end
        assert values["steps"]["2"]["endpoint"] == pytest.approx(0, abs=1e-10)
        assert values["steps"]["1"]["endpoint"] > 0
    else:
        before = (one.work / "run" / "metrics.jsonl").read_bytes()
        assert rg_lcd.measured(one, data, TEACHER, experiment) == values
        assert (one.work / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("first", [report.LCD, report.LONG])
def test_the_longer_arm_is_the_same_run(experiment: Experiment, data: Path, first: str) -> None:
    """Whichever cell is made first."""
    cells = [experiment.cell(arm, 0) for arm in (report.LCD, report.LONG)]
    order = cells if first == report.LCD else cells[::-1]
    found = {c.arm: rg_lcd.trained(c, data, TEACHER, experiment) for c in order}
    assert found[report.LCD][0] == found[report.LONG][0] == cells[0].work / "run"
    rows = read_jsonl(cells[0].work / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    weights = [load_file(found[c.arm][1] / "unet" / WEIGHTS) for c in cells]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stage_that_is_past_is_not_taken_from_a_later_one(
    experiment: Experiment, data: Path
) -> None:
    cell = experiment.cell(report.LCD, 0)
    done = cell.work / "run" / "finished.json"
    done.parent.mkdir(parents=True)
    done.write_text('{"step": 5, "result": "model"}')
    with pytest.raises(RunFailed, match="is at step 5, and its result after 3 was not kept"):
        rg_lcd.trained(cell, data, TEACHER, experiment)
    assert not (cell.work / "run-3").exists()


def known() -> Results:
    """Results in which every number follows from arm, steps and seed."""
    gains = {report.LCD: 0.0, "proxy": 0.1, "direct": 0.2, "direct, large": 0.4}
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for arm in rg_lcd.ARMS:
        for seed in rg_lcd.EXPERIMENT.fewer.get(arm, rg_lcd.EXPERIMENT.seeds):
            teacher = arm == report.TEACHER_ARM
            steps = rg_lcd.SCORING["teacher_steps"] if teacher else (1, 2, 4)
            steps = rg_lcd.ARMS[arm].get("sampled", steps)
            each = {}
            for n in steps:
                scores = dict.fromkeys((kind.key for kind in report.KINDS), 0.5)
                scores["kernel"] = (0.4 if teacher else 0.1) / n
                scores["reward"] = (
                    0.2 + gains.get(arm, 0.0) + 0.001 * seed * (1 + gains.get(arm, 0))
                )
                each[str(n)] = scores
            cells[arm, seed] = {"device": "cpu", "n": 552, "steps": each}
            cells[arm, seed] |= {"accuracy": 0.6, "gap_accuracy": 0.8}
    return Results(cells)


def test_report_of_numbers_by_hand() -> None:
    told = rg_lcd.EXPERIMENT.text(known())
    assert "| 1 | 1 | x 0.25 [0.25, 0.25] | x 1 [1, 1] |" in told  # 0.1 / 0.4
    assert "| 4 | 10 | x 0.625 [0.625, 0.625] |  | x 1 [1, 1] |  |" in told  # (0.1/4) / (0.4/10)
    assert "reward(direct) > reward(proxy), 1 step(s): +0.1001" in told
    assert told.count("shown.") == 6 and "proxy 60.0% and 80.0%, 60.0%" in told
    assert "| two segments | " in told and "Made on cpu." in told
    rg_lcd.EXPERIMENT.draw(known(), Figure())


def test_report_before_there_is_much() -> None:
    some = Results({k: v for k, v in known().values.items() if k == ("teacher", 0)})
    assert "No seed has both teacher and LCD yet." in rg_lcd.EXPERIMENT.text(some)
    rg_lcd.EXPERIMENT.draw(some, Figure())
