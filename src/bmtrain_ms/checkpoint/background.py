"""Files that are written while training goes on."""

from __future__ import annotations

import atexit
import contextlib
import queue
import sys
import threading
from typing import Any, Callable, Optional

import numpy as np

from .format import AtomicFile


class DeferredFile:
    """An `AtomicFile` that a thread writes; it appears under its name after `commit`, or not at all."""

    def __init__(self, file: AtomicFile):
        self.path = file.path
        self._file = file
        self._error: Optional[Exception] = None
        self._pieces: queue.SimpleQueue[Optional[tuple[int, np.ndarray]]] = queue.SimpleQueue()
        self._discarded = False
        self._thread = threading.Thread(target=self._run, name="bmtrain_ms-save", daemon=False)
        self._thread.start()

    def write(self, position: int, data: np.ndarray) -> None:
        """Have the array's bytes written; they are copied now."""
        self._pieces.put((position, data.copy()))

    def commit(self) -> None:
        """No more pieces follow; returns at once."""
        self._pieces.put(None)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._discarded = True
        self._pieces.put(None)
        self._thread.join()

    def join(self) -> None:
        """Wait for the end; raises the error that the thread met, usually an OSError."""
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is None:  # else only let go of them
                self._attempt(self._file.write, *piece)
        if self._error is None and not self._discarded:
            self._attempt(self._file.commit)
        if self._error is not None or self._discarded:
            with contextlib.suppress(OSError):
                self._file.discard()

    def _attempt(self, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:
            self._error = error


# One entry for each save that nobody has waited for: the file on the rank that writes, None on the others.
pending: list[Optional[DeferredFile]] = []


def _report_at_exit() -> None:
    for file in pending:
        try:
            if file is not None:
                file.join()
        except Exception as error:
            sys.stderr.write(f"ERROR: {file.path} was not saved: {error}\n")


atexit.register(_report_at_exit)
