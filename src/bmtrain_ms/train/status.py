"""What is shown of a training while it runs."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from bmtrain_ms_base.launchers import TERMINAL

SECONDS = 10.0  # between lines, where there is no terminal


class Status:
    """A bar on a terminal, or on the launcher's; elsewhere, in a file that somebody reads later, a line at the first and the last
    step and every ten seconds in between. To be used in a `with` statement.

    Args:
        done, steps: how many steps there were before, and are in all.
        shown: by this rank.
        to: default: stderr.
    """

    def __init__(self, done: int, steps: int, shown: bool, to: TextIO | None = None):
        self._to = sys.stderr if to is None else to
        self._steps, self._shown, self._bar = steps, shown, None
        self._told_at = self._began_at = time.monotonic()
        self._first = done + 1
        if shown and (self._to.isatty() or os.environ.get(TERMINAL) == "1"):
            self._bar = tqdm(total=steps, initial=done, desc="train", mininterval=1.0, file=self._to)

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, record: dict[str, Any]) -> None:
        """A step's record, as in the log: its loss, rate, norm, speed, memory, and `mfu` or `tflops` if it has them."""
        if not self._shown:
            return
        text = f"loss {record['loss']:.3f} lr {record['lr']:.1e} |g| {record['grad_norm']:.2f} "
        text += f"{record['tokens_per_second']:.0f} tok/s {record['memory_mib']} MiB"
        if "mfu" in record:
            text += f" MFU {record['mfu']:.1%}"
        elif "tflops" in record:
            text += f" {record['tflops']:.3g} TFLOP/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        now, step = time.monotonic(), record["step"]
        if step not in (self._first, self._steps) and now - self._told_at < SECONDS:
            return
        self._told_at = now
        left = (now - self._began_at) / (step - self._first + 1) * (self._steps - step)
        self._to.write(f"train: step {step} of {self._steps}, {text}, {tqdm.format_interval(left)} left\n")
        self._to.flush()
