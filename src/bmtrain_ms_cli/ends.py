"""How a job ended: its exit code, and the line that says who ended how first."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Sequence

from bmtrain_ms_base.system import signal_name

EXIT_STOPPED = 75  # what a rank ends with that was told to stop, and saved


@dataclass
class End:
    """How one rank ended.

    Attributes:
        pid: 0: nothing was noted of the rank, which may have run on another host.
        status: of `os.waitpid`; None: it is not known how the process ended.
        finished: whether its script came to its end: returned, raised, or called `sys.exit`.
        caused: whether it says that another rank's end was the reason.
        at: when, in seconds of `time.monotonic`.
        by_us: the launcher ended it, because of the others or of a signal.
        step, doing, error: what it noted last.
    """

    rank: int
    pid: int
    status: int | None
    finished: bool = True
    caused: bool = False
    at: float = 0.0
    by_us: bool = False
    step: int = 0
    doing: str = ""
    error: str = ""

    @property
    def signal(self) -> int:
        """The signal that killed the rank, or 0."""
        return os.WTERMSIG(self.status) if self.status is not None and os.WIFSIGNALED(self.status) else 0

    @property
    def code(self) -> int:
        """The exit code for the shell; 1 where a process left, by 0 or unseen, before its script came to its end."""
        if self.signal:
            return 128 + self.signal
        code = 0 if self.status is None else os.WEXITSTATUS(self.status)
        return code or (0 if self.finished and self.status is not None else 1)

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than at its end, with 0, or saved, with 75."""
        return not self.finished or self.code not in (0, EXIT_STOPPED)

    def __str__(self) -> str:
        who = f"rank {self.rank}" + (f" (pid {self.pid})" if self.pid else "")
        if self.status is None and not self.pid:
            how = "was never started, or its host is lost"
        elif self.signal:
            how = f"was killed by {signal_name(self.signal)}"
        elif self.status is None:
            how = "has ended, nobody knows how"
        elif not self.finished:
            how = f"left by os._exit({os.WEXITSTATUS(self.status)}) or the like, before its script came to its end"
        else:
            how = "failed" if self.error else f"ended with exit code {self.code}"
        where = (f" at step {self.step}" if self.step or self.doing else "") + (f", in {self.doing}" if self.doing else "")
        return who + " " + how + where + (f": {self.error}" if how == "failed" else "")


def judge(ends: Sequence[End], asked: int) -> tuple[int, str]:
    """The job's exit code, and what to say; nothing if all went well.

    Args:
        ends: of all ranks.
        asked: the signal by which the launcher was told to stop, or 0.
    """
    after = f" after {signal_name(asked)}" if asked else ""
    told = (signal.SIGINT if asked == signal.SIGINT else signal.SIGTERM, asked)  # what the ranks were told, see `supervise`
    own = [end for end in ends if end.failed and not end.by_us and not (asked and (end.caused or end.code - 128 in told))]
    if own:
        first = min(own, key=lambda end: (end.caused, end.at))
        return first.code, f"{first}; exit code {first.code}"
    if any(end.failed for end in ends):
        signum = asked or signal.SIGTERM
        saved = [str(end.rank) for end in ends if not end.failed]
        some = f" (rank {', '.join(saved)} came to an end)" if saved else ""
        return 128 + signum, f"the ranks were ended by {signal_name(signum)}, without a save{some}; exit code {128 + signum}"
    if any(end.code for end in ends):
        stopped = sum(end.code != 0 for end in ends)
        ranks = f"{stopped} rank{'s' if stopped > 1 else ''}"
        return EXIT_STOPPED, f"{ranks} stopped{after}, and may be resumed; exit code {EXIT_STOPPED}"
    return 0, ""
