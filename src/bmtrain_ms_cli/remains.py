"""What MPICH leaves behind when its ranks do not end by themselves: memory in /dev/shm, a description of the machine in /tmp."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MEMORY = ("/dev/shm", ("mpich_shm_", "ucx_shm_posix_"))
_DESCRIPTIONS = ("/tmp", ("hydra_hwloc_xmlfile_",))


class Remains:
    """What the job that begins now will leave behind in /dev/shm and in temporary files."""

    def __init__(self) -> None:
        self._before = _found(*_MEMORY) | _found(*_DESCRIPTIONS)

    def remove(self) -> None:
        """Remove, after all processes have ended, what is new, this user's, and used by no process. Other jobs keep theirs."""
        new = (_found(*_MEMORY) | _found(*_DESCRIPTIONS)) - self._before
        if not new:
            return
        used, hydra = "", False
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                hydra |= (process / "comm").read_text().startswith("hydra_pmi_proxy")
                used += (process / "maps").read_text() if process.stat().st_uid == os.geteuid() else ""
        for path in new:
            if path not in used and not (hydra and path.startswith(_DESCRIPTIONS[0])):  # which is read, and not kept open
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _found(folder: str, beginnings: tuple[str, ...]) -> set[str]:
    found = set()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.startswith(beginnings) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    found.add(entry.path)
    return found
