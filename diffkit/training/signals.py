"""Ctrl-C and SIGTERM: finish the step, then stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from diffkit.console import say

__all__ = ["StopRequest"]


class StopRequest:
    """Inside its `with` block SIGINT and SIGTERM only set `requested`; a second one interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step; once more to stop at once.")
