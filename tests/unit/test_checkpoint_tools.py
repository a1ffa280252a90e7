"""`bmtrain-ms ckpt`: what it prints, what it writes, exit codes, and errors as one line."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from safetensors.numpy import load_file, save_file

import bmtrain_ms as bms
from bmtrain_ms.checkpoint import Checkpointer, CheckpointError, LoadResult, tools
from bmtrain_ms.checkpoint import folder as folder_module
from bmtrain_ms.checkpoint.index import INDEX, file_name, read_index
from bmtrain_ms.checkpoint.sharded import ShardedReader
from bmtrain_ms.optim import AdamOptimizer, OptimManager
from bmtrain_ms_cli.main import main
from tests.helpers.checkpoints import Run, equal

pytestmark = pytest.mark.usefixtures("single_world")


@pytest.fixture
def run(single_world: Any, tmp_path: Path) -> Run:
    """Saved after two steps in `tmp_path/run`."""
    made = Run(single_world, str(tmp_path / "run"))
    made.train(range(2))
    made.save(2, {"epoch": 1})
    made.close()
    return made


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Any:
    """`ckpt(*words)`: exit code, stdout; an error is one line."""

    def call(*words: Any) -> tuple[int, str]:
        code = main(["ckpt", *map(str, words)])
        out, err = capsys.readouterr()
        if code != 2:
            return code, out
        lines = [line for line in err.splitlines() if "B/s]" not in line and line.strip()]  # a progress bar that stopped
        assert out == "" and len(lines) == 1 and lines[0].startswith("bmtrain-ms: "), err
        return code, lines[0].removeprefix("bmtrain-ms: ")

    return call


def flip(path: Path) -> None:
    """The last byte."""
    content = path.read_bytes()
    path.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))


def parameters(run: Run) -> dict[str, np.ndarray]:
    return {name: x for name, x in run.everything().items() if " " not in name}


def total(run: Run) -> int:
    return sum(x.nbytes for x in parameters(run).values())


# Looking #


def test_inspect(run, ckpt, tmp_path):
    """A checkpoint, or the latest of a folder."""
    code, text = ckpt("inspect", tmp_path / "run")
    assert code == 0 and ckpt("inspect", tmp_path / "run" / "step-00000002") == (0, text)
    lines = text.splitlines()
    assert lines[0] == f"{tmp_path}/run/step-00000002: sharded checkpoint of step 2, written by 1 rank(s)"
    assert lines[1].startswith("versions: ") and "mindspore" in lines[1] and lines[2] == "extra: {'epoch': 1}"
    (weight,) = [line for line in lines if line.startswith("head.weight ")]
    assert weight.split() == ["head.weight", "Float32", "(11,", "7)", "308", "B"]
    count = len(parameters(run))
    assert lines[-2] == f"model: {count} tensors, {total(run) / 1024:.2f} KiB"
    assert lines[-1] == f"in all: {3 * count} tensors, {3 * total(run) / 1024:.2f} KiB"
    assert len(lines) == 3 + 3 * count + 2


def test_inspect_whole_tensors(run, ckpt, tmp_path):
    bms.save(run.model, tmp_path / "file")
    code, text = ckpt("inspect", tmp_path / "file")
    assert code == 0 and text.startswith(f"{tmp_path}/file: safetensors, whole tensors\n")
    assert f"in all: {len(parameters(run))} tensors, {total(run) / 1024:.2f} KiB" in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 19, "1.50 MiB"), (5 << 30, "5.00 GiB"), (3 << 40, "3072.00 GiB")],
)
def test_sizes_are_readable(nbytes, text):
    assert tools._size(nbytes) == text


def test_verify(run, ckpt, tmp_path):
    """One bit is enough; whole tensors have no hashes."""
    path = tmp_path / "run" / "step-00000002"
    code, text = ckpt("verify", tmp_path / "run")
    assert code == 0 and text == f"{path} is sound: {3 * total(run) / 1024:.2f} KiB in 1 file(s), every hash is right\n"
    flip(path / file_name(0, 1))
    code, text = ckpt("verify", tmp_path / "run")
    assert code == 2 and text.startswith(f"{path / file_name(0, 1)}: tensor ") and "is damaged (bytes 0 to " in text
    bms.save(run.model, tmp_path / "file")
    code, text = ckpt("verify", tmp_path / "file")
    assert code == 0 and "It has no hashes: a changed value cannot be seen" in text
    os.truncate(tmp_path / "file", 100)
    assert ckpt("verify", tmp_path / "file")[0] == 2


@pytest.mark.parametrize("action", ["inspect", "verify", "diff", "consolidate", "reshard"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("nothing", "does not exist"),
        ("empty", "has neither model.safetensors nor"),
        ("garbage", "is 3 bytes long"),
        ("pipe", "is not a file"),
    ],
)
def test_what_is_no_checkpoint(run, ckpt, tmp_path, action, kind, text):
    path = tmp_path / "path"
    if kind == "empty":
        path.mkdir()
    elif kind == "garbage":
        path.write_text("abc")
    elif kind == "pipe":
        os.mkfifo(path)
    words = {"diff": [tmp_path / "run"], "consolidate": [tmp_path / "out"], "reshard": [tmp_path / "out", "--ranks", 2]}
    code, said = ckpt(action, path, *words.get(action, []))
    assert code == 2 and said.startswith(f"{path} {text}") and not (tmp_path / "out").exists()


# Consolidating #


@pytest.mark.parametrize(("size", "files"), [("5GB", 1), ("700", 3)])
def test_consolidate(run, single_world, ckpt, tmp_path, size, files):
    out = tmp_path / "new" / "out"
    code, text = ckpt("consolidate", tmp_path / "run", out, "--max-shard-size", size)
    written = sorted(path for path in out.iterdir() if path.suffix == ".safetensors")
    assert code == 0 and text.split() == [str(path) for path in written] and len(written) == files
    loaded = {name: x for path in written for name, x in load_file(path).items()}
    assert equal(loaded, parameters(run))
    other = Run(single_world, str(tmp_path / "other"))
    other.train(range(5, 6))
    bms.load(other.model, out)
    assert equal(parameters(other), parameters(run))
    if files > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": total(run)} and set(index["weight_map"]) == set(loaded)


def test_consolidate_everything(run, ckpt, tmp_path):
    assert ckpt("consolidate", tmp_path / "run", tmp_path / "out", "--everything")[0] == 0
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(read_index(tmp_path / "run" / "step-00000002").tensors)


def test_consolidate_over_an_earlier_one(run, ckpt, tmp_path):
    """Whose files do not count any more."""
    for step, size in enumerate(("300", "5GB", "700"), 3):
        run.train(range(step, step + 1))
        run.save(step)
        assert ckpt("consolidate", tmp_path / "run", tmp_path / "out", "--max-shard-size", size)[0] == 0
        expected = parameters(run)
        run.train(range(9, 10))
        bms.load(run.model, tmp_path / "out")
        assert equal(parameters(run), expected)
    run.close()


def test_consolidate_refuses(run, ckpt, tmp_path):
    """A size that is none; a damaged checkpoint, of which nothing is left; a place that cannot be."""
    code, text = ckpt("consolidate", tmp_path / "run", tmp_path / "out", "--max-shard-size", "5 apples")
    assert code == 2 and text == "max_shard_size must be a number of bytes, or like 5GB or 200MiB, not '5 apples'"
    (tmp_path / "file").touch()
    code, text = ckpt("consolidate", tmp_path / "run", tmp_path / "file" / "out")
    assert code == 2 and text.startswith(f"{tmp_path}/file/out cannot be written: ")
    flip(tmp_path / "run" / "step-00000002" / file_name(0, 1))
    code, text = ckpt("consolidate", tmp_path / "run", tmp_path / "out", "--everything")
    assert code == 2 and "is damaged" in text and os.listdir(tmp_path / "out") == []


# Resharding #


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_reshard(run, single_world, ckpt, tmp_path, ranks):
    target = tmp_path / "new" / "out"
    assert ckpt("reshard", tmp_path / "run", target, "--ranks", ranks) == (0, f"{target}\n")
    assert sorted(os.listdir(target)) == [INDEX, *(file_name(rank, ranks) for rank in range(ranks))]
    assert os.listdir(tmp_path / "new") == ["out"]
    assert ckpt("verify", target)[0] == 0 and ckpt("diff", tmp_path / "run", target) == (0, "no difference\n")
    other = Run(single_world, str(tmp_path / "other"))
    other.train(range(5, 6))
    assert other.load(target).extra == {"epoch": 1}
    assert equal(other.everything(), run.everything()) and other.counters() == run.counters()
    assert ckpt("reshard", target, tmp_path / "back", "--ranks", 1)[0] == 0
    assert ckpt("diff", tmp_path / "run", tmp_path / "back")[0] == ckpt("verify", tmp_path / "back")[0] == 0


def test_reshard_refuses(run, ckpt, tmp_path):
    """What exists, what is not sharded, what is damaged; nothing is left."""
    (tmp_path / "there").mkdir()
    assert ckpt("reshard", tmp_path / "run", tmp_path / "there", "--ranks", 2) == (
        2,
        f"{tmp_path}/there exists; choose another name",
    )
    bms.save(run.model, tmp_path / "file")
    code, text = ckpt("reshard", tmp_path / "file", tmp_path / "out", "--ranks", 2)
    assert code == 2 and text == f"{tmp_path}/file is not a sharded checkpoint; it can be loaded at any number of ranks as it is"
    flip(tmp_path / "run" / "step-00000002" / file_name(0, 1))
    before = sorted(os.listdir(tmp_path))
    code, text = ckpt("reshard", tmp_path / "run", tmp_path / "out", "--ranks", 2)
    assert code == 2 and "is damaged" in text and sorted(os.listdir(tmp_path)) == before
    code, text = ckpt("reshard", tmp_path / "run", tmp_path / "out", "--ranks", 100000)
    assert code == 2 and text == "ranks must be from 1 to 99999, not 100000"
    with pytest.raises(SystemExit):
        main(["ckpt", "reshard", "a", "b", "--ranks", "0"])
    with pytest.raises(ValueError, match="ranks must be from 1 to 99999, not 0"):
        tools.reshard(tmp_path / "run", tmp_path / "out", 0)


def test_consolidate_over_what_it_reads(run, ckpt, tmp_path):
    """It would be gone if the disk were full."""
    ckpt("consolidate", tmp_path / "run", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for source in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        code, text = ckpt("consolidate", source, tmp_path / "model")
        assert code == 2 and text.startswith(f"{tmp_path}/model is where {tmp_path}/model")
        assert text.endswith(" is read from; choose another folder")
    code, text = ckpt("consolidate", tmp_path / "run", tmp_path / "run" / "step-00000002")
    assert code == 2 and "is read from; choose another folder" in text
    flip(tmp_path / "run" / "step-00000002" / file_name(0, 1))
    for options in ([], ["--max-shard-size", "200"]):
        assert ckpt("consolidate", "--everything", tmp_path / "run", tmp_path / "model", *options)[0] == 2
    assert os.listdir(tmp_path / "model") == ["model.safetensors"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_parameters_that_are_called_as_a_state(ckpt, single_world, tmp_path):
    """They are the model's; and a name can be one thing only."""
    model = bms.DistributedModule()
    for name in ("optimizer", "gradient", "other"):
        child = bms.DistributedModule()
        child.weight = bms.DistributedParameter(np.full(4, len(name), np.float32))
        setattr(model, name, child)
    manager = OptimManager()
    manager.add_optimizer(AdamOptimizer(model.trainable_params()))
    checkpoints = Checkpointer(tmp_path / "run", model, manager)
    manager.backward(lambda: sum((child.weight * 2.0).sum() for child in (model.optimizer, model.gradient, model.other)))
    checkpoints.save(1)  # with gradients
    assert ckpt("consolidate", tmp_path / "run", tmp_path / "out")[0] == 0
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert set(whole) == {"optimizer.weight", "gradient.weight", "other.weight"}
    manager.zero_grad()
    assert checkpoints.load().result == LoadResult([], []) and len(manager.gradients()) == 3
    model.other.parameter("weight").name = "optimizer.0.exp_avg.gradient.weight"
    with pytest.raises(CheckpointError, match=r"a parameter of the model is called optimizer\.0\.exp_avg\.grad"):
        checkpoints.save(2)
    checkpoints.close()


class Mixed(bms.DistributedModule):
    """With a plain parameter, which is the same on all ranks."""

    def __init__(self):
        super().__init__()
        self.weight = bms.DistributedParameter(bms.empty(6), init_method=bms.ParameterInitializer(bms.init.normal_))
        self.plain = Parameter(Tensor(np.arange(4, dtype=np.float32)), name="plain")


def test_every_copy_is_verified(single_world, ckpt, tmp_path):
    """What is the same on all ranks is in every file of a resharded checkpoint, which hosts may divide."""
    model, manager = Mixed(), bms.optim.OptimManager()
    bms.init_parameters(model)
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params()))
    checkpoints = Checkpointer(tmp_path / "mixed", model, manager)
    checkpoints.save(1)
    checkpoints.close()
    out = tools.reshard(tmp_path / "mixed", tmp_path / "out", 2)
    with ShardedReader(out) as reader:
        name = next(n for n, t in reader.index.tensors.items() if t.shard is None and t.count)
        second, infos = reader._files[1]
        stored, at = reader.stored, infos[name].start
        assert stored == sum(reader.verify()) > sum(t.count * t.itemsize for t in reader.index.tensors.values())
    data = bytearray(Path(second.path).read_bytes())
    data[at] ^= 1
    Path(second.path).write_bytes(data)
    code, text = ckpt("verify", out)
    assert code == 2 and f"{second.path}: tensor {name} is damaged" in text


def test_reshard_reaches_the_disk(run, tmp_path, monkeypatch):
    """Files, the index and their folder before the name; then the name."""
    fsync, replace, done = os.fsync, os.replace, []
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"{b} named"), replace(a, b))[1])
    tools.reshard(tmp_path / "run", tmp_path / "out", 2)
    named = done.index(f"{tmp_path}/out named")
    assert done[named + 1 :] == [str(tmp_path)]
    temporary = Path(done[named - 1])
    assert temporary.parent == tmp_path and done[named - 2] == str(temporary / INDEX)
    assert sum(".safetensors" in name and "named" not in name for name in done[:named]) == 2


# Differences #


def test_diff(run, ckpt, tmp_path):
    """Names, shapes, types, values."""
    base = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float32), "c": np.zeros(2, np.float16)}
    save_file(base, tmp_path / "base")
    assert ckpt("diff", tmp_path / "base", tmp_path / "base") == (0, "no difference\n")
    changed = {"a": np.array([0, 1, 2.5, 3, 4, 7], np.float32), "b": np.ones((3, 2), np.float32), "d": np.zeros(1, np.int8)}
    save_file({**changed, "c": np.zeros(2, np.float32)}, tmp_path / "other")
    code, text = ckpt("diff", tmp_path / "base", tmp_path / "other")
    assert code == 1 and text.splitlines() == [
        f"+ d: only in {tmp_path}/other",
        "! a: 2 of 6 elements differ, by at most 2",
        "! b: Float32 (2, 3) against Float32 (3, 2)",
        "! c: Float16 (2,) against Float32 (2,)",
    ]
    code, text = ckpt("diff", tmp_path / "other", tmp_path / "base")
    assert code == 1 and text.splitlines()[0] == f"- d: only in {tmp_path}/other"


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs", "text"),
    [
        ("int64", [2**53 + 1, 5], [2**53, 5], "1 of 2 elements differ, by at most 1"),
        ("int64", [-(2**63), 0], [2**63 - 1, 1], "2 of 2 elements differ, by at most 1.84467e+19"),
        ("int8", [-128, 3], [127, 3], "1 of 2 elements differ, by at most 255"),
        ("uint8", [0, 200], [1, 100], "2 of 2 elements differ, by at most 100"),
        ("bool", [True, False], [True, True], "1 of 2 elements differ, by at most 1"),
        ("float16", [1.0, 2.0], [1.0, 2.5], "1 of 2 elements differ, by at most 0.5"),
        ("float32", [0.0, 1.0], [-0.0, 1.0], "1 of 2 elements differ, by at most 0"),
        ("float32", [math.nan, 1.0], [math.nan, 1.0], None),
        ("float32", [math.nan, 1.0], [2.0, 1.0], "1 of 2 elements differ, by at most 0"),
        ("float32", [math.inf, 1.0], [math.inf, 1.5], "1 of 2 elements differ, by at most 0.5"),
        ("float64", [1e308, 0.0], [-1e308, 0.0], "1 of 2 elements differ, by at most inf"),
        ("float64", [1.0, 1.0], [1.0, math.nextafter(1.0, 2.0)], "1 of 2 elements differ, by at most 2.22045e-16"),
    ],
)
def test_values_are_compared_bit_by_bit(ckpt, tmp_path, dtype, ours, theirs, text):
    for name, values in (("a", ours), ("b", theirs)):
        save_file({"x": np.array(values, dtype)}, tmp_path / name)
    code, said = ckpt("diff", tmp_path / "a", tmp_path / "b")
    assert (code, said) == ((0, "no difference\n") if text is None else (1, f"! x: {text}\n"))


def test_diff_takes_little_memory(tmp_path):
    """Also of the smallest types, whose elements are many."""
    ours, theirs = np.zeros(40 << 20, np.uint8), np.ones(40 << 20, np.uint8)
    save_file({"x": ours}, tmp_path / "a")
    save_file({"x": theirs}, tmp_path / "b")
    del ours, theirs
    tracemalloc.start()
    lines = tools.diff(tmp_path / "a", tmp_path / "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [f"! x: {40 << 20} of {40 << 20} elements differ, by at most 1"]
    assert peak < 6 * tools.STEP  # two pieces, and the two before


def test_diff_of_a_run(run, ckpt, tmp_path):
    """With its own checkpoint, and with the next step's."""
    run.train(range(2, 3))
    run.save(3)
    run.close()
    second, third = (tmp_path / "run" / f"step-0000000{step}" for step in (2, 3))
    assert ckpt("diff", tmp_path / "run", third) == (0, "no difference\n")
    code, text = ckpt("diff", second, third)
    with ShardedReader(second) as reader:
        assert code == 1 and len(text.splitlines()) == len(reader.index.tensors)
    assert all(line.startswith("! ") and "elements differ, by at most " in line for line in text.splitlines())


def test_the_latest_is_what_the_pointer_says(run, ckpt, tmp_path):
    run.save(3)
    run.close()
    assert "of step 3, " in ckpt("inspect", tmp_path / "run")[1]
    folder_module.point_to(tmp_path / "run", "step-00000002")
    assert "of step 2, " in ckpt("inspect", tmp_path / "run")[1]
    assert "of step 2, " in ckpt("inspect", tmp_path / "run" / "latest")[1]


def test_the_folder_of_a_run_is_that_of_its_checkpoints(run, ckpt, single_world, tmp_path):
    run.close()
    out = tmp_path / "out"
    out.mkdir()
    assert ckpt("inspect", out)[1].startswith(f"{out} has neither model.safetensors nor ")
    (tmp_path / "run").rename(out / "checkpoints")
    assert ckpt("inspect", out) == ckpt("inspect", out / "checkpoints")
    bms.save(run.model, out / "model.safetensors")  # as the demo's
    assert ckpt("inspect", out)[1].startswith(f"{out}: safetensors")
    bms.save(run.model, out / "latest")  # a name as any other where no checkpoints are
    assert ckpt("inspect", out / "latest")[1].startswith(f"{out / 'latest'}: safetensors")
