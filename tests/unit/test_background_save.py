"""save(non_blocking=True): the same file, later; errors are told, and nothing is left behind by any failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import CheckpointError, wait_for_saves
from bmtrain_ms.checkpoint import whole as whole_module
from bmtrain_ms.checkpoint.writer import DeferredFile
from bmtrain_ms.comm import CommError
from bmtrain_ms.compat.runtime import from_host
from bmtrain_ms.files import gathering
from bmtrain_ms.files.format import AtomicFile

pytestmark = pytest.mark.usefixtures("single_world")

SOURCE = Path(__file__).resolve().parents[2] / "src"


class Model(nn.Cell):
    """Two parameters with values from a seed, and one that is whole on every rank."""

    def __init__(self, seed: int = 0, count: int = 5000):
        super().__init__()
        random = np.random.default_rng(seed)
        self.large, self.half = (
            bms.DistributedParameter(Tensor(random.standard_normal(n).astype(np.float32)).astype(dtype))
            for n, dtype in ((count, ms.float32), (7, ms.float16))
        )
        self.whole = Parameter(Tensor(np.zeros(3, np.float32)), name="whole")
        self.whole.set_data(from_host(random.standard_normal(3).astype(np.float32)))

    def values(self) -> list[list[float]]:
        return [p.asnumpy().tolist() for p in self.get_parameters()]

    def clear(self) -> None:
        """What training does: write into the parameters' own memory, and replace it."""
        self.large.asnumpy()[...] = 0
        self.whole.asnumpy()[...] = 0
        self.half.copy_full(np.zeros(7, np.float16))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written until it is set."""
    opened, write = threading.Event(), AtomicFile.write

    def wait_and_write(self: AtomicFile, position: int, data: np.ndarray) -> None:
        assert opened.wait(30)
        write(self, position, data)

    monkeypatch.setattr(AtomicFile, "write", wait_and_write)
    monkeypatch.setattr(gathering, "PIECE", 1024)
    yield opened
    opened.set()
    wait_or_error()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`failing(error, after=0, method="write")`: that method of files fails from then on."""

    def start(error: BaseException, after: int = 0, method: str = "write") -> None:
        original, calls = getattr(AtomicFile, method), []

        def fail(self: AtomicFile, *args: Any) -> None:
            calls.append(args)
            if len(calls) > after:
                raise error
            original(self, *args)

        monkeypatch.setattr(AtomicFile, method, fail)
        monkeypatch.setattr(gathering, "PIECE", 1024)

    return start


def wait_or_error() -> str:
    try:
        wait_for_saves()
    except CheckpointError as error:
        return str(error)
    return ""


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bmtrain_ms-save"]


def nothing_is_left(folder: Path) -> bool:
    return not threads() and not os.listdir(folder) and not whole_module.pending


FULL = OSError(28, "No space left on device")


# Without errors #


def test_the_file_is_that_of_a_blocking_save(tmp_path: Path):
    model = Model()
    bms.save(model, tmp_path / "now")
    bms.save(model, tmp_path / "later", non_blocking=True)
    wait_for_saves()
    assert (tmp_path / "now").read_bytes() == (tmp_path / "later").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["later", "now"] and not threads()
    wait_for_saves()  # nothing to wait for


def test_training_goes_on_while_the_file_is_written(tmp_path: Path, gate: threading.Event):
    model, other = Model(1), Model(2)
    path = tmp_path / "file"
    bms.save(model, path, non_blocking=True)
    assert not path.exists() and len(threads()) == 1
    model.clear()
    gate.set()
    bms.load(other, path)  # waits for it
    assert other.values() == Model(1).values() and not any(map(any, model.values()))


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path, gate: threading.Event):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    bms.save(Model(), path, non_blocking=True)
    assert path.read_bytes() == b"old"
    gate.set()
    wait_for_saves()
    assert len(path.read_bytes()) > 20_000 and os.listdir(tmp_path) == ["file"]


def test_one_after_the_other(tmp_path: Path):
    """A save waits for the one before, blocking or not, also to the same name."""
    path, other = tmp_path / "file", Model(9)
    for seed, non_blocking in ((1, True), (2, True), (3, False), (4, True)):
        bms.save(Model(seed), path, non_blocking)
        assert len(threads()) <= 1
    bms.load(other, path)
    assert other.values() == Model(4).values() and os.listdir(tmp_path) == ["file"]


# Errors #

NEXT = {
    "wait": lambda folder: wait_for_saves(),
    "save": lambda folder: bms.save(Model(), folder / "next"),
    "save in background": lambda folder: bms.save(Model(), folder / "next", non_blocking=True),
    "load": lambda folder: bms.load(Model(), folder / "next"),
}


@pytest.mark.parametrize("step", NEXT)
@pytest.mark.parametrize("method, after", [("write", 0), ("write", 3), ("commit", 0)])
def test_an_error_is_raised_by_what_comes_next(tmp_path: Path, failing: Callable, monkeypatch, step: str, method: str, after: int):
    failing(FULL, after, method)
    bms.save(Model(), tmp_path / "file", non_blocking=True)
    with pytest.raises(CheckpointError) as info:
        NEXT[step](tmp_path)
    assert str(info.value) == f"{tmp_path / 'file'} was not written in the background: {FULL}"
    assert nothing_is_left(tmp_path)
    monkeypatch.undo()
    assert wait_or_error() == ""  # told once
    bms.save(Model(), tmp_path / "file")


def test_an_error_of_any_kind_is_told(tmp_path: Path, failing: Callable):
    failing(MemoryError("no memory"))
    bms.save(Model(), tmp_path / "file", non_blocking=True)
    assert wait_or_error() == f"{tmp_path / 'file'} was not written in the background: no memory"
    assert nothing_is_left(tmp_path)


def test_after_an_error_the_pieces_are_let_go_of(tmp_path: Path, failing: Callable, monkeypatch: pytest.MonkeyPatch):
    failing(FULL)
    made: list[DeferredFile] = []

    class Kept(DeferredFile):
        def __init__(self, file: AtomicFile):
            made.append(self)
            super().__init__(file)

    monkeypatch.setattr(whole_module, "DeferredFile", Kept)
    bms.save(Model(), tmp_path / "file", non_blocking=True)
    threads_before = threads()
    for thread in threads_before:
        thread.join(10)
    assert made[0]._pieces.empty() and wait_or_error()


def test_a_folder_that_is_gone(tmp_path: Path, gate: threading.Event):
    folder = tmp_path / "folder"
    folder.mkdir()
    bms.save(Model(), folder / "file", non_blocking=True)
    for name in os.listdir(folder):
        (folder / name).unlink()
    folder.rmdir()
    gate.set()
    assert wait_or_error().startswith(f"{folder / 'file'} was not written in the background: [Errno 2] No such file or directory")
    assert nothing_is_left(tmp_path)


def test_nowhere_to_write_is_told_at_once(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot be written: \[Errno 2\] No such file"):
        bms.save(Model(), tmp_path / "missing" / "file", non_blocking=True)
    assert nothing_is_left(tmp_path)


def test_a_file_that_is_too_large_from_the_start(tmp_path: Path):
    with pytest.raises(OSError, match="File too large"):
        AtomicFile(tmp_path / "file", b"header", 1 << 62)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("non_blocking", [False, True], ids=["blocking", "background"])
@pytest.mark.parametrize("error", [CommError("rank 1 is gone"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_interrupted_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, non_blocking: bool, error: BaseException):
    """Its thread would keep the process from ending."""
    (tmp_path / "file").write_bytes(b"old")
    pieces = gathering.pieces_of

    def interrupted(*args: Any) -> Iterator[Any]:
        yield next(pieces(*args))
        raise error

    monkeypatch.setattr(gathering, "pieces_of", interrupted)
    with pytest.raises(type(error)):
        bms.save(Model(), tmp_path / "file", non_blocking)
    assert not threads() and not whole_module.pending
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


# At exit #

SCRIPT = """
import resource, sys
import numpy as np
from mindspore import nn
import bmtrain_ms as bms
from bmtrain_ms.checkpoint import whole
from bmtrain_ms.files.format import AtomicFile

whole.PIECE = 1024  # less than a file buffers
bms.init_distributed(seed=0)
model = nn.Cell()
model.large = bms.DistributedParameter(np.ones(1 << 20, np.float32), name="large")
if sys.argv[2] == "full":
    write = AtomicFile.write

    def limited(self, position, data):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        write(self, position, data)

    AtomicFile.write = limited
bms.save(model, sys.argv[1], non_blocking=True)
"""


@pytest.mark.parametrize("disk", ["empty", "full"])
def test_a_process_that_ends_at_once(tmp_path: Path, disk: str):
    """The file is finished, or the error told. The limit acts like a full disk: closing the file fails as well."""
    path = tmp_path / "file"
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "GLOG_v": "3"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(path), disk]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if disk == "full":
        assert f"ERROR: {path} was not saved: [Errno 27] File too large\n" in done.stderr and "Traceback" not in done.stderr
        assert not os.listdir(tmp_path)
    else:
        assert "ERROR: " not in done.stderr and os.listdir(tmp_path) == ["file"]
        model = nn.Cell()
        model.large = bms.DistributedParameter(bms.empty(1 << 20), name="large")
        bms.load(model, path)
        assert (model.large.asnumpy() == 1).all()
