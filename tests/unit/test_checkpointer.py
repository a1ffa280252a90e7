"""Checkpointer at one rank: what is refused changes nothing, what fails is told and leaves the last checkpoint, old files load."""

from __future__ import annotations

import json
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, CheckpointError, LoadResult, load_training, tools
from bmtrain_ms.checkpoint.index import INDEX, _checksum
from bmtrain_ms.comm import use_world
from bmtrain_ms.comm.launch import Launch
from bmtrain_ms.lr_scheduler import Linear
from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms.zero import context_of
from tests.helpers.checkpoints import Layout, Run, equal
from tests.helpers.models import Model, data
from tests.helpers.ranks import ROOT
from tests.helpers.training_v1 import save_training

pytestmark = pytest.mark.usefixtures("single_world")

V2 = ROOT / "tests" / "data" / "sharded-v2"
V1 = ROOT / "tests" / "data" / "training-v1.safetensors"
WORDS = [3, [*range(624), 624], None]  # of Python's generator


def everything(run: Run) -> Any:
    """What a load may change."""
    numpy = np.random.get_state()
    tensors = {name: x.tobytes() for name, x in run.everything().items()}
    gradients = {name: x.asnumpy().tobytes() for name, (_, x) in run.manager.gradients().items()}
    clock, kept = run.world.engine.clock.step, (numpy[1].tobytes(), numpy[2:])
    return tensors, gradients, run.counters(), clock, random.getstate(), kept


def refused(run: Run, text: str, *args: Any, **kwargs: Any) -> str:
    """With everything as it was."""
    before = everything(run)
    with pytest.raises(CheckpointError, match=text) as info:
        run.load(*args, **kwargs)
    assert everything(run) == before
    return str(info.value)


def saved(world: Any, folder: Path, layout: Layout | None = None, steps: int = 2, **options: Any) -> Run:
    """A run that has saved after so many steps."""
    run = Run(world, str(folder), layout, **options)
    run.train(range(steps))
    run.save(steps, {"epoch": 1})
    run.close()
    return run


def lie(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the state in an index, with the right checksum."""
    raw = json.loads((checkpoint / INDEX).read_text())
    del raw["checksum"]
    change(raw["state"])
    (checkpoint / INDEX).write_text(json.dumps({**raw, "checksum": _checksum(raw)}))


# Refused, and nothing is changed #

ODD_STATES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    *((f"its state has no '{name}'", lambda s, n=name: s.pop(n)) for name in ("seed", "extra", "clock", "manager")),
    ("its seed is '5'", lambda s: s.update(seed="5")),
    ("its extra is 3, not an object", lambda s: s.update(extra=3)),
    ("its clock is -1", lambda s: s.update(clock=-1)),
    ("its clock is 2.5", lambda s: s.update(clock=2.5)),
    ("its clock is nan", lambda s: s.update(clock=float("nan"))),
    (f"its clock is {2**63}", lambda s: s.update(clock=2**63)),
    ("its step is None", lambda s: s.update(step=None)),
    ("its number of draws is 'x'", lambda s: s.update(draws="x")),
    ("its draw_step is -1", lambda s: s.update(draw_step=-1)),
    ("", lambda s: s.update(manager=None)),
    ("", lambda s: s.update(manager=[])),
    ("OptimManager: optimizers is missing, or wrong", lambda s: s["manager"].pop("optimizers")),
    ("2 optimizers", lambda s: s["manager"].update(optimizers=s["manager"]["optimizers"] * 2)),
    ("", lambda s: s["manager"].update(optimizers=None)),
    ("OptimManager: loss_scale is missing, or wrong", lambda s: s["manager"].pop("loss_scale")),
    ("", lambda s: s["manager"].update(loss_scale=[1])),
    ("schedule", lambda s: s["manager"].update(lr_schedulers=[None])),
    ("", lambda s: s.update(generators=3)),
    ("", lambda s: s.update(generators=[])),
    ("", lambda s: s.update(generators=[3])),
    ("its state has no 'numpy'", lambda s: s.update(generators=[{"python": WORDS}])),
    ("", lambda s: s["generators"][0].update(python=[3, [1, 2], None])),
    ("", lambda s: s["generators"][0].update(python=[3, [2**70] * 625, None])),
    ("", lambda s: s["generators"][0].update(python="abc")),
    ("", lambda s: s["generators"][0]["numpy"].__setitem__(0, "PCG64")),
    ("", lambda s: s["generators"][0]["numpy"].__setitem__(1, [1, 2])),
    ("NumPy's generator is at 700 of 624 words", lambda s: s["generators"][0]["numpy"].__setitem__(2, 700)),
    ("NumPy's generator is at -1 of 624 words", lambda s: s["generators"][0]["numpy"].__setitem__(2, -1)),
]


def test_states_that_cannot_be(single_world, tmp_path):
    """Each of them with the right checksum: the tensors stay too."""
    saved(single_world, tmp_path)
    run, checkpoint = Run(single_world, str(tmp_path)), tmp_path / "step-00000002"
    run.train(range(5, 6))
    run.manager.zero_grad()
    run.backward(7)  # a gradient that waits
    index = (checkpoint / INDEX).read_text()
    for text, change in ODD_STATES:
        lie(checkpoint, change)
        for strict in (True, False):
            refused(run, f"^{checkpoint} cannot be loaded: .*{text}", strict=strict)
        (checkpoint / INDEX).write_text(index)
    assert run.load().extra == {"epoch": 1}
    assert not run.manager.gradients()


def test_another_model(single_world, tmp_path):
    """The difference is readable; without `strict` the names are returned, and what fits is taken."""
    small = saved(single_world, tmp_path)
    other = Run(single_world, str(tmp_path), dropout=0.1)
    other.manager.parameters_by_name()["layers.0.a.weight"].name = "layers.0.a.wait"
    other.train(range(1))
    text = refused(other, r"step-00000002 does not fit the model; 3 missing in the file: layers\.0\.a\.wait \(did you mean ")
    assert "did you mean layers.0.a.weight?)" in text and "; 3 unexpected in the file: layers.0.a.weight, optimizer" in text
    kept = other.everything()
    resumed = other.load(strict=False)
    names = ["{}", "optimizer.0.exp_avg.{}", "optimizer.0.exp_avg_sq.{}"]
    assert sorted(resumed.result.missing) == sorted(name.format("layers.0.a.wait") for name in names)
    assert sorted(resumed.result.unexpected) == sorted(name.format("layers.0.a.weight") for name in names)
    after, expected = other.everything(), small.everything()
    for name, x in after.items():
        assert x.tobytes() == (kept if "wait" in name else expected)[name].tobytes(), name
    [theirs], [mine] = (run.counters()["optimizers"] for run in (small, other))
    steps = dict(zip(mine["groups"][0].pop("names"), mine["steps"]))
    theirs["groups"][0].pop("names")
    assert resumed.step == 2 and steps.pop("layers.0.a.wait") == 1 and set(steps.values()) == {2}
    assert mine["groups"] == theirs["groups"]


@pytest.mark.parametrize("sharded", [True, False])
def test_another_number_of_trained_parameters(single_world, tmp_path, sharded):
    """A layer is frozen, or thawed, between two runs: only without `strict`."""
    whole, frozen = Run(single_world, str(tmp_path / "whole")), Run(single_world, str(tmp_path / "frozen"))
    for p in frozen.model.layers[0].get_parameters():
        p.requires_grad = False
    optimizer = AdamOptimizer(frozen.model.trainable_params())
    frozen.manager = OptimManager()
    frozen.manager.add_optimizer(optimizer, Linear(optimizer, 0.02, 2, 12))
    frozen.checkpoints = Checkpointer(tmp_path / "frozen", frozen.model, frozen.manager)
    own = [f"optimizer.0.{kind}.{p.name}" for p in frozen.model.layers[0].get_parameters() for kind in ("exp_avg", "exp_avg_sq")]
    for run in (whole, frozen):
        run.manager.zero_grad()
        run.backward(0)
        run.manager.step()
        with use_world(run.world):
            if sharded:
                run.save(1)
            else:
                save_training(run.checkpoints.folder.with_suffix(".safetensors"), run.model, run.manager, {})
    suffix = "" if sharded else ".safetensors"
    for run, source, direction in ((frozen, "whole", "unexpected"), (whole, "frozen", "missing")):
        path = str(tmp_path / source) + suffix
        refused(run, rf"does not fit the model; {len(own)} {direction} in the file: ", path)
        result = run.load(path, strict=False).result
        assert sorted(getattr(result, direction)) == sorted(own), direction
        assert run.manager.state_dict(tensors=False)["optimizers"][0]["steps"] == [1] * len(run.manager.drivers[0].parameters)


def test_other_shapes_are_refused_even_if_not_strict(single_world, tmp_path):
    saved(single_world, tmp_path)
    run, checkpoint = Run(single_world, str(tmp_path)), tmp_path / "step-00000002"
    raw = json.loads((checkpoint / INDEX).read_text())
    del raw["checksum"]
    raw["tensors"]["head.weight"]["shape"] = [7, 11]
    (checkpoint / INDEX).write_text(json.dumps({**raw, "checksum": _checksum(raw)}))
    for strict in (True, False):
        refused(run, r"1 shapes differ: head\.weight: \(7, 11\) in the file, \(11, 7\) here", strict=strict)


def test_another_seed(single_world, tmp_path):
    before = saved(single_world, tmp_path)
    run = Run(single_world, str(tmp_path))
    run.checkpoints._world = replace(run.world, seed=6)
    text = r"was saved by a run with seed 5, this one has seed 6: dropout would differ; use init_distributed\(seed=5\), or load"
    refused(run, rf"{tmp_path}/step-00000002 {text} with strict=False")
    assert run.load(strict=False).result == LoadResult([], [])
    assert equal(run.everything(), before.everything()) and run.checkpoints._world.seed == 6


def test_another_number_of_ranks_per_host(single_world, tmp_path):
    """Without shared storage: said before files are missed."""
    saved(single_world, tmp_path, shared_storage=False)
    for local_size in (1, 2):
        run = Run(single_world, str(tmp_path), launch=Launch("mpi", 0, 1, 0, local_size), shared_storage=False)
        if local_size == 1:
            assert run.load().step == 2
        else:
            text = r"resumed by the layout that wrote it: ranks per host \[1\], not \[2\]; bring its files to one folder and"
            refused(run, f"without shared storage a checkpoint is {text}")
    assert Run(single_world, str(tmp_path), launch=Launch("mpi", 0, 1, 0, 2)).load().step == 2


def test_a_resharded_checkpoint_has_no_layout_yet(single_world, tmp_path):
    """Any hosts may have its files: without shared storage too."""
    saved(single_world, tmp_path / "a", shared_storage=False)
    tools.reshard(tmp_path / "a", tmp_path / "b" / "step-00000002", 1)
    for local_size in (1, 2):
        launch = Launch("mpi", 0, 1, 0, local_size)
        assert Run(single_world, str(tmp_path / "b"), launch=launch, shared_storage=False).load().step == 2


def test_random_numbers_go_on(single_world, tmp_path):
    """Python's, NumPy's with the half of a pair of normal numbers that is kept, and those of dropout within a step."""
    run = Run(single_world, str(tmp_path), dropout=0.5)

    def drawn() -> Any:
        keys = context_of(run.world).draws.next_key().tolist()
        return random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(3).tolist(), keys

    drawn()  # there are kept halves now
    run.save(4)
    run.close()
    expected = drawn()
    assert drawn() != expected
    run.load()
    assert drawn() == expected


# Files of save_training #


def spoiled(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the training state in a file's header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    state = json.loads(header["__metadata__"]["bmtrain_ms"])
    changed = change(state)
    header["__metadata__"]["bmtrain_ms"] = changed if isinstance(changed, str) else json.dumps(state)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


ODD_FILES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("is damaged: its training state is not JSON: ", lambda s: "{"),
    ("is damaged: its training state is not JSON: ", lambda s: ""),
    ("is damaged: its training state is not JSON: ", lambda s: "[" * 100_000),
    ("is damaged: its training state has the version None", lambda s: "[]"),
    ("is damaged: its training state has the version None", lambda s: s.pop("version") and None),
    ("is damaged: its training state has the version '1'", lambda s: s.update(version="1")),
    ("is damaged: its training state has the version 0", lambda s: s.update(version=0)),
    ("is damaged: its training state has the version True", lambda s: s.update(version=True)),
    ("is damaged: its training state has the version nan", lambda s: s.update(version=float("nan"))),
    ("has format version 2, this bmtrain_ms reads up to 1; upgrade", lambda s: s.update(version=2)),
    *(
        (f"cannot be loaded: its state has no '{name}'", lambda s, n=name: bool(s.pop(n)) and None)
        for name in ("seed", "clock", "manager", "extra")
    ),
    ("cannot be loaded: its clock is '3'", lambda s: s.update(clock="3")),
    ("cannot be loaded: its extra is", lambda s: s.update(extra=[1])),
    ("cannot be loaded: its step is 'x'", lambda s: s.update(extra={"step": "x"})),
    ("cannot be loaded: ", lambda s: s.update(manager=3)),
    (
        "cannot be loaded: this is not the state of an OptimManager: optimizers is missing, or wrong",
        lambda s: bool(s["manager"].pop("optimizers")) and None,
    ),
    ("was saved by a run with seed 4, this one has seed 5: dropout would differ", lambda s: s.update(seed=4)),
]


def test_training_files_that_cannot_be(single_world, tmp_path):
    before, run = Run(single_world, str(tmp_path / "a")), Run(single_world, str(tmp_path / "b"))
    before.train(range(2))
    with use_world(before.world):
        save_training(tmp_path / "good", before.model, before.manager, {"step": 2})
    run.train(range(5, 6))
    for text, change in ODD_FILES:
        shutil.copy(tmp_path / "good", tmp_path / "file")
        spoiled(tmp_path / "file", change)
        refused(run, f"^{tmp_path}/file {text}", tmp_path / "file")
    assert "seed 4" in ODD_FILES[-1][0] and run.load(tmp_path / "file", strict=False).step == 2
    assert equal(run.everything(), before.everything())


def test_a_training_file_of_another_model(single_world, tmp_path):
    """Not strict: through the Checkpointer the names come back."""
    before = Run(single_world, str(tmp_path / "a"))
    with use_world(before.world):
        save_training(tmp_path / "file", before.model, before.manager, {})
    run = Run(single_world, str(tmp_path / "b"))
    run.manager.parameters_by_name()["head.weight"].name = "head.other"
    refused(run, r"3 missing in the file: head\.other", tmp_path / "file")
    result = run.load(tmp_path / "file", strict=False).result
    assert len(result.missing) == len(result.unexpected) == 3 and "head.other" in result.missing


class Old:
    """The model that wrote the file of version 1."""

    def __init__(self, folder: Path) -> None:
        bms.shutdown()
        bms.init_distributed(seed=3)
        self.model = Model(1, True, 3, ms.float32)
        bms.init_parameters(self.model)
        self.optimizer = AdamOptimizer(self.model.trainable_params(), weight_decay=0.01)
        self.manager = OptimManager(loss_scale=64.0)
        self.manager.add_optimizer(self.optimizer, Linear(self.optimizer, 1e-2, 2, 10))
        self.checkpoints = Checkpointer(folder, self.model, self.manager)

    def train(self, steps: range) -> list[bytes]:
        """Every parameter and moment after them."""
        for step in steps:
            x, y = data(step)
            self.manager.zero_grad()
            self.manager.backward(lambda a, b: cross_entropy(self.model(a), b), Tensor(x), Tensor(y))
            self.manager.step()
        return [x.asnumpy().tobytes() for p in self.optimizer.parameters for x in (p, *self.optimizer.state_of(p).values())]


def test_a_folder_of_version_2(tmp_path):
    """Kept from then on, written by two ranks: every tensor has the bits that are in the files, as another library reads them."""
    folder = V2 / "step-00000003"
    parts = [safetensors.numpy.load_file(folder / f"rank-0000{rank}-of-00002.safetensors") for rank in range(2)]
    expected = {name: np.concatenate([part[name] for part in parts if name in part]) for name in parts[0]}
    old = Old(tmp_path)
    old.train(range(8, 9))
    resumed = old.checkpoints.load(V2)
    assert (resumed.step, resumed.extra, resumed.result) == (3, {"position": 12}, LoadResult([], []))
    got = {p.name: p.asnumpy() for p in old.model.get_parameters()}
    got.update({f"optimizer.0.{name}": x.asnumpy() for name, (_, x) in old.optimizer.state_tensors().items()})
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].reshape(-1)[: x.size].tobytes() == x.tobytes(), name
    assert old.optimizer.state_dict(tensors=False)["steps"] == [3] * len(old.optimizer.parameters)
    assert old.manager.loss_scale == 64.0 and old.manager.lr_schedulers[0].num_iter == 3
    old.train(range(3, 4))


@pytest.mark.parametrize("how", ["Checkpointer", "load_training"])
def test_version_1(tmp_path, how):
    """The file is kept from then on: it loads, and training goes on as it would have."""
    expected = Old(tmp_path).train(range(7))
    old = Old(tmp_path)
    old.train(range(8, 9))
    old.manager.backward(lambda: (old.model.head.weight * 1.0).sum())  # waits, and is forgotten
    if how == "Checkpointer":
        resumed = old.checkpoints.load(V1)
        assert (resumed.step, resumed.extra, resumed.path, resumed.result) == (3, {"step": 3}, V1, LoadResult([], []))
    else:
        assert load_training(V1, old.model, old.manager) == {"step": 3}
    assert not old.manager.gradients() and old.manager.lr_schedulers[0].num_iter == 3
    for got, wanted in zip(old.train(range(3, 7)), expected):
        np.testing.assert_allclose(np.frombuffer(got, np.float32), np.frombuffer(wanted, np.float32), rtol=1e-5, atol=1e-7)
