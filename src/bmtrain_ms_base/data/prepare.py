"""Text to Megatron's indexed files: `P_text_document.bin` and `.idx`, whatever the number of workers, in bounded memory.

Sources are cut into pieces, by their size alone; each piece becomes files in the folder `P.partial`, and these, in order, the
result. What is done of an interrupted run is there and is not done again; under the result's names nothing is before all of it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from . import indexed, notes, rows, sources
from .cutting import cut
from .extras import MissingLibraryError, read_note
from .instructions import OUTPUTS, InstructionRecipe
from .pieces import PrepareError, Worker, command, piece_file
from .tokenizing import TokenizerError, load_tokenizer

_OWN = re.compile(r"lock|finishing|plan\.(json|new)|\d{8,}\.(\d+\.)?\w+")  # names of files of the folder
_FINISHING = "finishing"  # in the folder: results are being put in place


@dataclass(frozen=True)
class PrepareOptions:
    """What is to be prepared, and how.

    Attributes:
        inputs: files, folders and names on a hub, see `find_sources`.
        prefix: of the result: `prefix_KEY_document.bin` and `.idx`.
        tokenizer: arguments of `load_tokenizer`.
        keys: columns; each has a result of its own, and document i of all of them is the same row.
        instructions: settings of `InstructionRecipe`: rows are conversations and results `OUTPUTS`; `keys` do not count then.
        append_eod: put the tokenizer's end of document behind each document.
        workers: processes; 1: none but this one.
        skip: kinds of wrong rows that are left out and counted, of `rows.PROBLEMS`; all others end the run.
        overwrite: replace a result that is there.
        restart: throw away what another run has left, instead of refusing it.
    """

    inputs: Sequence[str]
    prefix: str
    tokenizer: dict[str, Any]
    keys: Sequence[str] = ("text",)
    instructions: dict[str, Any] | None = None
    append_eod: bool = False
    workers: int = 1
    skip: Sequence[str] = ("empty", "long")
    overwrite: bool = False
    restart: bool = False


@dataclass
class Progress:
    """How far a run is: `bytes` of the `total` of the sources, `documents`, `tokens`; of these `resumed` were there before."""

    total: int
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    resumed: int = 0


@dataclass
class Prepared:
    """What has been made.

    Attributes:
        names: of the pairs, without an ending, one for each key.
        documents: in each of them.
        tokens: in each of them.
        wrong: rows that were left out: for each kind their number, `rows`, and the `first` places.
        left_out: files of folders that are of no kind that can be read.
    """

    names: list[str]
    documents: int
    tokens: list[int]
    wrong: dict[str, Any]
    left_out: list[str] = field(default_factory=list)


def prepare(options: PrepareOptions, report: Callable[[Progress], None] = lambda progress: None) -> Prepared:
    """Prepare a text; `report` is called now and then.

    Raises:
        PrepareError: options that do not fit together, results that are there already, another run that is at it or was
            interrupted, a wrong row that is not to be skipped, or nothing left.
        SourceError: a file cannot be read.
        TokenizerError: the tokenizer cannot.
        MissingLibraryError: a library is not installed.
    """
    plan, left_out = _plan(options)
    prefix = os.path.abspath(os.path.expanduser(options.prefix))
    names = [f"{prefix}_{output}_document" for output in plan["outputs"]]
    folder = Path(prefix + ".partial")
    resumed = not options.restart and (folder / "plan.json").is_file()
    begun = resumed and (folder / _FINISHING).exists()  # then results may be those of this very run
    _refuse_lost(names, plan, options.overwrite or begun)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _begin(folder, plan, options.restart)
        counts = _work(folder, plan, options.workers, report)
        result = _sum_up(names, counts, left_out)
        if not result.documents:
            raise PrepareError(f"no document is left of {', '.join(options.inputs)}: {describe_wrong(result.wrong)}")
        _finish(folder, plan, names, result)
        shutil.rmtree(folder)
    return result


def _refuse_lost(names: Sequence[str], plan: dict[str, Any], overwrite: bool) -> None:
    """Before anything is written: what would be lost. A result is a pair, and the note beside it, whose name may be a text's."""
    found = [name + end for name in names for end in notes.ENDS if os.path.lexists(name + end)]
    if not found:
        return
    texts = {_identity(source[0]) for source in plan["sources"]}
    for path in found:
        if os.path.exists(path) and _identity(path) in texts:
            raise PrepareError(f"{path} is text to be prepared, and a result would replace it: choose another --output-prefix")
        if path.endswith(".json") and notes.is_foreign(path):
            raise PrepareError(
                f"{path} is there already, and prepare has not written it, so that it is not replaced: choose another "
                "--output-prefix, or move it away"
            )
    if not overwrite:
        raise PrepareError(f"{found[0]} is there already: --overwrite replaces it, or choose another --output-prefix")


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def describe_wrong(wrong: dict[str, Any]) -> str:
    """The rows that were left out, in words: how many of which kind, and where the first ones are."""
    if not wrong:
        return "there are no rows"
    return "; ".join(
        f"{entry['rows']:,} left out where {rows.PROBLEMS[kind]} (e.g. {entry['first'][0]})"
        for kind, entry in sorted(wrong.items())
    )


def _plan(options: PrepareOptions) -> tuple[dict[str, Any], list[str]]:
    """All that the result depends on, and so nothing of workers."""
    unknown = [kind for kind in options.skip if kind not in rows.PROBLEMS]
    if unknown:
        raise PrepareError(f"rows are wrong in these ways: {', '.join(rows.PROBLEMS)}; not {', '.join(unknown)}")
    if not options.keys or len(set(options.keys)) < len(options.keys):
        raise PrepareError(f"keys are one or several different ones, not {', '.join(options.keys) or 'none'}")
    if os.path.basename(options.prefix) in ("", ".", "..", "~"):
        raise PrepareError(
            f"--output-prefix {options.prefix!r} ends without a name, and results would be beside that folder: put one behind it, "
            f"as {os.path.join(options.prefix, 'text')}"
        )
    if any("/" in key or "\0" in key for key in options.keys):
        raise PrepareError(f"a key is part of the result's name and cannot have a slash: {', '.join(options.keys)}")
    tokenizer = load_tokenizer(**options.tokenizer)
    if options.append_eod and tokenizer.end is None:
        raise PrepareError(f"{options.tokenizer['path']} does not say which token ends a document; name it: --eod-token")
    found, left_out = sources.find_sources(options.inputs)
    talks = options.instructions is not None
    if options.instructions is not None:
        InstructionRecipe(options.tokenizer, options.instructions)  # or it says what is wrong
    pieces = cut(found, [] if talks else options.keys)
    numbers = {source.path: number for number, source in enumerate(found)}
    return {
        "version": 1,
        "sources": [[*dataclasses.astuple(source), os.stat(source.path).st_mtime_ns] for source in found],
        "pieces": [[numbers[piece.source.path], piece.start, piece.stop, piece.size] for piece in pieces],
        "keys": list(options.keys),
        "instructions": options.instructions,
        "outputs": list(OUTPUTS if talks else options.keys),
        "tokenizer": {"arguments": options.tokenizer, "digest": tokenizer.digest, "end": tokenizer.end},
        "vocab_size": tokenizer.vocab_size,
        "append_eod": options.append_eod,
        "dtype": "<i4" if talks else indexed.token_type(tokenizer.vocab_size).str,  # labels may be -100
        "skip": sorted(options.skip),
    }, left_out


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(f"another process is preparing {folder.with_suffix('')} at this time: wait for it") from error
        except OSError:  # some clusters' disks have no locks
            sys.stderr.write(f"{folder} is on a disk without locks: nothing keeps a second run away from it\n")
        yield


def _begin(folder: Path, plan: dict[str, Any], restart: bool) -> None:
    """Go on with what the folder has, if it is of this plan."""
    other = sorted(path.name for path in folder.iterdir() if not _OWN.fullmatch(path.name))
    if other:  # it would be deleted
        raise PrepareError(f"{folder} is for what a run leaves, and has {other[0]} in it: choose another --output-prefix")
    file = folder / "plan.json"
    if file.is_file() and not restart:
        before = read_note(file, dict)
        other = [name for name in plan if before.get(name) != plan[name]]
        if not other:
            return
        if other == ["skip"] and set(before["skip"]) <= set(plan["skip"]):  # what is done had no row of the kinds that are new
            _write_plan(file, plan)
            return
        raise PrepareError(
            f"{folder} is what an interrupted run has left, and its {', '.join(other)} differ from those of this one: "
            "give it the same to go on, or --restart to throw that away"
        )
    for old in folder.iterdir():
        if old.name != "lock":
            old.unlink()
    _write_plan(file, plan)


def _write_plan(file: Path, plan: dict[str, Any]) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(plan))
    os.replace(new, file)


def _work(folder: Path, plan: dict[str, Any], workers: int, report: Callable[[Progress], None]) -> list[dict[str, Any]]:
    """The counts of all pieces, in order, as soon as all are done."""
    if workers < 1:
        raise PrepareError(f"--workers must be at least 1, not {workers}")
    tally = _Tally(folder, [piece[3] for piece in plan["pieces"]], report)
    waiting = [number for number, found in enumerate(tally.counts) if found is None]
    if workers == 1 or len(waiting) < 2:
        with _one_thread():
            worker = Worker(folder, plan) if waiting else None
            for number in waiting:
                if worker is not None:
                    tally.tell({**worker.do(number, tally.tell), "done": True})
    else:
        _share(folder, waiting, min(workers, len(waiting)), tally.tell)
    return [found for found in tally.counts if found is not None]


class _Tally:
    """What is done, and how far the rest is."""

    def __init__(self, folder: Path, sizes: list[int], report: Callable[[Progress], None]):
        self._sizes, self._report = sizes, report
        self._progress = Progress(sum(sizes))
        self._told: dict[int, tuple[int, int]] = {}  # documents and tokens of pieces that are under way
        self.counts: list[dict[str, Any] | None] = [None] * len(sizes)
        for number in range(len(sizes)):
            note = piece_file(folder, number, "json")
            if note.exists():
                self.tell({**read_note(note, dict), "done": True}, aloud=False)
        self._progress.resumed = self._progress.tokens
        report(self._progress)

    def tell(self, now: dict[str, Any], aloud: bool = True) -> None:
        """A worker's report: counts of a piece, so far or, where it is done, in all."""
        if "piece" not in now:
            return
        number, documents, tokens = now["piece"], now["documents"], sum(now["tokens"])
        before = self._told.get(number, (0, 0))
        self._told[number] = documents, tokens
        self._progress.documents += documents - before[0]
        self._progress.tokens += tokens - before[1]
        if now.get("done"):
            self.counts[number] = now
            del self._told[number]
            self._progress.bytes += self._sizes[number]
        if aloud:
            self._report(self._progress)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep `tokenizers` from taking all cores inside the `with` block."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _share(folder: Path, waiting: list[int], workers: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Have workers do pieces, the next one for whoever is done with its last."""
    reports: queue.Queue[tuple[int, str | None]] = queue.Queue()
    words, environment = command(folder)

    def listen(which: int, pipe: Any) -> None:
        for line in pipe:
            reports.put((which, line))
        reports.put((which, None))

    started: list[subprocess.Popen[str]] = []
    left = iter(waiting)
    try:
        for which in range(workers):
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True))
            threading.Thread(target=listen, args=(which, started[-1].stdout), daemon=True).start()
        open_workers = workers
        while open_workers:
            which, line = reports.get()
            if line is None:
                open_workers -= 1
                if started[which].wait():
                    raise PrepareError(f"a worker ended with code {started[which].returncode}; what is done is kept: run it again")
                continue
            told = json.loads(line)
            if "error" in told:
                raise _error(told)
            tell(told)
            if not told or told.get("done"):
                number = next(left, None)
                stdin: Any = started[which].stdin
                with contextlib.suppress(BrokenPipeError):  # it has ended since, which comes behind all that it has said
                    if number is None:
                        stdin.close()
                    else:
                        stdin.write(f"{number}\n")
                        stdin.flush()
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not sent yet has no reader any more
                    pipe.close()  # type: ignore[union-attr]


def _error(told: dict[str, Any]) -> Exception:
    kinds = {kind.__name__: kind for kind in (sources.SourceError, TokenizerError, MissingLibraryError)}
    return kinds.get(told["kind"], PrepareError)(told["error"])


def _sum_up(names: list[str], counts: list[dict[str, Any]], left_out: list[str]) -> Prepared:
    wrong: dict[str, Any] = {}
    for found in counts:
        for kind, entry in found["wrong"].items():
            total = wrong.setdefault(kind, {"rows": 0, "first": []})
            total["rows"] += entry["rows"]
            total["first"] = (total["first"] + entry["first"])[:3]
    tokens = [sum(found["tokens"][key] for found in counts) for key in range(len(names))]
    return Prepared(names, sum(found["documents"] for found in counts), tokens, wrong, left_out)


def _finish(folder: Path, plan: dict[str, Any], names: Sequence[str], result: Prepared) -> None:
    """Put the pieces of all keys together; they stay until that is done, so that this can be interrupted too.

    What is there already is replaced when everything is complete, and on disk: a full disk leaves the old result as it was.
    """
    (folder / _FINISHING).touch()
    try:
        for key, name in enumerate(names):
            _join(folder, plan, key, name, result)
    except BaseException:
        indexed.remove(*(f"{name}{end}.partial" for name in names for end in notes.ENDS))
        raise
    for name in names:
        indexed.put(name, note=True)


def _join(folder: Path, plan: dict[str, Any], key: int, name: str, result: Prepared) -> None:
    """Write a key's three files, to disk, under names that tell that they are not all."""

    def parts(part: str) -> list[str]:
        return [str(piece_file(folder, number, f"{key}.{part}")) for number in range(len(plan["pieces"]))]

    digest = indexed.join(parts("bin"), name + ".bin.partial")
    labels_only = plan["instructions"] is not None and key > 0  # masks and labels are no ids
    known = {
        "hash": digest,
        "documents": result.documents,
        "tokens": result.tokens[key],
        "vocab_size": None if labels_only else plan["vocab_size"],
        "tokenizer": plan["tokenizer"],
        "append_eod": plan["append_eod"],
        "key": plan["outputs"][key],
        "sources": [source[:4] for source in plan["sources"]],
        "wrong": result.wrong,
    }
    notes.write_note(name + ".json.partial", known)
    indexed.complete(name, parts("lengths"), parts("documents"), np.dtype(plan["dtype"]))
