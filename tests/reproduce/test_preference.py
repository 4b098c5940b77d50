"""The preference experiment: its reward, its labels, one cell at tiny size, its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import preference
import pytest
import torch
from diffkit.assets import path
from matplotlib.figure import Figure
from preference import ARMS, CLEANS, EXPERIMENT, FLIPPED, SETTINGS, bare, redness, rows_of_pairs
from runner.experiment import Cell, Results

from diffkit.data.preference_sources import open_pairs
from diffkit.files import read_jsonl

SAMPLE = path("sample")


@pytest.fixture
def cell(tmp_path: Path) -> Callable[..., Cell]:
    changed = {"pairs": 12, "max_steps": 4, "batch_size": 2, "warmup_steps": 1}
    experiment = replace(
        EXPERIMENT,
        settings={**SETTINGS, **changed},
        scoring={**EXPERIMENT.scoring, "samples": 2, "steps": 2, "judged_pairs": 12},
        work=tmp_path,
    )
    return experiment.cell


def test_the_reward_of_known_colours() -> None:
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.3, 0.3, 0.3]])
    images = colours[:, :, None, None].expand(4, 3, 2, 5)
    torch.testing.assert_close(redness(images), torch.tensor([1.0, -0.5, 0.75, 0.0]))


def test_captions_lose_their_background() -> None:
    assert bare("red apple, noto style, white background") == "red apple, noto style"
    assert bare("red apple, white background, noto style") == "red apple, noto style"


def table(seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
    return rows_of_pairs(SAMPLE, {**SETTINGS, "flips": 0.0, **changes}, seed)


def test_pairs_are_of_one_emoji_on_two_backgrounds() -> None:
    rows = {row["file_name"]: row for row in read_jsonl(SAMPLE / "metadata.jsonl")}
    found = table()
    for pair in found:
        first, second = rows[pair["image_0"]], rows[pair["image_1"]]
        assert (first["concept"], first["style"]) == (second["concept"], second["style"])
        assert first["background"] != second["background"]
        assert "background" not in pair["text"]
    assert len({(pair["image_0"], pair["image_1"]) for pair in found}) == len(found)
    assert table(1) != found == table()


def test_labels_follow_the_rewards_by_bradley_and_terry() -> None:
    found = table(temperature=0.1)
    gaps = torch.tensor([pair["reward_0"] - pair["reward_1"] for pair in found])
    first = torch.tensor([pair["label_0"] for pair in found])
    expected = (gaps / 0.1).sigmoid()
    spread = (expected * (1 - expected)).sum().sqrt()
    assert abs(first.sum() - expected.sum()) < 4 * spread
    cold = table(temperature=1e-6)
    wins = torch.tensor([pair["label_0"] == 1 for pair in cold])
    told = gaps.abs() > 1e-4  # white and gray are equally red
    assert torch.equal(wins[told], gaps[told] > 0) and told.float().mean() > 0.9


def test_turned_labels_are_said_and_more_flips_hold_the_fewer() -> None:
    clean, some, more = (table(flips=flips) for flips in (0.0, 0.3, 0.4))
    turned = [{i for i, pair in enumerate(rows) if pair["flipped"]} for rows in (clean, some, more)]
    assert turned[0] == set() and turned[1] < turned[2]
    assert len(turned[1]) / len(some) == pytest.approx(0.3, abs=0.15)
    for before, after in zip(clean, some, strict=True):
        assert (after["label_0"] != before["label_0"]) == after["flipped"]
        assert {k: v for k, v in before.items() if k not in ("label_0", "flipped")} == {
            k: v for k, v in after.items() if k not in ("label_0", "flipped")
        }


@pytest.mark.slow
def test_a_tiny_cell(cell: Callable[..., Cell]) -> None:
    """Adaptive-DPO has all measures; made again, the finished run is only measured."""
    one = cell("Adaptive, none", 1)
    values = preference.measured(one, SAMPLE)
    assert values["n"] == 2 and -0.5 <= values["reward"] <= 1
    assert 0 <= values["concept"] <= 1 and 0 <= values["accuracy"] <= 1
    assert 0 <= values["detection"] <= 1
    assert 1 / 11 <= values["weight"] < 1 and values["winner_drift"] > 0
    assert json.loads(json.dumps(values)) == values
    log = one.work / "run" / "metrics.jsonl"
    before = log.read_bytes()
    assert preference.measured(one, SAMPLE) == values
    assert log.read_bytes() == before
    source = open_pairs(preference.configuration(one, SAMPLE).data)
    assert source.rows == 12 and {"flipped", "reward_0"} < set(source[0].extras)


@pytest.mark.slow
def test_arms_of_a_seed_differ_in_their_loss_alone(cell: Callable[..., Cell]) -> None:
    """At the start the model is its own reference, so errors do not depend on the loss."""
    first = {}
    for arm in ("DPO", "rDPO", "Adaptive, std"):
        one = cell(arm, 0)
        preference.measured(one, SAMPLE)
        first[arm] = read_jsonl(one.work / "run" / "metrics.jsonl")[0]
    assert len({row["winner_error"] for row in first.values()}) == 1
    assert len({row["loser_error"] for row in first.values()}) == 1


def known() -> Results:
    """Results in which DPO gains 0.2 of right labels and 0.05 of wrong ones."""
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for arm in ARMS:
        for seed in EXPERIMENT.fewer.get(arm, EXPERIMENT.seeds):
            gain = 0.0 if arm == "base" else 0.2 if arm in CLEANS else 0.05
            values = {"n": 128, "reward": 0.1 + gain + 0.001 * seed, "concept": 0.9}
            if arm != "base":
                values |= {"accuracy": 0.6, "winner_drift": 1.01, "win_rate": 0.5}
            if arm.startswith("Adaptive"):
                values |= {"detection": 0.8, "weight": 0.5}
            cells[arm, seed] = values
    return Results(cells)


def test_the_tables_say_what_the_results_say() -> None:
    lines = preference.text(known()).splitlines()
    main, _ = (line for line in lines if line.startswith("| redness of samples |"))
    assert main.startswith("| redness of samples | 0.1010 | 0.3010 | +0.2000 [+0.2000, +0.2000] |")
    rows = [line for line in lines if line.split(" |")[0].removeprefix("| ") in FLIPPED]
    assert len(rows) == len(FLIPPED) == 9
    assert rows[0].startswith("| DPO | 3 | +0.0500 [+0.0500, +0.0500] | 25% | 90.0% | 60.0% |")
    assert rows[1].startswith("| cDPO | 1 | +0.0500 (1 seed) | 25% |")
    assert rows[3].endswith("| 1.010 | 0.50 | 0.800 |")


def test_the_figure_is_drawn_from_results_alone() -> None:
    figure = Figure()
    preference.draw(known(), figure)
    assert len(figure.axes) == 3
