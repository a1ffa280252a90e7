"""The first backward pass of a process, in which MindSpore's own threads are slow to begin."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import numpy as np
import mindspore as ms
from mindspore import Tensor
import bmtrain_ms as bms
from bmtrain_ms.compat.autograd import custom_vjp

bms.init_distributed(seed=1)
layer = bms.nn.Linear(6, 4, bias=False)
bms.init_parameters(layer)
x = Tensor(np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))


def loss(x):
    y = bms.nn.functional.linear(x, layer.weight)
    return custom_vjp(lambda y: ((y * 2,), None), lambda _, __, grads: grads, y)[0].sum()


_, (grad,) = ms.value_and_grad(loss, None, layer.trainable_params())(x)
print(float(np.abs(grad.asnumpy()).sum()))
"""


def test_gradients_of_the_first_pass_are_there():
    """An argument that goes straight into an operation of ours, and its result into another: every second process had none."""
    jobs = [subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    found = [job.communicate(timeout=240)[0].split()[-1] for job in jobs]
    assert len(set(found)) == 1 and float(found[0]) > 0, found
