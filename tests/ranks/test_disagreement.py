"""Ranks that do not do the same: every rank gets an error that names a rank and what differs, at once."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms.comm import Clock, CommError, Engine, Mesh, World, node, use_world
from bmtrain_ms.comm.mpi import MpiEngine
from bmtrain_ms.compat.runtime import from_host

pytestmark = pytest.mark.ranks

ODD = 1  # the rank that differs


class Layer(nn.Cell):
    """Parameters a (3, 5), b (5, 3) and c (5,), or what the case makes of them."""

    def __init__(self, case: str):
        super().__init__()
        shapes = {"a": (3, 5), "b": (5, 3), "c": (5,)}
        if case == "order":
            shapes = {"b": (5, 3), "a": (3, 5), "c": (5,)}
        if case == "list":
            del shapes["c"]
        if case == "longer list":
            shapes["d"] = (5,)
        if case == "shape":
            shapes["b"] = (15, 1)
        for name, shape in shapes.items():
            dtype = ms.float16 if case == "dtype" and name == "b" else ms.float32
            setattr(self, name, bms.DistributedParameter(bms.empty(*shape, dtype=dtype)))

    def construct(self, x: Tensor) -> Tensor:
        return x + self.a.sum()


class Model(nn.Cell):
    """Three blocks; with case `branch` the middle one is left out."""

    def __init__(self, case: str, use_checkpoint: bool):
        super().__init__()
        self.case = case
        self.layers = bms.TransformerBlockList(bms.Block(Layer(case), use_checkpoint) for _ in range(3))
        if case == "frozen":
            self.layers[1].b.requires_grad = False

    def construct(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.layers):
            if not (self.case == "branch" and i == 1):
                x = block(x)
        return x.sum()


def make_engine(kind: str) -> Engine:
    """One that may break."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    made = MpiEngine(comm, Clock(7), 30) if kind == "mpi" else node.connect(comm, Clock(7), 30)
    assert made is not None
    return made


def told(text: str, expected: Callable[[int, int], str], rank: int, size: int) -> bool:
    """Whether the text is the error of this rank, or was passed on by another, about any rank that differs from it."""
    for reporter in range(size):
        others = [ODD] if reporter != ODD else [r for r in range(size) if r != ODD]
        start = "" if reporter == rank else f"rank {reporter} failed: "
        if any(text == start + expected(reporter, peer) for peer in others):
            return True
    return False


def failure(world: Any, kind: str, case: str, use_checkpoint: bool) -> str:
    """The error of a training step."""
    engine = make_engine(kind)
    with use_world(dataclasses.replace(world, everyone=engine)):
        model = Model(case if engine.rank == ODD else "", use_checkpoint)
        model.check_names_and_refresh_name()
        x = from_host(np.ones(4, np.float32))
        with pytest.raises(CommError) as caught:
            ms.value_and_grad(lambda: model(x), None, model.trainable_params())()
            engine.barrier("end of the step").wait()
    engine.close()
    return str(caught.value)


SAME = "Every rank must issue the same operations in the same order: look for a branch that only some ranks take"
ALIKE = "The models must be built alike on every rank"
# case -> (operation and label, what the odd rank has, what the others have)
TEXTS = {
    "order": ("all_gather (layers.0)", "layers.0.b (5, 3) Float32", "layers.0.a (3, 5) Float32"),
    "shape": ("all_gather (layers.0)", "layers.0.b (15, 1) Float32", "layers.0.b (5, 3) Float32"),
    "dtype": ("all_gather (layers.0)", "layers.0.b (5, 3) Float16", "layers.0.b (5, 3) Float32"),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("kind", ["node", "mpi"])
def test_other_parameters(run_ranks: Callable, kind: str, case: str):
    what, odd, others = TEXTS[case]
    for rank, text in enumerate(run_ranks(3, failure, kind=kind, case=case, use_checkpoint=True)):

        def expected(rank: int, peer: int) -> str:
            theirs, mine = (odd, others) if rank != ODD else (others, odd)
            return f"{what} at step 7 on rank {rank} of 3: rank {peer} has {theirs} where this rank has {mine}. {ALIKE}"

        assert told(text, expected, rank, 3), text


@pytest.mark.parametrize("case, name", [("list", "layers.0.c"), ("longer list", "layers.0.d")])
@pytest.mark.parametrize("kind", ["node", "mpi"])
def test_another_number_of_parameters(run_ranks: Callable, kind: str, case: str, name: str):
    for rank, text in enumerate(run_ranks(3, failure, kind=kind, case=case, use_checkpoint=True)):

        def expected(rank: int, peer: int) -> str:
            owner = "this rank" if (rank == ODD) == (case == "longer list") else f"rank {peer}"
            return f"all_gather (layers.0) at step 7 on rank {rank} of 3: only {owner} has {name} (5,) Float32. {ALIKE}"

        assert told(text, expected, rank, 3), text


@pytest.mark.parametrize("use_checkpoint", [True, False])
@pytest.mark.parametrize("kind", ["node", "mpi"])
def test_a_branch_on_one_rank(run_ranks: Callable, kind: str, use_checkpoint: bool):
    results = run_ranks(3, failure, kind=kind, case="branch", use_checkpoint=use_checkpoint)
    for rank, text in enumerate(results):

        def expected(rank: int, peer: int) -> str:
            mine, theirs = ("layers.2", "layers.1") if rank == ODD else ("layers.1", "layers.2")
            start = f"all_gather ({mine}) at step 7 on rank {rank} of 3"
            return f"{start}: rank {peer} issued all_gather ({theirs}) instead. {SAME}"

        assert told(text, expected, rank, 3), text


@pytest.mark.parametrize("kind", ["node", "mpi"])
def test_frozen_on_one_rank(run_ranks: Callable, kind: str):
    for rank, text in enumerate(run_ranks(3, failure, kind=kind, case="frozen", use_checkpoint=True)):

        def expected(rank: int, peer: int) -> str:
            b, c = "layers.1.b (5, 3) Float32", "layers.1.c (5,) Float32"
            mine, theirs = (c, b) if rank == ODD else (b, c)
            start = f"reduce_scatter (layers.1) at step 7 on rank {rank} of 3"
            return f"{start}: rank {peer} has {theirs} where this rank has {mine}. {ALIKE}"

        assert told(text, expected, rank, 3), text


def different_calls(world: Any, kind: str) -> list[str]:
    """Errors of operations that do not fit together, each on an engine of its own."""
    texts = []
    x, y = from_host(np.ones(6, np.float32)), from_host(np.ones(6, np.float16))
    calls: list[tuple[Callable, Callable]] = [
        (lambda e: e.all_gather([x], label="a"), lambda e: e.all_gather([x], label="b")),
        (lambda e: e.all_reduce([x], "max"), lambda e: e.all_reduce([x], "min")),
        (lambda e: e.broadcast([x], 0), lambda e: e.broadcast([x], 1)),
        (lambda e: e.all_gather([x]), lambda e: e.reduce_scatter([x])),
        (lambda e: e.all_reduce([x]), lambda e: e.all_reduce([y])),
        (lambda e: e.barrier("x"), lambda e: e.all_to_all([x])),
    ]
    for usual, odd in calls:
        engine = make_engine(kind)
        with pytest.raises(CommError) as caught:
            (odd if engine.rank == ODD else usual)(engine).wait()
        texts.append(str(caught.value).replace(" at step 7 on rank", ""))
        with pytest.raises(CommError):
            engine.barrier("nothing more").wait()
        engine.close()
    return texts


@pytest.mark.parametrize("kind", ["node", "mpi"])
def test_operations_that_do_not_fit_together(run_ranks: Callable, kind: str):
    assert run_ranks(2, different_calls, kind=kind)[0] == [
        f"all_gather (a) 0 of 2: rank 1 issued all_gather (b) instead. {SAME}",
        f"all_reduce 0 of 2: rank 1 issued all_reduce min instead. {SAME}",
        f"broadcast 0 of 2: rank 1 issued broadcast from rank 1 instead. {SAME}",
        f"all_gather 0 of 2: rank 1 issued reduce_scatter sum instead. {SAME}",
        f"all_reduce 0 of 2: rank 1 has tensors of 6 float16 where this rank has tensors of 6 float32. {ALIKE}",
        f"barrier (x) 0 of 2: rank 1 issued all_to_all instead. {SAME}",
    ]


# The node engine in particular #


def message_of_another_size(world: Any) -> str:
    engine = make_engine("node")
    x = from_host(np.ones(6, np.float32))
    with pytest.raises(CommError) as caught:
        work = engine.send([x], 1) if engine.rank == 0 else engine.recv([x[:5]], 0)
        work.wait()
    engine.close()
    return str(caught.value)


def test_a_message_of_another_size(run_ranks: Callable):
    sent, received = run_ranks(2, message_of_another_size)
    text = "recv from rank 0 at step 7 on rank 1 of 2: rank 0 has tensors of 6 float32 where this rank has tensors of 5 float32"
    assert received == f"{text}. {ALIKE}"
    assert sent == f"rank 1 failed: {received}"


def one_leaves(world: Any) -> str:
    engine = make_engine("node")
    engine.all_gather([from_host(np.ones(6, np.float32))]).wait()
    if engine.rank == ODD:
        engine.close()
        return ""
    with pytest.raises(CommError) as caught:
        engine.barrier("without you").wait()
    engine.close()
    return str(caught.value)


def test_a_rank_that_has_left(run_ranks: Callable):
    assert run_ranks(2, one_leaves) == [
        "barrier (without you) at step 7 on rank 0 of 2 cannot finish: rank 1 has ended",
        "",
    ]


def flood(world: Any) -> None:
    """More posts than the sockets hold, in both directions, before anybody takes one."""
    engine = make_engine("node")
    inputs = [from_host(np.full(3, i, np.float32)) for i in range(5000)]
    works = [engine.all_reduce([x], label="a long label " * 10) for x in inputs]
    for i, work in enumerate(works):
        assert work.wait()[0].asnumpy().tolist() == [2.0 * i] * 3
    many = [from_host(np.full(2, i, np.float32)) for i in range(4000)]
    (gathered,) = engine.all_gather([ops.cat(many)]).wait()
    assert gathered.shape == (16000,)
    results = engine.all_gather(many).wait()
    assert [float(y.asnumpy()[-1]) for y in results] == list(range(4000))
    text = r"^all_gather \(all\) at step 7 on rank \d of 2: 9000 tensors are too many for one operation; pass at most 4096$"
    with pytest.raises(CommError, match=text):
        engine.all_gather([inputs[0]] * 9000, label="all")
    engine.close()


def test_many_operations_and_many_tensors(run_ranks: Callable):
    run_ranks(2, flood)


def decided(world: Any, kind: str, what: str) -> str:
    """The error of three steps, of which the odd rank makes the second by a decision of its own."""
    engine = make_engine(kind)
    with use_world(dataclasses.replace(world, everyone=engine)):
        model = Model("", use_checkpoint=True)
        model.check_names_and_refresh_name()
        manager, x = bms.optim.OptimManager(), from_host(np.ones(4, np.float32))
        optimizer = bms.optim.AdamOptimizer(model.trainable_params(), lr=0.5)
        manager.add_optimizer(optimizer)
        with pytest.raises(CommError) as caught:
            for step in range(3):
                manager.zero_grad()
                manager.backward(lambda: model(x))
                odd = step == 1 and engine.rank == ODD
                if what == "clip":
                    manager.clip_grad_norm(optimizer.param_groups, 0.25 if odd else 2.0)
                if what == "zero" and odd:
                    manager.zero_grad()
                if what in ("lr", "betas") and odd:
                    optimizer.param_groups[0][what] = 0.125 if what == "lr" else (0.5, 0.75)
                if what == "discard" and odd:
                    manager.discard_step()
                elif not (what == "left out" and odd):
                    manager.step()
    engine.close()
    return str(caught.value)


DECIDED = {  # what the odd rank and the others are said to be; {}: a digest of settings
    "left out": ("at step 8, after a step with rates 0.5 {}", "at step 9, after a step with rates 0.5 {}"),
    "clip": (
        "at step 9, after a step with rates 0.5, clipped to 0.25 {}",
        "at step 9, after a step with rates 0.5, clipped to 2 {}",
    ),
    "zero": ("at step 9, after a step with no gradients, rates 0.5 {}", "at step 9, after a step with rates 0.5 {}"),
    "lr": ("at step 9, after a step with rates 0.125 {}", "at step 9, after a step with rates 0.5 {}"),
    "betas": ("at step 9, after a step with rates 0.5 {}", "at step 9, after a step with rates 0.5 {}"),
    "discard": ("at step 9, after a step that was discarded", "at step 9, after a step with rates 0.5 {}"),
}


@pytest.mark.parametrize("what", DECIDED)
@pytest.mark.parametrize("kind", ["node", "mpi"])
def test_another_rule(run_ranks: Callable, kind: str, what: str):
    """Each rank updates its shards, so one model would be updated by two rules: noticed when it is gathered next."""
    odd, others = DECIDED[what]
    digests = set()
    for rank, text in enumerate(run_ranks(2, decided, kind=kind, what=what)):
        digests.update(re.findall(r"\(other settings: ([0-9a-f]{8})\)", text))
        text = re.sub(r"\(other settings: [0-9a-f]{8}\)", "{}", text)
        mine, theirs = (odd, others) if rank == ODD else (others, odd)
        assert f"rank {1 - rank} is {theirs}, and this rank {mine}: parameters would be updated by different rules" in text or (
            f"rank {rank} is {mine}, and this rank {theirs}" in text and text.startswith(f"rank {1 - rank} failed: ")
        ), text
    assert len(digests) == (2 if what == "betas" else 1)


def stages_first(world: World) -> np.ndarray:
    """A step of two stages with other rates; then a parameter that both ranks share, in another world of theirs."""
    rank = world.everyone.rank
    with use_world(World(world.everyone, Mesh(2, rank, pp=2))):
        p = bms.DistributedParameter(np.ones(3, np.float32), name="p")
        manager = bms.optim.OptimManager()
        manager.add_optimizer(bms.optim.AdamOptimizer([p], lr=0.5 + rank))
        manager.step()
    with use_world(World(world.everyone, Mesh(2, rank))):
        return bms.DistributedParameter(np.arange(5, dtype=np.float32), name="q").gather().asnumpy()


def test_stages_may_have_rules_of_their_own(run_ranks: Callable):
    for found in run_ranks(2, stages_first):
        np.testing.assert_array_equal(found, np.arange(5))
