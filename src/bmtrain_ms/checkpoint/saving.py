"""What a rank writes of one checkpoint, in this thread or in one of its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from .sharded import write_rank_file
from .store import Entry


class Saving:
    """One save on this rank."""

    def __init__(
        self,
        step: int,
        folder: Path,
        entries: Mapping[str, Entry],
        apart: Sequence[str],
        state: dict[str, Any],
        path: Path | None,
        pieces: dict[str, tuple[Any, np.ndarray]],
    ):
        self.step, self.folder, self.entries, self.apart, self.state = step, folder, entries, apart, state
        self._path = path
        self._pieces = pieces
        self._hashes: dict[str, list[str]] = {}
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write in this thread; an error is kept for `result`."""
        try:
            if self._path is not None:
                self._hashes = write_rank_file(self._path, self._pieces, {"format": "pt"})
        except Exception as caught:
            self.error = caught
        self._pieces = {}

    def start(self) -> None:
        """Write in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="bmtrain_ms-checkpoint", daemon=True)
        self._thread.start()

    @property
    def in_background(self) -> bool:
        """Whether a thread writes it."""
        return self._thread is not None

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> dict[str, list[str]]:
        """Name -> hashes of this rank's pieces; raises what writing raised."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self._hashes
