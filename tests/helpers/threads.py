"""Ranks that are threads of one process: for what ranks tell each other, without MindSpore."""

from __future__ import annotations

import json
import threading
from typing import Any, Callable

from bmtrain_ms_base.data.storage import Place, StorageError


class Threads:
    """`size` ranks, `per_host` neighbouring ones on each host, which is called `h0`, `h1` and so on.

    As engines do, `gather` raises on the others when a rank has ended with an error.
    """

    def __init__(self, size: int, per_host: int):
        self.size, self.per_host, self.gathers = size, per_host, 0
        self._barrier = threading.Barrier(size, timeout=30)
        self._values: list[str] = [""] * size

    def run(self, function: Callable[[Place], Any]) -> list[Any]:
        """Results, or exceptions, by rank."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = function(self.place(rank))
            except BaseException as error:
                results[rank] = error
                if not isinstance(error, StorageError):  # which all raise
                    self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a rank hangs"
        return results

    def place(self, rank: int) -> Place:
        host, local = divmod(rank, self.per_host)
        return Place(rank, host, local, lambda value: self._gather(rank, value), f"h{host}")

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = json.dumps(value)
        self._barrier.wait()
        found = [json.loads(text) for text in self._values]
        self.gathers += rank == 0
        self._barrier.wait()  # before anybody gives the next value
        return found
