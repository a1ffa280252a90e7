"""Memory of this process, as the system counts it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path


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
    """Bytes that new allocations can have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
