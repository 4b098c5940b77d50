"""metrics.jsonl: one row a step, gathered on the device and written a few steps at a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkit.errors import RunFailed
from diffkit.files import append_jsonl, atomic_write, storage_errors

__all__ = ["BINS", "Metrics", "StepRecord"]

BINS = 10
"""Equal parts of the noise schedule in which the loss is logged."""


@dataclass
class StepRecord:
    """What one training step measured, still on the device.

    `values` are scalar tensors whose sum over processes is the logged mean; of `ratios` the sum of
    each name's pair is divided after that; `time` holds sums and counts of the loss by place on the
    noise schedule, (2, BINS).
    """

    step: int
    epoch: int
    rate: float
    samples: int
    values: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, Tensor] = field(default_factory=dict)
    time: Tensor | None = None
    seconds: float = 0.0

    def add(self, prefix: str, terms: Mapping[str, Any], share: float) -> None:
        """Take in the terms of one micro-batch, each (b,) or a pair of such, whose ratio is logged.

        `share` is 1 / (samples x repeats).
        """
        for name, value in terms.items():
            if isinstance(value, tuple):
                pair = torch.stack([part.detach().float().sum() for part in value])
                before = self.ratios.get(prefix + name)
                self.ratios[prefix + name] = pair if before is None else before + pair
            elif name != "time":
                self._sum(prefix + name, value.detach().sum() * share)
        if "time" in terms:
            loss = terms["loss"].detach()
            bins = (terms["time"].detach() * BINS).long().clamp(0, BINS - 1)
            sums = torch.zeros(2, BINS, device=loss.device)
            sums[0].scatter_add_(0, bins, loss.float())
            sums[1].scatter_add_(0, bins, torch.ones_like(loss, dtype=torch.float32))
            self.time = sums if self.time is None else self.time + sums

    def add_norm(self, prefix: str, norm: Tensor, share: float) -> None:
        """Take in a gradient norm, which is equal on all processes; `share` is 1 / repeats."""
        self._sum(prefix + "grad_norm", norm.detach() * share)

    def _sum(self, name: str, value: Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value

    def flat(self) -> Tensor:
        """All numbers of the record in one row."""
        parts = [torch.stack([v.float() for v in self.values.values()]), *self.ratios.values()]
        if self.time is not None:
            parts.append(self.time.flatten())
        return torch.cat(parts)

    def row(self, numbers: list[float]) -> dict[str, Any]:
        """The row of metrics.jsonl, from the reduced numbers of `flat`."""
        row: dict[str, Any] = {"step": self.step, "epoch": self.epoch}
        row |= {name: _short(x) for name, x in zip(self.values, numbers)}
        pairs = numbers[len(self.values) : len(self.values) + 2 * len(self.ratios)]
        for name, over, under in zip(self.ratios, pairs[::2], pairs[1::2], strict=True):
            row[name] = _short(over / under) if under else None
        row |= {"lr": self.rate, "samples": self.samples, "seconds": round(self.seconds, 4)}
        if self.time is not None:
            sums, counts = numbers[-2 * BINS : -BINS], numbers[-BINS:]
            row["loss_by_time"] = [_short(s / n) if n else None for s, n in zip(sums, counts)]
            row["count_by_time"] = [int(n) for n in counts]
        return row


def _short(value: float) -> float:
    """The shortest decimal that is this float32 number."""
    return float(str(np.float32(value)))


class Metrics:
    """The file, and the records that are not in it yet.

    Arguments:
        path: metrics.jsonl.
        reduce: sums a tensor over the processes.
        write: whether this process writes the file.
        skipped_steps: whether infinite gradients are skipped by a loss scaler (fp16).
        track: called with each row as it is written.
    """

    def __init__(
        self,
        path: Path,
        reduce: Callable[[Tensor], Tensor],
        write: bool,
        skipped_steps: bool,
        track: Callable[[dict[str, Any]], None],
    ) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        self._reduce = reduce
        self._write = write
        self._skipped = skipped_steps
        self._track = track
        self._waiting: list[StepRecord] = []
        self._clock = time.perf_counter()

    def rewind(self, step: int) -> None:
        """Drop the rows of steps beyond `step`, which a resumed run makes again."""
        if not self._write or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill, and so beyond every checkpoint
                break
            if row["step"] > step:
                break
            kept.append(line + "\n")
        with atomic_write(self.path, "w") as file:
            file.writelines(kept)

    def record(self, record: StepRecord) -> None:
        """Take in a step whose computation was asked for."""
        self._waiting.append(record)

    def pause(self) -> None:
        """Do not count the time since the last flush, which went into something else."""
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """Write all waiting rows; raises `RunFailed` at the first loss that is not finite.

        Each gets an equal part of the time since the last flush: a GPU computes behind the
        program, and only here it is waited for. A collective call.
        """
        records, self._waiting = self._waiting, []
        if not records:
            return
        flats = [record.flat() for record in records]
        numbers = self._reduce(torch.cat(flats)).tolist()
        now = time.perf_counter()
        seconds, self._clock = (now - self._clock) / len(records), now
        rows, failure = [], None
        for record, flat in zip(records, flats, strict=True):
            mine, numbers = numbers[: len(flat)], numbers[len(flat) :]
            failure = self._failure(record, mine)
            if failure:
                break
            record.seconds = seconds
            rows.append(record.row(mine))
        if self._write and rows:
            with storage_errors(self.path):
                append_jsonl(self.path, *rows)
            for row in rows:
                self._track(row)
        if rows:
            self.last = rows[-1]
        if failure:
            raise RunFailed(failure)

    def _failure(self, record: StepRecord, numbers: list[float]) -> str | None:
        names = [*record.values, *(name for name in record.ratios for _ in range(2))]
        for name, value in zip(names, numbers):
            if math.isfinite(value) or (self._skipped and name.endswith("grad_norm")):
                continue
            return (
                f"step {record.step}: {name} is {value}, so training stopped; the last checkpoint "
                "is good. Try a lower --learning-rate, or --mixed-precision bf16 or no."
            )
        return None
