"""`bmtrain-ms tokenizer`: who trains one in a folder is alone there, and asks for no more than there is. No MindSpore here."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms_base.data import new_tokenizer
from bmtrain_ms_base.data.tokenizing import load_tokenizer
from bmtrain_ms_cli.main import main


def train(folder: Path, *more: str, text: str = "the cat sees a dog\n" * 20) -> int:
    (folder / "a.txt").write_text(text)
    return main(["tokenizer", "--input", str(folder / "a.txt"), "--output", str(folder / "tok"), "--vocab-size", "280", *more])


def test_two_at_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The second one is refused before it trains, and the first one's is whole."""
    real, codes = new_tokenizer.train_tokenizer, []

    def training(*given: Any) -> Any:
        if not codes:
            codes.append(train(tmp_path, "--vocab-size", "270"))
        return real(*given)

    monkeypatch.setattr(new_tokenizer, "train_tokenizer", training)
    assert train(tmp_path) == 0 and codes == [2]
    error = capsys.readouterr().err
    assert error == f"bmtrain-ms: another process is training a tokenizer in {tmp_path}/tok at this time: choose another folder\n"
    assert load_tokenizer(str(tmp_path / "tok")).vocab_size > 270
    assert sorted(os.listdir(tmp_path / "tok")) == ["tokenizer.json", "tokenizer_config.json"]
    assert train(tmp_path) == 2
    assert f"there is a tokenizer in {tmp_path}/tok already" in capsys.readouterr().err


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train(tmp_path) == 0
    assert "tok is on a disk without locks: nothing keeps a second run away from it" in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
def test_no_text_leaves_no_folder(tmp_path: Path, capsys: Any, there: bool) -> None:
    if there:
        (tmp_path / "tok").mkdir()
    assert train(tmp_path, text="\n") == 2
    assert "has text in text" in capsys.readouterr().err and (tmp_path / "tok").exists() == there


@pytest.mark.parametrize("size", [10**11, 10**18, 10**30])
def test_more_tokens_than_memory_has_room_for(tmp_path: Path, capsys: Any, size: int) -> None:
    """The library ends the process where it is asked for them."""
    assert train(tmp_path, "--vocab-size", str(size)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bmtrain-ms: a tokenizer with {size:,} tokens takes ") and error.count("\n") == 1
    assert not (tmp_path / "tok").exists()
