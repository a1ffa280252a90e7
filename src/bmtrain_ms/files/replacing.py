"""Small files that appear under their names complete, and on the disk, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .locking import sweep_temporaries


def replace_text(path: Path, text: str) -> None:
    """Write a file; it appears under its name, complete and on the disk, in one instant."""
    sweep_temporaries(path.parent, f".{path.name}.", "")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        write_text(temporary, text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file that is not there yet, not even as a link, and bring it to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
