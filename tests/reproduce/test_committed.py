"""The committed results: what the README shows is what the JSON files say."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
from runner import ROOT
from runner.experiment import Experiment, Results
from runner.main import COMMITTED
from runner.report import FIGURE, SUMMARY, between, section

from diffkit.files import read_json

SCRIPTS = sorted((ROOT / "scripts" / "reproduce").glob("*.py"))


def experiment_of(name: str) -> Experiment:
    # by the folder too: a benchmark may have the same name
    found: Experiment = importlib.import_module(f"reproduce.{name}").EXPERIMENT
    return found


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_a_script_is_named_as_its_experiment(name: str) -> None:
    assert experiment_of(name).name == name


def test_there_are_no_results_of_other_experiments() -> None:
    known = {script.stem for script in SCRIPTS}
    assert {folder.name for folder in COMMITTED.glob("*")} <= known


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_the_summary_is_what_the_results_say(name: str) -> None:
    experiment = experiment_of(name)
    results = Results.read(experiment, COMMITTED)
    if not results:
        assert not (COMMITTED / name / SUMMARY).exists()
        return
    assert (COMMITTED / name / SUMMARY).read_text(encoding="utf-8") == section(experiment, results)
    assert (COMMITTED / name / FIGURE).exists()


def test_the_readme_shows_the_summaries() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert between(ROOT, COMMITTED) in readme, "run any script of scripts/reproduce --report-only"


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_results_were_made_with_the_settings_of_the_script(name: str) -> None:
    """Weights in assets/ may have been replaced since; the runner then says so and redoes them."""
    experiment = experiment_of(name)
    for path in (COMMITTED / name).glob("*.json"):
        kept = read_json(path)
        cell = experiment.cell(kept["arm"], kept["seed"])
        assert own(kept["settings"]) == own(cell.settings), path
        assert own(kept["scoring"]) == own(cell.scoring), path


def own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "assets"}
