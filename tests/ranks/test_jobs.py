"""However a job ends: its exit code is the documented one, its last line says who ended how, and nothing of it is left.

Most scripts need no MindSpore: the launcher does not depend on what it runs.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.jobs import job, says, until

pytestmark = pytest.mark.ranks

LAUNCHERS = [("auto", 1), ("auto", 2), ("mpi", 1), ("mpi", 2)]
WAIT = "note('here', os.getpid()); time.sleep(300)"
SAVE = """
def save(signum, frame):
    note('told', signum)
    sys.exit(75)
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, save)
"""

# what the last rank does -> exit code, last line ({} is its number)
ENDS = {
    "pass": (0, None),
    "sys.exit(0)": (0, None),
    "sys.exit(3)": (3, "rank {} PID ended with exit code 3; exit code 3"),
    "sys.exit('a reason')": (1, "rank {} PID failed: a reason; exit code 1"),
    "raise ValueError('one\\ntwo')": (1, "rank {} PID failed: ValueError: one; exit code 1"),
    "os._exit(0)": (1, r"rank {} PID left by os._exit\(0\) or the like, before its script came to its end; exit code 1"),
    "os._exit(9)": (9, r"rank {} PID left by os._exit\(9\) or the like, before its script came to its end; exit code 9"),
    "os.kill(os.getpid(), signal.SIGKILL)": (137, "rank {} PID was killed by SIGKILL; exit code 137"),
    "os.kill(os.getpid(), signal.SIGSEGV)": (139, "rank {} PID was killed by SIGSEGV; exit code 139"),
    "sys.exit(75)": (75, "1 rank stopped, and may be resumed; exit code 75"),
}


@pytest.mark.parametrize(("launcher", "ranks"), [("auto", 1), ("auto", 2), ("mpi", 2)])
@pytest.mark.parametrize("action", ENDS)
def test_how_a_rank_ends_is_said(tmp_path: Path, launcher: str, ranks: int, action: str):
    """The other one comes to its end."""
    code, line = ENDS[action]
    body = f"if RANK == {ranks - 1}:\n    {action}".replace("one\ntwo", "one\\ntwo")
    with job(tmp_path, body, ranks, launcher) as made:
        assert made.ended() == code, made.err
        assert (made.err == "") if line is None else says(made.last_line, line.format(ranks - 1)), made.err
        if "ValueError" in action:
            lines = [text for text in made.err.splitlines() if text.startswith(f"[rank {ranks - 1}] ")]
            assert lines[0].endswith("Traceback (most recent call last):") and "job.py" in lines[1]
            assert lines[-2].endswith("ValueError: one") and lines[-1].endswith("] two")


@pytest.mark.parametrize("launcher", ["auto", "mpi"])
def test_a_killed_rank_with_children_ends_the_job_and_stuck_ranks_show_their_stacks(tmp_path: Path, launcher: str):
    """A data worker holds the output and a session of its own; the other rank notices nothing by itself."""
    body = """
    leave_a_child()
    def stuck():
        time.sleep(300)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    stuck()
    """
    with job(tmp_path, body, 2, launcher) as made:
        assert made.ended() == 137
        assert says(made.last_line, "rank 1 PID was killed by SIGKILL; exit code 137"), made.err
        assert "rank 0 (pid" in made.err and "is still there; its stacks:" in made.err and "in stuck" in made.err


@pytest.mark.parametrize(("launcher", "ranks"), LAUNCHERS)
def test_a_child_that_is_left_at_a_normal_end_keeps_nobody_waiting(tmp_path: Path, launcher: str, ranks: int):
    with job(tmp_path, "leave_a_child()", ranks, launcher) as made:
        assert made.ended() == 0, made.err
        assert made.err == ""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_a_signal_to_the_command_asks_the_ranks_to_save(tmp_path: Path, signum: int):
    """Each gets one signal, although the command gets two at once: Slurm and terminals signal more than one process."""
    with job(tmp_path, SAVE + WAIT, 2) as made:
        made.written("here")
        for _ in range(2):
            made.process.send_signal(signum)
        assert made.ended() == 75, made.err
        name = signal.Signals(signum).name
        assert says(made.last_line, f"2 ranks stopped after {name}, and may be resumed; exit code 75")
        assert made.written("told") == [signum if signum == signal.SIGINT else signal.SIGTERM] * 2


@pytest.mark.parametrize(("launcher", "ranks"), [("auto", 1), ("mpi", 2)])
def test_ranks_that_do_not_save_end_by_the_signal(tmp_path: Path, launcher: str, ranks: int):
    with job(tmp_path, WAIT, ranks, launcher) as made:
        made.written("here")
        made.process.send_signal(signal.SIGTERM)
        assert made.ended() == 143
        assert says(made.last_line, "the ranks were ended by SIGTERM, without a save; exit code 143")


@pytest.mark.parametrize(("launcher", "ranks"), [("auto", 1), ("mpi", 2)])
@pytest.mark.parametrize("code", [0, 75])
def test_a_signal_behind_the_end_of_the_scripts_does_not_undo_it(tmp_path: Path, launcher: str, ranks: int, code: int):
    """Their processes have still something to do."""
    body = f"import atexit\natexit.register(lambda: (note('over', 1), time.sleep(300)))\nsys.exit({code})"
    with job(tmp_path, body, ranks, launcher) as made:
        made.written("over")
        made.process.send_signal(signal.SIGTERM)
        assert made.ended() == code, made.err
        assert "without a save" not in made.err


def test_an_error_while_ranks_stop_is_not_hidden_by_the_signal(tmp_path: Path):
    body = "def fail(*_): raise OSError('disk full')\nsignal.signal(signal.SIGTERM, fail)\n" + WAIT
    with job(tmp_path, body, 2) as made:
        made.written("here")
        made.process.send_signal(signal.SIGTERM)
        assert made.ended() == 1
        assert says(made.last_line, r"rank [01] PID failed: OSError: disk full; exit code 1"), made.err


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path):
    body = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT
    with job(tmp_path, body, 2) as made:
        made.written("here")
        while made.process.poll() is None:  # the second counts as one of its own after a second
            made.process.send_signal(signal.SIGINT)
            with_patience(made)
        assert made.ended() == 130
        assert says(made.last_line, "the ranks were ended by SIGINT, without a save; exit code 130"), made.err


def with_patience(made) -> None:
    """Two seconds, or until it ends."""
    try:
        made.process.wait(2)
    except Exception:
        return


@pytest.mark.parametrize(("launcher", "ranks"), [("auto", 1), ("auto", 2), ("mpi", 2)])
@pytest.mark.parametrize("victim", ["command", "supervisor"])
def test_whatever_is_killed_nothing_is_left(tmp_path: Path, launcher: str, ranks: int, victim: str):
    with job(tmp_path, "leave_a_child()\n" + WAIT, ranks, launcher) as made:
        made.written("here")
        made.written("child")
        os.kill(made.process.pid if victim == "command" else made.supervisor(), signal.SIGKILL)
        until(lambda: not made.alive(), "the end of every process")
        code = made.ended()
        assert code == (-9 if victim == "command" else 137)
        assert "was killed" in made.err


def test_the_process_that_waits_for_a_rank_of_mpiexec_may_be_killed_too(tmp_path: Path):
    body = "note('parent', os.getppid())\n" + WAIT
    with job(tmp_path, body, 2, "mpi") as made:
        made.written("here")
        os.kill(made.written("parent")[1], signal.SIGKILL)
        assert made.ended() == 137
        assert says(made.last_line, "rank 1 PID was killed by SIGKILL; exit code 137"), made.err


def test_a_terminal_that_is_gone_does_not_hide_the_end(tmp_path: Path):
    """Nobody reads the standard error any more."""
    with job(tmp_path, WAIT, 1) as made:
        made.written("here")
        made.process.send_signal(signal.SIGHUP)
        assert made.ended() == 129


def test_variables_of_other_launchers_do_not_reach_the_ranks(tmp_path: Path):
    body = """
    from bmtrain_ms_base.launchers import detect
    found = detect()
    assert (found.kind, found.rank, found.size) == ("launch", RANK, 2), found
    """
    others = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "99", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    others |= {
        "MS_ROLE": "MS_WORKER",
        "MS_WORKER_NUM": "8",
        "WORLD_SIZE": "3",
        "RANK": "1",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "9",
    }
    with job(tmp_path, body, 2, **others) as made:
        assert made.ended() == 0, made.err


def test_input_goes_to_rank_0(tmp_path: Path):
    with job(tmp_path, "note('read', len(sys.stdin.read()))", 2) as made:
        assert made.written("read")[1] == 0
        assert made.ended() == 0, made.err
