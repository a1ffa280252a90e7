"""`bmtrain-ms prepare`: the same bytes for any number of workers, wrong rows, interruptions, the command. No MindSpore here."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import pytest

from bmtrain_ms_base.data import GPTData, cutting, pieces, sources, train_tokenizer
from bmtrain_ms_base.data.indexed import IndexedFile
from bmtrain_ms_base.data.pieces import PrepareError
from bmtrain_ms_base.data.prepare import PrepareOptions, Progress, prepare
from bmtrain_ms_cli.main import main
from tests.helpers.hub import hub
from tests.helpers.tokens import golden_c

NULL = {"path": "1000", "kind": "null"}
NINE = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]


def exit_code(*words: Any) -> int:
    try:
        return main(["prepare", *(str(word) for word in words)])
    except SystemExit as error:  # argparse
        return error.code


def numbers(path: Path, documents: Sequence[Sequence[int]]) -> str:
    path.write_text("".join(json.dumps({"text": " ".join(map(str, ids)), "n": "7"}) + "\n" for ids in documents))
    return str(path)


def many(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 1000, draw.integers(1, 40)).tolist() for _ in range(count)]


def sha(*paths: Any) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


@pytest.fixture
def small_pieces(monkeypatch):
    """So that little text has many of them."""
    monkeypatch.setattr(cutting, "_LEAST", 2000)


def test_golden(tmp_path):
    """What Megatron makes of the same documents."""
    result = prepare(PrepareOptions([numbers(tmp_path / "c.jsonl", golden_c())], str(tmp_path / "c"), NULL))
    assert result.names == [f"{tmp_path}/c_text_document"] and (result.documents, result.tokens) == (20, [138])
    assert sha(f"{tmp_path}/c_text_document.bin", f"{tmp_path}/c_text_document.idx") == [
        "25f65b1876456bd85139ae50cf0438d025d7e469b22fd1fb54636c7eaf3de83c",
        "b74c80dfb3e73b71de6f08065eca5d7a10388b4fbeb366cf3d139b0c021a38dd",
    ]
    known = json.loads((tmp_path / "c_text_document.json").read_text())
    assert (known["documents"], known["tokens"], known["vocab_size"]) == (20, 138, 1001)
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", *(f"c_text_document.{end}" for end in ("bin", "idx", "json"))]


def test_32_bits_by_vocabulary(tmp_path):
    path = numbers(tmp_path / "b.jsonl", [[1, 2, 3], [70000], [5, 6]])
    prepare(PrepareOptions([path], str(tmp_path / "b"), {"path": "131072", "kind": "null"}))
    assert sha(f"{tmp_path}/b_text_document.bin") == ["001f7f2dafcfaf9544852b72b6a94d415d37089b6937b34aaa7954a3545f52fe"]
    assert sha(f"{tmp_path}/b_text_document.idx") == ["3058cb4b397c35fd3c28ad46de96ef68cbad794fb616e3338494e9893cf6628f"]


@pytest.mark.parametrize("prefix", ["", ".", "..", "~", "here/"])
def test_a_prefix_without_a_name_is_refused(tmp_path, monkeypatch, capsys, prefix):
    """Results would lie beside the folder that it names."""
    (tmp_path / "in" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    assert exit_code("--input", numbers(tmp_path / "x.jsonl", [[1, 2]]), "--output-prefix", prefix, *NINE) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bmtrain-ms: --output-prefix {prefix!r} ends without a name") and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["in", "x.jsonl"] and os.listdir(tmp_path / "in") == ["here"]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(tmp_path, small_pieces, workers):
    path = numbers(tmp_path / "x.jsonl", many(400))
    seen: list[tuple[int, int]] = []
    for count in (1, workers):
        options = PrepareOptions([path], str(tmp_path / str(count)), NULL, ["text", "n"], append_eod=True, workers=count)
        prepare(options, lambda progress: seen.append((progress.bytes, progress.documents)))
        assert seen[-1] == (os.path.getsize(path), 400)
    for name in ("text_document.bin", "text_document.idx", "text_document.json", "n_document.bin", "n_document.idx"):
        first, second = sha(f"{tmp_path}/1_{name}", f"{tmp_path}/{workers}_{name}")
        assert first == second
    file = IndexedFile(tmp_path / "1_text_document")
    assert [file.read(i).tolist() for i in range(len(file))] == [[*ids, 1000] for ids in many(400)]


def test_sentences_and_tokens_that_are_none(tmp_path):
    """A list of texts is a document of several sequences; one without tokens is none; `--append-eod` ends the document."""
    rows = [["1 2", " ", "3"], ["4"], [" "], "5 6"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    result = prepare(PrepareOptions([str(tmp_path / "x.jsonl")], str(tmp_path / "x"), NULL, append_eod=True))
    file = IndexedFile(result.names[0])
    assert [file.read(i).tolist() for i in range(len(file))] == [[1, 2], [3, 1000], [4, 1000], [5, 6, 1000]]
    assert file.ends.tolist() == [0, 2, 3, 4]
    assert result.wrong == {"empty": {"rows": 1, "first": [f"{tmp_path}/x.jsonl, line 3: text has no tokens"]}}


def test_wrong_rows_are_fatal_or_counted(tmp_path, small_pieces):
    lines = ['{"text": "1"}', '{"other": "1"}', '{"text": 5}', "{", '{"text": "\\ud800"}', '{"text": ""}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines * 200))
    path = str(tmp_path / "x.jsonl")
    for workers in (1, 2):
        with pytest.raises(
            PrepareError, match=r"x\.jsonl, .*: no text; --skip missing leaves out rows where it lacks a key, and counts them"
        ):
            prepare(PrepareOptions([path], str(tmp_path / "a"), NULL, workers=workers))
        kinds = ["missing", "not-text", "broken", "invalid", "empty"]
        result = prepare(PrepareOptions([path], str(tmp_path / str(workers)), NULL, workers=workers, skip=kinds))
        assert result.documents == 200 and {kind: entry["rows"] for kind, entry in result.wrong.items()} == dict.fromkeys(
            kinds, 200
        )
        assert result.wrong["missing"]["first"][0] == f"{path}, line 2: no text"
    with pytest.raises(PrepareError, match="in these ways: broken, missing, not-text, invalid, empty, long; not odd"):
        prepare(PrepareOptions([path], str(tmp_path / "b"), NULL, skip=["odd"]))


def test_what_is_there_is_not_replaced_in_silence(tmp_path):
    path = numbers(tmp_path / "x.jsonl", [[1]])
    prepare(PrepareOptions([path], str(tmp_path / "x"), NULL))
    with pytest.raises(PrepareError, match=r"x_text_document\.bin is there already: --overwrite replaces it, or choose another"):
        prepare(PrepareOptions([path], str(tmp_path / "x"), NULL))
    numbers(tmp_path / "x.jsonl", [[2], [3]])
    assert prepare(PrepareOptions([path], str(tmp_path / "x"), NULL, overwrite=True)).documents == 2


class StopError(Exception):
    """The run is interrupted here."""


def test_an_interrupted_run_goes_on(tmp_path, small_pieces, monkeypatch):
    """What is done is not done again, and the result is the same."""
    path = numbers(tmp_path / "x.jsonl", many(400))
    whole = prepare(PrepareOptions([path], str(tmp_path / "whole"), NULL))

    def stop(progress: Progress) -> None:
        if progress.documents > 150:
            raise StopError

    options = PrepareOptions([path], str(tmp_path / "x"), NULL)
    with pytest.raises(StopError):
        prepare(options, stop)
    assert not list(tmp_path.glob("x_text_document*"))
    done: list[int] = []
    do = pieces.Worker.do
    monkeypatch.setattr(pieces.Worker, "do", lambda self, number, tell: done.append(number) or do(self, number, tell))
    seen: list[Progress] = []
    result = prepare(options, seen.append)
    assert done[0] > 0 and seen[0].resumed > 0 and result.tokens == whole.tokens
    assert sha(*(f"{name}.{end}" for name in result.names for end in ("bin", "idx"))) == sha(
        *(f"{name}.{end}" for name in whole.names for end in ("bin", "idx"))
    )


def test_what_an_interrupted_run_left_is_of_its_own_settings(tmp_path):
    path = numbers(tmp_path / "x.jsonl", many(10))

    def stop(progress: Progress) -> None:
        raise StopError

    with pytest.raises(StopError):
        prepare(PrepareOptions([path], str(tmp_path / "x"), NULL), stop)
    other = PrepareOptions([path], str(tmp_path / "x"), NULL, append_eod=True)
    with pytest.raises(PrepareError, match=r"x\.partial is what an interrupted run has left, and its append_eod differ"):
        prepare(other)
    numbers(tmp_path / "x.jsonl", many(11))
    with pytest.raises(PrepareError, match="its sources, pieces differ"):
        prepare(PrepareOptions([path], str(tmp_path / "x"), NULL))
    assert prepare(PrepareOptions([path], str(tmp_path / "x"), NULL, restart=True)).documents == 11


def test_a_wrong_row_late_in_a_text(tmp_path, small_pieces, monkeypatch):
    """Whoever then skips its kind does not begin anew."""
    path = numbers(tmp_path / "x.jsonl", many(400))
    with open(path, "a") as file:
        file.write('{"other": 1}\n')
    with pytest.raises(PrepareError, match="no text; --skip missing"):
        prepare(PrepareOptions([path], str(tmp_path / "x"), NULL))
    with pytest.raises(PrepareError, match="its skip differ"):
        prepare(PrepareOptions([path], str(tmp_path / "x"), NULL, skip=["missing"]))
    seen: list[int] = []
    options = PrepareOptions([path], str(tmp_path / "x"), NULL, skip=["missing", "empty", "long"])
    result = prepare(options, lambda progress: seen.append(progress.documents))
    assert seen[0] > 300 and (result.documents, result.wrong["missing"]["rows"]) == (400, 1)


def test_only_one_at_a_time(tmp_path):
    path = numbers(tmp_path / "x.jsonl", many(10))
    options = PrepareOptions([path], str(tmp_path / "x"), NULL)

    def again(progress: Progress) -> None:
        with pytest.raises(PrepareError, match=r"another process is preparing .*/x at this time: wait for it"):
            prepare(options)

    prepare(options, again)


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    """Some clusters have them."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = numbers(tmp_path / "x.jsonl", many(10))
    name = prepare(PrepareOptions([path], str(tmp_path / "x"), NULL)).names[0]
    assert "x.partial is on a disk without locks: nothing keeps a second run away from it" in capsys.readouterr().err
    assert len(GPTData(name, 4, 8)) >= 4


@pytest.mark.parametrize("when", ["work", "finish"])
def test_killed_and_started_again(tmp_path, when):
    """By SIGKILL, in the middle of the pieces or while they are put together; workers end too."""
    path = numbers(tmp_path / "x.jsonl", many(3000))
    code = (
        "import os, sys, time\n"
        "from bmtrain_ms_base.data import cutting, indexed\n"
        "from bmtrain_ms_base.data import prepare as p\n"
        "cutting._LEAST = 20000\n"
        "def stop(*_): print('now', flush=True); time.sleep(60)\n"
        "show = (lambda x: x.documents > 600 and stop()) if sys.argv[3] == 'work' else lambda x: None\n"
        "if sys.argv[3] == 'finish': indexed.write_index = stop\n"
        "options = p.PrepareOptions([sys.argv[1]], sys.argv[2], {'path': '1000', 'kind': 'null'}, workers=2)\n"
        "p.prepare(options, show)\n"
    )
    root = str(Path(sources.__file__).resolve().parents[2])
    command = [sys.executable, "-c", code, path, str(tmp_path / "x"), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as process:
        assert process.stdout is not None and process.stdout.readline() == b"now\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("*.idx")) and not list(tmp_path.glob("*.bin"))
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):  # killed with the one that started them
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = subprocess.run(
        [sys.executable, "-c", code, path, str(tmp_path / "x"), ""], env={**os.environ, "PYTHONPATH": root}, timeout=60
    )
    assert done.returncode == 0
    file = IndexedFile(tmp_path / "x_text_document")
    assert file.documents == 3000 and file.read(2999).tolist() == many(3000)[-1]


@pytest.mark.parametrize("every", [False, True])
def test_a_worker_that_is_killed(tmp_path, small_pieces, every):
    """The others end, what is done is kept, and the message says so; also where who has just reported is gone already."""
    path = numbers(tmp_path / "x.jsonl", many(2000))
    options = PrepareOptions([path], str(tmp_path / "x"), NULL, workers=2)

    def kill(progress: Progress) -> None:
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            if b"data.pieces" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                while Path(f"/proc/{child}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX":
                    time.sleep(0.001)
                if not every:
                    return

    with pytest.raises(PrepareError, match=r"a worker ended with code -9; what is done is kept: run it again"):
        prepare(options, kill)
    assert prepare(options).documents == 2000


# The command #


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tok").mkdir()
    train_tokenizer(["the cat sat on the mat"] * 9, 280).save(str(tmp_path / "tok" / "tokenizer.json"))
    return str(tmp_path / "tok")


def test_modellinks_command(tmp_path, tokenizer, capsys):
    """Parquet in, the same flags, the same names out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"instruction": ["a", "b"], "text": ["the cat", "the mat <|endoftext|>"]}), tmp_path / "alpaca.parquet")
    words = [
        "--input",
        tmp_path / "alpaca.parquet",
        "--tokenizer-name-or-path",
        tokenizer,
        "--output-prefix",
        tmp_path / "out" / "alpaca",
    ]
    assert exit_code(*words, "--workers", 4, "--log-interval", 1000, "--tokenizer-type", "PretrainedFromHF") == 0
    output = capsys.readouterr()
    file = IndexedFile(tmp_path / "out" / "alpaca_text_document")
    assert output.out == f"{file.name}: 2 documents, {file.tokens:,} tokens\n"
    assert exit_code(*words, "--append-eod", "--overwrite", "--json-keys", "text", "instruction") == 0
    assert IndexedFile(file.name).read(1)[-1] == 0 and IndexedFile(f"{tmp_path}/out/alpaca_instruction_document").documents == 2
    assert "prepare: 100%" in capsys.readouterr().err


def test_lines_of_a_log(tmp_path, capsys):
    """None is missed, whatever the interval."""
    path = numbers(tmp_path / "x.jsonl", many(2000))
    words = ["--input", path, "--tokenizer-type", "NullTokenizer", "--vocab-size", 1000, "--output-prefix", tmp_path / "x"]
    assert exit_code(*words, "--log-interval", 30) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 1 and lines[-1].startswith("2,000 documents, ") and lines[-1].endswith(" tokens/s")


def test_a_folder_names_what_it_leaves_out(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    numbers(tmp_path / "in" / "x.jsonl", [[1], [2]])
    (tmp_path / "in" / "LICENSE").write_text("")
    (tmp_path / "in" / "y.txt").write_text("3\n\n4")
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 9, "--log-interval", 99]
    assert exit_code("--input", tmp_path / "in", *words, "--output-prefix", tmp_path / "x") == 0
    out = capsys.readouterr().out
    assert f"left out, as it is of no kind that can be read: {tmp_path}/in/LICENSE\n" in out
    assert f"rows: 1 left out where there is nothing in it (e.g. {tmp_path}/in/y.txt, line 2: text is empty)\n" in out
    assert IndexedFile(tmp_path / "x_text_document").span(0, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "words, text",
    [
        (["--tokenizer-name-or-path", "nowhere"], "bmtrain-ms: there is no tokenizer nowhere"),
        ([], "bmtrain-ms: which tokenizer? auto needs --tokenizer-name-or-path"),
        (["--tokenizer-type", "NullTokenizer"], "bmtrain-ms: which tokenizer? NullTokenizer needs --vocab-size"),
        (["--partitions", "4"], "prepare: --partitions is not known here: all workers write at the same time anyway; leave it out"),
        (["--split-sentences"], "--split-sentences is not known here: a column that holds a list of texts"),
        (
            ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--json-keys", "a", "a"],
            "keys are one or several different ones",
        ),
        ([*NINE, "--json-keys", "a/b"], "cannot have a slash: a/b"),
        (NINE, "reads numbers below 9 only"),
        ([*NINE, "--map-keys", "["], "argument --map-keys: is no JSON: Expecting value"),
        ([*NINE, "--map-keys", "[" * 100000], "argument --map-keys: is no JSON: maximum recursion depth exceeded"),
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "9" * 23], "up to 2,147,483,647, not '99999999999999999999999'"),
    ],
)
def test_what_is_refused(tmp_path, capsys, words, text):
    path = numbers(tmp_path / "x.jsonl", [[500]])
    assert exit_code("--input", path, "--output-prefix", tmp_path / "x", *words) == 2
    assert text in capsys.readouterr().err


def test_a_tokenizer_without_an_end(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(PrepareError, match=r"does not say which token ends a document; name it: --eod-token"):
        prepare(PrepareOptions([str(tmp_path / "x.txt")], str(tmp_path / "x"), {"path": str(tmp_path)}, append_eod=True))


def test_nothing_left(tmp_path):
    (tmp_path / "x.txt").write_text("\n\n")
    with pytest.raises(PrepareError, match=r"no document is left of .*x\.txt: 2 left out where there is nothing in it"):
        prepare(PrepareOptions([str(tmp_path / "x.txt")], str(tmp_path / "x"), NULL))


def test_a_name_on_a_hub(tmp_path):
    """Rows and tokenizer are fetched, from where HF_ENDPOINT says; other files are not."""
    train_tokenizer(["the cat"] * 9, 260).save(str(tmp_path / "tokenizer.json"))
    files = {"data/x.jsonl": b'{"text": "the cat"}\n{"text": "on"}\n', "README.md": b"", "model.safetensors": b"large"}
    tokenizer = {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes(), "model.safetensors": b"large"}
    with hub("some/texts", files) as (rows, asked), hub("some/model", tokenizer, "models") as (models, _):
        code = (
            "import os, sys\n"
            "from bmtrain_ms_base.data.sources import download\n"
            "from bmtrain_ms_base.data.tokenizing import load_tokenizer\n"
            "from bmtrain_ms_cli.main import main\n"
            f"os.environ['HF_ENDPOINT'] = {models!r}\n"
            "print(len(load_tokenizer('hf:some/model').encode(['the cat'])[0]))\n"
            "folder = download('hf:some/model', 'model', ['tokenizer.json'])\n"
            f"os.environ['HF_ENDPOINT'] = {rows!r}\n"
            "words = ['--tokenizer-name-or-path', folder, '--log-interval', '99', '--output-prefix', sys.argv[1]]\n"
            "assert main(['prepare', '--input', 'hf:some/texts', *words]) == 0\n"
            "sys.exit(main(['prepare', '--input', 'hf:some/nothing', *words]))\n"
        )
        root = str(Path(sources.__file__).resolve().parents[2])
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": root, "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", code, str(tmp_path / "x")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2 and f"bmtrain-ms: hf:some/nothing cannot be fetched from {rows}: " in done.stderr, done.stderr
    assert IndexedFile(tmp_path / "x_text_document").documents == 2
    assert any(path.endswith("x.jsonl") for path in asked) and not any(path.endswith("safetensors") for path in asked)
