"""Dropout that can be repeated."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn

from bmtrain_ms_base.random import chunks, uniform

from ..comm import world as current_world
from ..compat.autograd import custom_op
from ..compat.cells import drop_rate
from ..compat.runtime import from_host, numpy_dtype
from ..zero import context_of


class Dropout(nn.Cell):
    """Zeroes elements with probability `p` in training and scales the rest by 1 / (1 - p) (Srivastava et al., 2014).

    The mask is drawn from a counter-based generator keyed by the run's seed, the step (skipped ones do not count), the number of
    the draw in the step, and the element's position in the batch of all ranks that read rows of their own, whose parts are to be
    equally large. So any number of them, a recomputed forward pass, and a resumed run draw the same mask; MindSpore's own dropout
    does none of that on CPU. Passes whose gradient nobody takes draw other masks, and do not change what training draws.
    Tensor-parallel ranks draw alike: for what each has all of.

    Raises:
        ValueError: p is not in [0, 1).
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout probability must be in [0, 1), not {p}")
        self.p = p

    def construct(self, x: Tensor) -> Tensor:
        """Any shape; the same shape and dtype."""
        return _drop(x, self.p) if self.training and self.p else x


class ReplayingDropout(nn.Dropout):
    """What `BMTrainModelWrapper` makes of a `mindspore.nn.Dropout`: the same Cell, with `Dropout`'s masks."""

    replays = True

    def construct(self, x: Tensor) -> Tensor:
        """Any shape; the same shape and dtype."""
        p = drop_rate(self)
        return _drop(x, p) if self.training and p else x


def _drop(x: Tensor, p: float) -> Tensor:
    context = context_of(current_world())
    with context.drawing():
        key = context.draws.next_key()
    size = int(np.prod(x.shape))
    start = context.draws.place(context.data_rank, size)
    mask = np.empty(size, numpy_dtype(x.dtype))
    for first, words, inside in chunks(key, start, start + size):
        kept, begin = uniform(words)[inside] >= p, first + inside.start - start
        mask[begin : begin + kept.size] = kept.astype(np.float32) / (1.0 - p)
    mask_tensor = from_host(mask.reshape(x.shape))
    return custom_op(lambda x: (x * mask_tensor,), lambda grads: (grads[0] * mask_tensor,), x)[0]
