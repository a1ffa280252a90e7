"""Data of ranks on several hosts, which may share a disk or have one each: who makes what is missing, and that all read the same.

[Note: storage] A *storage* is what some ranks have in common: what one of them writes, the others find under the same name. On a
disk of a cluster all ranks have one, without it those of each host. The first rank of a storage, its *builder*, makes what is
missing, and the others wait. They wait for its answer and not for a file, so that whatever goes wrong on one rank is said on all of
them: a builder that fails answers with its error, and one that dies is noticed by the collective, as anywhere else.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

from .extras import DataError

Gather = Callable[[Any], list[Any]]
"""Gives every rank's value, which JSON can hold, by rank; all ranks call it together."""
Made = TypeVar("Made")

_NAMED = 4  # hosts, in a message
_ROUND = 15.0  # seconds after which a builder says that it is still at work: collectives give up after some minutes


class StorageError(DataError):
    """What went wrong on some ranks, or differs among hosts; every rank raises the same."""


@dataclass(frozen=True)
class Place:
    """Where this rank stands.

    Attributes:
        rank: among all.
        host: any number that the ranks of a host have in common, and no others.
        local_rank: among the ranks of its host; one of them is 0.
        gather: what all ranks tell each other with.
        name: of the host, for messages.
    """

    rank: int
    host: int
    local_rank: int
    gather: Gather
    name: str = field(default_factory=socket.gethostname)


class Storage:
    """What this rank's files are shared with, and how ranks make and compare files together. All ranks make one, and call its
    methods together; see [Note: storage].

    Args:
        place: of this rank.
        folders: that files are to be made in, here; None: one that cannot be made or written, where nothing will be.
        shared: True: all ranks see the same files; False: those of a host do; None: find out, by files that are written to the
            folders and deleted.

    Attributes:
        place: of this rank.
        builder: whether it is this rank that makes what is missing.
        builders: all ranks that do, each for one storage.

    Raises:
        StorageError: ranks do not agree on `shared`, or a host has no rank of number 0.
    """

    def __init__(self, place: Place, folders: Sequence[Path | None] = (), shared: bool | None = None):
        self.place = place
        facts = place.gather([place.host, place.local_rank, place.name, shared, len(folders)])
        self._hosts: list[int] = [fact[0] for fact in facts]
        self._names: list[str] = [fact[2] for fact in facts]
        self._first = {host: rank for rank, (host, local, *_) in enumerate(facts) if local == 0}
        for host in dict.fromkeys(self._hosts):
            local = [fact[1] for fact in facts if fact[0] == host]
            if local.count(0) != 1:
                ranks = [rank for rank, other in enumerate(self._hosts) if other == host]
                raise StorageError(
                    f"ranks {_listed(ranks)} share a host and say that they are {_listed(local)} of it; one of them has to be 0: "
                    "give each host neighbouring ranks"
                )
        self._refuse_unlike("shared storage, and folders that may be shared", {rank: fact[3:] for rank, fact in enumerate(facts)})
        if shared is None and folders:
            seen = self._looked_for(folders)
        else:
            seen = [0 if shared else self._of_host]
        # ranks that have only some of the folders in common each count as having all for themselves: where they meet, locks help
        stores = [tuple(store) for store in place.gather(seen)]
        self.builders = [stores.index(store) for store in dict.fromkeys(stores)]
        self.builder = place.rank in self.builders

    @property
    def _of_host(self) -> int:
        return self._first[self.place.host]

    def _looked_for(self, folders: Sequence[Path | None]) -> list[int]:
        """For each folder the first rank of the first host whose file is seen here; this host's where there is none."""
        names = self.place.gather(f".bmtrain_ms-{secrets.token_hex(8)}.marker" if self.place.local_rank == 0 else "")
        written: list[Path] = []
        try:
            if self.place.local_rank == 0:
                for path in _written(folders, names[self.place.rank]):
                    written.append(path)
            self.place.gather(len(written))  # all are there
            found = [self._seen(folder, names) for folder in folders]
            self.place.gather(len(found))  # all have looked
            return found
        finally:
            for path in written:
                path.unlink(missing_ok=True)

    def _seen(self, folder: Path | None, names: Sequence[str]) -> int:
        if folder is None:
            return self._of_host
        return next((first for first in self._first.values() if (folder / names[first]).exists()), self._of_host)

    def described(self) -> str:
        """The storages, in words, for a log."""
        if len(self.builders) == 1:
            return f"all {len(self._names)} ranks share one storage"
        return f"{len(self.builders)} storages, what is missing is made on {self._on_hosts(self.builders)}"

    def together(self, what: str, make: Callable[[], Made]) -> Made:
        """What `make` returns on this rank, when it has returned on all of them.

        Args:
            what: is done, for the message: "opening the data".

        Raises:
            StorageError: it has failed on some rank; the message says which, and why.
        """
        return self._answered(what, make)

    def made(self, what: str, make: Callable[[bool], Made]) -> Made:
        """What `make(True)` returns on the builder of each storage, and then `make(False)` on all other ranks.

        Args:
            what: is made, for the message.
            make: makes what is missing if it is told so, and opens it; otherwise opens it only.

        Raises:
            StorageError: it has failed on some rank; the message says which, and why.
        """
        first = self._answered(what, lambda: make(True) if self.builder else None)
        rest = self._answered(what, lambda: None if self.builder else make(False))
        return first if self.builder else rest  # type: ignore[return-value]

    def refuse_other_settings(self, what: str, settings: Any) -> None:
        """Have all ranks be given the same.

        Args:
            what: they are, for the message.
            settings: JSON can hold them.

        Raises:
            StorageError: they are not.
        """
        self._refuse_unlike(what, dict(enumerate(self.place.gather(settings))))

    def _refuse_unlike(self, what: str, values: Mapping[int, Any]) -> None:
        kinds = {json.dumps(value): rank for rank, value in reversed(list(values.items()))}
        if len(kinds) > 1:
            told = "; ".join(
                f"{kind} on {self._on_hosts([rank])}" for kind, rank in sorted(kinds.items(), key=lambda item: item[1])
            )
            raise StorageError(f"ranks were given different {what}: {told}; give all of them the same")

    def refuse_differing(self, digests: Mapping[str, str]) -> None:
        """Compare what ranks read.

        Args:
            digests: name of a file -> digest of what it holds, in the same order on all ranks; names may differ. None on a rank
                that need not be compared, as another one of its host is.

        Raises:
            StorageError: they differ; the message says which file, and on which hosts.
        """
        given = {rank: list(row.items()) for rank, row in enumerate(self.place.gather(dict(digests))) if row}
        self._refuse_unlike("numbers of files", {rank: len(row) for rank, row in given.items()})
        for files in zip(*given.values()):
            named = dict(zip(given, files))
            kinds: dict[str, list[int]] = {}
            for rank, (_, digest) in named.items():
                kinds.setdefault(digest, []).append(rank)
            if len(kinds) > 1:
                held = "; ".join(f"{named[ranks[0]][0]} on {self._on_hosts(ranks)} has {kind}" for kind, ranks in kinds.items())
                raise StorageError(f"hosts have different data: {held}. Copy it from one host to the others, or prepare it anew")

    def _on_hosts(self, ranks: Sequence[int]) -> str:
        """Names of hosts with these ranks of theirs, of a few."""
        hosts: dict[int, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self._hosts[rank], []).append(rank)
        named = [f"{self._names[some[0]]} (rank {_listed(some)})" for some in list(hosts.values())[:_NAMED]]
        return ", ".join(named) + (f" and {len(hosts) - _NAMED:,} more hosts" if len(hosts) > _NAMED else "")

    def _answered(self, what: str, make: Callable[[], Made]) -> Made:
        """Make it in a thread, and tell each other from time to time that it is still being made."""
        work = _Work(make)
        while True:
            answers = self.place.gather(work.answer(_ROUND))
            if all(answer is not None for answer in answers):
                break
        failed = [rank for rank, answer in enumerate(answers) if answer]
        if failed:
            # one text for all that failed alike, as all ranks do where what they were given is wrong
            texts = {answers[rank]: [other for other in failed if answers[other] == answers[rank]] for rank in failed}
            told = "; ".join(f"{self._on_hosts(ranks)}: {text}" for text, ranks in texts.items())
            raise StorageError(f"{what} has failed on {told}") from work.error
        return work.result()


class _Work:
    """A function that runs in a thread, while this one goes on answering others."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made = make, None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="bmtrain_ms data")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made = self._make()
        except BaseException as error:  # whatever it is: the other ranks wait
            self.error = error

    def answer(self, seconds: float) -> str | None:
        """After so many seconds at most: None: it is at work; an empty text: done; or why it has failed."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return None
        return "" if self.error is None else str(self.error) or type(self.error).__name__

    def result(self) -> Any:
        return self._made


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _written(folders: Sequence[Path | None], name: str) -> Iterator[Path]:
    """Files of that name, where they can be made."""
    for folder in dict.fromkeys(folders):
        try:
            if folder is not None:
                os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                yield folder / name
        except OSError:  # then nothing will be made there either
            continue
