"""MPI's finalisation, which must happen in the process of the rank only."""

from __future__ import annotations

import atexit
import os
import sys

from .board import ENDED, own_row

_taken_over: list[int] = []


def finalise_in_ranks_only() -> None:
    """Finalise MPI at the end of this process, but not in those that are forked from it.

    mpi4py does so in every process: a forked one that ends takes the rank's connections down. It reads this setting when
    `mpi4py.MPI` is first imported; afterwards it is too late.
    """
    if _taken_over:
        return
    try:
        import mpi4py
    except ImportError:
        return
    mpi4py.rc.finalize = False
    _taken_over.append(os.getpid())
    atexit.register(_finalise)


def _finalise() -> None:
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or _taken_over[0] != os.getpid() or not MPI.Is_initialized() or MPI.Is_finalized():
        return
    row = own_row()
    if row is not None and row.state == ENDED and row.code not in (0, 75):
        return  # it has failed: the others will not come, and our launcher ends them
    MPI.Finalize()
