"""What modules do besides computing: call other Blocks, use shards, keep weights, change what they were given.

Each either gives the gradients of ordinary Cells, or is refused in a sentence.
"""

from __future__ import annotations

import collections
import copy
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.compat.autograd import no_grad
from tests.helpers.twins import BLOCKS, WIDTH, Twin, chained, compare, outputs, plain_layer, squared, start, steps

pytestmark = pytest.mark.usefixtures("single_world")
OLD = ms.__version__.startswith("2.5")
in_every_block = pytest.mark.parametrize("block", BLOCKS, ids=["ckpt3", "ckpt2", "kept3", "kept2"])
CHECKPOINTED = [block for block in BLOCKS if block[0]]
KEPT = [block for block in BLOCKS if not block[0]]


@in_every_block
@pytest.mark.parametrize("through", [1, 2])
def test_a_block_calls_another_one_on_what_needs_no_gradient(block: tuple[bool, int], through: int):
    def function(self: Any, x: Tensor) -> Tensor:
        if self.place < through:  # which calls the next in turn
            return plain_layer(self, x) + self.owner.blocks[self.place + 1](Tensor(start(5, 4, 5)))
        return plain_layer(self, x)

    compare(lambda twin, x: squared(twin.blocks[0](x)), function, block)


@in_every_block
def test_shards_of_other_parameters_are_used_inside(block: tuple[bool, int]):
    def function(self: Any, x: Tensor) -> Tensor:
        return plain_layer(self, x) + 0.1 * (self.owner.shared**2).sum()

    compare(chained(), function, block, count=3)


@in_every_block
def test_its_own_shard_is_used_inside_from_the_second_step_on(block: tuple[bool, int]):
    def function(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        own = self.owner.params[2 * self.place]
        return plain_layer(self, x), (own**2).sum() if self.owner.step else x.sum() * 0

    def run(twin: Twin, x: Tensor) -> Tensor:
        found = outputs(twin, x)
        return squared(found[-1][0]) + 0.1 * sum(penalty for _, penalty in found)

    compare(run, function, block, count=3)


@pytest.mark.parametrize("block", CHECKPOINTED)
def test_the_shard_of_another_parameter_later_on_is_refused_when_it_is_seen(block: tuple[bool, int]):
    def function(self: Any, x: Tensor) -> Tensor:
        return plain_layer(self, x) + (0.1 * (self.owner.shared**2).sum() if self.owner.step >= self.owner.begins else 0.0)

    def found(block: tuple[bool, int] | None, begins: int, count: int) -> list[list[np.ndarray]]:
        twin = Twin(function, block)
        vars(twin)["begins"] = begins
        return steps(twin, chained(), count)

    for mine, right in zip(found(block, 1, 4), found(None, 1, 4)):  # seen in the second pass, asked for in the third
        for a, b in zip(mine, right):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"uses the shard of shared, which is no parameter of its own, and did not in its first"):
        found(block, 2, 4)  # in the third pass nobody looks, in the fourth one does


@in_every_block
def test_the_shard_of_a_parameter_that_is_trained_later_on(block: tuple[bool, int]):
    """Its use cannot be seen before it is asked for: from the third pass on, in which nobody would look by count."""

    def function(self: Any, x: Tensor) -> Tensor:
        return plain_layer(self, x) + 0.1 * (self.owner.shared**2).sum()

    def gradients(twin: Twin) -> list[np.ndarray]:
        found = []
        for i in range(4):
            x, trained = Tensor(start(100 + i, 4, WIDTH)), [p for p in twin.params if i > 1 or p is not twin.shared]
            found += ms.value_and_grad(lambda x: squared(twin.chain(x)), None, trained)(x)[1]
        return [grad.asnumpy().reshape(-1) for grad in found]

    for mine, right in zip(gradients(Twin(function, block)), gradients(Twin(function))):
        np.testing.assert_allclose(mine, right, rtol=2e-5, atol=1e-6)


def test_a_copied_block_knows_nothing_of_what_the_original_uses():
    def function(self: Any, x: Tensor) -> Tensor:
        return plain_layer(self, x) + 0.1 * (self.owner.shared**2).sum()

    twin = Twin(function, (True, 3))
    steps(twin, chained(), 3)
    other = copy.deepcopy(twin)
    for mine, right in zip(steps(other, chained(), 3), steps(Twin(function), chained(), 3)):
        for a, b in zip(mine, right):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@in_every_block
def test_arrays_of_objects_are_passed_through(block: tuple[bool, int]):
    names = np.array(["a", {"b": 1}], object)

    def function(self: Any, x: Tensor, names: np.ndarray) -> Tensor:
        return plain_layer(self, x) * len(names)

    compare(lambda twin, x: squared(twin.blocks[0](x, names)), function, block)


@in_every_block
def test_complex_tensors_are_refused(block: tuple[bool, int]):
    returns, takes = Twin(lambda self, x: ops.Complex()(plain_layer(self, x), x), block), Twin(lambda self, x: ops.real(x), block)
    with pytest.raises(TypeError, match=r"a complex tensor is returned by the module of a Block.*real and imaginary part as two"):
        steps(returns, lambda twin, x: squared(ops.real(twin.blocks[0](x))), 1)
    with pytest.raises(TypeError, match=r"a complex tensor is given to Block 0, through which"):
        steps(takes, lambda twin, x: squared(twin.blocks[0](ops.Complex()(x, x))), 1)


@in_every_block
def test_a_list_that_is_appended_to(block: tuple[bool, int]):
    def function(self: Any, x: Tensor, seen: list) -> Tensor:
        seen.append(x.sum())
        return plain_layer(self, x)

    with pytest.raises(RuntimeError, match=r"changed a list or dict that it was given.*Return it instead"):
        steps(Twin(function, block), lambda twin, x: squared(twin.blocks[0](x, [])), 1)
    seen: list[Tensor] = []
    with no_grad():
        Twin(function, block).blocks[0](Tensor(start(0, 4, 5)), seen)
    assert len(seen) == 1  # nothing is differentiated: it is the caller's list


@in_every_block
def test_arguments_in_unusual_containers(block: tuple[bool, int]):
    def function(self: Any, x: Tensor, table: dict, params: Any) -> Tensor:
        assert table["missing"] == [] and type(table) is collections.defaultdict
        del table["missing"]
        return plain_layer(self, x) * table["scale"].sum() + params[0].sum()

    def run(twin: Twin, x: Tensor) -> Tensor:
        table: dict = collections.defaultdict(list)
        table["scale"] = twin.prompt
        return squared(twin.blocks[0](x, table, ms.ParameterTuple([twin.prompt])))

    compare(run, function, block)


@pytest.mark.parametrize("block", KEPT)
@pytest.mark.filterwarnings("ignore:the recorded graph keeps a full copy")  # 2.5 copies views
@pytest.mark.parametrize("what", [lambda w: w, lambda w: w.T, lambda w: w[1:3]], ids=["itself", "transposed", "slice"])
def test_weights_that_somebody_keeps_stay_what_they_are(block: tuple[bool, int], what: Any):
    def function(self: Any, x: Tensor) -> Tensor:
        vars(self)["kept"] = what(self.weight)
        return plain_layer(self, x)

    twin = Twin(function, block)

    def run(twin: Twin, x: Tensor) -> Tensor:
        out = twin.chain(x)
        vars(twin)["seen"] = [layer.kept.asnumpy().copy() for layer in twin.inner]
        return squared(out)

    steps(twin, run, 2)
    for i, layer in enumerate(twin.inner):
        right = np.asarray(what(start(i, 5, 5)))
        np.testing.assert_array_equal(twin.seen[i], right)
        np.testing.assert_array_equal(layer.kept.asnumpy(), right)


@pytest.mark.parametrize("block", KEPT)
def test_weights_in_an_object_of_somebody_elses_stay_what_they_are(block: tuple[bool, int]):
    kept: list[Tensor] = []

    def function(self: Any, x: Tensor) -> Tensor:
        kept.append(self.weight)
        return plain_layer(self, x)

    def run(twin: Twin, x: Tensor) -> Tensor:
        kept.clear()
        out = twin.chain(x)
        return squared(out) + 0.1 * sum((w.asnumpy() ** 2).sum().item() for w in kept)

    compare(run, function, block)


@in_every_block
def test_backward_hooks_of_a_block_see_and_change_gradients(block: tuple[bool, int]):
    def run_with(calls: list[int]) -> Any:
        def hook(cell: nn.Cell, grad_input: Any, grad_output: Any) -> Any:
            calls.append(len(grad_output))
            return tuple(None if g is None else g * 2.0 for g in grad_input)

        def run(twin: Twin, x: Tensor) -> Tensor:
            if not calls:
                twin.blocks[1].register_backward_hook(hook)
                calls.append(0)
            return squared(twin.chain(x))

        return run

    mine: list[int] = []
    theirs: list[int] = []
    ours, right = steps(Twin(block=block), run_with(mine), 2), steps(Twin(), run_with(theirs), 2)
    assert mine == theirs
    for a, b in zip((x for found in ours for x in found), (x for found in right for x in found)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@in_every_block
def test_hooks_on_what_a_block_returns(block: tuple[bool, int]):
    def run(twin: Twin, x: Tensor) -> Tensor:
        y = twin.blocks[0](x)
        if OLD and twin.ours:
            with pytest.raises(RuntimeError, match=r"MindSpore 2\.5 ignores a hook.*take y = y\.copy\(\)"):
                y.register_hook(lambda grad: grad * 3.0)
        y = y.copy()
        y.register_hook(lambda grad: grad * 3.0)
        return squared(twin.blocks[1](y))

    compare(run, block=block)


@in_every_block
def test_the_mode_of_the_module_is_set_by_whoever_sets_it_last(block: tuple[bool, int]):
    wrapped = Twin(block=block)
    outer, inner = wrapped.blocks[0], wrapped.inner[0]
    outer.set_train()
    assert inner.training and outer.training
    inner.set_train(False)
    outer(Tensor(start(0, 4, 5)))
    assert not inner.training
    nn.CellList([outer]).set_train(True)
    assert inner.training


@pytest.mark.parametrize("block", CHECKPOINTED)
def test_what_was_given_must_stay_until_backward(block: tuple[bool, int]):
    scale = np.ones(5, np.float32)

    def function(self: Any, x: Tensor, scale: np.ndarray) -> Tensor:
        return plain_layer(self, x) * 0.0 + x * Tensor(scale) * 0.0  # what it was given does not show in the output

    def run(twin: Twin, x: Tensor) -> Tensor:
        out = twin.blocks[0](x, scale)
        scale[:] = 2.0
        return squared(out)

    with pytest.raises(RuntimeError, match=r"what it was given was changed between forward and backward of 0 \(Sharded\)"):
        steps(Twin(function, block), run, 1)


@pytest.mark.parametrize("block", CHECKPOINTED)
def test_a_flag_must_stay_until_backward(block: tuple[bool, int]):
    def function(self: Any, x: Tensor) -> Tensor:
        return ops.stop_gradient(plain_layer(self, x)) if self.frozen else plain_layer(self, x)

    twin = Twin(function, block)
    for layer in twin.inner:
        layer.frozen = False

    def run(twin: Twin, x: Tensor) -> Tensor:
        out = twin.blocks[0](x)
        twin.inner[0].frozen = True
        return squared(out)

    with pytest.raises(RuntimeError, match=r"a flag of its cells was changed between forward and backward of 0 \(Sharded\)"):
        steps(twin, run, 1)


@in_every_block
def test_precision_that_is_set_on_blocks(block: tuple[bool, int]):
    class Half(nn.Cell):
        def __init__(self, ours: bool):
            super().__init__()
            self.linear = bms.nn.Linear(5, 5) if ours else nn.Dense(5, 5)

        def construct(self, x: Tensor) -> Tensor:
            return ops.tanh(self.linear(x))

    found = []
    for ours in (True, False):
        cell = Half(ours)
        for p, values in zip(cell.trainable_params(), (start(0, 5, 5), start(1, 5))):
            p.copy_full(values) if ours else p.set_data(Tensor(values))
        net = bms.Block(cell, *block) if ours else cell
        net.to_float(ms.float16)
        params = net.trainable_params()
        loss, grads = ms.value_and_grad(lambda x, net=net: (net(x).astype(ms.float32) ** 2).mean(), None, params)(
            Tensor(start(2, 4, 5))
        )
        found.append([loss.asnumpy(), *(g.asnumpy().reshape(-1) for g in grads)])
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


def test_a_block_that_calls_itself():
    def function(self: Any, x: Tensor) -> Tensor:
        return self.owner.blocks[self.place](x) if x.sum() > 0 else plain_layer(self, x)

    for block in BLOCKS:
        with pytest.raises(RuntimeError, match=r"Sharded \(0\) calls the Block that it is in: write the repetition as a loop"):
            steps(Twin(function, block), lambda twin, x: squared(twin.blocks[0](x * x)), 1)


def test_recomputation_of_mindspores_in_a_block():
    with pytest.raises(ValueError, match=r"a Block recomputes by itself: leave recompute\(\) out"):
        Twin(block=(True, 3)).blocks[0].recompute()

    class Outer(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.linear = bms.nn.Linear(5, 5)

        def construct(self, x: Tensor) -> Tensor:
            return self.linear(x)

    cell = Outer()
    block = bms.Block(cell)
    cell.linear.recompute()
    with pytest.raises(ValueError, match=r"Linear linear was set to recompute\(\)"):
        ms.value_and_grad(lambda x: block(x).sum(), None, block.trainable_params())(Tensor(start(0, 4, 5)))
