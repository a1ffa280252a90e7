"""What the tests of Blocks share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

import bmtrain_ms as bms
from tests.helpers.models import WIDTH

MODES = pytest.mark.parametrize(
    ("use_checkpoint", "zero_level"), [(True, 3), (False, 3), (True, 2), (False, 2)], ids=["ckpt3", "keep3", "ckpt2", "keep2"]
)


def x_of(seed: int = 0, rows: int = 4) -> Tensor:
    return Tensor(np.random.RandomState(seed).randn(rows, WIDTH).astype(np.float32))


def build(inner: Any, use_checkpoint: bool = True, zero_level: int = 3) -> bms.Block:
    block = bms.Block(inner, use_checkpoint, zero_level)
    bms.init_parameters(block)
    return block
