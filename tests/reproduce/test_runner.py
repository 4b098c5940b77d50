"""The runner: resuming, staleness, claims, failures, and tables from the JSON alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runner import ROOT
from runner.experiment import Experiment, Results, digest
from runner.main import comparison, numbers
from runner.report import between, section, write_readme, write_report
from runner.work import claim, make

from diffkit.errors import RunFailed
from diffkit.files import read_json
from tests.reproduce.toy_experiment import toy


def everything(experiment: Experiment, results: Path) -> int:
    return make(experiment, experiment.cells(experiment.arms, experiment.seeds), results)


def calls(experiment: Experiment) -> int:
    files = (experiment.work / experiment.name).glob("*/calls.txt")
    return sum(len(file.read_text().splitlines()) for file in files)


def test_each_cell_is_one_file_and_one_call(tmp_path: Path) -> None:
    experiment = toy(tmp_path / "work")
    assert everything(experiment, tmp_path / "results") == 0
    names = sorted(path.name for path in (tmp_path / "results" / "toy").iterdir())
    assert names == sorted(f"{arm}-{seed}.json" for arm in ("plain", "better") for seed in range(3))
    kept = read_json(tmp_path / "results" / "toy" / "better-2.json")
    assert kept["values"] == {"value": 3.0, "twice": [3.0, 6.0]}
    assert kept["settings"] == {
        "scale": 1.0,
        "seconds": 0.0,
        "gain": 1.0,
        "arm": "better",
        "seed": 2,
    }
    assert everything(experiment, tmp_path / "results") == 0
    assert calls(experiment) == 6


def test_pairs_come_early(tmp_path: Path) -> None:
    cells = toy(tmp_path).cells(["plain", "better"], [0, 1])
    assert [cell.name for cell in cells] == ["plain-0", "better-0", "plain-1", "better-1"]


def test_a_result_of_other_settings_is_named_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    everything(toy(tmp_path / "work"), results)
    changed = toy(tmp_path / "work", scale=10.0)
    before = Results.read(changed, results)
    assert before.values["better", 0]["value"] == 1.0
    assert "better-0.json: was made with other settings" in capsys.readouterr().err
    assert everything(changed, results) == 0
    assert Results.read(changed, results).values["better", 0]["value"] == 10.0
    assert "other settings" not in capsys.readouterr().err
    folders = (tmp_path / "work" / "toy").glob("better-0-????????")
    assert len(list(folders)) == 2, "other settings must not find the checkpoints of these"


def test_another_scoring_finds_the_same_work_folder(tmp_path: Path) -> None:
    from dataclasses import replace

    one = toy(tmp_path)
    two = replace(one, scoring={"digits": 3})
    assert one.cell("plain", 0).work == two.cell("plain", 0).work
    assert one.cell("plain", 0).digest != two.cell("plain", 0).digest


def test_the_digest_sees_values_and_not_their_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_claimed_cell_is_left_to_its_process(tmp_path: Path) -> None:
    experiment, results = toy(tmp_path / "work"), tmp_path / "results"
    with claim(experiment.cell("plain", 1).work) as ours:
        assert ours
        assert everything(experiment, results) == 0
        assert not (results / "toy" / "plain-1.json").exists()
    assert calls(experiment) == 5
    assert everything(experiment, results) == 0
    assert calls(experiment) == 6


def test_a_failed_cell_is_named_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    def run(cell):
        if cell.name == "plain-0":
            raise RunFailed("the loss is not finite.")
        return {"value": 1.0}

    experiment = replace(toy(tmp_path / "work"), run=run)
    assert everything(experiment, tmp_path / "results") == 1
    assert "plain-0: failed. the loss is not finite." in capsys.readouterr().err
    assert len(list((tmp_path / "results" / "toy").iterdir())) == 5


def test_the_report_is_a_function_of_the_files(tmp_path: Path) -> None:
    experiment, results = toy(tmp_path / "work"), tmp_path / "results"
    everything(experiment, results)
    text = write_report(experiment, results)
    assert text == (results / "toy" / "summary.md").read_text()
    assert text == section(experiment, Results.read(experiment, results))
    row = "| the value | 1.00 | 2.00 | +1.00 [+1.00, +1.00] | +1.00, +1.00, +1.00 |"
    assert row in text.splitlines()
    assert "| twice it | 2.0 | 4.0 | +2.0 [+2.0, +2.0] |" in text
    assert (results / "toy" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    assert write_report(toy(tmp_path), tmp_path / "results") == ""


def test_a_report_takes_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    experiment, results = toy(tmp_path / "work"), tmp_path / "results"
    make(experiment, experiment.cells(["plain"], [0, 1]), results)
    make(experiment, experiment.cells(["better"], [1, 2]), results)
    assert Results.read(experiment, results).seeds("plain", "better") == [1]
    assert "+1.00 (1 seed) | +1.00 |" in write_report(experiment, results)


def test_the_readme_has_what_stands_before_more(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "one"
    folder.mkdir(parents=True)
    whole = "### One\n\nshort\n\n<!-- more -->\n\nlong\n\n![One](figure.png)\n\n`it` makes it.\n"
    (folder / "summary.md").write_text(whole)
    text = between(tmp_path, tmp_path / "results")
    assert "### One\n\nshort\n\n![One](results/one/figure.png)\n\n`it` makes it." in text
    assert "[All tables](results/one/summary.md)" in text and "long" not in text


def test_the_readme_is_filled_between_the_markers(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("head\n<!-- experiments:begin -->\nold\n<!-- experiments:end -->\ntail\n")
    experiment = toy(tmp_path / "work")
    everything(experiment, results)
    write_report(experiment, results)
    for _ in range(2):
        write_readme(readme, results)
    text = readme.read_text()
    assert text == f"head\n{between(tmp_path, results)}\ntail\n"
    assert "![Toy](results/toy/figure.png)" in text
    assert "old" not in text


def test_what_was_made_anew_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything(toy(tmp_path / "one"), tmp_path / "committed")
    changed = toy(tmp_path / "two", scale=1.5)
    everything(changed, tmp_path / "anew")
    monkeypatch.setattr("runner.main.COMMITTED", tmp_path / "committed")
    lines = comparison(changed, tmp_path / "anew")
    assert (
        "plain-0: 3 of 3 numbers equal the committed ones; the widest gap is 0, in value." in lines
    )
    assert (
        "better-2: 0 of 3 numbers equal the committed ones; the widest gap is 1, in twice[1]."
        in lines
    )


def test_numbers_are_found_with_their_path() -> None:
    found = dict(numbers({"a": 1, "b": [2.0, {"c": 3}], "d": "text", "e": None}))
    assert found == {"a": 1.0, "b[0]": 2.0, "b[1].c": 3.0}


# -- several processes ------------------------------------------------------------------------


def script(tmp_path: Path, *words: str) -> dict[str, Any]:
    """Arguments of `subprocess` that run the toy experiment as a user does."""
    path = Path(__file__).with_name("toy_experiment.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "reproduce")]),
        "TOY_WORK": str(tmp_path / "work"),
    }
    command = [sys.executable, str(path), *words, "--results", str(tmp_path / "out")]
    return {"args": command, "env": environment}


@pytest.mark.slow
def test_processes_share_the_cells_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    first = subprocess.Popen(**script(tmp_path, "--worker"))
    while first.poll() is None and not list((tmp_path / "work").glob("toy/*/calls.txt")):
        time.sleep(0.05)
    first.kill()
    first.wait()
    done = subprocess.run(**script(tmp_path, "--jobs", "2"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "| the value | 1.00 | 2.00 |" in done.stdout.decode()
    files = sorted((tmp_path / "out" / "toy").glob("*.json"))
    assert len(files) == 6
    for file in files:
        assert json.loads(file.read_text())["made_with"]["threads"] == 1
    made = calls(toy(tmp_path / "work", seconds=0.2))
    assert made == 7, "the cell of the killed process was made twice, and no other"


@pytest.mark.slow
def test_only_some_arms_and_seeds(tmp_path: Path) -> None:
    run = script(tmp_path, "--only", "better", "--seeds", "1", "2")
    assert subprocess.run(**run, capture_output=True).returncode == 0
    names = {path.name for path in (tmp_path / "out" / "toy").glob("*.json")}
    assert names == {"better-1.json", "better-2.json"}
    wrong = subprocess.run(**script(tmp_path, "--only", "worse"), capture_output=True)
    assert wrong.returncode == 2
    assert b"invalid choice: 'worse'" in wrong.stderr
