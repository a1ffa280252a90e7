"""Memory of this process, as the system counts it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Iterator


def resident_memory() -> tuple[int, int]:
    """Bytes resident now, and at most since `reset_peak_memory` (Linux; elsewhere the peak of the whole process, twice)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return peak, peak
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
    return sizes["VmRSS"], sizes["VmHWM"]


def reset_peak_memory() -> None:
    """Start a new peak from what is resident; does nothing where the system cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> int | None:
    """Bytes that new allocations can have: of the machine, and of the container or job (control group); None: it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    found += [room for folder in _control_groups() if (room := _room(folder)) is not None]
    return max(0, min(found)) if found else None


def _control_groups() -> Iterator[Path]:
    """Folders of the groups that this process is in, and of those around them, in the second and the first version."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = Path(f"/sys/fs/cgroup/{controllers}")
                inside = root / path.lstrip("/")  # a container may see its own group as the root, and this path not at all
                yield from [inside, *(x for x in inside.parents if x == root or root in x.parents)]


def _room(group: Path) -> int | None:
    """Bytes up to the limit of a group, whose file cache counts as free; None: it has none."""
    for most, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not of this version; "max" is no limit
            left = int((group / most).read_text()) - int((group / used).read_text())
            return left + int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get(cached, 0))
    return None
