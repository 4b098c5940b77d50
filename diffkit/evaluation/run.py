"""An evaluation from request to report; killed at any moment, the same call goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffkit.console import say
from diffkit.errors import RunFailed, UserError
from diffkit.evaluation.costs import measure_costs
from diffkit.evaluation.entrants import common_size, open_entrants, pair
from diffkit.evaluation.extractors import load_extractor
from diffkit.evaluation.folder import EvaluationFolder
from diffkit.evaluation.latency import Subject
from diffkit.evaluation.measure import Bench, RealPictures, situations
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.page import write_page
from diffkit.evaluation.pictures import resize_rule
from diffkit.evaluation.plan import PromptPlan, choose_prompts
from diffkit.evaluation.report import head, sample_rows, set_facts
from diffkit.evaluation.request import EvaluationRequest, stamp
from diffkit.evaluation.selection import COST, Chosen, Selection, choose
from diffkit.evaluation.spectrum_curves import spectrum_curves
from diffkit.files import atomic_write, read_json, write_json
from diffkit.generation.engine import render
from diffkit.generation.run import Processes, run
from diffkit.models.loading import quiet_libraries

__all__ = ["evaluate"]


def evaluate(
    request: EvaluationRequest,
    output: Path,
    *,
    command: Mapping[str, Any],
    overwrite: bool = False,
    processes: Processes | None = None,
) -> dict[str, Any] | None:
    """Draw what is missing, measure it, write OUTPUT/report.json and report.html.

    Pictures are shared out over `processes`; the first one alone measures them.

    Args:
        output: see `EvaluationFolder`.
        command: the flags, as the report repeats them.

    Returns:
        The report; None on the other processes.

    Raises:
        UserError: the request is wrong, asks for what its inputs do not allow, or `output` holds
            something else.
        RunFailed: storage or memory ran out; what was finished is kept.
    """
    me = processes or Processes()
    selection = _selection(request)
    prompts = choose_prompts(request)
    folder, config = EvaluationFolder(output), request.describe(prompts.prompts)
    folder.check(config, overwrite)
    stamps = _stamps(request)
    report = None if overwrite else folder.finished(config, stamps)
    if report is not None:
        say(f"{folder.page}: is there already, of the same request and files")
        return report if me.rank == 0 else None
    with quiet_libraries():
        work = _Work(request, selection, prompts, folder)
    me.wait()  # all must have looked at the folder before one of them changes it
    if me.rank == 0:
        folder.prepare(config, overwrite)
    me.wait()
    work.draw(me)
    if me.rank != 0:
        return None
    with quiet_libraries():
        return work.finish(command, stamps)


def _selection(request: EvaluationRequest) -> Selection:
    """The metrics asked for. Raises `UserError` for those, and for networks, without a use."""
    selection = Selection.parse(request.metrics)
    if not request.generated and COST in selection.named:
        raise UserError(f"--metrics {COST}: pictures of a folder cost nothing; give a model.")
    for flag, network, default in (
        ("extractor", "features", "embedded"),
        ("scorer", "scorer", "embedded"),
        ("lpips", "lpips", "alex"),
    ):
        if getattr(request, flag) != default and not selection.uses(network):
            raise UserError(f"--{flag}: none of the chosen metrics uses it; leave it out.")
    if request.data is not None and request.data.is_file() and not selection.uses("reference"):
        raise UserError("--data: none of the chosen metrics uses it; leave it out.")
    return selection


def _stamps(request: EvaluationRequest) -> dict[str, str]:
    """What tells that the inputs' files are the same, and where the costs were measured."""
    sources: dict[str, Any] = {side.name: side.source for side in request.sides}
    sources |= {"data": request.data} if request.data is not None else {}
    stamps = {name: stamp(source) for name, source in sources.items()}
    # Its kind only: each process has a card of its own, and all must come to the same decision.
    device = request.device.partition(":")[0]
    return {**stamps, "device": device, "batch_size": str(request.batch_size)}


def _bench_device(device: str) -> str:
    """Where pictures are measured: MPS has neither float64 nor antialiased resizing."""
    return "cpu" if device.startswith("mps") else device


class _Work:
    """One evaluation between the decision to make it and its report."""

    def __init__(
        self,
        request: EvaluationRequest,
        selection: Selection,
        prompts: PromptPlan,
        folder: EvaluationFolder,
    ) -> None:
        self.request, self.selection = request, selection
        self.prompts, self.folder = prompts, folder
        self.entrants = open_entrants(request, prompts)
        size = common_size(self.entrants)
        self.real = RealPictures(request.data, size)
        self.pairing, self.unpaired = pair(self.entrants)
        texts = [text for entrant in self.entrants.values() for text in entrant.prompts]
        device = _bench_device(request.device)
        self.tools = Toolbox(device, scorer=request.scorer, lpips=request.lpips, prompts=texts)
        self.chosen: Chosen = choose(
            selection, situations(self.entrants, self.real, self.tools), self.unpaired
        )
        self.extractor = None
        if any("features" in metric.needs for metric in self.chosen.metrics):
            self.extractor = load_extractor(request.extractor, device)
            self.real.check(self.extractor, resize_rule(size))

    def draw(self, processes: Processes) -> None:
        """Make the pictures that are missing, one model on the device at a time."""
        for name, entrant in self.entrants.items():
            model = entrant.model
            if model is None:
                continue
            model.to(self.request.device)
            say(f"pictures of {entrant.side.source} ({name})")
            run(
                entrant.recipes,
                self.folder.path / name,
                lambda batch, model=model: render(model, batch),  # type: ignore[misc]
                batch_size=self.request.batch_size,
                processes=processes,
                with_sheet=False,
            )
            model.to("cpu")

    def finish(self, command: Mapping[str, Any], stamps: Mapping[str, str]) -> dict[str, Any]:
        """Measure, and write the result."""
        sets = {name: e.drawn(self.folder.path) for name, e in self.entrants.items()}
        bench = Bench(
            self.request,
            self.folder,
            self.entrants,
            sets,
            self.pairing,
            self.real,
            self.extractor,
            self.tools,
        )
        measured = bench.measure(self.chosen)
        cost, no_cost = self._cost_if_any()
        report = {
            **head(self.request, command, stamps),
            **set_facts(self.entrants, self.prompts, self.pairing),
            "reference": self.real.facts(),
            "metrics": measured.rows,
            "skipped": [
                {"name": name, "reason": reason} for name, reason in self._skipped(no_cost)
            ],
            "spectra": spectrum_curves(sets, self.real.folder),
            "cost": cost,
        }
        samples = sample_rows(self.entrants, sets, self.pairing, measured.values, self.folder.path)
        with atomic_write(self.folder.samples, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        write_json(self.folder.report, report)
        write_page(report, samples, self.folder.path)
        return report

    def _skipped(self, no_cost: str) -> list[tuple[str, str]]:
        return [*self.chosen.skipped, *([(COST, no_cost)] if no_cost else [])]

    def _cost_if_any(self) -> tuple[dict[str, Any], str]:
        """The costs, or {} and why there are none; "" where nobody asked."""
        if not self.selection.cost:
            return {}, ""
        if not self.request.generated:
            return {}, "pictures of a folder cost nothing"
        try:
            return self._cost(), ""
        except RunFailed as error:
            if COST in self.selection.named:
                raise
            return {}, str(error).rstrip(".")

    def _cost(self) -> dict[str, Any]:
        """The costs of the models, measured once for a device and a batch size."""
        subjects = {
            name: Subject(entrant.model, entrant.recipes)
            for name, entrant in self.entrants.items()
            if entrant.model is not None
        }
        device, batch_size = self.request.device, self.request.batch_size
        key = {"device": device, "batch_size": batch_size, "sets": list(subjects)}
        if self.folder.cost.exists() and (kept := read_json(self.folder.cost))["key"] == key:
            return dict(kept["cost"])
        try:
            for subject in subjects.values():
                subject.model.to(device)
            cost = measure_costs(subjects, batch_size)
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                "out of memory while the costs were measured, for which all models are on the "
                "device at once: evaluate each alone, or in --dtype bf16"
            ) from error
        write_json(self.folder.cost, {"key": key, "cost": cost})
        return cost
