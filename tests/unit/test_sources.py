"""Files of text: which there are, their pieces and rows, and what is wrong with them. No MindSpore here."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms_base.data import cutting, rows, sources
from bmtrain_ms_base.data.cutting import cut
from bmtrain_ms_base.data.extras import MissingLibraryError, needed
from bmtrain_ms_base.data.rows import Problem
from bmtrain_ms_base.data.sources import Piece, SourceError, find_sources, source_of

TEXTS = ["one", "zwei, größer", '三 "quoted"\nwith a line', "  ", "last"]


def write(path: Path, texts: Sequence[Any] = TEXTS) -> Path:
    """The texts, in the file's own kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    ends = path.suffixes
    table = pa.table({"other": list(range(len(texts))), "text": list(texts)})
    if ends[-1] == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif ends[-1] == ".arrow":
        make = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
        with make(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=2)
    else:
        if ends[0] in (".csv", ".tsv"):
            lines = []
            writer = csv.writer(type("", (), {"write": staticmethod(lines.append)}), "excel-tab" if ends[0] == ".tsv" else "excel")
            writer.writerows([["other", "text"], *enumerate(texts)])
        elif ends[0] == ".json":
            lines = [json.dumps([{"text": text} for text in texts], indent=1)]
        else:
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        data = "".join(lines).encode()
        packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
        path.write_bytes(packed[ends[-1]](data) if len(ends) > 1 else data)
    return path


def read(path: Path, keys: Sequence[str] = ("text",), size: int = 1 << 20) -> list[Any]:
    source = source_of(path)
    assert source is not None
    return [found for piece in cutting._pieces(source, keys, size) for found in rows.documents(piece, keys)]


NAMES = ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.json", "x.json.gz", "x.csv", "x.csv.zst", "x.tsv", "x.parquet"]
NAMES += ["file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_every_kind_has_the_same_rows(tmp_path, name, size):
    assert [found for _, found in read(write(tmp_path / name), size=size)] == [[[text]] for text in TEXTS]


def test_lines_of_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo \xff\nthree")
    found = [found for _, found in read(tmp_path / "x.txt")]
    assert found[0] == [["one"]] and found[3] == [["three"]]
    assert [found[i].kind for i in (1, 2)] == ["empty", "invalid"]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b".").replace(b"\r", b".")), max_size=12),
    size=st.integers(1, 40),
)
def test_any_cut_finds_each_line_once(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    path.write_bytes(b"\n".join([b"first", *lines]))
    assert [found for _, found in read(path, size=size)] == [found for _, found in read(path)]
    assert len(read(path)) == len(b"\n".join([b"first", *lines]).split(b"\n")) - (b"\n".join([b"first", *lines])[-1:] == b"\n")


@pytest.mark.parametrize(
    "line, kind, why",
    [
        (b"", "empty", "the line is blank"),
        (b"{", "broken", "no JSON: "),
        (b"[" * 100000, "broken", "no JSON: "),
        (b'"x"', "broken", 'a row is an object of JSON, not "x"'),
        (b'{"other": 1}', "missing", "no text"),
        (b'{"text": null}', "missing", "text is null"),
        (b'{"text": 3}', "not-text", "text is 3"),
        (b'{"text": ["a", 3]}', "not-text", r'text is \["a", 3\]'),
        (b'{"text": ""}', "empty", "text is empty"),
        (b'{"text": []}', "empty", "text is empty"),
        (b'{"text": "\xff"}', "invalid", "byte 10 of the line is 0xff"),
        (b'{"text": "\\ud800"}', "invalid", "text is not UTF-8"),
    ],
)
def test_wrong_rows(tmp_path, line, kind, why):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": ["a", "b"]}\n')
    first, (place, problem), last = read(tmp_path / "x.jsonl")
    assert (first, last) == (("line 1", [["good"]]), ("line 3", [["a", "b"]]))
    assert place == "line 2" and isinstance(problem, Problem) and problem.kind == kind
    assert re.match(why, problem.why)


def test_wrong_rows_of_tables(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "x.csv").write_text("a,text\n1,one\n2\n3,three,more\n")
    assert [getattr(found, "kind", found) for _, found in read(tmp_path / "x.csv")] == [[["one"]], "missing", "broken"]
    raw = pa.array([b"good", b"\xff", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())  # as other writers do, who do not look
    pq.write_table(pa.table({"text": text, "n": [1, None, 3], "raw": raw}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert [getattr(x, "kind", x) for _, x in found] == [[["good"]], "invalid", [["fine"]]] and found[1][0] == "row 2"
    assert [getattr(x, "kind", x) for _, x in read(tmp_path / "x.parquet", ["n"])] == ["not-text", "missing", "not-text"]
    assert [getattr(x, "kind", x) for _, x in read(tmp_path / "x.parquet", ["raw"])] == [[["good"]], "invalid", [["fine"]]]


def test_rows_are_numbered_over_pieces(tmp_path):
    for name in ("x.parquet", "file.arrow"):
        assert [place for place, _ in read(write(tmp_path / name), size=1)] == [f"row {i}" for i in range(1, 6)]
    places = [place for place, _ in read(write(tmp_path / "x.jsonl"), size=20)]
    assert places[1] == "line 2" and places[2].startswith("the line at byte 4")


def test_several_columns(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"b": "2", "a": "1"}\n{"a": "3"}\n')
    (_, first), (_, second) = read(tmp_path / "x.jsonl", ["a", "b"])
    assert first == [["1"], ["2"]] and second == Problem("missing", "no b")
    for name in ("x.parquet", "file.arrow", "x.csv"):
        with pytest.raises(SourceError, match=rf"{name} has no column nope; it has other, text"):
            read(write(tmp_path / name), ["text", "nope"])
    with pytest.raises(SourceError, match=r"x\.txt: lines of text have one column, text, not a"):
        cut([sources.Source(str(tmp_path / "x.txt"), "txt", "", 5)], ["a"])


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet", "file.arrow", "stream.arrow", "x.json"])
def test_files_that_are_cut(tmp_path, name):
    path = write(tmp_path / name, [str(i) * 9 for i in range(999)])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SourceError, match=rf"{name}(,| ).*(damaged|cannot be read as|is no JSON)"):
        read(path)


def test_files_that_are_something_else(tmp_path):
    for name in ("x.parquet", "x.arrow", "x.jsonl.gz", "x.jsonl.zst"):
        (tmp_path / name).write_bytes(b"this is none of them" * 9)
        with pytest.raises(SourceError, match=name):
            read(tmp_path / name)
    (tmp_path / "x.csv").write_text('text\n"a"b\n')
    with pytest.raises(SourceError, match=r"x\.csv, line 2, is no csv"):
        read(tmp_path / "x.csv")


def test_a_long_array_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_READ", 7)
    (tmp_path / "x.json").write_text('\ufeff [ {"text": "one, [two]"} ,\n{"text":"' + "x" * 500 + '"}, 12 ]')
    found = [x for _, x in read(tmp_path / "x.json")]
    assert found[:2] == [[["one, [two]"]], [["x" * 500]]] and found[2].why == "a row is an object of JSON, not 12"
    (tmp_path / "x.json").write_text(" []")
    assert read(tmp_path / "x.json") == []


def test_a_folder(tmp_path):
    """All that is below it, by name; what is left out is told."""
    (tmp_path / "b").mkdir()
    for name in ("b/x.txt", "a.jsonl.gz", "c.json", "README.md", "dataset_info.json"):
        (tmp_path / name).write_bytes(b"")
    found, left = find_sources([str(tmp_path)])
    assert [os.path.relpath(source.path, tmp_path) for source in found] == ["a.jsonl.gz", "c.json", "b/x.txt"]
    assert [os.path.basename(path) for path in left] == ["README.md", "dataset_info.json"]
    assert [(source.kind, source.packed) for source in found] == [("json", "gz"), ("json", ""), ("txt", "")]
    with pytest.raises(SourceError, match=r"c\.json is given twice"):
        find_sources([str(tmp_path), str(tmp_path / "b" / ".." / "c.json")])


def test_notes_beside_files_of_tokens_are_no_text(tmp_path):
    """Results that lie in the folder are left out; a file of JSON with only one such neighbour is text."""
    for name in ("a.json", "b.json", "b.bin", "tokens_text_document.bin", "tokens_text_document.idx", "tokens_text_document.json"):
        (tmp_path / name).write_bytes(b"")
    found, left = find_sources([str(tmp_path)])
    assert [os.path.basename(source.path) for source in found] == ["a.json", "b.json"]
    assert os.path.basename(left[-1]) == "tokens_text_document.json"


@pytest.mark.parametrize(
    "name, text",
    [
        ("nothing.txt", r"nothing\.txt does not exist; a name on a hub is written hf:owner/name"),
        (
            "x.pdf",
            r"x\.pdf is of no kind that can be read, by its ending; kinds are \.jsonl, .*; lines and tables also \.gz",
        ),
        ("empty", r"empty has no file that can be read"),
    ],
)
def test_what_cannot_be_an_input(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_bytes(b"")
    with pytest.raises(SourceError, match=text):
        find_sources([str(tmp_path / name)])
    with pytest.raises(SourceError, match=r"hf:x is no name on a hub; write hf:owner/name, "):
        find_sources(["hf:x"])


def test_pieces_do_not_depend_on_anything_but_sizes(tmp_path):
    big = sources.Source(str(tmp_path / "x.txt"), "txt", "", 100 << 20)
    pieces = cut([big], ["text"])
    assert [(piece.start, piece.stop) for piece in pieces[:2]] == [(0, 8 << 20), (8 << 20, 16 << 20)]
    assert pieces[-1] == Piece(big, 96 << 20, 100 << 20, 4 << 20)
    assert len(cut([sources.Source(big.path, "txt", "", 1 << 40)], ["text"])) == 4096


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    wanted = r"x\.parquet \(a parquet file\) needs pyarrow, which cannot be imported \(.*\): pip install 'bmtrain-ms\[data\]'"
    with pytest.raises(MissingLibraryError, match=wanted):
        cut(find_sources([str(tmp_path / "x.parquet")])[0], ["text"])
    with pytest.raises(ImportError):
        needed("no_such_library", "this")
