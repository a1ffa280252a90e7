"""What went wrong in ModelLink's and Megatron-LM's preparation and reading of data, and must not here. No MindSpore here.

Where another file has a test of it, it is not repeated: an empty `input` that became the text "None" (`test_instructions`,
`test_rows_of_alpaca`); rows left out and counted, and documents of which nothing is left (`test_prepare`,
`test_sentences_and_tokens_that_are_none`, `test_wrong_rows_are_fatal_or_counted`); lines of a log (`test_lines_of_a_log`); several
keys (`test_workers_do_not_change_a_byte`); offsets beyond 32 bits and merged documents (`test_indexed`, `test_data_tools`); splits
that hang or repeat few documents, what would change the order on resume (`test_gpt_data`); hosts without shared storage
(`test_storage`, `tests/ranks/test_data_ranks`, `tests/ranks/test_checkpointer_hosts`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pytest

from bmtrain_ms_base.data import GPTBatches, GPTData, gpt, gpt_data, indexed, train_tokenizer
from bmtrain_ms_base.data.batch import changes
from bmtrain_ms_base.data.gpt_index import build_indices, epochs_for
from bmtrain_ms_base.data.indexed import IndexedError, IndexedFile, IndexedWriter
from bmtrain_ms_base.data.instructions import OUTPUTS
from bmtrain_ms_base.data.prepare import PrepareOptions, prepare
from bmtrain_ms_cli.main import main
from tests.helpers.tokens import golden_c

NULL = {"path": "1000", "kind": "null"}


def write(path: Path, documents: Sequence[Sequence[int]]) -> str:
    with IndexedWriter(path, "uint16") as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))
    return str(path)


# Preparing #


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Whose token of padding is its own, and not the one that ends a text."""
    folder = tmp_path / "tok"
    folder.mkdir()
    made = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    made.add_special_tokens(["<pad>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))
    return folder


@pytest.fixture
def packed(tmp_path: Path, tokenizer: Path) -> list[list[list[int]]]:
    """Ids, masks and labels of rows that hold two conversations and some padding."""
    rows = [{"instruction": "the cat", "input": "", "output": "sat"}] * 4
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["prepare", "--input", tmp_path / "x.jsonl", "--tokenizer-name-or-path", tokenizer, "--prompt-type", "alpaca", "--pack"]
    words += ["--handler-name", "AlpacaStyleInstructionHandler", "--output-prefix", tmp_path / "x", "--log-interval", 99]
    words += ["--seq-length", 600]
    assert main([str(word) for word in words]) == 0
    files = [IndexedFile(tmp_path / f"x_{output}_document") for output in OUTPUTS]
    return [[file.read(i).tolist() for file in files] for i in range(len(files[0]))]


def test_packing_wrote_ids_for_masks_and_labels(packed):
    (row,) = packed
    ids, mask, labels = row
    assert len(ids) == len(mask) == len(labels) == 600 and sorted(set(mask)) == [0, 1, 2, 3, 4]
    assert set(labels) != set(ids) and -100 in labels
    for token, number, label in zip(*row):
        assert label in (token, -100) and (number > 0 or label == -100)


def test_packing_failed_for_tokenizers_with_a_token_of_padding(packed, tokenizer):
    """And padding is that token, which nobody learns."""
    from tokenizers import Tokenizer

    pad = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("<pad>")
    ((ids, mask, labels),) = packed
    assert {ids[i] for i in range(600) if mask[i] == 0} == {pad} and pad not in labels


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
        try:
            tokens = IndexedFile(name).tokens
        except IndexedError as error:
            assert "there is no file" in str(error)
        else:
            assert step == "sync_folder" and tokens == 3  # all of the new ones
    assert prepare(PrepareOptions([str(path)], str(tmp_path / "x"), NULL, overwrite=True)).tokens == [3]


def test_sums_of_lengths_overflowed_32_bits_of_numpy():
    """In indices of samples too: their tokens are counted beyond 2^31."""
    lengths = np.full(3, 2**30, np.int32)
    epochs = epochs_for(3 * 2**30, 3, 2**30 - 1)
    made = build_indices(lengths, range(3), epochs, 2**30 - 1, 1234)
    assert made["sample_index"].tolist()[:3] == [[0, 0], [0, 2**30 - 1], [1, 2**30 - 2]]


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
