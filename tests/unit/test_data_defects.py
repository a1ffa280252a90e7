"""Defects that other trainers' data tools have or had, each as a test that has its name. No MindSpore here.

More of them are where their subject is: `test_gpt_data` (a split that rounds to nothing, an index that is not of its data, a
resumed run in another order), `test_indexed` (offsets beyond 32 bits), `test_prepare` (killed runs, rows that lack a key),
`test_data_tools` (merging), `test_storage` and `tests/ranks/test_data_ranks` (hosts with disks of their own, of a blend too),
`tests/ranks/test_checkpointer_hosts` (checkpoints there).
"""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pytest

from bmtrain_ms_base.data import GPTBatches, GPTData, InstructionBatches, gpt_data, indexed, tools, train_tokenizer
from bmtrain_ms_base.data.batch import changes
from bmtrain_ms_base.data.gpt_index import split_ranges
from bmtrain_ms_base.data.indexed import IndexedError, IndexedFile, IndexedWriter
from bmtrain_ms_base.data.instructions import OUTPUTS
from bmtrain_ms_base.data.prepare import PrepareOptions, Progress, prepare
from bmtrain_ms_cli.main import main
from bmtrain_ms_cli.prepare import _Shown
from tests.helpers.tokens import golden_c

NULL = {"path": "1000", "kind": "null"}
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def write(path: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    with IndexedWriter(path, dtype) as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))
    return str(path)


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Rows and what is written of them (ModelLink, Megatron-LM) #


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tok"
    folder.mkdir()
    made = train_tokenizer(["### Instruction None Input Response one two"] * 9, 300)
    made.add_tokens(["None"])  # as most vocabularies have it
    made.add_special_tokens(SPECIAL)
    made.save(str(folder / "tokenizer.json"))
    return folder


def conversations(folder: Path, tokenizer: Path, rows: Sequence[dict[str, Any]], *words: Any, **config: str) -> list[np.ndarray]:
    """What is in each of the three files, one row after the other."""
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    command = ["prepare", "--input", lines(folder / "x.jsonl", rows), "--tokenizer-name-or-path", tokenizer, "--output-prefix"]
    command += [folder / "x", "--handler-name", "AlpacaStyleInstructionHandler", "--seq-length", 40, "--log-interval", 99]
    assert main([str(word) for word in [*command, "--overwrite", *words]]) == 0
    files = [IndexedFile(f"{folder}/x_{output}_document") for output in OUTPUTS]
    return [file.span(0, file.tokens) for file in files]


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}], ids=["empty", "null", "absent"])
def test_an_empty_input_is_not_the_word_none(tmp_path, tokenizer, template, row):
    from tokenizers import Tokenizer

    ids, *_ = conversations(tmp_path, tokenizer, [{"instruction": "one", **row, "output": "two"}], "--prompt-type", template)
    text = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids.tolist(), skip_special_tokens=False)
    assert "one" in text and "two" in text and "None" not in text


def test_packing_writes_masks_and_labels_and_not_ids_three_times(tmp_path, tokenizer):
    rows = [{"instruction": "one", "output": "two"}] * 2
    words = ["--prompt-type", "chatml", "--pack", "--seq-length", 99]
    ids, mask, labels = conversations(tmp_path, tokenizer, rows, *words, pad_token="<pad>")
    assert len(ids) == len(mask) == len(labels) == 99 and set(mask.tolist()) == {0, 1, 2}
    learnt = labels != -100
    assert 0 < learnt.sum() < 30 and np.array_equal(labels[learnt], ids[learnt]) and not learnt[mask == 0].any()


@pytest.mark.parametrize("pad", ["<pad>", None], ids=["pad token", "none, and a word None"])
def test_rows_are_padded_whether_or_not_the_tokenizer_has_a_pad_token(tmp_path, tokenizer, pad):
    from tokenizers import Tokenizer

    config = {} if pad is None else {"pad_token": pad}
    ids, mask, _ = conversations(
        tmp_path, tokenizer, [{"instruction": "one", "output": "two"}], "--prompt-type", "chatml", "--pack", **config
    )
    expected = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id(pad or "</s>")
    assert set(ids[mask == 0].tolist()) == {expected} and (mask == 0).any()


def test_what_is_skipped_is_counted_and_said(tmp_path, tokenizer, capsys):
    rows = [{"instruction": "one", "output": "two " * n} for n in (1, 99, 2, 99, 99)]
    conversations(tmp_path, tokenizer, rows, "--prompt-type", "chatml")
    out = capsys.readouterr().out
    assert "rows: 3 left out where it does not fit into a row" in out and f"{tmp_path}/x.jsonl, line 2:" in out
    assert IndexedFile(f"{tmp_path}/x_{OUTPUTS[0]}_document").documents == 2


def test_a_document_whose_sentences_are_all_skipped_is_none(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"text": ["1", "2"]}, {"text": ["", " "]}, {"text": []}, {"text": ["3"]}])
    result = prepare(PrepareOptions([path], str(tmp_path / "x"), NULL))
    file = IndexedFile(result.names[0])
    assert result.documents == file.documents == 2 and file.ends.tolist() == [0, 2, 3] and (np.diff(file.ends) > 0).all()
    assert result.wrong["empty"]["rows"] == 2


def test_no_line_of_the_log_is_missed_where_its_interval_does_not_divide_the_steps(capsys):
    """Steps of 50 documents, a line for every 30: one after each step, and not after every third only."""
    shown = _Shown(30)
    for documents in range(50, 501, 50):
        shown.show(Progress(1, 0, documents, 7 * documents))
    told = [int(line.split()[0]) for line in capsys.readouterr().err.splitlines()]
    assert told == list(range(50, 501, 50))
    slow = _Shown(100)
    for documents in range(50, 501, 50):
        slow.show(Progress(1, 0, documents, 0))
    assert [int(line.split()[0]) for line in capsys.readouterr().err.splitlines()] == [100, 200, 300, 400, 500]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_one_of_several_keys_is_finished(tmp_path, workers):
    """And not the last one only."""
    rows = [{"a": f"{i} 1", "b": f"{i}", "c": f"{i} 2 3"} for i in range(30)]
    options = PrepareOptions([lines(tmp_path / "x.jsonl", rows)], str(tmp_path / "x"), NULL, ["a", "b", "c"], workers=workers)
    for name, tokens in zip(prepare(options).names, (2, 1, 3)):
        file = IndexedFile(name)
        assert (file.documents, file.tokens) == (30, 30 * tokens) and file.read(7)[0] == 7
        assert tools.verify(name)


@pytest.mark.parametrize("when", ["join", "write_index", "replace"])
def test_an_interrupted_run_leaves_no_old_index_beside_new_tokens(tmp_path, monkeypatch, when):
    """Whatever it is interrupted in: a reader finds the whole of the old or of the new, or says that there is none."""
    path = tmp_path / "x.jsonl"
    prepare(PrepareOptions([lines(path, [{"text": "1 2"}])], str(tmp_path / "x"), NULL))
    options = PrepareOptions([lines(path, [{"text": "3 4 5"}, {"text": "6"}])], str(tmp_path / "x"), NULL, overwrite=True)
    place, name = (indexed, when) if when != "replace" else (os, "replace")
    function = getattr(place, name)

    def interrupted(*arguments: Any, **rest: Any) -> Any:
        if when == "replace" and not str(arguments[1]).endswith("_document.bin"):
            return function(*arguments, **rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(options)
    monkeypatch.undo()
    with pytest.raises(IndexedError, match=r"there is no file .*x_text_document\.idx"):
        IndexedFile(tmp_path / "x_text_document")
    prepare(options)
    assert IndexedFile(tmp_path / "x_text_document").span(0, 4).tolist() == [3, 4, 5, 6]


# Files (Megatron-LM, bigcode, NeMo) #


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_tokens_of_every_type_of_whole_numbers_are_read(tmp_path, dtype):
    file = IndexedFile(write(tmp_path / "x", [[1, 2, 100], [], [7]], dtype))
    assert file.dtype == np.dtype(dtype) and [file.read(i).tolist() for i in range(3)] == [[1, 2, 100], [], [7]]


def test_the_index_of_many_documents_takes_no_memory_for_each_of_them(tmp_path):
    """Python lists of lengths and offsets took hundreds of bytes for each: terabytes of text were beyond any machine."""
    count, chunk = 2_000_000, 1 << 16

    def ones(value: int) -> Any:
        return lambda: (np.full(min(chunk, count - start), value, np.int32) for start in range(0, count, chunk))

    tracemalloc.start()
    try:
        indexed.write_index(tmp_path / "x.idx", np.dtype("uint16"), ones(3), ones(1))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize(tmp_path / "x.idx") == 34 + 20 * count + 8 and most < 4 << 20  # and not 40 MB


def test_merging_takes_no_memory_for_what_is_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "_TOKENS", 1 << 14)
    monkeypatch.setattr(indexed, "_CHUNK", 1 << 14)
    documents = np.arange(50_000)
    for name in "ab":
        with IndexedWriter(tmp_path / name, "int32") as out:
            for start in range(0, len(documents), 10_000):
                for i in documents[start : start + 10_000]:
                    out.add(np.full(40, i))
    names = [str(tmp_path / name) for name in "ab"]
    tracemalloc.start()
    try:
        tools.merge(names, str(tmp_path / "c"))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize(tmp_path / "c.bin") == 16_000_000 and most < 1 << 20
    file = IndexedFile(tmp_path / "c")
    assert file.documents == 100_000 and file.read(50_003)[0] == 3 and file.ends.tolist() == list(range(100_001))


# Samples (Megatron-LM) #


@pytest.fixture
def golden(tmp_path):
    return write(tmp_path / "c", golden_c())


def test_a_recipe_whose_test_split_is_one_document_says_how_often_it_is_repeated(tmp_path):
    """Alpaca's 52,002 rows by `99990,8,2`: the test loss is that of one text, some thousand times."""
    assert [len(chosen or ()) for chosen in split_ranges("99990,8,2", 52002)] == [51997, 4, 1]
    path = write(tmp_path / "x", [[1] * 100] * 5202)
    with pytest.warns(UserWarning, match=r"12,800 samples of 64 tokens repeat the 1 sequence\(s\) of .*, 100 tokens, 8,193 times"):
        gpt_data([path], [1, 0, 12800], 64, "5197,4,1")


def test_a_path_is_typed_in_another_way_and_its_index_is_found(golden, tmp_path, monkeypatch):
    """A relative path, one through a link as on a host with another mount point, and one with an ending."""
    first = GPTData(golden, 8, 8)
    (tmp_path / "mount").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in ("c", "./c.bin", f"{tmp_path}/../{tmp_path.name}/c.idx", str(tmp_path / "mount" / "c")):
        assert GPTData(path, 8, 8).described == first.described
    assert len(list((tmp_path / "cache").glob("*/shuffle_index.npy"))) == 1


def test_data_that_is_written_anew_under_its_name_does_not_find_the_old_index(golden, tmp_path):
    """Of the same size, and with the time of the old one: what a hash of names and settings cannot see."""
    before = GPTData(golden, 8, 8)
    times = os.stat(f"{golden}.bin").st_mtime_ns
    before.file.close()
    for end in ("bin", "idx"):
        os.remove(f"{golden}.{end}")
    write(tmp_path / "c", [ids[::-1] for ids in golden_c()])
    os.utime(f"{golden}.bin", ns=(times, times))
    after = GPTData(golden, 8, 8)
    assert changes(before.described, after.described)[0].startswith("file: ")
    assert len(list((tmp_path / "cache").glob("*/shuffle_index.npy"))) == 2


# Going on (Megatron-LM) #


def described(path: Any, samples: int = 30, length: int = 8, batch: int = 2, **rest: Any) -> dict[str, Any]:
    return GPTBatches(gpt_data([path] if isinstance(path, str) else path, [samples, 0, 0], length, **rest)[0], batch).described


def test_more_steps_that_change_the_order_of_epochs_are_named(golden):
    """The documents of all epochs are shuffled together: one epoch more is another order from the first step on."""
    rest = {"split": "100"}
    before = described(golden, 17, **rest)
    assert changes(before, described(golden, 16, **rest)) == []  # the same epoch
    assert changes(before, described(golden, 50, **rest))[0] == "samples.epochs: 1 then, 3 now"
    old, new = (gpt_data([golden], [samples, 0, 0], 8, "100")[0] for samples in (17, 50))
    assert any(not np.array_equal(old.sample(i)[0], new.sample(i)[0]) for i in range(17))


@pytest.mark.parametrize(
    "other, told",
    [
        ({"length": 9}, "samples.length: 8 then, 9 now"),
        ({"split": "50,50"}, "samples.sequences[1]: 20 then, 10 now"),
        ({"seed": 1}, "samples.seed: 1234 then, 1 now"),
        ({"batch": 4}, "global_batch: 2 then, 4 now"),
    ],
    ids=["length", "split", "seed", "batch"],
)
def test_what_reshuffles_in_silence_elsewhere_is_named(golden, other, told):
    before = described(golden, split="100")
    assert told in changes(before, described(golden, **{"split": "100", **other}))


def test_other_weights_and_parts_of_a_blend_are_named(golden, tmp_path):
    other = write(tmp_path / "d", [ids[::-1] for ids in golden_c()])
    before = described(["1", golden, "1", other], split="100")
    assert "samples.weights[0]: 1.0 then, 3.0 now" in changes(before, described(["3", golden, "1", other], split="100"))
    swapped = changes(before, described(["1", other, "1", golden], split="100"))
    assert [text.split(":")[0] for text in swapped] == ["samples.parts[0].file", "samples.parts[1].file"]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_order_of_an_epoch_does_not_depend_on_how_many_ranks_read_it(tmp_path, golden, ranks):
    """Also where rows are shuffled anew in each epoch, and where a step crosses the end of one."""
    for output in OUTPUTS:
        write(tmp_path / f"x_{output}_document", [[i, i] for i in range(20)], "int32")
    data = gpt_data([golden], [60, 0, 0], 8, "100")[0]
    for batches in (InstructionBatches(tmp_path / "x", 2, 6), GPTBatches(data, 6)):
        for step in range(8):
            parts = [batches.batch(step, rank, ranks) for rank in range(ranks)]
            assert np.array_equal(np.concatenate([part.ids for part in parts]), batches.batch(step).ids)
