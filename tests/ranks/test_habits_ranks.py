"""MindSpore's ways with whole parameters, on two ranks: every rank gets the sentence, or its part of what is right."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import bmtrain_ms as bms


def plain() -> nn.Cell:
    ms.set_seed(1)
    return nn.SequentialCell(nn.Dense(6, 7), nn.Tanh(), nn.Dense(7, 5))


def habits(world, folder: str) -> list[str]:
    whole, model = plain(), bms.BMTrainModelWrapper(plain(), verbose=False)
    x = Tensor(np.ones((2, 6), np.float32))
    said = []
    for p in whole.get_parameters():
        p.set_data(p * 3 + 1)
    path = str(Path(folder) / f"{world.engine.rank}.ckpt")
    try:
        ms.save_checkpoint(model, path)
    except TypeError as error:
        said.append(str(error))
    ms.save_checkpoint(whole, path)
    ms.load_param_into_net(model, ms.load_checkpoint(path))
    assert np.array_equal(model(x).asnumpy(), whole(x).asnumpy())
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        model(x)
    except RuntimeError as error:
        said.append(str(error))
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    return said


def test_every_rank_is_told(run_ranks, tmp_path):
    for said in run_ranks(2, habits, folder=str(tmp_path)):
        assert len(said) == 2 and "use bms.save(model, path)" in said[0] and "keep ms.set_context(mode=ms.PYNATIVE_MODE)" in said[1]
