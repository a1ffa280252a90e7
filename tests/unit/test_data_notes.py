"""What lies beside a pair: notes of `prepare`, and text, which is neither taken for a note nor lost. No MindSpore here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmtrain_ms_base.data import tools
from bmtrain_ms_base.data.extras import DataError
from bmtrain_ms_base.data.indexed import IndexedFile, IndexedWriter
from bmtrain_ms_base.data.prepare import PrepareOptions, prepare
from bmtrain_ms_base.data.sources import find_sources
from bmtrain_ms_cli.main import main

TEXT = '{"text": "1 2"}\n{"text": "3"}\n'
NOT_NOTES = [TEXT, '{"vocab_size": "x"}', '{"tokens": 3}', "[1]", '"x"', "[" * 100000, "{", "", '{"hash": "ab", "text": "x"}\n' * 2]


def pair(path: Path, beside: str = TEXT) -> str:
    """As Megatron leaves it: the text under the same name."""
    with IndexedWriter(path, "uint16") as out:
        for ids in ([1, 2], [3]):
            out.add(np.array(ids))
    path.with_suffix(".json").write_text(beside)
    return str(path)


def prepared(folder: Path, name: str = "p") -> str:
    (folder / f"{name}.txt").write_text("1 2\n3\n4 5 6")
    return prepare(PrepareOptions([str(folder / f"{name}.txt")], str(folder / name), {"path": "99", "kind": "null"})).names[0]


@pytest.mark.parametrize("beside", NOT_NOTES, ids=range(len(NOT_NOTES)))
def test_what_is_no_note_is_none(tmp_path: Path, beside: str) -> None:
    name = pair(tmp_path / "z", beside)
    assert tools.inspect(name).startswith(f"{name}: 2 documents")
    assert tools.verify(name).endswith("its vocabulary is not known")
    assert IndexedFile(name).prepared == {}
    tools.merge([name, prepared(tmp_path)], str(tmp_path / "m"))
    assert len(tools.split(name, str(tmp_path / "s"), [1, 1])) == 2
    assert not list(tmp_path.glob("[ms]*.json")) and (tmp_path / "z.json").read_text() == beside


@pytest.mark.parametrize(
    "damage",
    [
        {"vocab_size": "x"},
        {"tokenizer": 3},
        {"tokenizer": {"digest": "x"}},
        {"tokenizer": {"arguments": [], "digest": "", "end": 0}},
        {"sources": None},
        {"append_eod": "no"},
        "cut",
        "deep",
    ],
    ids=str,
)
def test_a_damaged_note_is_one_line(tmp_path: Path, capsys: Any, damage: Any) -> None:
    """Which does not say that the file is to be deleted."""
    name = prepared(tmp_path)
    note = Path(name + ".json")
    text = note.read_text()
    if damage == "cut":
        note.write_text(text[: len(text) // 2])
    elif damage == "deep":
        note.write_text(text.rstrip()[:-1] + ', "more": ' + "[" * 100000)
    else:
        note.write_text(json.dumps({**json.loads(text), **damage}, indent=1))
    out = ["--output-prefix", str(tmp_path / "out")]
    for words in (
        ["inspect", name],
        ["verify", name],
        ["merge", "--input", name, *out],
        ["split", name, "--parts", "1", "1", *out],
    ):
        assert main(["data", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"bmtrain-ms: {note}, the note of what {name} was made of, is damaged (")
        assert error.count("\n") == 1 and "delete" not in error and len(error) < 600
    with pytest.raises(DataError, match="is damaged"):
        _ = IndexedFile(name).prepared
    assert not list(tmp_path.glob("out*"))


def test_notes_of_earlier_releases_without_a_hash_are_read(tmp_path: Path) -> None:
    name = prepared(tmp_path)
    note = json.loads(Path(name + ".json").read_text())
    Path(name + ".json").write_text(json.dumps({key: value for key, value in note.items() if key != "hash"}, indent=1))
    assert tools.verify(name).endswith("all below 100")


def test_text_beside_its_pair_is_text(tmp_path: Path) -> None:
    """Of a folder, only notes are left out."""
    pair(tmp_path / "z")
    prepared(tmp_path)
    found, left = find_sources([str(tmp_path)])
    assert [Path(source.path).name for source in found] == ["p.txt", "z.json"]
    assert "p_text_document.json" in [Path(path).name for path in left]


@pytest.mark.parametrize("action", ["merge", "split"])
def test_merge_and_split_replace_no_file(tmp_path: Path, capsys: Any, action: str) -> None:
    """And look before they write anything."""
    name = prepared(tmp_path)
    (tmp_path / "v").mkdir()
    text = tmp_path / "v" / ("z.json" if action == "merge" else "z_1.json")
    text.write_text(TEXT)
    words = ["--input", name] if action == "merge" else [name, "--parts", "1", "1"]
    assert main(["data", action, *words, "--output-prefix", str(tmp_path / "v" / "z")]) == 2
    assert capsys.readouterr().err == (
        f"bmtrain-ms: there is a file {text} already, where the pair's note would be: choose another name\n"
    )
    assert [path.name for path in text.parent.iterdir()] == [text.name] and text.read_text() == TEXT


def test_notes_of_what_is_merged_and_split(tmp_path: Path) -> None:
    a, b = prepared(tmp_path, "a"), prepared(tmp_path, "b")
    tools.merge([a, b], str(tmp_path / "m"))
    tools.split(str(tmp_path / "m"), str(tmp_path / "s"), [1, 1])
    for name, documents in (("m", 6), ("s_0", 3), ("s_1", 3)):
        assert tools.verify(str(tmp_path / name)).endswith("all below 100")
        note = IndexedFile(tmp_path / name).prepared
        assert note["documents"] == documents and len(note["sources"]) == 2
    assert not list(tmp_path.glob("*.partial"))
