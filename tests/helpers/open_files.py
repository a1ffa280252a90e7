"""What this process has open."""

from __future__ import annotations

import os
from pathlib import Path


def open_files(folder: Path) -> list[str]:
    """
    The files in the folder that are open, in order, also deleted ones. Not how many files the process has open:
    what earlier tests left is closed whenever Python collects it.
    """
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the list itself, or closed by a thread meanwhile
            continue
    return sorted(path for path in found if path.startswith(f"{folder.resolve()}/"))
