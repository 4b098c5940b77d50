"""What an experiment is: arms x seeds, each pair one call that returns numbers, kept as one JSON.

RESULTS/EXPERIMENT/ARM-SEED.json   the numbers, what they were made with, and its digest
WORK/EXPERIMENT/ARM-SEED-DIGEST/   models and checkpoints of the call; not committed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.console import warn
from diffkit.files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cell", "Experiment", "Results", "Values", "digest"]

Values = Mapping[str, Any]
"""Name of a measure -> number, or list of numbers."""


def digest(value: Any) -> str:
    """12 hexadecimal digits that depend on every key and value of JSON-like data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cell:
    """One arm with one seed.

    Attributes:
        settings: everything that decides what the call makes, the arm's own values included.
        scoring: everything that decides how that is measured.
        work: its folder for models and checkpoints; another one for other settings.
    """

    experiment: str
    arm: str
    seed: int
    settings: Mapping[str, Any]
    scoring: Mapping[str, Any]
    work: Path

    @property
    def name(self) -> str:
        """The stem of its result file."""
        return f"{self.arm}-{self.seed}"

    @property
    def digest(self) -> str:
        """Changes with the settings and with the scoring."""
        return digest([self.settings, self.scoring])

    def path(self, results: Path) -> Path:
        """Its result below the folder of all results."""
        return results / self.experiment / f"{self.name}.json"

    def state(self, results: Path) -> str:
        """ "missing", "stale" (made with other settings) or "done"."""
        path = self.path(results)
        if not path.exists():
            return "missing"
        return "done" if read_json(path)["digest"] == self.digest else "stale"


@dataclass(frozen=True)
class Experiment:
    """A table of arms x seeds and how it is told.

    Attributes:
        name: of the script and of the result folder.
        title: of its section.
        arms: name -> the settings in which the arm differs from the others.
        seeds: the rows of every pair of arms.
        settings: common to all arms; under "assets" digests of the weights that it starts from.
        scoring: how the results are measured; under "assets" digests of the weights that measure.
        run: makes one cell; called again after an interruption, it goes on from what lies in
            `cell.work`.
        text: results -> the Markdown of its section, a title not included.
        draw: results, empty figure -> the drawn figure.
        work: where scratch folders lie.
        fewer: arms that have fewer seeds than the others -> their seeds.
    """

    name: str
    title: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    scoring: Mapping[str, Any]
    run: Callable[[Cell], Values]
    text: Callable[[Results], str]
    draw: Callable[[Results, Figure], None]
    work: Path = Path(".build/reproduce")
    fewer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def cell(self, arm: str, seed: int) -> Cell:
        """The cell of an arm and a seed."""
        settings = {**self.settings, **self.arms[arm], "arm": arm, "seed": seed}
        work = self.work / self.name / f"{arm}-{seed}-{digest(settings)[:8]}"
        return Cell(self.name, arm, seed, settings, self.scoring, work)

    def cells(self, arms: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
        """Seed by seed, so that the first pairs are complete early."""
        chosen = list(arms)
        return [
            self.cell(arm, seed)
            for seed in seeds
            for arm in chosen
            if seed in self.fewer.get(arm, self.seeds)
        ]


class Results:
    """The numbers of an experiment as the JSON files tell them; stale ones are named and kept.

    Arguments:
        values: (arm, seed) -> the numbers of the cell.
    """

    def __init__(self, values: Mapping[tuple[str, int], Values]) -> None:
        self.values = dict(values)

    @classmethod
    def read(cls, experiment: Experiment, folder: Path) -> Results:
        """All results there are; a warning names those that were made with other settings."""
        found: dict[tuple[str, int], Values] = {}
        for cell in experiment.cells(experiment.arms, experiment.seeds):
            state = cell.state(folder)
            if state == "stale":
                warn(f"{cell.path(folder)}: was made with other settings; run the script again.")
            if state != "missing":
                found[cell.arm, cell.seed] = read_json(cell.path(folder))["values"]
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self.values)

    def seeds(self, *arms: str) -> list[int]:
        """The seeds that all of these arms have."""
        sets = [{seed for arm, seed in self.values if arm == name} for name in arms]
        return sorted(set.intersection(*sets))

    def column(self, arm: str, measure: str, seeds: Iterable[int]) -> list[Any]:
        """One measure of one arm, seed by seed."""
        return [self.values[arm, seed][measure] for seed in seeds]
