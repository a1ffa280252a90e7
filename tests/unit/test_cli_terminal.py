"""Ctrl-C while a command runs, and output that nobody takes: one line or none, and the documented exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmtrain_ms_base.system import open_streams
from bmtrain_ms_cli import data as data_module
from bmtrain_ms_cli.main import main
from bmtrain_ms_cli.terminal import EXIT_INTERRUPTED, EXIT_UNREAD

WORDS = ["data", "inspect", "x"]
FULL = Path("/dev/full")

# A command whose part that writes is this test's: others wait for MindSpore first.
PROGRAM = """
import sys
from bmtrain_ms_base.data import tools
from bmtrain_ms_cli.main import main
tools.inspect = lambda *_: "a line\\n" * int(sys.argv[1])
raise SystemExit(main(["data", "inspect", "x"]))
"""

IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
from bmtrain_ms_cli import data
from bmtrain_ms_cli.main import main
def run(arguments):
    import slow
data.run = run
raise SystemExit(main(["data", "inspect", "x"]))
"""


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_a_stream_that_is_closed_is_the_null_device(closed: str):
    """As some schedulers start programs; what a command says where nobody takes it is no fault."""
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c"]
    done = subprocess.run([*shell, PROGRAM, "2"], input="", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if ">&-" in closed.split() else "a line\n" * 2 + "\n")


@pytest.mark.parametrize("closed", CLOSED)
def test_ranks_have_all_streams(closed: str, tmp_path: Path):
    """The next file that a rank opens is none of them."""
    script = (
        "import os, sys\n"
        "held = open('held', 'w')\n"
        "print('words')\n"
        "print('words', file=sys.stderr)\n"
        "sys.stdin.read()\n"
        "open('seen', 'w').write(repr((held.fileno() > 2, [os.path.exists(f'/proc/self/fd/{i}') for i in range(3)])))\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "1", "script.py"]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, cwd=tmp_path, input="", capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "seen").read_text() == "(True, [True, True, True])" and (tmp_path / "held").read_text() == ""


def test_streams_are_opened_once(monkeypatch: pytest.MonkeyPatch):
    """A stream that Python has found closed stays none where a file has taken its number since."""
    for name in ("stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, None)
    open_streams()
    assert sys.stderr is not None and sys.stderr is sys.__stderr__ and sys.stderr.name == os.devnull
    before = sys.stderr
    open_streams()
    assert sys.stderr is before
    before.close()


def test_characters_that_the_output_has_no_bytes_for():
    program = PROGRAM.replace("a line", "\u0436")
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", program, "1"], capture_output=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u0436\n\n", b"")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in between"])
def test_a_reader_that_has_gone_is_no_fault(lines: int):
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "wb") as gone:
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(lines)], stdout=gone, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (EXIT_UNREAD, b"") == (141, b"")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in between"])
def test_a_full_disk_is_one_line(lines: int):
    with FULL.open("wb") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(lines)], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"bmtrain-ms: standard output cannot be written: No space left on device\n"


def test_what_is_read_arrives():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "2"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a line\na line\n\n", b"")


def test_an_interrupted_command_says_so_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(data_module, "run", lambda arguments: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(WORDS) == EXIT_INTERRUPTED == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "bmtrain-ms: interrupted\n"


def test_a_rank_leaves_it_to_the_launcher_to_say_so(monkeypatch, capfd):
    monkeypatch.setenv("BMTRAIN_MS_BOARD", "x")
    monkeypatch.setattr(data_module, "run", lambda arguments: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(WORDS) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == ""


def test_no_import_is_broken_off_by_an_exception(tmp_path: Path):
    """MindSpore's would crash the interpreter: the process ends at once instead, without a word of what is being imported."""
    (tmp_path / "slow.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('broken off')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(tmp_path)],
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"bmtrain-ms: interrupted\n")


def test_one_who_ignores_interrupts_goes_on_ignoring_them(monkeypatch):
    monkeypatch.setattr(data_module, "run", lambda arguments: signal.raise_signal(signal.SIGINT) or 0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        assert main(WORDS) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_memory_has_no_room_for_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_module, "run", lambda arguments: np.empty(1 << 57))
    assert main(WORDS) == 2
    said = capsys.readouterr().err
    assert said.startswith("bmtrain-ms: memory has no room for what was asked for. Unable to allocate 1.00 EiB")
    assert len(said.splitlines()) == 1
