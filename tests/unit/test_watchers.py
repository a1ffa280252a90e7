"""What looks at each step of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms.train.watchers import TensorBoard, Utilisation, WandB
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
