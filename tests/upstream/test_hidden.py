"""BMTrain's tests of losses on hidden states, on several ranks: gradients of a list, of its Blocks and of bare cells agree.

Upstream compares printed summaries, test_middle_hidden to within 2.0; here every gradient is compared to one process without
Blocks, which has the whole batch, to 1e-5.
"""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from tests.helpers.models import recorded, share
from tests.helpers.wrapped import raw, whole

pytestmark = pytest.mark.ranks

WIDTH, ROWS, LAYERS = 6, 8, 5
KINDS = ["list", "blocks", "kept", "level2"]


class Linear(nn.Cell):
    """Of plain Parameters; the same values each time."""

    def __init__(self, seed: int):
        super().__init__()
        random = np.random.RandomState(seed)
        self.weight = Parameter(Tensor((random.randn(WIDTH, WIDTH) * 0.4).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(random.randn(WIDTH).astype(np.float32)), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        return ops.MatMul(transpose_b=True)(x, self.weight) + self.bias


class Mixing(nn.Cell):
    """Three hidden states and two further inputs in, three out."""

    def __init__(self, seed: int):
        super().__init__()
        self.a, self.b = Linear(2 * seed), Linear(2 * seed + 1)

    def construct(self, h1: Tensor, h2: Tensor, h3: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b = self.a(h1 + x), ops.tanh(self.b(h2 * y))
        return ops.tanh(a) + h3, b + h1, h2 - h3 * b


class Single(nn.Cell):
    """One hidden state."""

    def __init__(self, seed: int):
        super().__init__()
        self.a = Linear(seed)

    def construct(self, x: Tensor) -> Tensor:
        return x + ops.tanh(self.a(x))


class Model(nn.Cell):
    """A Linear, the layers, and a Linear."""

    def __init__(self, layer: type[nn.Cell] = Single):
        super().__init__()
        self.before, self.layers = Linear(100), nn.CellList([layer(i) for i in range(LAYERS)])
        self.after = Linear(101)

    def through(self, *hidden: Tensor, others: tuple[Tensor, ...] = ()) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """Outputs of the last layer, and the inputs of all."""
        seen = []
        for layer in self.layers:
            seen.append(hidden)
            out = layer(*hidden, *others)
            hidden = out if isinstance(out, tuple) else (out,)
        return hidden, seen


class Listed(Model):
    def through(self, *hidden: Tensor, others: tuple[Tensor, ...] = ()) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        n = len(hidden)
        out = self.layers(*hidden, *others, return_hidden_states=True)
        assert len(out) == 2 * n and all(stack.shape == (LAYERS, *hidden[0].shape) for stack in out[n:])
        return out[:n], [tuple(stack[i] for stack in out[n:]) for i in range(LAYERS)]


def make(kind: str, layer: type[nn.Cell]) -> nn.Cell:
    if kind == "plain":
        return Model(layer)
    if kind == "list":
        model = bms.BMTrainModelWrapper(Listed(layer), layers=[], verbose=False)
        model.layers = bms.TransformerBlockList(list(model.layers), num_hidden=3 if layer is Mixing else 1)
        return model
    options = {"blocks": {}, "kept": {"use_checkpoint": False}, "level2": {"zero_level": 2}}[kind]
    return bms.BMTrainModelWrapper(Model(layer), verbose=False, **options)


# Losses of (model, batch, further batches); each is a mean over rows, so that the ranks' mean is the whole batch's #


def last(model: Model, x: Tensor, *_: Tensor) -> Tensor:
    (out,), _ = model.through(model.before(x))
    return (model.after(out) ** 2).mean()


def hidden(model: Model, x: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    _, seen = model.through(model.before(x))
    return sum((i + 1) * ((h - target) ** 2).mean() for i, (h,) in enumerate(seen[1:]))


def both(model: Model, x: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    (out,), seen = model.through(model.before(x))
    return (model.after(out) ** 2).mean() + (seen[2][0] * target).mean() + (seen[LAYERS - 1][0] ** 2).mean()


def of_parameters(model: Model, x: Tensor, *_: Tensor) -> Tensor:
    """On parameters before and behind the list, besides its output."""
    (out,), _ = model.through(model.before(x))
    w, v, b = model.before.weight, model.after.weight, model.after.bias
    return (model.after(out) ** 2).mean() + (w**2).sum() * 0.1 + ops.tanh(w * v).sum() + (b * model.before.bias).sum()


def only_parameters(model: Model, x: Tensor, *_: Tensor) -> Tensor:
    """The layers get a gradient through the output, the others through their values alone."""
    (out,), _ = model.through(x)
    return out.mean() + (model.before.weight * model.after.weight).sum() + (model.before.bias * model.after.bias).sum()


def several(model: Model, *xs: Tensor) -> Tensor:
    outputs, _ = model.through(*xs[:3], others=xs[3:])
    return sum(((i + 1) * y**2).mean() for i, y in enumerate(outputs))


def several_and_hidden(model: Model, *xs: Tensor) -> Tensor:
    outputs, seen = model.through(*xs[:3], others=xs[3:])
    return sum((y**2).mean() for y in outputs) + sum((a * b + c).mean() for a, b, c in seen[1:])


LOSSES = {f.__name__: f for f in (last, hidden, both, of_parameters, only_parameters, several, several_and_hidden)}


def batches() -> list[np.ndarray]:
    return [np.random.RandomState(i).randn(ROWS, WIDTH).astype(np.float32) for i in range(5)]


def differentiate(model: nn.Cell, loss: str, xs: list[Tensor]) -> tuple[Tensor, tuple, dict[str, Tensor]]:
    """Loss; gradients of the inputs; gradients of the parameters, by path."""
    named = dict(model.parameters_and_names())
    positions = tuple(range(len(xs)))
    value, (inputs, params) = ms.value_and_grad(lambda *xs: LOSSES[loss](model, *xs), positions, list(named.values()))(*xs)
    return value, inputs, dict(zip(named, params))


def run(world: World, losses: list[str], layer: str) -> None:
    """Asserts on every rank; rank by rank of the same whole batch."""
    kind_of_layer = {"Mixing": Mixing, "Single": Single}[layer]
    for loss in losses:
        full_batch = [Tensor(x) for x in batches()]
        _, wanted_inputs, wanted = differentiate(make("plain", kind_of_layer), loss, full_batch)
        used = [name for name, g in wanted.items() if np.abs(g.asnumpy()).max() > 0]
        expected = {"several": 4 * LAYERS, "several_and_hidden": 4 * LAYERS, "hidden": 2 + 2 * (LAYERS - 1)}.get(
            loss, 2 * LAYERS + 4
        )
        assert len(used) == expected, f"{loss} reaches {used}"
        for kind in KINDS:
            with use_world(recorded(world)) as here:
                model = make(kind, kind_of_layer)
                value, inputs, grads = differentiate(model, loss, [Tensor(share(here, x)) for x in batches()])
                local = differentiate(make("plain", kind_of_layer), loss, [Tensor(share(here, x)) for x in batches()])
                np.testing.assert_allclose(value.asnumpy(), local[0].asnumpy(), rtol=1e-5, err_msg=f"{loss} {kind}")
                for got, alone, together in zip(inputs, local[1], wanted_inputs):
                    np.testing.assert_allclose(got.asnumpy(), alone.asnumpy(), atol=1e-5, err_msg=f"{loss} {kind}")
                    np.testing.assert_allclose(
                        got.asnumpy() / here.engine.size, share(here, together.asnumpy()), atol=1e-5, err_msg=f"{loss} {kind}"
                    )
                assert list(grads) == list(wanted)
                for name, grad in grads.items():
                    got = whole(here, raw(model, name), grad)
                    np.testing.assert_allclose(got, wanted[name].asnumpy(), atol=1e-5, err_msg=f"{loss} {kind} {name}")


def test_multi_return(run_ranks: Callable[..., list[Any]]):
    run_ranks(2, run, losses=["several", "several_and_hidden"], layer="Mixing")


def test_middle_hidden(run_ranks: Callable[..., list[Any]]):
    run_ranks(4, run, losses=["last", "hidden", "both"], layer="Single")


def test_other_hidden(run_ranks: Callable[..., list[Any]]):
    run_ranks(4, run, losses=["of_parameters", "only_parameters"], layer="Single")
