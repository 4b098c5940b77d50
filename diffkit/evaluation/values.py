"""Values of per-picture metrics, streamed to disk; a killed run loses at most one block.

`METRIC-SET.jsonl` begins with a line that says what the values depend on; every further line holds
one block of pictures: where it starts and stops, the digest of its pictures, its values. Blocks of
other pictures, and everything after the first of them, are measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.console import progress
from diffkit.errors import UserError
from diffkit.evaluation.metrics.base import SampleBatch, SampleMetric
from diffkit.evaluation.metrics.tools import Toolbox, networks
from diffkit.evaluation.pictures import Batch, PictureSet
from diffkit.files import append_jsonl, atomic_write, read_jsonl

__all__ = ["measure_samples"]

BLOCK = 64
"""Pictures between two writes."""


def measure_samples(
    metrics: Sequence[SampleMetric],
    pictures: PictureSet,
    other: PictureSet | None,
    tools: Toolbox,
    folder: Path,
    name: str,
) -> dict[str, Tensor]:
    """Values (n,) float32 of every metric, each picture read once for all of them.

    Args:
        other: the set whose picture i belongs to picture i of this one; None where no metric asks.
        folder, name: values are kept as FOLDER/METRIC-NAME.jsonl, with "-" for ":".
    """
    logs = {
        metric.name: _Log(_file(folder, metric, name), _key(metric, tools), pictures)
        for metric in metrics
    }
    if other is not None:
        for metric in metrics:
            if "against" in metric.needs:
                logs[metric.name].other = other
    for log in logs.values():
        log.recover()
    start = min((log.done for log in logs.values()), default=len(pictures))
    batches = pictures.batches(BLOCK, start)
    for begin in progress(range(start, len(pictures), BLOCK), f"measuring: {name}"):
        stop = min(begin + BLOCK, len(pictures))
        due = [metric for metric in metrics if logs[metric.name].done < stop]
        block = {metric.name: torch.empty(stop - begin) for metric in due}
        filled = 0
        while filled < stop - begin:
            for batch in next(batches).pieces():
                rows = torch.tensor(batch.indices) - begin
                seen = _sample_batch(batch, pictures, other, tools)
                for metric in due:
                    block[metric.name][rows] = metric.run(seen, tools)
                filled += len(batch.indices)
        for metric in due:
            logs[metric.name].append(begin, stop, block[metric.name])
    return {metric_name: log.values for metric_name, log in logs.items()}


def _file(folder: Path, metric: SampleMetric, name: str) -> Path:
    return folder / f"{metric.name.replace(':', '-')}-{name}.jsonl"


def _sample_batch(
    batch: Batch, pictures: PictureSet, other: PictureSet | None, tools: Toolbox
) -> SampleBatch:
    prompts = tuple(pictures.prompts[i] for i in batch.indices) if pictures.has_prompts else ()
    partner = None
    if other is not None:
        pixels = torch.stack([other.read(i) for i in batch.indices])
        partner = Batch(batch.indices, pixels).images.to(tools.device)
    return SampleBatch(batch.images.to(tools.device), prompts, partner)


def _key(metric: SampleMetric, tools: Toolbox) -> str:
    """Everything but the pictures that the values depend on."""
    parts = [metric.name, *(tools.key(need) for need in networks(metric.needs))]
    if "prompts" in metric.needs:
        parts += tools.prompts
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


class _Log:
    """The file of one metric and set, and the values that hold so far."""

    def __init__(self, path: Path, key: str, pictures: PictureSet) -> None:
        self.path = path
        self.pictures = pictures
        self.other: PictureSet | None = None
        self._head = {"key": key}
        self._parts: list[Tensor] = []

    @property
    def values(self) -> Tensor:
        """(done,) float32."""
        return torch.cat(self._parts) if self._parts else torch.empty(0)

    @property
    def done(self) -> int:
        """Pictures that have a value."""
        return sum(len(part) for part in self._parts)

    def recover(self) -> None:
        """Read the blocks that hold and cut the file back to them."""
        lines = self._lines()
        kept: list[Mapping[str, Any]] = []
        for line in lines[1:] if lines[:1] == [self._head] else []:
            if line["pictures"] != self._identity(line["start"], line["stop"]):
                break
            kept.append(line)
            self._parts.append(torch.tensor(line["values"]))
        whole = bool(lines) and len(kept) == len(lines) - 1
        if whole and self.done == len(self.pictures):
            return
        # Also where all lines hold: a torn last line must not get the next one appended.
        with atomic_write(self.path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in (self._head, *kept))

    def append(self, start: int, stop: int, values: Tensor) -> None:
        """Keep one more block."""
        self._parts.append(values)
        row = {"start": start, "stop": stop, "pictures": self._identity(start, stop)}
        append_jsonl(self.path, {**row, "values": values.tolist()})

    def _identity(self, start: int, stop: int) -> str:
        other = self.other.identity(start, stop) if self.other is not None else ""
        return self.pictures.identity(start, stop) + other

    def _lines(self) -> list[Any]:
        try:
            return read_jsonl(self.path) if self.path.is_file() else []
        except UserError:  # an altered line: nothing in the file can be trusted
            return []
