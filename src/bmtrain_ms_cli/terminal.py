"""What the other side of a command does to it: Ctrl-C, and output that nobody takes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Iterator

from bmtrain_ms_base import board as boards

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_UNREAD = 128 + signal.SIGPIPE  # as any program ends whose reader has gone


class OutputError(Exception):
    """Standard output cannot be written. No OSError: commands take these for faults of the files that they read and write.

    Attributes:
        unread: whether who read it has gone.
    """

    def __init__(self, error: OSError):
        super().__init__(f"standard output cannot be written: {error.strerror}")
        self.unread = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from error


def write_what_cannot_be_encoded() -> None:
    """Have characters that standard output has no bytes for, as those of a path, written as `\\u0436`: they are no error."""
    for stream, own in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)):
        if stream is own and isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # nobody catches it
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def own_output() -> Iterator[None]:
    """Inside of the `with` statement, and at its end, OutputError is raised for what standard output does not take."""
    before = sys.stdout
    if before is None or before is not sys.__stdout__:  # there is none, or somebody catches it
        yield
        return
    at_once = bool(before.line_buffering or getattr(before, "write_through", False))
    file = io.BufferedWriter(_Output(before.fileno(), "w", closefd=False))
    sys.stdout = io.TextIOWrapper(file, encoding=before.encoding, errors=before.errors, line_buffering=at_once)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), before.fileno())  # what is left over would be tried again when the interpreter ends
        raise
    finally:
        sys.stdout = before


@contextlib.contextmanager
def unbroken_imports() -> Iterator[None]:
    """Inside of the `with` statement Ctrl-C raises KeyboardInterrupt, but for while a module is imported: it ends the process then.

    An exception in the middle of MindSpore's native initialisation may crash the interpreter.
    """
    own_thread = threading.current_thread() is threading.main_thread()
    if not own_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # in a thread, which gets no signals; or somebody else hears it, or it is ignored
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            say_interrupted()
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def say_interrupted() -> None:
    """Say it on stderr; of ranks the launcher says it."""
    if boards.ADDRESS not in os.environ:
        with contextlib.suppress(OSError):
            os.write(2, b"bmtrain-ms: interrupted\n")
