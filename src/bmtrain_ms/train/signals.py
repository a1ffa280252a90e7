"""Being told to end by a signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

EXIT_STOPPED = 75  # what a process ends with that was told to stop, and saved (EX_TEMPFAIL: try again)
_SAME_REQUEST = 1.0  # seconds
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """From `watch` to `release` SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask to stop; one a second later, or more, ends the process.

    One that comes sooner says the same again: a scheduler tells the launcher and the ranks, and the launcher tells the ranks too.
    One that nobody has `answered` has its usual effect at `release`. A `with` statement watches inside it.

    Attributes:
        asked: whether one came.
        answered: whether what was asked is being done.
    """

    def __init__(self) -> None:
        self.asked = self.answered = False
        self._signum = 0
        self._asked_at = 0.0
        self._watching = False
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Begin; does nothing the second time, and in a thread, which gets no signals."""
        if self._watching or threading.current_thread() is not threading.main_thread():
            return
        self._watching = True
        for signum in _SIGNALS:
            before = signal.getsignal(signum)
            if not (signum == signal.SIGHUP and before is signal.SIG_IGN):  # nohup: not to be told
                self._before[signum] = before
                signal.signal(signum, self._ask)

    def release(self) -> None:
        """End; does nothing the second time."""
        if not self._watching:
            return
        self._watching = False
        for signum, before in self._before.items():
            if threading.current_thread() is threading.main_thread() and signal.getsignal(signum) == self._ask:
                signal.signal(signum, before)  # otherwise somebody watches since, and may give it back to `_ask`
        if self.asked and not self.answered:
            signal.raise_signal(self._signum)

    def _ask(self, signum: int, frame: Any) -> None:
        if not self._watching:
            self._pass_on(signum, frame)
        elif not self.asked:
            self.asked, self._asked_at, self._signum = True, time.monotonic(), signum
        elif time.monotonic() - self._asked_at >= _SAME_REQUEST:
            os._exit(128 + signum)  # the last checkpoint is complete, and stays

    def _pass_on(self, signum: int, frame: Any) -> None:
        before = self._before[signum]
        if callable(before):
            before(signum, frame)
        elif before is not signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def __enter__(self) -> StopSignals:
        self.watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.answered |= kind is not None
        self.release()
