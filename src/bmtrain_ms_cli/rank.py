"""What `bmtrain-ms launch` starts on every rank: runs a script, or `-m` and a module, as Python itself would.

Besides, it ends with the launcher, puts the rank's number before a traceback, answers the launcher with its stacks, and notes on
the board that the script has come to its end, and how: a process that leaves by `os._exit(0)` has not.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # its modules are no top-level ones

import contextlib
import faulthandler
import io
import runpy
import signal
import traceback
import types
import warnings
import zipfile
from typing import Any

from bmtrain_ms_base import board as boards
from bmtrain_ms_base import system
from bmtrain_ms_base.launchers import folders_of, forget_board
from bmtrain_ms_base.mpi import finalise_in_ranks_only

_OWN_FILES = (__file__, runpy.__file__)


def main() -> None:
    """Be a rank; `sys.argv` is this file, then the script or `-m` and a module, and its arguments."""
    system.open_streams()
    row = _take_row()
    if row is not None:
        row.start()
        faulthandler.enable()
        faulthandler.register(system.DUMP, all_threads=True)
    rank = os.environ.get(boards.RANK, "0")
    _go_to_folder(rank)
    sys.excepthook = lambda kind, error, where: _print_error(rank, kind, error, where)
    del sys.argv[0]
    try:
        _run_module() if sys.argv[0] == "-m" else _run_file()
    except BaseException as error:
        if row is not None:
            row.end(*_described(error))
        raise
    if row is not None:
        row.end(0)


def _go_to_folder(rank: str) -> None:
    """Be where this rank's host is, if ranks are as if on several."""
    folders = folders_of(os.environ)
    if len(folders) > 1:
        os.chdir(folders[int(rank) * len(folders) // int(os.environ[boards.SIZE])])


def _take_row() -> boards.Row | None:
    """Take this rank's row of the board; None on another host than the launcher's."""
    env = os.environ
    board = boards.open_board(env.get(boards.ADDRESS, ""))
    if board is None:
        if env.get(boards.KIND) != "mpi":
            raise SystemExit("the launcher has ended")
        forget_board(env)
        return None
    if env[boards.KIND] == "mpi":
        env[boards.RANK] = env["PMI_RANK"]
        row = board.rows[int(env[boards.RANK])]
        _fork_the_rank(row)
        finalise_in_ranks_only()  # before the script can import mpi4py.MPI
        return row
    system.die_with(board.launcher)
    return board.rows[int(env[boards.RANK])]


def _fork_the_rank(row: boards.Row) -> None:
    """Go on in a child: MPICH's `mpiexec` tells nobody how a process ended, and kills all others at once."""
    launcher, parent = os.getppid(), os.getpid()
    row.wait()
    child = os.fork()
    if child == 0:
        system.die_with(parent)
        return
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the rank decides
    system.die_with(launcher)
    _, status = os.waitpid(child, 0)
    row.waited(status)
    if (status != 0 and os.WEXITSTATUS(status) != 75) or row.state != boards.ENDED:
        signal.pause()  # until the launcher has heard what the others have to say
    os._exit(0)


def _run_file() -> None:
    script = sys.argv[0]
    if zipfile.is_zipfile(script):
        runpy.run_path(script, run_name="__main__")
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    with io.open_code(os.path.abspath(script)) as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=script, __cached__=None)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _run_module() -> None:
    del sys.argv[0]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd()
    # bmtrain_ms imports its modules itself: the one that runs is a second copy, which does no harm
    warnings.filterwarnings("ignore", "'bmtrain_ms.* found in sys.modules", RuntimeWarning)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _described(error: BaseException) -> tuple[int, str, bool]:
    """Exit code, text, and whether another rank's end is the reason."""
    if isinstance(error, SystemExit):
        code = error.code
        return (0, "", False) if code is None else (code & 0xFF, "", False) if isinstance(code, int) else (1, f"{code}", False)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "KeyboardInterrupt", False
    lines = traceback.format_exception_only(type(error), error)[-1].strip().splitlines() or [""]
    return 1, lines[0], any(kind.__name__ == "CommError" for kind in type(error).__mro__)


def _print_error(rank: str, kind: type[BaseException], error: BaseException, where: Any) -> None:
    """An uncaught exception, from the script's first line on; each line begins with the rank."""
    while where is not None and where.tb_frame.f_code.co_filename in _OWN_FILES:
        where = where.tb_next
    text = "".join(traceback.format_exception(kind, error, where))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write("".join(f"[rank {rank}] {line}\n" for line in text.splitlines()))
        sys.stderr.flush()


if __name__ == "__main__":
    main()
