"""The line that shows how training goes: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from diffkit.console import quiet, say

__all__ = ["Report", "duration"]

LOG_SECONDS = 30.0


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


class Report:
    """Shows the newest row of metrics; a context manager.

    Arguments:
        start: steps made before this run went on.
        total: steps in all.
        shown: names in the row that are shown beside the losses.
    """

    def __init__(self, start: int, total: int, shown: Sequence[str] = ()) -> None:
        self._start, self._total, self._shown = start, total, shown
        self._began = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Report:
        if sys.stderr.isatty() and not quiet():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task("", total=self._total, completed=self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Show this row."""
        now = time.monotonic()
        step = row["step"]
        pace = (now - self._began) / (step - self._start)
        losses = [f"{k} {v:.4g}" for k, v in row.items() if k == "loss" or k.endswith("/loss")]
        losses += [f"{k} {row[k]:.4g}" for k in self._shown if row.get(k) is not None]
        left = duration(pace * (self._total - step))
        text = f"{'  '.join(losses)}  lr {row['lr']:.3g}  {pace:.3g} s/step  {left} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif now - self._said > LOG_SECONDS or step == self._total:
            self._said = now
            say(f"step {step}/{self._total}  {text}")
