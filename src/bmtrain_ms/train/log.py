"""The log of a run, one line of JSON per step, and a picture of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import weakref
from collections import deque
from pathlib import Path
from typing import Any

from ..files.locking import hold, let_go, sweep_temporaries
from ..files.replacing import sync_folder
from .errors import TrainingError

_MOST_WAITING = 100_000  # lines, some 25 MB
_TAIL = 1 << 16  # bytes; no line is longer


class LogFile:
    """A log that is written: of one job at a time, one line after the other.

    What cannot be written, e.g. because the disk is full, waits in memory, and follows when it can.

    Raises:
        TrainingError: it cannot be opened, or another job writes it.
    """

    def __init__(self, path: Path):
        self.path = Path(os.path.realpath(path))
        self._waiting: deque[bytes] = deque()
        self._begun = False  # whether a part of the first of them is in the file
        self._lost = 0
        self._mended = False
        self._warned = False
        try:
            self._open()
        except BlockingIOError as error:
            raise TrainingError(
                f"another job logs to {path}; end it, or choose another file: they would mix their lines"
            ) from error
        except OSError as error:
            raise TrainingError(f"the log {path} cannot be written: {error.strerror}; choose another file") from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a line for a record. Never raises for what the disk does: a training that goes well is worth more than its log."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        if len(self._waiting) > _MOST_WAITING:
            del self._waiting[1 if self._begun else 0]
            self._lost += 1
        try:
            self._catch_up()
        except OSError as error:
            if not self._warned:
                sys.stderr.write(
                    f"WARNING: the log {self.path} cannot be written: {error.strerror}. Training goes on; the lines wait in memory "
                    "and follow as soon as they can\n"
                )
            self._warned = True

    def trim(self, done: int) -> None:
        """Leave out the lines behind step `done`, and damaged ones.

        Raises:
            TrainingError: that cannot be written.
        """
        try:
            text = self.path.read_bytes()
            kept = b"".join(line for step, line in _readable(self.path, text) if step <= done)
            if text.startswith(kept):  # needs no room on the disk
                os.ftruncate(self._file, len(kept))
            else:
                self._replace(kept)
        except OSError as error:
            raise TrainingError(f"the lines behind step {done} cannot be cut from the log {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Write what waits, if that is possible now, and let another job write it."""
        with contextlib.suppress(OSError):
            if self._waiting:
                self._catch_up()
        lost = self._lost + len(self._waiting)
        if lost:
            sys.stderr.write(f"WARNING: {lost} line(s) are missing in the log {self.path}, which could not be written\n")
        self._waiting.clear()
        self._lost = 0
        self._let_go()

    def _open(self) -> None:
        while True:
            file = _open_alone(self.path, os.O_APPEND)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    break
            let_go(file)  # replaced while it was opened
        self._use(file)

    def _use(self, file: int) -> None:
        self._file, self._mended = file, False
        self._let_go = weakref.finalize(self, let_go, file)

    def _mend(self) -> None:
        """A last line that its job did not finish would swallow the first of this one."""
        info = os.fstat(self._file)
        start = max(0, info.st_size - _TAIL)
        tail = os.pread(self._file, _TAIL, start) if stat.S_ISREG(info.st_mode) else b""
        last = tail[tail.rfind(b"\n") + 1 :]
        if last and _step_of(last) is None:
            os.ftruncate(self._file, info.st_size - len(last))
        elif last:
            self._waiting.appendleft(b"\n")
        self._mended = True

    def _catch_up(self) -> None:
        """Write the lines that wait; raises OSError where it cannot."""
        if not self._in_place():
            self._let_go()
            self._open()
            self._begun = False
        if not self._mended:
            self._mend()
        while self._waiting:
            line = self._waiting[0]
            count = os.write(self._file, line)
            self._begun = count < len(line)
            if self._begun:
                self._waiting[0] = line[count:]
            else:
                self._waiting.popleft()

    def _in_place(self) -> bool:
        """Whether the file still has its name: somebody may have moved or deleted it."""
        if not self._let_go.alive:  # it could not be opened again
            return False
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _replace(self, text: bytes) -> None:
        sweep_temporaries(self.path.parent, f".{self.path.name}.", "")
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        file = _open_alone(temporary, os.O_APPEND | os.O_EXCL)
        try:
            view = memoryview(text)
            while view:
                view = view[os.write(file, view) :]
            os.fsync(file)
            os.replace(temporary, self.path)
        except BaseException:
            let_go(file)
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.path.parent)
        self._let_go()
        self._use(file)


def _open_alone(path: Path, flags: int) -> int:
    """Make it if need be. What is no plain file (a terminal, a pipe) has no owner.

    Raises:
        BlockingIOError: another job has it.
        OSError: it cannot be opened, or the file system has no locks.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    try:
        if stat.S_ISREG(os.fstat(file).st_mode):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    hold(file)
    return file


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL log, without a last line that was cut when the run was killed.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def _readable(path: Path, text: bytes) -> list[tuple[int, bytes]]:
    """(step, line) of those that are there. A power loss leaves zeros for what was not written: a run goes on all the same."""
    lines = [(_step_of(line), line + b"\n") for line in text.split(b"\n") if line]
    good = [(step, line) for step, line in lines if step is not None]
    if len(good) < len(lines):
        sys.stderr.write(f"WARNING: {path} has {len(lines) - len(good)} damaged line(s), which are left out\n")
    return good


def _step_of(line: bytes) -> int | None:
    """Which step a line of the log is of; None: it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are the first
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def plot_log(log: str | Path, picture: str | Path, held_out: dict[int, float], unigram: float | None = None) -> bool:
    """Draw the loss curve as PNG; False, with a note on stderr, where that fails, e.g. as matplotlib is not installed.

    Args:
        log: JSONL log.
        picture: PNG to write.
        held_out: step -> loss on held-out text.
        unigram: entropy of that text to compare with.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        sys.stderr.write("no loss curve: matplotlib is not installed (pip install matplotlib)\n")
        return False
    try:
        records = read_log(log)
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1, label="training")
        if held_out:
            axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
        if unigram is not None:
            axes.axhline(unigram, color="grey", linestyle=":", label="unigram entropy of the held-out text")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        figure.savefig(picture, dpi=120)
        pyplot.close(figure)
    except Exception as error:  # whatever it is: the model is worth more than its picture
        sys.stderr.write(f"no loss curve: {error}\n")
        return False
    return True
