"""The CUDA rows of benchmarks/transfer.py: `python benchmarks/transfer.py --device cuda:0`, or `--device emulated`.

Bytes a second to the device: pinned by size and by copies in flight, one copy an expert against three, pageable
memory through staging, and whole records through the queue, from files and from pinned memory. Every row's bytes are
compared afterwards. On the emulation the column "right" is all that means anything.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from emoe.device import Device, open_device
from emoe.errors import ConfigError

EXPERT = 12 << 20  # Qwen3-30B's experts have 9.4 MB, OLMoE's 12.6 MB in bfloat16
PARTS = 3


def measure(name: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of `case`, `bytes` a copy, `bytes_per_second`, `right`.

    Raises:
        ConfigError: the name is the CPU's.
        BackendUnavailable: says which of driver, device, build is missing.
    """
    device = open_device(name)
    if device is None:
        raise ConfigError(f"device='{name}' has no memory of its own to copy to")
    sizes = (64 << 10, 1 << 20) if quick or name == "emulated" else (64 << 10, 1 << 20, 4 << 20, EXPERT, 64 << 20)
    rows = []
    for in_flight in (1, 2, 4):
        made = device.module.CudaDevice(device.native.index, demand_in_flight=in_flight)
        for size in sizes:
            copies = max(4, min(64, (256 << 20) // size)) if name != "emulated" else 8
            rows.append(row(f"pinned, {in_flight} in flight", size, made.copy_rate(size, copies)))
    expert = sizes[-1] // PARTS * PARTS
    rows.append(row("one copy an expert", expert, device.native.copy_rate(expert, 8)))
    rows.append(row(f"{PARTS} copies an expert", expert, device.native.copy_rate(expert // PARTS, 8 * PARTS)))
    rows += [pageable(device, size) for size in sizes]
    rows += records(device, sizes[-1], 8)
    return rows


def row(case: str, size: int, rate: float, right: bool = True) -> dict[str, Any]:
    return {"case": case, "bytes": size, "bytes_per_second": rate, "right": right}


def pageable(device: Device, size: int) -> dict[str, Any]:
    """Ordinary memory, which goes through pinned chunks."""
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    back = np.zeros_like(source)
    address = device.native.allocate(size)
    started = time.perf_counter()
    for _ in range(4):
        device.native.upload(address, source.ctypes.data, size, 0)
    device.native.download(back.ctypes.data, address, size, 0)
    seconds = time.perf_counter() - started
    device.native.free(address)
    return row("pageable, 4 up and 1 down", size, 5 * size / seconds, bool((back == source).all()))


def records(device: Device, size: int, count: int) -> list[dict[str, Any]]:
    """Whole records through the queue: first from the file, then again out of pinned memory."""
    module = device.module
    content = np.random.default_rng(0).integers(0, 256, size * count, dtype=np.uint8)
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
        slab = device.native.slab(count, size)
        queue = module.DeviceQueue(
            device.native, slab, table, module.make_reader("auto"), module.HostStore(count, size, device.native.index)
        )
        for case in ("records from a file", "records from pinned memory"):
            started = time.perf_counter()
            for ticket in [queue.submit(record, slot) for slot, record in enumerate(ids)]:
                queue.wait(ticket)
            rate = size * count / (time.perf_counter() - started)
            back = np.zeros(size, dtype=np.uint8)
            right = True
            for slot in range(count):
                device.native.download(back.ctypes.data, slab.address + slot * slab.slot_bytes, size, 0)
                right = right and bool((back == content[slot * size : (slot + 1) * size]).all())
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
