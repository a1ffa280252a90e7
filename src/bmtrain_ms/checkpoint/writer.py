"""Files that are written while training goes on."""

from __future__ import annotations

import atexit
import contextlib
import queue
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import numpy as np

from ..files.errors import CheckpointError
from ..files.format import AtomicFile


class Writer:
    """Writes something, in this thread or in one of its own; the error that it meets is raised by who asks for the result.

    Args:
        path: what is written, for who reads of an error.
        work: does it; gives the result.
        left: what is wrong if a process ends that has started a thread, and nobody has asked; default: nothing but an error.
    """

    def __init__(self, path: Path, work: Callable[[], Any], left: str = ""):
        self.path = path
        self._work: Callable[[], Any] | None = work
        self._left = left
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write now; an error is kept for `result`."""
        try:
            if self._work is not None:
                self._result = self._work()
        except Exception as caught:
            self._error = caught
        self._work = None  # and the memory that it holds

    def start(self) -> Writer:
        """Write in a thread; at the end of the process it is waited for, and an error told that nobody has asked for."""
        _unasked[id(self)] = self
        self._thread = threading.Thread(target=self.run, name="bmtrain_ms-save", daemon=False)
        self._thread.start()
        return self

    @property
    def in_background(self) -> bool:
        """Whether a thread writes."""
        return self._thread is not None

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> Any:
        """Wait for the end: what the work gave; raises what it raised."""
        _unasked.pop(id(self), None)
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def forgotten(self) -> str:
        """Wait for the end: what is wrong, if nobody asks any more; empty: nothing."""
        if self._thread is not None:
            self._thread.join()
        own = isinstance(self._error, (OSError, MemoryError, CheckpointError))  # nothing that a dying interpreter causes
        return str(self._error) if self._error is not None and (own or not self._left) else self._left


class DeferredFile:
    """An `AtomicFile` that a `writer` writes in the background; it appears under its name after `commit`, or not at all."""

    def __init__(self, file: AtomicFile):
        self._file = file
        self._discarded = False
        self._pieces: queue.SimpleQueue[tuple[int, np.ndarray] | None] = queue.SimpleQueue()
        self.writer = Writer(file.path, self._run).start()

    def write(self, position: int, data: np.ndarray) -> None:
        """Have the array's bytes written; they are copied now."""
        self._pieces.put((position, data.copy()))

    def commit(self) -> None:
        """No more pieces follow; returns at once."""
        self._pieces.put(None)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._discarded = True
        self.commit()
        with contextlib.suppress(Exception):
            self.writer.result()

    def _run(self) -> None:
        pieces = iter(self._pieces.get, None)
        try:
            for position, data in pieces:
                self._file.write(position, data)
            self._file.discard() if self._discarded else self._file.commit()
        except BaseException:
            for _ in pieces:  # only let go of them
                pass
            with contextlib.suppress(OSError):
                self._file.discard()
            raise


_unasked: dict[int, Writer] = {}  # which nobody else may keep


def _report_at_exit() -> None:
    for writer in list(_unasked.values()):
        what = writer.forgotten()
        if what:
            sys.stderr.write(f"ERROR: {writer.path} was not saved: {what}\n")


atexit.register(_report_at_exit)
