"""What looks at each step of a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bmtrain_ms.train.watchers import Board, TensorBoard, Utilisation, WandB
from bmtrain_ms_base.data.extras import MissingLibraryError

RECORD: dict[str, Any] = {"step": 3, "loss": 2.5, "skipped": False, "rank_norms": [0.5, 0.25]}


def test_the_models_own_work_of_a_rank():
    """6 numbers of work for a parameter and a token, and 6 for a number of each pair of tokens that see each other."""
    record = {"tokens_per_second": 1e9}
    Utilisation(active=1000, attention=10, length=50, ranks=2, peak=6.0)(record)
    assert record == {"tokens_per_second": 1e9, "tflops": (6 * 1000 + 6 * 10 * 50) / 2 / 1e3, "mfu": 0.75}


def test_tensorboard_reads_what_is_written(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(tmp_path)
    writer(RECORD)
    writer.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    values = {tag: found.Tensors(tag)[0] for tag in found.Tags()["tensors"]}
    assert {tag: (event.step, event.tensor_proto.float_val[0]) for tag, event in values.items()} == {
        "loss": (3, 2.5),
        "skipped": (3, 0.0),
        "rank_norms/0": (3, 0.5),
        "rank_norms/1": (3, 0.25),
    }


def steps_in(folder: Path) -> set[int]:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    found = EventMultiplexer().AddRunsFromDirectory(str(folder))
    found.Reload()
    return {event.step for run in found.Runs() for event in found.Tensors(run, "loss")}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread, which ends
def test_a_full_disk_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """TensorBoard's own thread writes, at the latest two minutes later; an error of its comes out at a later step."""
    from tensorboard.summary.writer import record_writer

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = TensorBoard(tmp_path / "runs")
    with monkeypatch.context() as disk:
        disk.setattr(record_writer.RecordWriter, "write", full)
        for step in range(1, 50):
            writer({"step": step, "loss": 1.0})
            if "WARNING" in (said := capsys.readouterr().err):
                break
            time.sleep(0.1)
        assert said.startswith("WARNING: TensorBoard's files cannot be written since step") and "No space left" in said
        writer({"step": 97, "loss": 1.0})
        assert not capsys.readouterr().err
    writer({"step": 98, "loss": 1.0})
    writer({"step": 99, "loss": 1.0})
    writer.close()
    assert "step(s) or more are missing in TensorBoard's files; the log has them" in capsys.readouterr().err
    assert {98, 99} <= steps_in(tmp_path / "runs") and 97 not in steps_in(tmp_path / "runs")


def test_a_service_that_is_away_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Run:
        sent: ClassVar[list[tuple[int, dict[str, float]]]] = []

        def log(self, numbers: dict[str, float], step: int) -> None:
            if step == 2:
                raise ConnectionError("the service\nis away.")
            self.sent.append((step, numbers))

        def finish(self) -> None:
            raise TimeoutError

    writer = WandB.__new__(WandB)
    Board.__init__(writer, "Weights & Biases")
    writer._run = Run()
    for step in (1, 2, 3):
        writer({"step": step, "loss": 1.0})
    writer.close()
    assert Run.sent == [(1, {"loss": 1.0}), (3, {"loss": 1.0})]
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: Weights & Biases cannot be written since step 2: the service is away. Training goes on, and later steps are "
        "tried again; the log has all of them",
        "WARNING: the last steps may be missing in Weights & Biases: TimeoutError; the log has them",
        "WARNING: 1 step(s) or more are missing in Weights & Biases; the log has them",
    ]


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same run goes on when the folder is the same."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        writer = WandB("tests", tmp_path, {"train": {"steps": 3}})
        writer(RECORD)
        writer.close()
    name = (tmp_path / "wandb-run-id").read_text()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*{name}"))
    assert runs and all(list(run.glob("*.wandb")) for run in runs)


@pytest.mark.parametrize(("module", "make"), [("tensorboard", lambda p: TensorBoard(p)), ("wandb", lambda p: WandB("x", p, {}))])
def test_what_is_not_installed_is_said(module: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibraryError, match=rf"needs {module}.*pip install 'bmtrain-ms\[log\]'"):
        make(tmp_path)
