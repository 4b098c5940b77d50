"""Every number of an evaluation, from pictures that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffkit.console import say
from diffkit.evaluation.compare import Comparison, Pairing, Resampling, resampled_groups
from diffkit.evaluation.entrants import PAIRING_NOTES, Entrant
from diffkit.evaluation.extractors import Extractor
from diffkit.evaluation.features import stream_features
from diffkit.evaluation.folder import EvaluationFolder
from diffkit.evaluation.metrics.base import Metric, SetData, Situation
from diffkit.evaluation.metrics.registry import METRICS
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import PictureSet
from diffkit.evaluation.reference import Reference
from diffkit.evaluation.request import LEVEL, EvaluationRequest
from diffkit.evaluation.selection import Chosen
from diffkit.evaluation.values import measure_samples

_OUTSIDE = "the interval allows for the bias of finite n, and so lies beside the value"

__all__ = ["Bench", "Measured", "RealPictures", "situations"]


class RealPictures:
    """What `--data` gives: a folder of pictures, or the statistics of one.

    A photograph of 4000 pixels and a drawn picture of 512 differ in detail whatever they show, so
    real pictures are brought to `size` first, as training does it.

    Arguments:
        place: the folder or file, None for no real pictures.
        size: (height, width) of the compared sets, where that is one; None leaves pictures as
            they are.

    Raises `UserError` for a folder without pictures, or a file that is no reference.
    """

    def __init__(self, place: Path | None, size: tuple[int, int] | None = None) -> None:
        self.folder = place if place is not None and place.is_dir() else None
        self.pictures = None if self.folder is None else PictureSet.open(self.folder, size=size)
        of_file = place is not None and self.folder is None
        self._saved = Reference.load(place) if of_file and place is not None else None

    def __len__(self) -> int:
        if self.pictures is not None:
            return len(self.pictures)
        return 0 if self._saved is None else self._saved.n

    def facts(self) -> dict[str, Any] | None:
        """What the report says of them."""
        if self.pictures is not None:
            return {"source": str(self.folder), "n": len(self)}
        return None if self._saved is None else {"source": self._saved.source, "n": len(self)}

    def check(self, extractor: Extractor, resize: str) -> None:
        """Raise `UserError` when saved statistics are not comparable."""
        if self._saved is not None:
            self._saved.check(extractor, resize)

    def reference(self, extractor: Extractor, folder: EvaluationFolder) -> Reference | None:
        """Statistics of the pictures, kept in `folder` for other evaluations."""
        if self.pictures is None:
            return self._saved
        file = _feature_file(folder, "reference", extractor)
        features = stream_features(self.pictures, extractor, file)
        source = str(self.pictures.root)
        reference = Reference.of(features, extractor, self.pictures.resize, source)
        if not folder.reference.exists() or _newer(file, folder.reference):
            reference.save(folder.reference)
        return reference


def _newer(file: Path, than: Path) -> bool:
    return file.stat().st_mtime_ns > than.stat().st_mtime_ns


def _feature_file(folder: EvaluationFolder, name: str, extractor: Extractor) -> Path:
    folder.features.mkdir(parents=True, exist_ok=True)
    plain = extractor.name.replace(":", "-").replace("/", "-")
    return folder.features / f"{name}-{plain}.f32"


def situations(
    entrants: Mapping[str, Entrant], real: RealPictures, tools: Toolbox
) -> dict[str, Situation]:
    """What each set offers the metrics."""
    found = {}
    for name, entrant in entrants.items():
        has = {"prompts": entrant.has_prompts, "reference": len(real) > 0}
        has["against"] = len(entrants) > 1
        found[name] = Situation(
            frozenset(key for key, there in has.items() if there),
            entrant.prompts,
            entrant.groups,
            len(real),
            tools,
        )
    return found


@dataclass
class Measured:
    """Results: report rows in the order of `Chosen`, and the values of single pictures.

    `values` maps a metric's name and a set's name to (n,) float32.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Everything that the metrics are given.

    Attributes:
        sets: by name, "model" first.
        pairing: of the two sets.
        extractor: None where no metric needs one.
    """

    request: EvaluationRequest
    folder: EvaluationFolder
    entrants: Mapping[str, Entrant]
    sets: Mapping[str, PictureSet]
    pairing: Pairing
    real: RealPictures
    extractor: Extractor | None
    tools: Toolbox

    def measure(self, chosen: Chosen) -> Measured:
        """All chosen metrics of all sets."""
        found = Measured()
        self._samples(chosen, found)
        self._sets(chosen, found)
        order = {name: place for place, name in enumerate(METRICS)}
        found.rows.sort(key=lambda row: order.get(row["name"], len(order)))
        return found

    @property
    def resampling(self) -> Resampling:
        """How this run makes intervals."""
        groups = {name: resampled_groups(e.groups) for name, e in self.entrants.items()}
        seed, resamples = self.request.seed, self.request.resamples
        return Resampling(groups, self.pairing, seed, LEVEL, resamples)

    def _samples(self, chosen: Chosen, found: Measured) -> None:
        self.folder.values.mkdir(parents=True, exist_ok=True)
        for metric in chosen.sample:
            found.values[metric.name] = {}
        for name, pictures in self.sets.items():
            # Distances between the sets are the same from either side.
            due = [m for m in chosen.sample if name == "model" or "against" not in m.needs]
            pairs = any("against" in metric.needs for metric in due)
            other = self.sets["against"] if pairs else None
            values = measure_samples(due, pictures, other, self.tools, self.folder.values, name)
            for metric_name, measured in values.items():
                found.values[metric_name][name] = measured
        for metric in chosen.sample:
            compared = self.resampling.of_values(found.values[metric.name])
            found.rows.append(self._row(metric, compared, ""))

    def _sets(self, chosen: Chosen, found: Measured) -> None:
        if not chosen.sets or self.extractor is None:
            return
        reference = None
        if any("reference" in metric.needs for metric in chosen.sets):
            reference = self.real.reference(self.extractor, self.folder)
        data = {}
        for name, pictures in self.sets.items():
            file = _feature_file(self.folder, name, self.extractor)
            features = stream_features(pictures, self.extractor, file)
            groups = self.entrants[name].groups
            data[name] = SetData(features, self.extractor, groups, reference, self.request.seed)
        for metric in chosen.sets:
            say(f"measuring {metric.label}")
            statistics = {name: metric.run(given) for name, given in data.items()}
            compared = self.resampling.of_statistics(statistics)
            note = statistics["model"].note
            found.rows.append(self._row(metric, compared, note))

    def _row(self, metric: Metric, compared: Comparison, note: str) -> dict[str, Any]:
        notes = [note]
        counts = {name: len(pictures) for name, pictures in self.sets.items()}
        if compared.difference is not None:
            notes.append(PAIRING_NOTES[self.pairing])
        if len(set(counts.values())) > 1:
            notes.append(f"the baseline has {counts['against']} pictures")
        if any(found.outside for found in compared.values.values()):
            notes.append(_OUTSIDE)
        network = metric.network(self.extractor, self.tools)
        rules = [self.sets["model"].resize, metric.resize(self.extractor, self.tools)]
        if "reference" in metric.needs and self.real.pictures is not None:
            rules.append(f"real {self.real.pictures.resize}")
        return {
            "name": metric.name,
            "label": metric.title(self.extractor, self.tools),
            "about": metric.about,
            "kind": metric.kind,
            "better": metric.better,
            "extractor": network,
            "resize": "; ".join(dict.fromkeys(filter(None, rules))),
            "n": counts["model"],
            "n_reference": len(self.real) if "reference" in metric.needs else None,
            "seed": self.request.seed,
            "resamples": compared.resamples,
            "note": "; ".join(filter(None, notes)),
            "values": {name: found.to_json() for name, found in compared.values.items()},
            "difference": compared.difference and compared.difference.to_json(),
        }
