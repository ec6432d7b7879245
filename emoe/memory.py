"""What memory this process has and may still take, as the system and its control groups say."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from threading import RLock, get_ident
from typing import ClassVar

import psutil

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes this process may still take: free memory of the machine, or less where a memory cgroup says so."""
    free = int(psutil.virtual_memory().available)
    for limit, usage, statistics, inactive in _bounds():
        try:
            bound = limit.read_text().strip()
            if bound == "max":
                continue
            used = int(usage.read_text()) - _statistic(statistics, inactive)  # the page cache gives way
            free = min(free, max(0, int(bound) - used))
        except (OSError, ValueError):
            continue
    return free


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


def give_back(address: int, nbytes: int) -> None:
    """Whole pages of anonymous memory go back to the system, and are zero when they are touched again.

    Raises:
        OSError: they are no such pages.
    """
    dont_need = 4  # MADV_DONTNEED
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), dont_need) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"madvise of {nbytes} bytes: {os.strerror(error)}")


class LargeBlocks:
    """While a thread holds them, malloc takes blocks of 1 MiB and more from the system and gives them back when freed.

    glibc otherwise keeps freed blocks of up to 32 MiB for itself, and tensors of many sizes leave holes among them: a
    prefill then holds several times what its tensors take. Held for prefill only, because each such block costs page
    faults. A setting of the process; where malloc is not glibc's, nothing happens. What an interrupted thread left ends
    with its next `hold` or `release`, and what a thread that has ended left with that of any other.
    """

    # Outside: what glibc itself comes to after it has freed one large block.
    _MMAP, _TRIM = (-3, 32 << 20, 1 << 20), (-1, 64 << 20, 1 << 20)
    _lock = RLock()
    _threads: ClassVar[set[int]] = set()  # that hold them
    _large = False

    @classmethod
    def hold(cls) -> None:
        """From now on this thread holds them; it may already."""
        with cls._lock:
            cls._threads.add(get_ident())
            cls._settle()

    @classmethod
    def release(cls) -> None:
        """This thread holds them no longer, if it did."""
        if cls._threads or cls._large:
            with cls._lock:
                cls._threads.discard(get_ident())
                cls._settle()

    @classmethod
    def _settle(cls) -> None:
        cls._threads.intersection_update(sys._current_frames())
        wanted = bool(cls._threads)
        if wanted != cls._large:
            cls._set(wanted)
            cls._large = wanted

    @classmethod
    def _set(cls, large: bool) -> None:
        try:
            libc = ctypes.CDLL("libc.so.6")
            for option in (cls._MMAP, cls._TRIM):
                libc.mallopt(option[0], option[1 + large])
            libc.malloc_trim(0)
        except (OSError, AttributeError):
            return

    @classmethod
    def _forked(cls) -> None:
        cls._lock = RLock()  # another thread may have had it, and is not in this process


os.register_at_fork(after_in_child=LargeBlocks._forked)


def format_bytes(nbytes: int) -> str:
    """A size for reading: "512 bytes", "1.5 GiB"; one decimal from KiB on."""
    size = float(nbytes)
    if abs(size) < 1024:
        return f"{nbytes} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def _bounds() -> list[tuple[Path, Path, Path, str]]:
    """Limit, usage and statistics of every memory cgroup this process is in, and of those above it."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for line in lines or ["0::/"]:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            root, names, inactive = _ROOT, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            root, inactive = _ROOT / "memory", "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            if each == root or root in each.parents:
                found.append((each / names[0], each / names[1], each / "memory.stat", inactive))
    return found


def _statistic(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
