"""What a run makes of its text: it is alone in its folder, and what was made of something else is refused. No rank is started."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms_base.data import DataError, run_data
from bmtrain_ms_base.data.run_data import RunText
from bmtrain_ms_base.data.tokenizing import read_config
from bmtrain_ms_cli import pretrain
from bmtrain_ms_cli.main import main

TALKS = [{"instruction": f"say {word}", "input": "", "output": f"{word} {word}"} for word in ("the", "cat", "dog", "runs") * 8]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "a.txt"
    path.write_text("the cat sees a dog\nthe dog runs away\n" * 20)
    return path


@pytest.fixture
def what(text: Path) -> RunText:
    return RunText([str(text.parent)], "text", None, None, None, 300, 32, 1)


@pytest.fixture
def talks(tmp_path: Path) -> RunText:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TALKS))
    return RunText([str(path)], "text", "alpaca", "chatml", None, 300, 96, 1)


def make(folder: Path, what: RunText) -> list[str]:
    """What is said while it is made."""
    said: list[str] = []
    run_data.run_data(folder / "out", what, said.append, lambda progress: None)
    return said


def refused(folder: Path, what: RunText) -> str:
    with pytest.raises(DataError) as caught:
        make(folder, what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path) -> None:
    """Another text of the same size, a moment later."""
    before = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("cat", "cow"))
    os.utime(path, ns=(before + 1, before + 1))


def to_earlier_release(out: Path) -> None:
    """Leave the notes that were written before there were digests."""
    note = out / "tokenizer" / "trained_on.json"
    known = json.loads(note.read_text())
    note.write_text(json.dumps({"text": [file[:2] for file in known["data.text"]], "vocab_size": known["tokenizer.train"]}))
    (out / "data" / "made_of.json").unlink()


def test_it_is_made_once(tmp_path: Path, what: RunText, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.split()[0] for line in make(tmp_path, what)] == ["training", "40"]
    monkeypatch.setattr(run_data, "_digest", None)  # nothing is read if no file was written
    assert make(tmp_path, what) == []


def test_a_file_that_was_written_again_as_it_was_is_the_same(tmp_path: Path, what: RunText, text: Path) -> None:
    make(tmp_path, what)
    os.utime(text, ns=(1, 1))
    assert make(tmp_path, what) == []


@pytest.mark.parametrize("files", [1, 2])
def test_text_that_was_moved_is_the_same(tmp_path: Path, what: RunText, text: Path, files: int, monkeypatch: Any) -> None:
    """By its content, in the same order; a file of another size is not read."""
    for i in range(1, files):
        shutil.copy(text, text.parent / f"b{i}.txt")
    make(tmp_path, what)
    shutil.copytree(text.parent, tmp_path / "moved")
    moved = dataclasses.replace(what, text=[str(tmp_path / "moved")])
    assert make(tmp_path, moved) == []
    os.rename(tmp_path / "moved" / "a.txt", tmp_path / "moved" / "another.txt")
    assert make(tmp_path, moved) == []
    change(tmp_path / "moved" / "another.txt")
    assert "another data.text than now" in refused(tmp_path, moved)
    (tmp_path / "moved" / "another.txt").write_text("the cat")
    monkeypatch.setattr(run_data, "_digest", None)
    assert "another data.text than now" in refused(tmp_path, moved)


@pytest.mark.parametrize("own", [True, False])
def test_text_that_has_changed_is_refused_although_it_has_its_size(tmp_path: Path, what: RunText, text: Path, own: bool) -> None:
    """Whether or not the tokenizer is the run's own."""
    make(tmp_path, what)
    if not own:
        os.rename(tmp_path / "out" / "tokenizer", tmp_path / "tokenizer")
        what = dataclasses.replace(what, tokenizer=str(tmp_path / "tokenizer"), vocab_size=None)
    change(text)
    which = "tokenizer" if own else "data"
    assert f"out/{which} was made with another data.text than now, or of files that have changed since" in refused(tmp_path, what)


@pytest.mark.parametrize(
    ("other", "told"),
    [({"template": "alpaca"}, "data.template"), ({"length": 64}, "data.length"), ({"vocab_size": 290}, "tokenizer.train")],
)
def test_conversations_that_are_to_be_prepared_otherwise_are_refused(tmp_path: Path, talks: RunText, other: Any, told: str) -> None:
    make(tmp_path, talks)
    assert f"was made with another {told} than now" in refused(tmp_path, dataclasses.replace(talks, **other))


def test_another_handler_or_column_is_refused(tmp_path: Path, talks: RunText) -> None:
    make(tmp_path, talks)
    os.rename(tmp_path / "out" / "tokenizer", tmp_path / "tokenizer")
    other = dataclasses.replace(talks, tokenizer=str(tmp_path / "tokenizer"), handler=None, template=None, key="output")
    assert "was made with another data.key, data.handler, data.template, data.length than now" in refused(tmp_path, other)


def test_a_template_that_has_changed_is_refused(tmp_path: Path, talks: RunText) -> None:
    template = tmp_path / "talk.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}")
    what = dataclasses.replace(talks, template=str(template))
    make(tmp_path, what)
    assert make(tmp_path, what) == []
    template.write_text(template.read_text().replace("<", "["))
    os.utime(template, ns=(1, 1))
    assert "another data.template than now" in refused(tmp_path, what)


@pytest.mark.parametrize("change", ["template", "a token that it asks for", "a token that it does not ask for"])
def test_the_tokenizer_s_own_template_has_changed(tmp_path: Path, talks: RunText, change: str) -> None:
    make(tmp_path, talks)
    folder = tmp_path / "tokenizer"
    os.rename(tmp_path / "out" / "tokenizer", folder)
    shutil.rmtree(tmp_path / "out" / "data")
    config = {**read_config(str(folder)), "chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    what = dataclasses.replace(talks, tokenizer=str(folder), template=None)
    make(tmp_path, what)
    assert make(tmp_path, what) == []
    if change == "template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}{{ eos_token }}{% endfor %}")
    else:
        config["eos_token" if "it asks" in change else "unk_token"] = "<another>"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if "does not" in change:
        assert make(tmp_path, what) == []
    else:
        assert "data.template" in refused(tmp_path, what)


def test_a_template_that_is_not_there(tmp_path: Path, talks: RunText) -> None:
    said = refused(tmp_path, dataclasses.replace(talks, template="other"))
    assert said == "there is no chat template other: data.template takes chatml, alpaca, or a file"


def test_notes_of_earlier_releases_are_read(tmp_path: Path, what: RunText, text: Path) -> None:
    make(tmp_path, what)
    to_earlier_release(tmp_path / "out")
    said = make(tmp_path, what)
    assert len(said) == 2 and all("is of an earlier release, without digests: files of the same names and sizes" in x for x in said)
    text.write_text(text.read_text() + "and more\n")
    assert "another data.text than now" in refused(tmp_path, what)


@pytest.mark.parametrize("damage", [b"{", b"{}", b"[]", b"\xff\xfe", b"3", b'{"data.text": 3}', b"[" * 100000])
@pytest.mark.parametrize("note", ["tokenizer/trained_on.json", "data/made_of.json", "data/tokens_text_document.json"])
def test_damaged_notes(tmp_path: Path, what: RunText, note: str, damage: bytes) -> None:
    make(tmp_path, what)
    path = tmp_path / "out" / note
    path.write_bytes(damage)
    assert refused(tmp_path, what) == f"{path} is damaged: delete {path.parent}, it is made again"


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe"])
@pytest.mark.parametrize("note", ["plan.json", "000000.json"])
def test_damaged_notes_of_an_interrupted_run(tmp_path: Path, what: RunText, note: str, damage: bytes, monkeypatch: Any) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bmtrain_ms_base.data.prepare._finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, what)
    folder = tmp_path / "out" / "data" / "tokens.partial"
    found = next(path for path in folder.glob("*.json") if (path.name == "plan.json") == (note == "plan.json"))
    found.write_bytes(damage)
    assert refused(tmp_path, what) == f"{found} is damaged: delete {folder}, it is made again"


# The command #


def command(folder: Path, *more: str) -> int:
    sizes = ["--model.family=llama", "--model.dim_model=32", "--model.num_heads=4", "--model.dim_ff=48", "--model.num_layers=2"]
    return main(
        ["pretrain", f"--out={folder / 'out'}", f"--data.text={[str(folder / 'text')]}", "--tokenizer.train=300", *sizes, *more]
    )


def test_a_second_run_in_the_folder_is_refused_before_it_writes(tmp_path: Path, text: Path, monkeypatch: Any, capfd: Any) -> None:
    other = tmp_path / "other.txt"
    other.write_text("one two three\n" * 20)
    out, codes = tmp_path / "out", []

    def launch(*given: Any, **more: Any) -> int:
        if codes:
            return 0
        kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        codes.append(command(tmp_path, f"--data.text={[str(other)]}"))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
        return 0

    monkeypatch.setattr(pretrain, "launch", launch)
    assert command(tmp_path) == 0
    assert codes == [2]
    assert f"bmtrain-ms: another job saves to {out} (process {os.getpid()} on " in capfd.readouterr().err
    assert command(tmp_path) == 0  # the lock was let go


def test_a_folder_in_the_text_is_refused(tmp_path: Path, text: Path, capfd: Any) -> None:
    out = text.parent / "runs" / "mine"
    assert command(tmp_path, f"--out={out}") == 2
    assert f"out: {out} is in the folder {text.parent} of data.text, and would be read as text" in capfd.readouterr().err
    assert not out.parent.exists()


def test_warnings_are_written_as_errors_are(tmp_path: Path, text: Path, monkeypatch: Any, capfd: Any) -> None:
    """Without the line of source that raised them; and who imports the command has its own way again."""
    before = warnings.showwarning

    def launch(*given: Any, **more: Any) -> int:
        warnings.simplefilter("always")
        warnings.warn("few data", stacklevel=2)
        return 0

    monkeypatch.setattr(pretrain, "launch", launch)
    assert command(tmp_path) == 0
    assert "bmtrain-ms: few data" in capfd.readouterr().err.splitlines()
    assert warnings.showwarning is before
