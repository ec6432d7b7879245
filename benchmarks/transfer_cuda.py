"""The CUDA rows of benchmarks/transfer.py: `python benchmarks/transfer.py --device cuda:0`, or `--device emulated`.

Bytes a second to the device: pinned by size and by copies in flight, one copy an expert against three, one copy stream
against two, pageable memory through staging, and whole records through the queue, from files and from pinned memory.
Every row sends random bytes to cleared memory and compares all of them afterwards, outside the time. On the emulation
the column "right" is all that means anything.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from emoe.compute.device import Device

EXPERT = 12 << 20  # Qwen3-30B's experts have 9.4 MB, OLMoE's 12.6 MB in bfloat16
PARTS = 3
DEMAND, PREFETCH = False, True

_Bytes = npt.NDArray[np.uint8]


def measure(device: Device, quick: bool) -> list[dict[str, Any]]:
    """Rows of `case`, `bytes` a copy, `bytes_per_second`, `right`."""
    quick = quick or device.name == "emulated"
    sizes = (64 << 10, 1 << 20) if quick else (64 << 10, 1 << 20, 4 << 20, EXPERT, 64 << 20)
    rows = []
    for piece in (1, 4, 16):
        native = device.module.CudaDevice(device.native.index, piece_bytes=piece << 20)
        rows += [pinned(f"pinned, in pieces of {piece} MiB", device, native, size) for size in sizes]
    expert = (sizes[-1] if quick else EXPERT) // PARTS * PARTS
    rows.append(pinned("one copy an expert", device, device.native, expert))
    rows.append(pinned(f"{PARTS} copies an expert", device, device.native, expert, parts=PARTS))
    rows.append(pinned("two streams by turns", device, device.native, expert, lanes=(DEMAND, PREFETCH)))
    rows += [pageable(device, size) for size in sizes]
    rows += records(device, expert)
    return rows


def row(case: str, size: int, rate: float, right: bool) -> dict[str, Any]:
    return {"case": case, "bytes": size, "bytes_per_second": rate, "right": right}


def blocks_of(size: int) -> int:
    """How many blocks of a size a row moves."""
    return max(4, min(64, (256 << 20) // size)) if size > 1 << 20 else 8


def fill(content: _Bytes) -> None:
    content[:] = np.random.default_rng(content.size).integers(0, 256, content.size, dtype=np.uint8)


def arrived(native: Any, address: int, content: _Bytes) -> bool:
    """Whether device memory holds these bytes."""
    back = np.zeros_like(content)
    native.download(back.ctypes.data, address, back.size, 0)
    return bool((back == content).all())


def pinned(
    case: str, device: Device, native: Any, size: int, parts: int = 1, lanes: tuple[bool, ...] = (DEMAND,)
) -> dict[str, Any]:
    """Blocks in `parts` copies each, which take the lanes by turns; every lane is a stream."""
    total = size * blocks_of(size)
    store = device.module.PinnedCache(1, total, native.index)
    source = np.frombuffer((ctypes.c_uint8 * total).from_address(store.address), dtype=np.uint8)
    fill(source)
    target = native.allocate(total)
    piece = size // parts
    started = time.perf_counter()
    for number, at in enumerate(range(0, total, piece)):
        native.copy(target + at, store.address + at, piece, lanes[number % len(lanes)])
    native.finish_copies()
    seconds = time.perf_counter() - started
    right = arrived(native, target, source)
    native.free(target)
    return row(case, piece, total / seconds, right)


def pageable(device: Device, size: int) -> dict[str, Any]:
    """Ordinary memory, which goes through pinned chunks."""
    source = np.empty(size * blocks_of(size), dtype=np.uint8)
    fill(source)
    last = np.zeros(1, dtype=np.uint8)
    target = device.native.allocate(source.size)
    started = time.perf_counter()
    for at in range(0, source.size, size):
        device.native.upload(target + at, source.ctypes.data + at, size, 0)
    device.native.download(last.ctypes.data, target + source.size - 1, 1, 0)  # blocks until all are there
    seconds = time.perf_counter() - started
    right = arrived(device.native, target, source)
    device.native.free(target)
    return row("pageable", size, source.size / seconds, right)


def records(device: Device, size: int) -> list[dict[str, Any]]:
    """Whole records through the queue: first from the file, then again out of pinned memory."""
    module, count = device.module, 8
    content = np.empty(size * count, dtype=np.uint8)
    fill(content)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.bin"
        content.tofile(path)
        table = module.RecordTable()
        file = table.add_file(str(path))
        ids = [
            table.add_record([(file, i * size, size, f"record {i}", "uint8", 0, "uint8", 1, size, size, 1)])
            for i in range(count)
        ]
        slab = device.native.slab(2 * count, size)  # slots of its own for each case
        store = module.PinnedCache(count, size, device.native.index)
        queue = module.DeviceQueue(device.native, slab, table, module.make_reader("auto"), store)
        for case, first in (("records from a file", 0), ("records from pinned memory", count)):
            started = time.perf_counter()
            for ticket in [queue.submit(record, first + i) for i, record in enumerate(ids)]:
                queue.wait(ticket)
            rate = size * count / (time.perf_counter() - started)
            right = all(
                arrived(device.native, slab.address + (first + i) * slab.slot_bytes, block)
                for i, block in enumerate(np.split(content, count))
            )
            rows.append(row(case, size, rate, right))
        queue.close()
    return rows


def table_of(rows: list[dict[str, Any]], name: str) -> Table:
    table = Table(
        title=f"Copies to {name}" + (" (figures of the emulation mean nothing)" if name == "emulated" else "")
    )
    for column in ("case", "bytes a copy", "GB/s", "right"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for each in rows:
        rate = f"{each['bytes_per_second'] / 1e9:.2f}"
        table.add_row(each["case"], f"{each['bytes']:,}", rate, "yes" if each["right"] else "NO")
    return table
