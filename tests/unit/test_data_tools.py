"""`bmtrain-ms data`: inspect, verify, merge, split. No MindSpore here."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms_base.data import tools
from bmtrain_ms_base.data.indexed import IndexedError, IndexedFile, IndexedWriter
from bmtrain_ms_base.data.prepare import PrepareOptions, prepare
from bmtrain_ms_cli.main import main
from tests.helpers.tokens import golden_c


def exit_code(*words: Any) -> int:
    try:
        return main(["data", *(str(word) for word in words)])
    except SystemExit as error:  # argparse
        return error.code


def write(path: Path, documents: Any, dtype: str = "uint16") -> str:
    with IndexedWriter(path, dtype) as out:
        for ids in documents:
            out.add(np.array(ids, np.int64))
    return str(path)


def prepared(folder: Path, name: str, lines: str) -> str:
    (folder / f"{name}.txt").write_text(lines)
    return prepare(PrepareOptions([str(folder / f"{name}.txt")], str(folder / name), {"path": "99", "kind": "null"})).names[0]


def test_inspect(tmp_path, capsys):
    assert exit_code("inspect", write(tmp_path / "c", golden_c()), "--show", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/c: 20 documents, 20 sequences, 138 tokens of uint16"
    assert lines[2:] == [
        "tokens of a sequence: 2 to 12, half have 7 or more",
        "empty sequences: 0",
        "0: 0 1",
        "1: 2 3 4 5 6 7 8 9 10",
    ]
    assert exit_code("inspect", prepared(tmp_path, "p", "1 2\n3")) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["tokenizer 99, 100 ids", "end of each document: none"]
    assert exit_code("inspect", tmp_path / "nothing") == 2
    assert capsys.readouterr().err == f"bmtrain-ms: there is no file {tmp_path}/nothing.idx\n"


def test_verify(tmp_path, capsys):
    path = write(tmp_path / "c", golden_c())
    assert exit_code("verify", path) == 0
    assert capsys.readouterr().out == f"{path} is whole: 20 documents, 138 tokens, ids up to 137, its vocabulary is not known\n"
    assert exit_code("verify", path, "--vocab-size", 138) == 0
    assert exit_code("verify", path, "--vocab-size", 120) == 2
    assert f"{path} has 120 in sequence 17, which is not below 120, the size of the vocabulary" in capsys.readouterr().err
    with pytest.raises(IndexedError, match="has -1 in sequence 1, which is no id"):
        tools.verify(write(tmp_path / "n", [[1], [-1]], "int32"))


def test_verify_knows_what_was_prepared(tmp_path):
    path = prepared(tmp_path, "p", "1 2\n3")
    assert tools.verify(path).endswith("ids up to 3, all below 100")
    data = (tmp_path / "p_text_document.bin").read_bytes()
    (tmp_path / "p_text_document.bin").write_bytes(data[:-2] + b"\xff\xff")
    with pytest.raises(IndexedError, match="has 65535 in sequence 1"):
        tools.verify(path)
    (tmp_path / "p_text_document.bin").write_bytes(b"\x05" + data[1:])
    with pytest.raises(IndexedError, match=r"p_text_document\.bin has other tokens than were prepared: it is damaged"):
        tools.verify(path)
    for end in ("bin", "idx"):
        os.remove(f"{path}.{end}")
    write(Path(path), [[1]])
    with pytest.raises(IndexedError, match="has 1 tokens, and was made with 3: it is another one"):
        tools.verify(path)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), min_size=2, max_size=10),
    cut=st.integers(0, 10),
)
def test_merged_is_as_written_at_once(tmp_path_factory, documents, cut):
    """To the byte; with empty documents, and those of several sequences."""
    folder = tmp_path_factory.mktemp("merge")
    for name, part in (("all", documents), ("a", documents[:cut]), ("b", documents[cut:])):
        with IndexedWriter(folder / name, "uint16") as out:
            for sequences in part:
                out.add([x for ids in sequences for x in ids], [len(ids) for ids in sequences])
    tools.merge([str(folder / "a"), f"{folder}/b.idx"], str(folder / "merged"))
    for end in ("bin", "idx"):
        assert (folder / f"merged.{end}").read_bytes() == (folder / f"all.{end}").read_bytes()


def test_merge(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, lines in enumerate(("1 2\n3", "4")):
        prepared(tmp_path / "in", f"x{i}", lines)
    assert exit_code("merge", "--input", tmp_path / "in", "--output-prefix", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 3 documents, 4 tokens, of 2 pairs\n"
    assert tools.verify(str(tmp_path / "out")).endswith("all below 100")
    assert [os.path.basename(source[0]) for source in json.loads((tmp_path / "out.json").read_text())["sources"]] == [
        "x0.txt",
        "x1.txt",
    ]
    assert exit_code("merge", "--input", tmp_path / "in", "--output-prefix", tmp_path / "out") == 2
    assert f"there is a pair {tmp_path}/out already: delete it, or choose another name" in capsys.readouterr().err
    with pytest.raises(IndexedError, match="pairs of different types cannot be merged: int32, uint16"):
        tools.merge([str(tmp_path / "out"), write(tmp_path / "y", [[1]], "int32")], str(tmp_path / "z"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(IndexedError, match=r"empty has no pair of \.bin and \.idx in it"):
        tools.merge([str(tmp_path / "empty")], str(tmp_path / "z"))
    other = prepare(PrepareOptions([f"{tmp_path}/in/x0.txt"], f"{tmp_path}/o", {"path": "98", "kind": "null"})).names[0]
    with pytest.raises(IndexedError, match="pairs of different tokenizers cannot be merged: null-98, null-99"):
        tools.merge([str(tmp_path / "out"), other], str(tmp_path / "z"))
    assert not list(tmp_path.glob("z*"))


def test_split(tmp_path, capsys):
    path = write(tmp_path / "c", golden_c())
    assert exit_code("split", path, "--parts", 80, 10, 10, "--output-prefix", tmp_path / "p") == 0
    lines = capsys.readouterr().out.splitlines()
    files = [IndexedFile(tmp_path / f"p_{i}") for i in range(3)]
    assert lines == [f"{file.name}: {file.documents} documents, {file.tokens} tokens" for file in files]
    assert [ids for file in files for ids in file.span(0, file.tokens).tolist()] == list(range(138))
    assert sum(file.documents for file in files) == 20 and abs(files[0].tokens - 110) <= 12
    tools.merge([file.name for file in files], str(tmp_path / "again"))
    for end in ("bin", "idx"):
        first, second = (hashlib.sha256((tmp_path / f"{name}.{end}").read_bytes()).digest() for name in ("c", "again"))
        assert first == second
    assert exit_code("split", path, "--parts", "inf", 1, "--output-prefix", tmp_path / "q") == 2
    assert "argument --parts: must be finite, not inf" in capsys.readouterr().err
    with pytest.raises(IndexedError, match="c has 20 documents, too few or too long to be divided like this"):
        tools.split(path, str(tmp_path / "q"), [1e6, 1, 1])
    with pytest.raises(IndexedError, match="a pair is divided into two or more parts above 0, not 1, 0"):
        tools.split(path, str(tmp_path / "q"), [1, 0])
    assert not list(tmp_path.glob("q*"))
    tools.split(prepared(tmp_path, "k", "1\n2\n3\n4"), str(tmp_path / "k"), [1, 1])
    assert json.loads((tmp_path / "k_1.json").read_text())["documents"] == 2 and tools.verify(str(tmp_path / "k_1"))
