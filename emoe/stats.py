"""Numbers a user can ask for while a model runs: `model.emoe.stats()`. Plain dicts, ready for JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def process_memory() -> dict[str, int]:
    """Resident memory of this process as the operating system counts it, in bytes.

    `peak` is VmHWM of /proc/self/status: the largest resident set since the process began, files mapped included.
    """
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            fields[name] = int(value.split()[0]) * 1024
    return {"resident": fields["VmRSS"], "peak": fields["VmHWM"]}


def reset_peak_memory() -> bool:
    """Starts the operating system's peak count anew for this process; False where the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def summary(stats: dict[str, Any]) -> str:
    """One line for a log: hit rate, stalls, bytes."""
    return (
        f"hit rate {stats['hit_rate']:.1%}, {stats['misses']} misses, "
        f"stalled {stats['stall_ms']:.0f} ms, read {stats['bytes_read'] / 2**20:.1f} MiB"
    )
