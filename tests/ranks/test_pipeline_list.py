"""PipelineTransformerBlockList: training is that of one rank over all rows."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from safetensors.numpy import load_file

import bmtrain_ms as bms
from bmtrain_ms.comm import World, use_world
from tests.helpers.chains import WIDTH, Chain, Layer, Model, parameter, rows_of, train
from tests.helpers.layouts import Case, model_of, whole
from tests.ranks.test_layouts import compare

Run = Callable[..., list[Any]]
STEPS = 10
_alone: dict[str, dict[str, Any]] = {}


def one_rank(run_ranks: Run, chain: Chain, **options: Any) -> dict[str, Any]:
    key = f"{chain}{options}"
    if key not in _alone:
        (found,) = run_ranks(1, train, chain=chain, steps=STEPS, **options)
        _alone[key] = {**found, **{name: whole([found[name]]) for name in ("first", "grads", "last")}}
    return _alone[key]


CHAINS = [
    Chain(),
    Chain(micro_batches=5),
    Chain(pp=2),
    Chain(pp=2, recompute=False, micro_batches=3),
    Chain(pp=3, micro_batches=2),  # fewer than stages
    Chain(pp=3, recompute=False, micro_batches=4),  # no multiple of the stages
    Chain(pp=2, dp=2),
    Chain(pp=2, dp=2, recompute=False, replica=2, micro_batches=4),
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_training_is_that_of_one_rank_over_all_rows(run_ranks: Run, chain: Chain):
    right = one_rank(run_ranks, Chain(micro_batches=1, recompute=False))
    answers = run_ranks(chain.ranks, train, chain=chain, steps=STEPS)
    compare(answers, right, 2e-5)
    for answer in answers:
        assert answer["memory"] == 0
        np.testing.assert_allclose(answer["evaluated"], right["evaluated"], rtol=1e-5)


FROZEN = [
    Chain(pp=3, frozen=("layers.2.", "layers.3.", "table", "mask")),  # nothing of the middle stage, nor what its rows are made of
    Chain(pp=2, frozen=("layers.", "table")),
]


@pytest.mark.parametrize("chain", FROZEN, ids=str)
def test_a_stage_may_train_nothing(run_ranks: Run, chain: Chain):
    right = one_rank(run_ranks, Chain(micro_batches=1, frozen=chain.frozen))
    compare(run_ranks(chain.ranks, train, chain=chain, steps=STEPS), right, 2e-5)


@pytest.mark.parametrize("chain", [Chain(), Chain(pp=2, micro_batches=3), Chain(pp=3, recompute=False)], ids=str)
def test_losses_of_all_hidden_states(run_ranks: Run, chain: Chain):
    right = one_rank(run_ranks, Chain(micro_batches=1), hidden=True)
    compare(run_ranks(chain.ranks, train, chain=chain, steps=STEPS, hidden=True), right, 2e-5)


@pytest.mark.parametrize("recompute", [True, False])
def test_layers_that_are_tensor_parallel(run_ranks: Run, recompute: bool):
    right = one_rank(run_ranks, Chain(micro_batches=1, parallel=True))
    chain = Chain(pp=2, tp=2, micro_batches=3, recompute=recompute, parallel=True)
    compare(run_ranks(4, train, chain=chain, steps=STEPS), right, 2e-5)


def test_dropout_is_drawn_again_when_layers_are_computed_again(run_ranks: Run):
    kept, again = (run_ranks(2, train, chain=Chain(pp=2, recompute=r, drop=0.3), steps=STEPS) for r in (False, True))
    assert [x["losses"] for x in kept] == [x["losses"] for x in again]
    plain = run_ranks(2, train, chain=Chain(pp=2), steps=STEPS)
    assert plain[0]["losses"][0] != kept[0]["losses"][0]


def held(world: World) -> list[Any]:
    """What a stage holds, and what is said of a list that is not right."""
    chain = Chain(pp=2, dp=2, micro_batches=3)
    with use_world(chain.world(world)) as here:
        model = Model(chain)
        layers, params = model.layers, {p.name for p in model.get_parameters()}
        ids, targets = rows_of(0, 0, 12)
        twice, plain = Layer(), Layer()
        with pytest.raises(ValueError, match=r"^layers 0 and 1 are the same Layer, and in stages 0 and 1: stages share nothing"):
            bms.PipelineTransformerBlockList([twice, twice])
        with pytest.raises(ValueError, match=r"^1 layers do not fill p \* v = 2 \* 1 = 2 stages"):
            bms.PipelineTransformerBlockList([plain])
        with pytest.raises(AssertionError, match=r'^a PipelineTransformerBlockList takes Blocks that were made with mode="PIPE"'):
            bms.PipelineTransformerBlockList([bms.Block(Layer()), Layer()])
        with pytest.raises(
            ValueError, match=r"^the 2 rows of a pipeline's ranks cannot be divided into 3 micro-batches: give each"
        ):
            model(ids, targets)
        x = Tensor(np.zeros((2, 4, 6), np.float32))
        with pytest.raises(
            ValueError, match=r"^batch_related=\[1\]: argument 1 behind the hidden .* 2 rows, as these, but \(1,\) Fl"
        ):
            layers(x, x, model.scale, batch_related=[1])
        with pytest.raises(ValueError, match=r"argument 'wrong' behind .* but there is no such one$"):
            layers(x, x, model.scale, batch_related=["wrong"])
        with pytest.raises(ValueError, match=r"^1 hidden states are expected as the first arguments, 0 were given$"):
            layers()
        with pytest.raises(ValueError, match=r"^a PipelineTransformerBlockList, where ranks .*, do not go together: use one of"):
            model_of(Case(pp=2), {"num_layers": 2})
        with bms.inspect.inspect_tensor() as seen:
            pass
        with pytest.raises(RuntimeError, match=r"^stages of a PipelineTransformerBlockList record other tensors each.*get_tensor"):
            seen.get_summary()
        where = [layers.get_stage_by_layer_id(i) for i in range(5)]
        parts = [list(layers.get_range_by_stage_id(s)) for s in range(2)]
        stages = layers.num_layers, layers.stages, layers.stage_id, len(layers), layers.get_part_len_by_stage_id(0)
        return [params, where, parts, stages, here.mesh.pp_rank]


def test_a_stage_holds_its_own_layers_only(run_ranks: Run):
    outside = {"table", "head", "scale", "mask"}
    for params, where, parts, stages, stage in run_ranks(4, held):
        own = [0, 1, 2] if stage == 0 else [3, 4]
        assert params == outside | {f"layers.{i}.{name}" for i in own for name in ("weight", "bias")}
        assert (where, parts, stages) == ([0, 0, 0, 1, 1], [[0, 1, 2], [3, 4]], (5, 2, stage, len(own), 3))


class Two(bms.DistributedModule):
    """Two hidden states, and arguments of every kind; wide: returns another shape."""

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.weight, self.wide = parameter(WIDTH, WIDTH), wide

    def construct(self, x: Tensor, y: Tensor, seen: Tensor, names: list[str], factor: float = 1.0) -> tuple[Tensor, Tensor]:
        assert names == ["a"] and seen.dtype == ms.bool_ and seen.shape[0] == x.shape[0]
        out = ops.tanh(ops.matmul(x, self.weight) + y * factor) * seen.astype(ms.float32).reshape(-1, 1)
        return (out if not self.wide else out[:, :1]), y + x


def two(world: World, chain: Chain) -> list[Any]:
    """Results and gradients of inputs, of a function that no manager differentiates; and what is said of a wrong result."""
    with use_world(chain.world(world)) as here:
        layers = bms.PipelineTransformerBlockList([Two() for _ in range(3)], num_hidden=2)
        bms.init_parameters(layers)
        random = np.random.default_rng(2)
        ranks, rank = chain.ranks, here.mesh.rank
        x, y, seen = (random.standard_normal((12, *shape)) for shape in ((WIDTH,), (WIDTH,), ()))
        mine = [Tensor(np.ascontiguousarray(v[rank * 12 // ranks : (rank + 1) * 12 // ranks]).astype(np.float32)) for v in (x, y)]
        mask = Tensor(np.ascontiguousarray(seen[rank * 12 // ranks : (rank + 1) * 12 // ranks] > 0))

        def loss(x: Tensor, y: Tensor) -> Tensor:
            a, b, states, _ = layers(x, y, mask, ["a"], factor=0.5, batch_related=[0], return_hidden_states=True)
            return (a * a).sum() + (b * x).sum() + states[1].sum()

        value, grads = ms.value_and_grad(loss, (0, 1))(*mine)
        wide = bms.PipelineTransformerBlockList([Two(wide=True) for _ in range(3)], num_hidden=2)
        bms.init_parameters(wide)
        if chain.pp == 1:  # others would wait for what this rank does not send
            with pytest.raises(ValueError, match=r"^layer 0 returned \(\d+, 1\) Float32, .* for hidden states .*: stages exchange"):
                wide(*mine, mask, ["a"], batch_related=[0])
        return [value.asnumpy().item(), *(g.asnumpy() for g in grads)]


@pytest.mark.parametrize("chain", [Chain(pp=2, micro_batches=5), Chain(pp=3)], ids=str)
def test_two_hidden_states_and_other_arguments(run_ranks: Run, chain: Chain):
    ((value, *grads),) = run_ranks(1, two, chain=Chain())
    answers = run_ranks(chain.ranks, two, chain=chain)
    np.testing.assert_allclose(sum(answer[0] for answer in answers), value, rtol=1e-5)
    for i, grad in enumerate(grads):
        np.testing.assert_allclose(np.concatenate([answer[1 + i] for answer in answers]), grad, rtol=1e-4, atol=1e-5)


def halves(world: World, chain: Chain, file: str) -> list[Any]:
    """Steps (made, norm, scale) in which one rank's loss overflows once, and what a file and another model have afterwards."""
    with use_world(chain.world(world)) as here:
        model = Model(chain)
        bms.init_parameters(model)
        manager = bms.optim.OptimManager(loss_scale=2.0**10)
        optimizer = bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-2)
        manager.add_optimizer(optimizer)
        steps = []
        for step in range(3):
            factor = float("inf") if step == 1 and here.mesh.rank == chain.ranks - 1 else 1.0
            manager.zero_grad()
            manager.backward(lambda *batch, by=factor: model(*batch) * by, *rows_of(step, here.mesh.rank, chain.ranks))
            norm = manager.clip_grad_norm(optimizer.param_groups, 1.0)
            steps.append((bool(manager.step()), round(norm, 4), manager.loss_scale))
        bms.save(model, file)
        other = Model(chain)
        bms.load(other, file)
        same = [p.name for p, q in zip(model.get_parameters(), other.get_parameters()) if np.array_equal(p.asnumpy(), q.asnumpy())]
        assert same == [p.name for p in model.get_parameters()]
        summary = bms.inspect.inspect_model(model, "*")
        return [steps, [(row["name"], round(row["std"], 5), round(row["grad_std"], 5)) for row in summary]]


def test_overflows_files_and_inspection(run_ranks: Run, tmp_path: Any):
    ((right, summary),) = run_ranks(1, halves, chain=Chain(), file=str(tmp_path / "one.safetensors"))
    for i, answer in enumerate(run_ranks(4, halves, chain=Chain(pp=2, dp=2), file=str(tmp_path / "four.safetensors"))):
        steps, rows = answer
        assert [step[0] for step in steps] == [True, False, True] == [step[0] for step in right], i
        np.testing.assert_allclose([s[1] for s in steps[::2]], [s[1] for s in right[::2]], rtol=1e-3)
        assert [s[2] for s in steps] == [s[2] for s in right]
        assert sorted(row[0] for row in rows) == sorted(row[0] for row in summary)
    one, four = (load_file(tmp_path / name) for name in ("one.safetensors", "four.safetensors"))
    assert sorted(one) == sorted(four)
    for name, values in one.items():
        np.testing.assert_allclose(four[name], values, atol=1e-4, err_msg=name)
