"""Checkpoints and files of releases in which a model's parameters had other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, CheckpointError
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("single_world")
IDS = Tensor((np.arange(12).reshape(2, 6) % 13).astype(np.int32))
TARGETS = Tensor(((np.arange(12) + 1) % 13).astype(np.int32))


class Job:
    """A Llama in training; `earlier`: with the names of then."""

    def __init__(self, earlier: bool = False, dtype: str = "float32", tied: bool = False):
        self.model = spread(Llama(LlamaConfig(13, 16, 2, dim_ff=12, num_layers=2, dtype=dtype, tied=tied)))
        bms.init_parameters(self.model)
        if earlier:
            for p in self.model.get_parameters():
                p.name = self.model.earlier_name(p.name)
        self.manager = bms.optim.OptimManager(loss_scale=8.0 if dtype == "float16" else None)
        self.manager.add_optimizer(bms.optim.AdamOptimizer(self.model.trainable_params(), lr=0.01))

    def step(self) -> float:
        self.manager.zero_grad()
        loss = self.backward()
        self.manager.step()
        return loss

    def backward(self) -> float:
        def loss() -> Tensor:
            return cross_entropy(self.model(IDS).reshape(12, 13), TARGETS)

        return self.manager.backward(loss).asnumpy().item()

    def values(self) -> list[bytes]:
        return [p.asnumpy().tobytes() for p in self.model.get_parameters()]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"dtype": "float16"}], ids=["fp32", "tied", "fp16"])
def test_training_goes_on_from_a_checkpoint_with_earlier_names(tmp_path: Path, options: dict[str, Any]):
    old, new = Job(earlier=True, **options), Job(**options)
    old.step()
    old.manager.zero_grad()
    old.backward()  # gradients wait, too
    with_gradients = Checkpointer(tmp_path, old.model, old.manager)
    with_gradients.save(1)
    with_gradients.close()
    resumed = Checkpointer(tmp_path, new.model, new.manager).load()
    assert resumed is not None and resumed.step == 1
    assert (resumed.result.missing, resumed.result.unexpected) == ([], [])
    assert new.values() == old.values()
    old.manager.step(), new.manager.step()
    assert [new.step() for _ in range(3)] == [old.step() for _ in range(3)]
    assert new.values() == old.values()


def test_files_and_dictionaries_with_earlier_names(tmp_path: Path):
    old, new = Job(earlier=True), Job()
    old.step()
    bms.save(old.model, tmp_path / "old.safetensors")
    assert bms.load(new.model, tmp_path / "old.safetensors").missing == []
    assert new.values() == old.values()
    other = Job()
    bms.checkpoint.load_state_dict(other.model, bms.checkpoint.state_dict(old.model))
    assert other.values() == old.values()


def test_names_that_nobody_had_are_still_told(tmp_path: Path):
    old = Job(earlier=True)
    next(iter(old.model.get_parameters())).name = "input_embedding.wait"
    bms.save(old.model, tmp_path / "old.safetensors")
    wrong = r"1 missing in .*: model\.embed_tokens\.weight.*1 unexpected in .*: input_embedding\.wait"
    with pytest.raises(CheckpointError, match=wrong):
        bms.load(Job().model, tmp_path / "old.safetensors")
