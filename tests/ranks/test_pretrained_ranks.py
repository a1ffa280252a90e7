"""Folders of Hugging Face's on every layout: parameters are those of one rank, each reads its part, what is written is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from mindspore import Tensor

from bmtrain_ms.checkpoint import CheckpointError
from bmtrain_ms.comm import World, use_world
from bmtrain_ms.model_center import Spread, from_pretrained
from bmtrain_ms.model_center.pretrained import load_pretrained
from tests.helpers.checkpoints import counted_bytes
from tests.helpers.layouts import Case, parts, whole
from tests.helpers.pretrained import bits, make, values_of

Run = Callable[..., list[Any]]
IDS = np.arange(1, 8, dtype=np.int32)[None]


def there_and_back(world: World, case: Case, folder: Path, out: Path) -> dict[str, Any]:
    with use_world(case.world(world)):
        with counted_bytes() as counts:
            model = from_pretrained(folder, Spread())
        model.save_pretrained(out / "x", max_shard_size=1500)
        model.save_pretrained(out / "again", source=out / "x")
        logits = model(Tensor(IDS)).asnumpy()
        return {"parts": parts({p.name: (p.layout, p) for p in model.get_parameters()}), "read": counts, "logits": logits}


def alone(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    model = from_pretrained(folder)
    return whole([parts({p.name: (p.layout, p) for p in model.get_parameters()})]), model(Tensor(IDS)).asnumpy()


CASES = [
    (Case(dp=2), "llama"),
    (Case(dp=2), "gpt2"),  # transposed
    (Case(tp=2), "qwen3"),
    (Case(tp=2), "deepseek_v2"),
    (Case(pp=2), "qwen2"),  # tied, on both stages
    (Case(pp=2), "mixtral"),
    (Case(dp=2, ep=2), "qwen3_moe"),
    (Case(tp=2, dp=2), "llama"),
    (Case(pp=2, dp=2, ep=2), "mixtral"),
]


@pytest.mark.parametrize(("case", "family"), CASES, ids=str)
def test_any_layout_reads_and_writes_what_one_rank_does(
    run_ranks: Run, single_world: World, tmp_path: Path, case: Case, family: str
):
    folder = make(tmp_path / "theirs", family)
    right, logits = alone(folder)
    answers = run_ranks(case.ranks, there_and_back, case=case, folder=folder, out=tmp_path)
    found = whole([answer["parts"] for answer in answers])
    np.testing.assert_equal(found, right)
    for answer in answers:
        np.testing.assert_allclose(answer["logits"], logits, atol=1e-5)
    for written in ("x", "again"):
        assert bits(tmp_path / written) == bits(folder)


def read_apart(world: World, case: Case, folder: Path) -> dict[str, int]:
    with use_world(case.world(world)), counted_bytes() as counts:
        from_pretrained(folder, Spread())
        return {name: count for name, count in counts.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("case", [Case(dp=2), Case(tp=2), Case(pp=2)], ids=str)
def test_each_rank_reads_its_part(run_ranks: Run, single_world: World, tmp_path: Path, case: Case):
    """Of files of some layers each: in stages those of other stages are not opened; in shards half of each is read."""
    model = from_pretrained(make(tmp_path / "theirs", "llama"))
    model.save_pretrained(tmp_path / "several", max_shard_size=700)
    folder = tmp_path / "several"
    tensors = sum(len(data) for _, _, data in bits(folder).values())
    headers = sum(path.stat().st_size for path in folder.glob("*.safetensors")) - tensors
    answers = run_ranks(2, read_apart, case=case, folder=folder)
    slack = 700 if case.tp == 2 else 200  # norms are on both; parts of tiny rows are read with what is between them
    for counts in answers:
        assert sum(counts.values()) <= tensors / 2 + headers + slack, counts
    if case.pp == 2:
        assert set(answers[0]) - set(answers[1]) and set(answers[1]) - set(answers[0])


def errors(world: World, folder: Path) -> list[str]:
    """What this rank says of a folder that does not fit, and of one that only the other rank can read."""
    found = []
    with use_world(Case(pp=2).world(world)):
        model = from_pretrained(folder / "right", Spread())
        before = [p.asnumpy().copy() for p in model.get_parameters()]
        for name in ("wrong", f"of-{world.everyone.rank}"):
            try:
                load_pretrained(model, folder / name)
            except CheckpointError as error:
                found.append(str(error).replace(str(folder), ""))
        for p, x in zip(model.get_parameters(), before):
            np.testing.assert_array_equal(p.asnumpy(), x)
    return found


def test_all_ranks_say_the_same_of_what_does_not_fit(run_ranks: Run, tmp_path: Path):
    tensors = values_of("llama")
    tensors["model.norm.weight"] = np.ones(9, np.float32)  # of the last stage
    tensors["model.embed_tokens.weight"] = np.ones((12, 8), np.float32)  # of the first
    make(tmp_path / "wrong", "llama", tensors)
    for name in ("right", "of-0"):
        make(tmp_path / name, "llama")
    first, second = run_ranks(2, errors, folder=tmp_path)
    assert first[0] == second[0]
    assert first[0].split("\n") == [
        "/wrong does not fit the model: 2 differences",
        "  shape  model.embed_tokens.weight  (12, 8) in the files, (11, 8) here",
        "  shape  model.norm.weight          (9,) in the files, (8,) here",
    ]
    assert "rank(s) [1] failed" in first[1] and "of-1 does not exist" in second[1]
