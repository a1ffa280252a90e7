"""Samples in Megatron's order, blends, batches, their cache and what resuming needs. No MindSpore here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms_base.data import extras, gpt, gpt_batches, gpt_cache
from bmtrain_ms_base.data.batch import changes
from bmtrain_ms_base.data.extras import DataError
from bmtrain_ms_base.data.gpt import Blend, GPTData, blend_sizes, gpt_data
from bmtrain_ms_base.data.gpt_batches import EndOfDataError, GPTBatches, RampUp
from bmtrain_ms_base.data.gpt_index import SplitError, blend_indices, build_indices, epochs_for, split_ranges
from bmtrain_ms_base.data.indexed import IndexedWriter
from tests.helpers.tokens import golden_c


def write(path: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    with IndexedWriter(path, dtype) as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))
    return str(path)


@pytest.fixture
def golden(tmp_path):
    """The twenty documents of which Megatron-LM core_r0.6.0's indices are known."""
    return write(tmp_path / "c", golden_c())


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def indices(data: GPTData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return data._documents, data._begins, data._shuffle


# Golden #


def test_golden_one_epoch(golden):
    train, valid, test = gpt_data([golden], [8, 1, 1], 8, "16,2,2")
    documents, begins, shuffle = indices(train)
    assert documents.tolist() == [13, 11, 0, 12, 14, 2, 10, 7, 1, 9, 8, 4, 5, 6, 3, 15]
    assert begins[:8].tolist() == [[0, 0], [2, 1], [3, 7], [4, 6], [5, 2], [6, 5], [8, 0], [8, 8]]
    assert shuffle.tolist() == [11, 12, 4, 3, 7, 2, 1, 9, 5, 0, 8, 13, 6, 10]
    assert [sha(x) for x in indices(train)] == ["dadcc32621adba81", "6aaaac68c0b2d771", "f6e9d5a5ba52858e"]
    assert train.sample(0)[0][:-1].tolist() == [46, 47, 48, 49, 50, 16, 17, 18]
    assert [x.tolist() for x in indices(valid)] == [[16, 17], [[0, 0], [1, 4]], [0]]
    assert valid.sample(0)[0][:-1].tolist() == list(range(113, 121))
    assert [x.tolist() for x in indices(test)] == [[18, 19], [[0, 0], [1, 1]], [0]]
    assert test.sample(0)[0][:-1].tolist() == list(range(128, 136))


def test_golden_last_epoch_apart(golden):
    train, valid, _ = gpt_data([golden], [30, 2, 2], 8, "16,2,2")
    documents, begins, shuffle = indices(train)
    assert (train.epochs.count, train.epochs.separate) == (3, True)
    assert (documents.dtype, shuffle.dtype, begins.shape) == (np.int32, np.uint32, (43, 2))
    assert documents[:12].tolist() == [7, 10, 4, 1, 10, 8, 3, 7, 14, 13, 2, 12]
    assert shuffle[:10].tolist() == [11, 24, 14, 21, 4, 7, 25, 2, 1, 3]
    assert [sha(x) for x in indices(train)] == ["cbfbd88ae7f6668e", "d4a876f868409f1d", "3d336134190f9116"]
    assert train.sample(0)[0][:-1].tolist() == [87, 0, 1, 11, 12, 13, 14, 15]
    assert [x.tolist() for x in indices(valid)] == [[16, 17, 16, 17], [[0, 0], [1, 4], [2, 1], [3, 5]], [1, 2, 0]]
    assert valid.sample(0)[0][:-1].tolist() == [121, 122, 123, 124, 125, 126, 127, 113]


def test_golden_epochs_together(golden):
    train, valid, test = gpt_data([golden], [50, 0, 0], 8, "100,0,0")
    assert (train.epochs.count, train.epochs.separate, valid, test) == (3, False, None, None)
    documents, _, shuffle = indices(train)
    assert documents[:10].tolist() == [9, 5, 8, 2, 6, 14, 19, 13, 18, 11]
    assert shuffle[:8].tolist() == [50, 35, 49, 13, 47, 46, 12, 27]
    assert [sha(x) for x in indices(train)] == ["b29f10f45cf9e977", "bf9e63898689a591", "b20b8594fef45c6c"]
    assert train.sample(0)[0][:-1].tolist() == [131, 132, 133, 134, 135, 136, 137, 51]


@pytest.mark.parametrize(
    "weights, which",
    [
        ([0.7, 0.2, 0.1], "0 1 0 2 0 0 0 1 0 0 0 1 0 2 0 0 0 1 0 0"),
        ([1, 1], "0 1 0 1 0 1 0 1"),
        ([3, 1], "0 1 0 0 0 1 0 0 0 1 0 0"),
    ],
)
def test_golden_blends(weights, which):
    expected = [int(x) for x in which.split()]
    found = blend_indices(weights, len(expected))
    assert found["dataset_index"].tolist() == expected and found["dataset_index"].dtype == np.int16
    assert found["dataset_sample_index"].tolist() == [expected[:i].count(x) for i, x in enumerate(expected)]


def walked(sizes: Sequence[int], documents: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Megatron's loop, word for word, but for the language."""
    place, offset, found = 0, 0, [[0, 0]]
    for _ in range(count):
        remaining = length + 1
        while remaining:
            left = sizes[documents[place]] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
                remaining = 0
            else:
                place, offset = place + 1, 0
        found.append([place, offset])
    return found


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    length=st.integers(1, 12),
    samples=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_are_megatrons(sizes, length, samples, seed):
    """Also over empty documents; and each epoch has every token once."""
    if not sum(sizes):
        sizes[0] = 1
    epochs = epochs_for(sum(sizes), samples, length)
    made = build_indices(np.array(sizes, np.int32), range(len(sizes)), epochs, length, seed)
    documents, begins, shuffle = made.values()
    assert epochs.samples >= samples and len(begins) == epochs.samples + 1
    assert begins.tolist() == walked(sizes, documents.tolist(), epochs.samples, length)
    assert sorted(documents.tolist()) == sorted(list(range(len(sizes))) * epochs.count)
    assert sorted(shuffle.tolist()) == list(range(epochs.samples))
    if epochs.separate:
        assert sorted(documents[-len(sizes) :].tolist()) == list(range(len(sizes)))
        assert sorted(shuffle[: epochs.before_last].tolist()) == list(range(epochs.before_last))


# Splits #


def test_splits():
    assert split_ranges("969,30,1", 1000) == [range(969), range(969, 999), range(999, 1000)]
    assert split_ranges("100", 7) == [range(7), None, None]
    assert split_ranges("0, 1,0", 7)[1] == range(7)
    assert split_ranges("99990,8,2", 52002) == [range(51997), range(51997, 52001), range(52001, 52002)]


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "1;2", "."])
def test_what_is_no_split(split):
    with pytest.raises(SplitError, match="a split is up to three numbers that are not all zero"):
        split_ranges(split, 10)


def test_a_split_that_would_hang(golden):
    """Megatron looks for the number of epochs of no tokens for ever."""
    with pytest.raises(
        SplitError, match="the split 999,1,0 of 20 sequences leaves none for validation: give it a larger part, or 0"
    ):
        gpt_data([golden], [1, 1, 0], 8, "999,1,0")
    with pytest.raises(SplitError, match="the split 100,0,0 has nothing for test, of which 3 samples are needed"):
        gpt_data([golden], [1, 0, 3], 8, "100,0,0")
    with pytest.raises(SplitError, match="no tokens"):
        GPTData(golden, 1, 8, chosen=range(3, 3))
    with pytest.raises(SplitError, match="has 20 sequences, not range"):
        GPTData(golden, 1, 8, chosen=range(3, 21))
    with pytest.raises(SplitError, match="there are no tokens, so that no number of epochs has a sample"):
        epochs_for(0, 1, 1)


def test_documents_that_are_repeated_often(golden):
    with pytest.warns(UserWarning, match=r"1,000 samples of 8 tokens repeat the 1 sequence\(s\) of .*, 3 tokens, 2,667 times"):
        data = GPTData(golden, 1000, 8, chosen=range(19, 20))
    assert len(data) >= 1000


def test_an_index_that_memory_cannot_hold_is_refused(golden, monkeypatch):
    with pytest.warns(UserWarning, match="repeat"), pytest.raises(DataError) as caught:
        gpt_data([golden], [8 * 10**12, 0, 0], 8, "1,0,0")
    told = r"an index of [\d,]{17} samples, [\d,]+ epochs, takes [\d,]+ GiB of memory to make, and [\d,]+ GiB are free: ask for .*"
    assert re.fullmatch(told, str(caught.value))
    monkeypatch.setattr(extras, "available_memory", lambda: 1000)
    with pytest.raises(DataError, match="a blend of 101 samples takes"):
        blend_indices([0.5, 0.5], 101)


def test_rows_that_memory_cannot_hold_are_refused(golden, monkeypatch):
    """Before anything is made of them; the system is not asked at each step."""
    monkeypatch.setattr(gpt, "cached", None)
    with pytest.raises(DataError) as caught:
        gpt_data([golden], [1, 0, 0], 10**12, "1,0,0")
    told = r"a row of 1,000,000,000,000 tokens takes 37,253 GiB of memory to make, and [\d,]+ GiB are free: ask for .*"
    assert re.fullmatch(told, str(caught.value))
    monkeypatch.undo()
    asked: list[int] = []
    monkeypatch.setattr(extras, "available_memory", lambda: asked.append(1) or 1 << 30)
    batches = GPTBatches(GPTData(golden, 16, 8, cache=Path(golden).parent), 16)
    asked.clear()
    assert len(batches.batch(0).ids) == 16 and not asked
    monkeypatch.setattr(batches.data, "length", 10**7)
    with pytest.raises(
        DataError, match=r"^a part of a step, 16 rows of 10,000,000 tokens, takes 4 GiB of memory to make, and 1 GiB are free"
    ):
        batches.batch(0)


def test_a_ramp_of_more_sizes_than_anybody_counts_is_refused():
    with pytest.raises(DataError, match="from 1 rows to 1,000,000,000 by 1 are 999,999,999 sizes, more than 100,000: grow"):
        gpt_batches.samples_for(5, 10**9, RampUp(1, 1, 10**12))


# Blends #


def test_a_blend_reads_its_parts(tmp_path):
    for name, first in (("a", 0), ("b", 1000)):
        write(tmp_path / name, [range(first, first + 40)] * 20)
    paths = ["3", str(tmp_path / "a"), "1", f"{tmp_path}/b.bin"]
    (blend, _, _) = gpt_data(paths, [80, 0, 0], 8, "1")
    parts = [GPTData(tmp_path / name, size, 8) for name, size in zip("ab", blend_sizes([3, 1], 80))]
    which = blend_indices([3, 1], 80)
    for i in range(80):
        expected = parts[which["dataset_index"][i]].sample(int(which["dataset_sample_index"][i]))
        assert all(np.array_equal(x, y) for x, y in zip(blend.sample(i), expected))
    assert [part["sequences"] for part in blend.described["parts"]] == [[0, 20], [0, 20]]
    assert blend_sizes([3, 1], 80) == [61, 21]
    with pytest.raises(IndexError, match="the blend has 80 samples; there is no 80"):
        blend.sample(80)
    with pytest.raises(DataError, match="part 1 of the blend needs 50 samples and has 4: see blend_sizes"):
        Blend([parts[0], GPTData(tmp_path / "b", 1, 8, chosen=range(1))], [1, 1], 100)


@pytest.mark.parametrize(
    "paths, text",
    [
        (["a", "b"], "a data path is one name, or weights and names in turn; not a b"),
        ([], "a data path is one name, or weights and names in turn; not nothing"),
        (["1", "a", "2"], "the weight 2 has no name behind it"),
        (["1", "a", "b", "2"], "weights and names have to take turns: 1 a b 2"),
        (["1", "a"], r"there is no file a\.idx"),
    ],
)
def test_what_is_no_data_path(paths, text):
    with pytest.raises(DataError, match=text):
        gpt_data(paths, [1, 0, 0], 8, "1")


def test_weights_that_are_none():
    for weights in ([0.0, 1.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(DataError, match="weights of a blend are positive numbers, not "):
            blend_indices(weights, 4)
    with pytest.raises(DataError, match="a blend is of 1 to 32,766 datasets, not 40,000"):
        blend_indices([1.0] * 40000, 4)


# Cache #


def test_indices_are_made_once_and_by_content(golden, tmp_path, monkeypatch):
    made: list[int] = []
    build = gpt.build_indices
    monkeypatch.setattr(gpt, "build_indices", lambda *rest: made.append(1) or build(*rest))
    first = GPTData(golden, 8, 8)
    (tmp_path / "elsewhere").mkdir()
    for end in ("bin", "idx"):
        os.rename(f"{golden}.{end}", tmp_path / "elsewhere" / f"renamed.{end}")
    moved = GPTData(tmp_path / "elsewhere" / "renamed", 8, 8, cache=tmp_path / "cache")
    assert len(made) == 1 and all(np.array_equal(x, y) for x, y in zip(indices(first), indices(moved)))
    assert len(list((tmp_path / "cache").glob("*/description.json"))) == 1
    GPTData(tmp_path / "elsewhere" / "renamed", 9, 8, cache=tmp_path / "cache")  # more of the same order
    assert len(made) == 1
    changed = golden_c()
    changed[3][0] += 1  # the same lengths: what a cache by name would not see
    other = write(tmp_path / "d", changed)
    GPTData(other, 8, 8, cache=tmp_path / "cache")
    for setting in ({"seed": 1}, {"chosen": range(19)}):
        GPTData(other, 8, 8, cache=tmp_path / "cache", **setting)
    GPTData(other, 8, 9, cache=tmp_path / "cache")
    assert len(made) == 5


def test_a_damaged_cache_is_made_anew(golden, tmp_path):
    cache = tmp_path / "cache"
    before = [x.copy() for x in indices(GPTData(golden, 8, 8))]
    for name, content in (
        ("shuffle_index.npy", b"x"),
        ("contents.json", b"{}"),
        ("contents.json", b"[1]"),
        ("sample_index.npy", None),
    ):
        (file,) = cache.glob(f"*/{name}")
        os.remove(file) if content is None else file.write_bytes(content)
        assert all(np.array_equal(x, y) for x, y in zip(indices(GPTData(golden, 8, 8)), before)), name
    assert not list(cache.glob("*.partial"))


def test_many_at_once_build_once(tmp_path):
    made: list[int] = []
    barrier = threading.Barrier(8)

    def build() -> dict[str, np.ndarray]:
        made.append(1)
        return {"x_index": np.arange(100_000)}

    def ask() -> None:
        barrier.wait()
        assert gpt_cache.cached(tmp_path, "", {"a": 1}, build)["x_index"][-1] == 99_999

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_where_indices_are_kept(golden, tmp_path, monkeypatch):
    """Beside the data; in the user's cache where that cannot be written; where it is said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "cache").write_text("in the way")
    GPTData(golden, 8, 8)
    assert list((tmp_path / "user" / "bmtrain_ms" / "data").glob("*/sample_index.npy"))
    with pytest.raises(DataError, match=r"indices of .*c cannot be kept in .*/cache: give one that can be written, cache="):
        GPTData(golden, 8, 8, cache=tmp_path / "cache")


# Batches #


class Counting:
    """Samples of which each is its number, in two documents."""

    length = 4
    described: dict[str, Any] = {"kind": "counting"}  # noqa: RUF012 - a protocol's

    def __init__(self, samples: int):
        self.samples = samples

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(5, number), np.array([2, 3])


def rows(batches: GPTBatches, step: int, ranks: int = 1) -> list[int]:
    return [x for rank in range(ranks) for x in batches.batch(step, rank, ranks).ids[:, 0].tolist()]


@given(batch=st.integers(1, 4), step=st.integers(0, 30), ranks=st.integers(1, 6))
def test_a_step_is_the_same_for_any_ranks(batch, step, ranks):
    batches = GPTBatches(Counting(10_000), batch * 60)
    assert rows(batches, step, ranks) == list(range(step * batch * 60, (step + 1) * batch * 60))


def test_packed_documents(golden):
    """Targets end with their document, whatever its last token is; or rows are one text."""
    train = gpt_data([golden], [8, 0, 0], 8, "16,2,2")[0]
    batch = GPTBatches(train, 1).batch(0)
    tokens, lengths = train.sample(0)
    assert lengths.tolist() == [5, 4] and tokens.tolist() == [46, 47, 48, 49, 50, 16, 17, 18, 19]
    assert batch.ids.tolist() == [[46, 47, 48, 49, 50, 16, 17, 18]] and batch.ids.dtype == np.int32
    assert batch.targets.tolist() == [[47, 48, 49, 50, -100, 17, 18, 19]] and batch.targets.dtype == np.int32
    assert batch.documents is not None and batch.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch.documents.dtype == np.int32
    plain = GPTBatches(train, 1, packed=False).batch(0)
    assert plain.targets.tolist() == [[47, 48, 49, 50, 16, 17, 18, 19]] and plain.documents is None


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=10),
    length=st.integers(1, 9),
    samples=st.integers(1, 12),
)
def test_rows_against_the_documents(tmp_path_factory, sizes, length, samples):
    """Every target that counts follows its token in a document; every other token is the last of one."""
    sizes[0] += 1
    folder = tmp_path_factory.mktemp("gpt")
    texts = [list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]
    path = write(folder / "x", texts)
    samples = min(samples, 9 * sum(sizes) // length) or 1
    if -(-(samples * length + 1) // sum(sizes)) > 10:
        return  # it would be said
    batches = GPTBatches(GPTData(path, samples, length), 1)
    last = {text[-1] for text in texts if text}
    for step in range(batches.steps):
        batch = batches.batch(step)
        counts = batch.targets != -100
        assert (batch.targets[counts] == batch.ids[counts] + 1).all() and set(batch.ids[~counts].tolist()) <= last
        assert batch.documents is not None and (batch.documents[0, 0], (np.diff(batch.documents) >= 0).all()) == (0, True)


def test_the_end_of_data_is_known_before_the_step():
    batches = GPTBatches(Counting(10), 4)
    assert batches.steps == 2 and rows(batches, 1) == [4, 5, 6, 7]
    for rank in range(2):
        with pytest.raises(
            EndOfDataError, match=r"step 2 needs samples up to 12, there are 10, for 2 steps: make the data with more"
        ):
            batches.batch(2, rank, 2)
    with pytest.raises(ValueError, match="a global batch of 4, at step 0, cannot be split evenly over 3 ranks"):
        batches.batch(0, 0, 3)


def megatrons_ramp(start: int, increment: int, samples: int, target: int, consumed: int) -> int:
    """Megatron's RampupBatchsizeNumMicroBatches."""
    if consumed > samples:
        return target
    return start + increment * int(consumed / (samples / ((target - start) // increment)))


@settings(max_examples=100, deadline=None)
@given(start=st.integers(1, 9), increment=st.integers(1, 5), times=st.integers(1, 6), samples=st.integers(1, 400))
def test_ramp_up_is_megatrons(start, increment, times, samples):
    target, consumed = start + increment * times, 0
    batches = GPTBatches(Counting(1000), target, ramp_up=RampUp(start, increment, samples))
    step = 0
    while consumed + batches.size(step) <= 1000:
        assert batches.consumed(step) == consumed
        assert batches.size(step) == min(megatrons_ramp(start, increment, samples, target, consumed), target)
        assert rows(batches, step) == list(range(consumed, consumed + batches.size(step)))
        consumed += batches.size(step)
        step += 1
    assert batches.steps == step


@pytest.mark.parametrize("ramp", [RampUp(0, 1, 5), RampUp(3, 2, 5), RampUp(9, 1, 5), RampUp(1, 0, 5)])
def test_a_ramp_that_leads_elsewhere(ramp):
    with pytest.raises(DataError, match=rf"from {ramp.start} rows, by {ramp.increment} more each time, a batch does not come to 8"):
        GPTBatches(Counting(10), 8, ramp_up=ramp)


# Going on #


def test_what_would_change_the_order_is_named(golden, tmp_path):
    def described(
        samples: int = 8, length: int = 8, split: str = "16,2,2", seed: int = 1234, batch: int = 2, path: str = golden
    ) -> Any:
        made = GPTBatches(gpt_data([path], [samples, 0, 0], length, split, seed)[0], batch).described
        assert json.loads(json.dumps(made)) == made
        return made

    before = described()
    assert changes(before, described(samples=9)) == []  # one epoch: more of the same
    assert changes(before, described(seed=1)) == ["samples.seed: 1234 then, 1 now"]
    assert changes(before, described(split="18,1,1")) == ["samples.sequences[1]: 16 then, 18 now"]
    assert changes(before, described(batch=4)) == ["global_batch: 2 then, 4 now"]
    assert changes(before, described(length=9))[0] == "samples.length: 8 then, 9 now"
    assert changes(before, described(samples=30)) == [
        "samples.epochs: 1 then, 3 now",
        "samples.last_epoch_apart: False then, True now",
    ]
    changed = golden_c()
    changed[3][0] += 1
    (name,) = (text.split(":")[0] for text in changes(before, described(path=write(tmp_path / "d", changed))))
    assert name == "samples.file"
    assert changes({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}, "c": 0}) == ["a.b[1]: 2 then, 3 now", "c: None then, 0 now"]


def test_far_into_a_run_is_as_near_as_its_begin(golden):
    """No step before is looked at."""
    train = gpt_data([golden], [50, 0, 0], 8, "100,0,0")[0]
    read: list[int] = []
    sample = train.sample
    train.sample = lambda number: read.append(number) or sample(number)
    GPTBatches(train, 2).batch(24)
    assert read == [48, 49] and gpt_batches.GPTBatches(Counting(10**12), 4).consumed(10**11) == 4 * 10**11
