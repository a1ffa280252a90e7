"""Being told to end by a signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

EXIT_STOPPED = 75  # what a process ends with that was told to stop, and saved (EX_TEMPFAIL: try again)
_SAME_REQUEST = 1.0  # seconds


class Stopped(Exception):
    """A signal came; the step was finished and a checkpoint saved. End the process with `EXIT_STOPPED`."""


class StopSignals:
    """Inside the `with` statement SIGTERM, SIGINT and SIGUSR1 ask to stop; a second one, a second later or more, ends the process.

    One that comes sooner says the same again: a scheduler tells the launcher and the ranks, and the launcher tells the ranks too.
    One that comes too late for anybody to look at `asked` has its usual effect when the `with` statement ends.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signum = 0
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def _ask(self, signum: int, frame: Any) -> None:
        if not self.asked:
            self.asked, self._asked_at, self._signum = True, time.monotonic(), signum
        elif time.monotonic() - self._asked_at >= _SAME_REQUEST:
            os._exit(128 + signum)  # the last checkpoint is complete, and stays

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._before and self.asked and kind is None:
            signal.raise_signal(self._signum)
        self._before = {}
