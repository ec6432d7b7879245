"""How fast this machine reads memory and a checkpoint's disk: a short measurement, kept in the user's cache folder."""

from __future__ import annotations

import mmap
import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emoe.files import jsontext
from emoe.files.kept import Kept

_BLOCK = 4 << 20
_DISK_BYTES = 64 << 20
_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Rates:
    """Bytes a second."""

    memory: float
    disk: float
    note: str


def measure(folder: Path | None, *, refresh: bool = False) -> Rates:
    """Rates for a checkpoint folder; a day-old measurement of the same device is reused.

    Args:
        folder: where the safetensors or GGUF files lie; None or a folder without files takes a cautious 1 GB/s for the
            disk.
        refresh: measure again in any case.
    """
    weights = _largest(folder) if folder else None
    device = str(weights.stat().st_dev) if weights else "none"
    if not refresh and (entry := KEPT.get(device)):
        return Rates(entry["memory"], entry["disk"], entry["note"])
    memory = _memory_rate()
    disk = _disk_rate(weights) if weights else 0.0
    note = f"measured {memory / 1e9:.1f} GB/s memory, " + (
        f"{disk / 1e9:.2f} GB/s disk" if disk else "disk not measured: 1 GB/s assumed"
    )
    KEPT.put(device, {"memory": memory, "disk": disk or 1e9, "note": note})
    return Rates(memory, disk or 1e9, note)


def _check(entry: dict[str, Any]) -> None:
    if not isinstance(entry.get("note"), str):
        raise ValueError(f"an entry is {jsontext.shown(entry)}")
    for name in ("memory", "disk"):
        jsontext.number(entry.get(name), name, 1, 1e18)


KEPT = Kept("bandwidth.json", "rates of memory and disk", _check, seconds=24 * 3600)


def _memory_rate() -> float:
    data = torch.ones(_MEMORY_BYTES // 4, dtype=torch.float32)
    data.sum()
    best = min(_seconds(lambda: data.sum()) for _ in range(3))
    return _MEMORY_BYTES / best


def _largest(folder: Path) -> Path | None:
    """The largest file of weights in a folder, if it is large enough for a measurement."""
    weights = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf") and file.is_file())
    found = max(weights, key=lambda file: file.stat().st_size, default=None)
    return found if found and found.stat().st_size >= 2 * _BLOCK else None


def _disk_rate(file: Path) -> float:
    """O_DIRECT reads spread over a file; 0 where the file system refuses them."""
    size = file.stat().st_size
    blocks = min(_DISK_BYTES, size) // _BLOCK
    step = (size - _BLOCK) // max(1, blocks - 1) // _BLOCK * _BLOCK if blocks > 1 else 0
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return 0.0
    try:
        with closing(mmap.mmap(-1, _BLOCK)) as buffer:
            seconds = _seconds(lambda: [os.preadv(fd, [buffer], i * step) for i in range(blocks)])
    except OSError:
        return 0.0
    finally:
        os.close(fd)
    return blocks * _BLOCK / seconds


def _seconds(action: object) -> float:
    start = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - start
