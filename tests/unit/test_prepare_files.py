"""Files that `bmtrain-ms prepare` reads and replaces: none that is not its own is lost, and none is left out. No MindSpore here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms_base.data import indexed, tools
from bmtrain_ms_base.data.indexed import IndexedFile
from bmtrain_ms_base.data.pieces import PrepareError
from bmtrain_ms_base.data.prepare import PrepareOptions, prepare
from bmtrain_ms_cli.main import main

NULL = {"path": "1000", "kind": "null"}
TEXT = '{"text": "1 2 3", "n": "7"}\n'


def command(text: Path, prefix: Path, *more: str) -> int:
    words = ["--output-prefix", str(prefix), "--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--log-interval", "99"]
    return main(["prepare", "--input", str(text), *words, *more])


def options(text: Path, prefix: Path, **more: Any) -> PrepareOptions:
    return PrepareOptions([str(text)], str(prefix), NULL, **more)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("link", [False, True])
def test_a_text_under_the_name_of_its_own_result_is_kept(tmp_path: Path, capsys: Any, more: list[str], link: bool) -> None:
    text = tmp_path / "c_text_document.json"
    text.write_text(TEXT)
    given = text
    if link:
        given = tmp_path / "link.json"
        given.symlink_to(text)
    assert command(given, tmp_path / "c", *more) == 2
    assert capsys.readouterr().err == (
        f"bmtrain-ms: {text} is text to be prepared, and a result would replace it: choose another --output-prefix\n"
    )
    assert text.read_text() == TEXT and not list(tmp_path.glob("c.*"))


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_file_of_others_where_the_note_would_be_is_kept(tmp_path: Path, capsys: Any, more: list[str]) -> None:
    (tmp_path / "c.jsonl").write_text(TEXT)
    other = tmp_path / "c_text_document.json"
    other.write_text('{"text": "mine"}\n')
    assert command(tmp_path / "c.jsonl", tmp_path / "c", *more) == 2
    assert capsys.readouterr().err.startswith(f"bmtrain-ms: {other} is there already, and prepare has not written it")
    assert other.read_text() == '{"text": "mine"}\n' and sorted(os.listdir(tmp_path)) == ["c.jsonl", other.name]


def test_a_note_alone_is_a_result_that_is_there(tmp_path: Path) -> None:
    text = tmp_path / "c.jsonl"
    text.write_text(TEXT)
    name = prepare(options(text, tmp_path / "c")).names[0]
    for end in (".bin", ".idx"):
        os.remove(name + end)
    with pytest.raises(PrepareError, match=r"c_text_document\.json is there already: --overwrite replaces it"):
        prepare(options(text, tmp_path / "c"))
    assert tools.verify(prepare(options(text, tmp_path / "c", overwrite=True)).names[0])


def test_a_folder_of_others_where_pieces_would_be_is_kept(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(TEXT)
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "mine.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(PrepareError, match=r"c\.partial is for what a run leaves, and has mine\.txt in it"):
            prepare(options(tmp_path / "c.jsonl", tmp_path / "c", restart=restart))
    assert (tmp_path / "c.partial" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("step", ["join", "write_index", "write_note"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ended"])
def test_what_is_replaced_is_there_until_all_that_is_new_is(tmp_path: Path, monkeypatch: Any, step: str, error: Any) -> None:
    """Of all keys: the last of several is the one that the disk has no room for."""
    text, keys = tmp_path / "c.jsonl", ["text", "n"]
    text.write_text(TEXT)
    names = prepare(options(text, tmp_path / "c", keys=keys)).names
    before = {path: path.read_bytes() for path in tmp_path.glob("c_*")}
    text.write_text('{"text": "4 5", "n": "8"}\n{"text": "6", "n": "9"}\n')
    where: Any = indexed if step != "write_note" else __import__("bmtrain_ms_base.data.notes", fromlist=["notes"])
    real, calls = getattr(where, step), []

    def fail(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            raise error
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(where, step, fail)
        with pytest.raises(type(error)):
            prepare(options(text, tmp_path / "c", keys=keys, overwrite=True))
    assert {path: path.read_bytes() for path in tmp_path.glob("c_*")} == before
    assert all(tools.verify(name) for name in names)
    prepare(options(text, tmp_path / "c", keys=keys, overwrite=True))
    assert all(tools.verify(name) for name in names) and IndexedFile(names[1]).read(1).tolist() == [9]
    assert sorted(os.listdir(tmp_path)) == sorted(["c.jsonl", *(path.name for path in before)])


def test_an_interruption_while_names_are_given_goes_on_without_overwrite(tmp_path: Path, monkeypatch: Any) -> None:
    """The results that are there then are its own; before that, they are somebody's."""
    text, keys = tmp_path / "c.jsonl", ["text", "n"]
    text.write_text(TEXT)
    put = indexed.put

    def once(name: str, note: bool = False) -> None:
        put(name, note)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexed, "put", once)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(text, tmp_path / "c", keys=keys))
    assert (tmp_path / "c_text_document.idx").exists() and not (tmp_path / "c_n_document.idx").exists()
    assert all(tools.verify(name) for name in prepare(options(text, tmp_path / "c", keys=keys)).names)


def test_results_that_came_while_a_run_was_interrupted_are_not_replaced(tmp_path: Path) -> None:
    text = tmp_path / "c.jsonl"
    text.write_text(TEXT)

    def stop(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options(text, tmp_path / "c"), stop)
    (tmp_path / "c_text_document.bin").write_bytes(b"mine")
    with pytest.raises(PrepareError, match=r"c_text_document\.bin is there already"):
        prepare(options(text, tmp_path / "c"))
    assert (tmp_path / "c_text_document.bin").read_bytes() == b"mine"
    assert json.loads((tmp_path / "c.partial" / "plan.json").read_text())["keys"] == ["text"]


# What may not be read, or is no file #


def no_permission(monkeypatch: Any, what: str, path: Path) -> None:
    """As for a user; who runs the tests may read everything."""
    real = getattr(os, what)

    def refuse(given: Any = ".", *more: Any, **rest: Any) -> Any:
        if os.fspath(given) == str(path) if not isinstance(given, int) else False:
            raise PermissionError(13, "Permission denied", str(path))
        return real(given, *more, **rest)

    monkeypatch.setattr(os, what, refuse)


def test_a_folder_within_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name in ("a.jsonl", "b/c.jsonl"):
        (tmp_path / "in" / name).write_text(TEXT)
    no_permission(monkeypatch, "scandir", tmp_path / "in" / "b")
    for given in ("in", "in/b"):
        assert command(tmp_path / given, tmp_path / "x") == 2
        assert capsys.readouterr().err == f"bmtrain-ms: the folder {tmp_path}/in/b cannot be read: Permission denied\n"
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("given", ["in", "in/a.jsonl"])
@pytest.mark.parametrize("call, told", [("open", "read"), ("stat", "looked for")])
def test_a_file_that_may_not_be_read_is_not_one_that_is_not_there(
    tmp_path: Path, monkeypatch: Any, capsys: Any, given: str, call: str, told: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(TEXT)
    no_permission(monkeypatch, call, tmp_path / "in" / "a.jsonl")
    assert command(tmp_path / given, tmp_path / "x") == 2
    assert capsys.readouterr().err == f"bmtrain-ms: {tmp_path}/in/a.jsonl cannot be {told}: Permission denied\n"


def test_what_a_folder_has_that_is_no_file_is_named(tmp_path: Path, capsys: Any) -> None:
    """A pipe would be waited for, for ever."""
    folder = tmp_path / "in"
    (tmp_path / "other").mkdir()
    folder.mkdir()
    (folder / "a.jsonl").write_text(TEXT.replace("1 2 3", "1"))
    os.mkfifo(folder / "b.jsonl")
    (folder / "c").symlink_to(tmp_path / "other")
    (folder / "d.pdf").symlink_to(tmp_path / "nothing")
    assert command(folder, tmp_path / "x") == 0
    left = [line.rsplit("/")[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert left == ["b.jsonl", "c", "d.pdf"]
    (folder / "e.jsonl").symlink_to(tmp_path / "nothing")
    assert command(folder, tmp_path / "y") == 2
    assert capsys.readouterr().err == f"bmtrain-ms: {folder}/e.jsonl is a link to what is not there\n"


def test_what_is_given_and_is_no_file_is_refused(tmp_path: Path, capsys: Any) -> None:
    os.mkfifo(tmp_path / "b.jsonl")
    for given in (tmp_path / "b.jsonl", Path("/dev/null")):
        assert command(given, tmp_path / "x") == 2
        assert capsys.readouterr().err == (
            f"bmtrain-ms: {given} is neither a file nor a folder, but a pipe, a socket or a device: save its text to a file\n"
        )
