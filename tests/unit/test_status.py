"""What is shown of a training while it runs."""

from __future__ import annotations

import io
from typing import Any

import pytest

from bmtrain_ms.train import status
from bmtrain_ms.train.status import Status
from bmtrain_ms_base.launchers import TERMINAL


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1234.4, "memory_mib": 700, **more}


def shown(to: io.StringIO, clock: list[float], **more: Any) -> list[str]:
    """Six steps, the first of which was done before, each a quarter of the time that is between lines."""
    with Status(1, 6, shown=True, to=to) as line:
        for step in range(2, 7):
            clock[0] += status.SECONDS / 4
            line.show(record(step, **more))
    return to.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_once_in_a_while(clock: list[float]):
    """The first and the last step, and what is ten seconds behind a line."""
    text = "loss 2.500 lr 1.0e-03 |g| 0.50 1234 tok/s 700 MiB"
    assert shown(io.StringIO(), clock) == [
        f"train: step 2 of 6, {text}, 00:10 left",
        f"train: step 6 of 6, {text}, 00:00 left",
    ]
    assert shown(io.StringIO(), clock, tflops=0.12345)[0].endswith("MiB 0.123 TFLOP/s, 00:10 left")
    assert shown(io.StringIO(), clock, tflops=0.1, mfu=0.4321)[0].endswith("MiB MFU 43.2%, 00:10 left")


def test_lines_in_between(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "SECONDS", 4.0)
    with Status(0, 100, shown=True, to=(file := io.StringIO())) as line:
        for step in range(1, 21):
            clock[0] += 1.0
            line.show(record(step))
    assert [row.split(",")[0] for row in file.getvalue().splitlines()] == [f"train: step {n} of 100" for n in (1, 5, 9, 13, 17)]


def test_a_terminal_gets_a_bar():
    with Status(1, 3, shown=True, to=(terminal := Terminal())) as line:
        line.show(record(2, mfu=0.4321))
        line.show(record(3, mfu=0.4321))
    assert "train: 100%" in terminal.getvalue() and "MFU 43.2%" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_the_launchers_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    """To which ranks write through it."""
    monkeypatch.setenv(TERMINAL, "1")
    with Status(0, 1, shown=True, to=(pipe := io.StringIO())) as line:
        line.show(record(1))
    assert "1/1" in pipe.getvalue()


def test_other_ranks_show_nothing():
    with Status(0, 2, shown=False, to=(file := Terminal())) as line:
        line.show(record(1))
    assert file.getvalue() == ""
