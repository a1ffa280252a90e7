"""The work of `prepare`: a piece of a text becomes files of tokens, by themselves; done here, or by processes that this starts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Protocol, Sequence

import numpy as np

from . import rows
from .extras import DataError
from .instructions import InstructionRecipe
from .sources import Piece, Source
from .tokenizing import TextTokenizer, TokenizerError, load_tokenizer

_NAMED = 3  # places of wrong rows of a kind that are remembered for each piece
_TELL = 0.3  # seconds between two reports

Tell = Callable[[dict[str, Any]], None]


class PrepareError(DataError):
    """A text that cannot be prepared as it was asked for."""


def piece_file(folder: Path, number: int, part: str) -> Path:
    """Where a part of a piece's result lies; `json`, the counts, is written last: with it the piece is done."""
    return folder / f"{number:08}.{part}"


Document = list[list[list[int]]]  # for each result the ids of each sequence


class Recipe(Protocol):
    """How rows become documents.

    `characters`, `documents`: how much is made at a time.
    """

    characters: int
    documents: int

    def rows(self, piece: Piece) -> Iterator[tuple[str, Any, int]]:
        """(where it is, what `encode` takes or a `Problem`, how many characters it has) of each row of a piece."""
        ...

    def encode(self, held: Sequence[tuple[str, Any]]) -> tuple[list[Document], list[tuple[str, rows.Problem]]]:
        """The documents of some rows, and the rows that have none."""
        ...


class TextRecipe:
    """Rows of texts, of which each is a document: one result for each key.

    Args:
        tokenizer: that makes ids.
        keys: columns.
        end: what is put behind each document.
    """

    characters, documents = 1 << 18, 512

    def __init__(self, tokenizer: TextTokenizer, keys: Sequence[str], end: Sequence[int]):
        self._tokenizer, self._keys, self._end = tokenizer, keys, list(end)

    def rows(self, piece: Piece) -> Iterator[tuple[str, rows.Texts | rows.Problem, int]]:
        """The rows of a piece, see `Recipe.rows`."""
        for place, found in rows.documents(piece, self._keys):
            yield place, found, 0 if isinstance(found, rows.Problem) else sum(len(text) for texts in found for text in texts)

    def encode(self, held: Sequence[tuple[str, rows.Texts]]) -> tuple[list[Document], list[tuple[str, rows.Problem]]]:
        """The documents of some rows, see `Recipe.encode`."""
        encoded = iter(self._tokenizer.encode([text for _, document in held for texts in document for text in texts]))
        kept, wrong = [], []
        for place, document in held:
            # as Megatron does it: a sentence that has no tokens is none
            ids = [[found for found in itertools.islice(encoded, len(texts)) if found] for texts in document]
            empty = [key for key, sentences in zip(self._keys, ids) if not sentences]
            if empty:
                wrong.append((place, rows.Problem("empty", f"{empty[0]} has no tokens")))
                continue
            if self._end:
                for sentences in ids:
                    sentences[-1] = sentences[-1] + self._end
            kept.append(ids)
        return kept, wrong


class Worker:
    """Does pieces of a plan.

    Args:
        folder: where the plan is and results go.
        plan: see `prepare`.

    Raises:
        TokenizerError: the tokenizer is another one than that of the plan.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self._folder, self._skip, self._outputs = folder, set(plan["skip"]), len(plan["outputs"])
        sources = [Source(*source[:4]) for source in plan["sources"]]
        self._pieces = [Piece(sources[source], *rest) for source, *rest in plan["pieces"]]
        tokenizer = load_tokenizer(**plan["tokenizer"]["arguments"])
        if tokenizer.digest != plan["tokenizer"]["digest"]:
            raise TokenizerError(f"{plan['tokenizer']['arguments']['path']} is another tokenizer than when this began: start anew")
        self._dtype = np.dtype(plan["dtype"])
        if plan["instructions"] is None:
            end = [plan["tokenizer"]["end"]] if plan["append_eod"] else []
            self._recipe: Recipe = TextRecipe(tokenizer, plan["keys"], end)
        else:
            self._recipe = InstructionRecipe(plan["tokenizer"]["arguments"], plan["instructions"])

    def do(self, number: int, tell: Tell) -> dict[str, Any]:
        """Make the files of a piece; returns its counts.

        Args:
            number: of the piece.
            tell: is told counts so far, now and then.

        Raises:
            PrepareError: a row is wrong in a way that is not to be skipped.
            SourceError: the file cannot be read.
        """
        counts: dict[str, Any] = {"piece": number, "documents": 0, "tokens": [0] * self._outputs, "wrong": {}}
        names = [f"{key}.{part}" for key in range(self._outputs) for part in ("bin", "lengths", "documents")]
        told = time.monotonic()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(piece_file(self._folder, number, name), "wb")) for name in names]
            for batch in self._batches(number, counts):
                for key in range(self._outputs):
                    self._write(files[3 * key : 3 * key + 3], [texts[key] for texts in batch], counts, key)
                counts["documents"] += len(batch)
                if time.monotonic() - told > _TELL:
                    told = time.monotonic()
                    tell({name: counts[name] for name in ("piece", "documents", "tokens")})
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        done = piece_file(self._folder, number, "json")
        done.with_suffix(".new").write_text(json.dumps(counts))
        os.replace(done.with_suffix(".new"), done)
        return counts

    def _batches(self, number: int, counts: dict[str, Any]) -> Iterator[list[Document]]:
        """The documents of a piece, some at a time."""
        held: list[tuple[str, Any]] = []
        size = 0
        for place, found, characters in self._recipe.rows(self._pieces[number]):
            if isinstance(found, rows.Problem):
                self._wrong(number, place, found, counts)
                continue
            held.append((place, found))
            size += characters
            if size >= self._recipe.characters or len(held) >= self._recipe.documents:
                yield self._encoded(number, held, counts)
                held, size = [], 0
        yield self._encoded(number, held, counts)

    def _encoded(self, number: int, held: list[tuple[str, Any]], counts: dict[str, Any]) -> list[Document]:
        made, wrong = self._recipe.encode(held)
        for place, problem in wrong:
            self._wrong(number, place, problem, counts)
        return made

    def _write(self, files: Sequence[Any], batch: list[list[list[int]]], counts: dict[str, Any], key: int) -> None:
        lengths = np.array([len(ids) for sentences in batch for ids in sentences], "<i4")
        total = int(lengths.sum(dtype=np.int64))
        flat = itertools.chain.from_iterable(itertools.chain.from_iterable(batch))
        files[0].write(np.fromiter(flat, self._dtype, total).tobytes())
        files[1].write(lengths.tobytes())
        files[2].write(np.array([len(sentences) for sentences in batch], "<i4").tobytes())
        counts["tokens"][key] += total

    def _wrong(self, number: int, place: str, problem: rows.Problem, counts: dict[str, Any]) -> None:
        where = f"{self._pieces[number].source.path}, {place}: {problem.why}"
        if problem.kind not in self._skip:
            raise PrepareError(
                f"{where}; --skip {problem.kind} leaves out rows where {rows.PROBLEMS[problem.kind]}, and counts them"
            )
        entry = counts["wrong"].setdefault(problem.kind, {"rows": 0, "first": []})
        entry["rows"] += 1
        if len(entry["first"]) < _NAMED:
            entry["first"].append(where)


def main(folder: str) -> None:
    """Be a worker: numbers of pieces come in, a line each, and JSON goes out."""

    def tell(report: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()

    try:
        plan = json.loads((Path(folder) / "plan.json").read_text())
        worker = Worker(Path(folder), plan)
        tell({})
        for line in sys.stdin:
            tell({**worker.do(int(line), tell), "done": True})
    except (DataError, OSError) as error:
        tell({"error": str(error), "kind": type(error).__name__})


def command(folder: Path) -> tuple[list[str], dict[str, str]]:
    """How a worker is started: words and environment."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    code = (
        "import sys, bmtrain_ms_base.system as s; s.die_with(int(sys.argv[2])); "
        "from bmtrain_ms_base.data.pieces import main; main(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-c", code, str(folder), str(os.getpid())], environment
