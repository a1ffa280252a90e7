"""What went wrong in ModelLink's and Megatron-LM's preparation and reading of data, and must not here. No MindSpore here.

Where another file has a test of it, it is not repeated: rows that are wrong (`test_prepare`); offsets of files beyond 32 bits
(`test_indexed`), merged documents (`test_data_tools`); splits that hang, what would change the order on resume (`test_gpt_data`);
hosts without shared storage (`test_storage`, `tests/ranks/test_data_ranks`, `tests/ranks/test_checkpointer_hosts`).
"""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pytest

from bmtrain_ms_base.data import GPTBatches, GPTData, InstructionBatches, gpt, gpt_data, indexed, tools, train_tokenizer
from bmtrain_ms_base.data.batch import changes
from bmtrain_ms_base.data.gpt_index import build_indices, epochs_for, split_ranges
from bmtrain_ms_base.data.indexed import IndexedFile, IndexedWriter
from bmtrain_ms_base.data.instructions import OUTPUTS
from bmtrain_ms_base.data.prepare import PrepareOptions, Progress, prepare
from bmtrain_ms_cli.main import main
from bmtrain_ms_cli.prepare import Shown
from tests.helpers.tokens import golden_c

NULL = {"path": "1000", "kind": "null"}


def write(path: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    with IndexedWriter(path, dtype) as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))
    return str(path)


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def golden(tmp_path: Path) -> str:
    return write(tmp_path / "c", golden_c())


# Preparing #


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Whose token of padding is its own, and not the one that ends a text."""
    folder = tmp_path / "tok"
    folder.mkdir()
    made = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    made.add_tokens(["None"])  # a word that most vocabularies have
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))
    return folder


def conversations(folder: Path, tokenizer: Path, rows: Sequence[dict[str, Any]], *words: str) -> list[list[list[int]]]:
    """Ids, masks and labels of what is prepared of them."""
    command = [
        "prepare",
        "--input",
        lines(folder / "x.jsonl", rows),
        "--tokenizer-name-or-path",
        tokenizer,
        "--prompt-type",
        "alpaca",
    ]
    command += ["--handler-name", "AlpacaStyleInstructionHandler", "--output-prefix", folder / "x", "--log-interval", 99]
    command += ["--seq-length", 600]
    assert main([str(word) for word in [*command, *words]]) == 0
    files = [IndexedFile(folder / f"x_{output}_document") for output in OUTPUTS]
    return [[file.read(i).tolist() for file in files] for i in range(len(files[0]))]


@pytest.fixture
def packed(tmp_path: Path, tokenizer: Path) -> list[list[list[int]]]:
    """Ids, masks and labels of rows that hold four conversations and some padding."""
    return conversations(tmp_path, tokenizer, [{"instruction": "the cat", "input": "", "output": "sat"}] * 4, "--pack")


def test_packing_wrote_ids_for_masks_and_labels(packed):
    (row,) = packed
    ids, mask, labels = row
    assert len(ids) == len(mask) == len(labels) == 600 and sorted(set(mask)) == [0, 1, 2, 3, 4]
    assert set(labels) != set(ids) and -100 in labels
    for token, number, label in zip(*row):
        assert label in (token, -100) and (number > 0 or label == -100)


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}], ids=["empty", "null", "absent"])
def test_an_empty_input_became_the_word_none(tmp_path, tokenizer, template, row):
    from tokenizers import Tokenizer

    rows = [{"instruction": "one", **row, "output": "two"}]
    ((ids, *_),) = conversations(tmp_path, tokenizer, rows, "--prompt-type", template)
    text = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert "one" in text and "two" in text and "None" not in text


def test_packing_failed_for_tokenizers_with_a_token_of_padding(packed, tokenizer):
    """And padding is that token, which nobody learns."""
    from tokenizers import Tokenizer

    pad = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<pad>")
    ((ids, mask, labels),) = packed
    assert {ids[i] for i in range(600) if mask[i] == 0} == {pad} and pad not in labels


def test_a_token_of_padding_that_is_null_was_the_word_none(tmp_path, tokenizer):
    """Then the one that ends a text is for padding."""
    from tokenizers import Tokenizer

    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"pad_token": None, "eos_token": "</s>"}))
    ((ids, mask, _),) = conversations(tmp_path, tokenizer, [{"instruction": "one", "output": "two"}], "--pack")
    end = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("</s>")
    assert {token for token, number in zip(ids, mask) if number == 0} == {end}


def test_rows_that_were_skipped_were_not_counted(tmp_path, tokenizer, capsys):
    rows = [{"instruction": "one", "output": "two " * n} for n in (1, 999, 2, 999, 999)]
    assert len(conversations(tmp_path, tokenizer, rows)) == 2
    out = capsys.readouterr().out
    assert "rows: 3 left out where it does not fit into a row" in out and f"{tmp_path}/x.jsonl, line 2:" in out


def test_a_document_whose_sentences_were_all_skipped_was_there_and_empty(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"text": ["1", "2"]}, {"text": ["", " "]}, {"text": []}, {"text": ["3"]}])
    result = prepare(PrepareOptions([path], str(tmp_path / "x"), NULL))
    file = IndexedFile(result.names[0])
    assert result.documents == file.documents == 2 and file.ends.tolist() == [0, 2, 3] and (np.diff(file.ends) > 0).all()
    assert result.wrong["empty"]["rows"] == 2


def test_lines_of_the_log_were_missed_where_its_interval_does_not_divide_the_steps(capsys):
    """Steps of 50 documents, a line for every 30: one after each step, and not after every third only."""
    shown = Shown(30)
    for documents in range(50, 501, 50):
        shown.show(Progress(1, 0, documents, 7 * documents))
    told = [int(line.split()[0]) for line in capsys.readouterr().err.splitlines()]
    assert told == list(range(50, 501, 50))
    slow = Shown(100)
    for documents in range(50, 501, 50):
        slow.show(Progress(1, 0, documents, 0))
    assert [int(line.split()[0]) for line in capsys.readouterr().err.splitlines()] == [100, 200, 300, 400, 500]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_last_one_of_several_keys_alone_was_finished(tmp_path, workers):
    """And not the last one only."""
    rows = [{"a": f"{i} 1", "b": f"{i}", "c": f"{i} 2 3"} for i in range(30)]
    options = PrepareOptions([lines(tmp_path / "x.jsonl", rows)], str(tmp_path / "x"), NULL, ["a", "b", "c"], workers=workers)
    for name, tokens in zip(prepare(options).names, (2, 1, 3)):
        file = IndexedFile(name)
        assert (file.documents, file.tokens) == (30, 30 * tokens) and file.read(7)[0] == 7
        assert tools.verify(name)


def test_an_interrupted_run_left_tokens_with_a_stale_index(tmp_path, monkeypatch):
    """Whatever moment it ends at, there is no pair that does not fit together."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "1 2 3"}\n')
    options = PrepareOptions([str(path)], str(tmp_path / "x"), NULL)
    name = prepare(options).names[0]
    path.write_text('{"text": "4 5"}\n{"text": "6"}\n')
    steps = ("write_index", "sync_folder")
    for step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(indexed, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(PrepareOptions([str(path)], str(tmp_path / "x"), NULL, overwrite=True))
        assert IndexedFile(name).lengths.tolist() == ([3] if step == "write_index" else [2, 1]) and tools.verify(name)
    assert prepare(PrepareOptions([str(path)], str(tmp_path / "x"), NULL, overwrite=True)).tokens == [3]


# Files #


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_tokens_of_every_type_of_whole_numbers_are_read(tmp_path, dtype):
    file = IndexedFile(write(tmp_path / "x", [[1, 2, 100], [], [7]], dtype))
    assert file.dtype == np.dtype(dtype) and [file.read(i).tolist() for i in range(3)] == [[1, 2, 100], [], [7]]


def test_the_index_took_memory_for_each_document(tmp_path):
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


def test_merging_took_memory_for_what_is_merged(tmp_path, monkeypatch):
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


def test_sums_of_lengths_overflowed_32_bits_of_numpy():
    """In indices of samples too: their tokens are counted beyond 2^31."""
    lengths = np.full(3, 2**30, np.int32)
    epochs = epochs_for(3 * 2**30, 3, 2**30 - 1)
    made = build_indices(lengths, range(3), epochs, 2**30 - 1, 1234)
    assert made["sample_index"].tolist()[:3] == [[0, 0], [0, 2**30 - 1], [1, 2**30 - 2]]


def test_a_test_split_of_one_document_was_repeated_in_silence(tmp_path):
    """Alpaca's 52,002 rows by `99990,8,2`: the test loss is that of one text, some thousand times."""
    assert [len(chosen or ()) for chosen in split_ranges("99990,8,2", 52002)] == [51997, 4, 1]
    path = write(tmp_path / "x", [[1] * 100] * 5202)
    with pytest.warns(UserWarning, match=r"12,800 samples of 64 tokens repeat the 1 sequence\(s\) of .*, 100 tokens, 8,193 times"):
        gpt_data([path], [1, 0, 12800], 64, "5197,4,1")


# Caches of indices #


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    build = gpt.build_indices
    monkeypatch.setattr(gpt, "build_indices", lambda *rest: made.append(1) or build(*rest))
    return made


def test_a_path_typed_otherwise_built_indices_anew(tmp_path, monkeypatch, built):
    """Relative, absolute, with an ending, through a link, from a place where another host has mounted it: it is the content."""
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "c", golden_c())
    cache = tmp_path / "cache"
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    shutil.copytree(tmp_path / "disk", tmp_path / "mounted")
    monkeypatch.chdir(tmp_path / "disk")
    for path in (tmp_path / "disk" / "c", "c", "./c.bin", "../disk/c.idx", tmp_path / "link" / "c", tmp_path / "mounted" / "c"):
        GPTData(path, 8, 8, cache=cache)
    assert len(built) == 1
    for name in os.listdir(tmp_path / "disk"):
        assert name in ("c.bin", "c.idx")


def test_other_content_under_the_same_name_found_the_old_indices(tmp_path, built):
    """Of the same length, also where the time of the file says nothing."""
    name = write(tmp_path / "c", [[1] * 40, [2] * 40])
    before = os.stat(f"{name}.idx")
    first = GPTData(name, 4, 8)
    for end in ("bin", "idx"):
        os.remove(f"{name}.{end}")
    write(tmp_path / "c", [[1] * 30, [2] * 50])
    for end in ("bin", "idx"):
        os.utime(f"{name}.{end}", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = GPTData(name, 4, 8)
    assert len(built) == 2 and first.described != second.described


def test_the_blends_index_was_made_by_rank_0_alone(tmp_path, built):
    """A blend's own index is kept in `cache=` as those of its parts are, on each host."""
    for name in "ab":
        write(tmp_path / name, golden_c())
    for host in ("h0", "h1"):
        gpt_data(["1", str(tmp_path / "a"), "1", str(tmp_path / "b")], [8, 0, 0], 8, "1", cache=tmp_path / host)
        kinds = [json.loads(path.read_text())["kind"] for path in (tmp_path / host).glob("*/description.json")]
        assert sorted(kinds) == ["blend", "gpt"]  # both parts have the same content


# Going on #


def test_more_steps_shuffled_documents_anew_without_a_word(tmp_path):
    """Within the same epochs more samples are more of the same; with another one it is named."""
    name = write(tmp_path / "c", golden_c())

    def rows(samples: int) -> tuple[list[Any], dict[str, Any]]:
        batches = GPTBatches(gpt_data([name], [samples, 0, 0], 8, "1")[0], 2)
        return [batches.batch(step).ids.tolist() for step in range(4)], batches.described

    (first, before), (more, same), (others, other) = (rows(samples) for samples in (8, 14, 60))
    assert first == more and changes(before, same) == []
    assert first != others and changes(before, other)[0] == "samples.epochs: 1 then, 4 now"


def described(path: Any, samples: int = 30, length: int = 8, batch: int = 2, **rest: Any) -> dict[str, Any]:
    return GPTBatches(gpt_data([path] if isinstance(path, str) else path, [samples, 0, 0], length, **rest)[0], batch).described


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
def test_settings_that_reshuffle_were_changed_without_a_word(golden, other, told):
    before = described(golden, split="100")
    assert told in changes(before, described(golden, **{"split": "100", **other}))


def test_other_weights_and_parts_of_a_blend_were_taken_without_a_word(golden, tmp_path):
    other = write(tmp_path / "d", [ids[::-1] for ids in golden_c()])
    before = described(["1", golden, "1", other], split="100")
    assert "samples.weights[0]: 1.0 then, 3.0 now" in changes(before, described(["3", golden, "1", other], split="100"))
    swapped = changes(before, described(["1", other, "1", golden], split="100"))
    assert [text.split(":")[0] for text in swapped] == ["samples.parts[0].file", "samples.parts[1].file"]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_order_of_an_epoch_depended_on_how_many_ranks_read_it(tmp_path, golden, ranks):
    """Also where rows are shuffled anew in each epoch, and where a step crosses the end of one."""
    for output in OUTPUTS:
        write(tmp_path / f"x_{output}_document", [[i, i] for i in range(20)], "int32")
    data = gpt_data([golden], [60, 0, 0], 8, "100")[0]
    for batches in (InstructionBatches(tmp_path / "x", 2, 6), GPTBatches(data, 6)):
        for step in range(8):
            parts = [batches.batch(step, rank, ranks) for rank in range(ranks)]
            assert np.array_equal(np.concatenate([part.ids for part in parts]), batches.batch(step).ids)
