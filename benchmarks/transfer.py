"""Speed of the transfer queue against a loop of plain O_DIRECT reads of the same blocks.

python benchmarks/transfer.py [--check] [--rounds 15] [--workers 2] [--quick] [--folder DIR] [--json FILE]

Both sides run in turn within a round, over the same blocks in the same random order, with as many threads as the queue
has workers; the best of all rounds counts, so that a busy machine disturbs both alike. Plain: each thread calls preadv
for whole blocks at a time and looks at nothing. Queue: submit and wait from Python, GROUP records
at a time, WINDOW in flight; bytes land in slots as the experts need them. CPU seconds of a GB say what the time was
spent on. --check exits with 1 where queue / plain is below TARGET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emoe import native

TARGET = 0.85
PAGE, HUGE_PAGE = 4096, 2 << 20
GROUP, WINDOW = 8, 16  # a layer's misses come together; two layers are in flight
MORE = 4  # a case below the target gets up to this many times the rounds: the best of few is luck on a busy machine
FILE_BYTES = 320 << 20
ROOT = Path(__file__).resolve().parents[1]
HEADER = 8 + 1000  # what precedes the tensors of a checkpoint: nothing there is aligned
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """Blocks of one size in the file and how each becomes a record.

    parts: a record's pieces, evenly spread over the file (gate, up, down lie apart in many checkpoints).
    placed: each starts where in a page of its slot it starts in the file, as large arrays of experts do.
    """

    name: str
    block: int
    shift: int = 0
    parts: int = 1
    src: str = "bfloat16"
    dst: str = "bfloat16"
    placed: bool = False


CASES = [
    *(Case("aligned", size) for size in (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)),
    *(Case("unaligned", size, HEADER) for size in (64 * KIB, 80 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)),
    *(Case("gate, up, down apart", size, HEADER, 3) for size in (3 * 64 * KIB, 3 * MIB, 12 * MIB)),
    *(Case("apart, placed as in the file", size, HEADER, 3, placed=True) for size in (3 * MIB, 12 * MIB)),
    *(Case("fp32 to bf16", size, HEADER, 3, "float32") for size in (3 * MIB, 12 * MIB)),
    Case("bf16 to fp32", 3 * MIB, HEADER, 3, "bfloat16", "float32"),
]
QUICK = [case for case in CASES if case.block in (80 * KIB, MIB, 3 * MIB)]


class Blocks:
    """The records of a case: byte ranges [(offset, nbytes)] of each, parts apart as in a checkpoint."""

    def __init__(self, case: Case, total: int) -> None:
        part = case.block // case.parts
        stride = FILE_BYTES // case.parts // PAGE * PAGE
        count = min((stride - HEADER) // part, max(WINDOW, total // case.block))
        places = random.Random(1).sample(range((stride - HEADER) // part), count)
        self.ranges = [[(p * stride + case.shift + i * part, part) for p in range(case.parts)] for i in places]
        self.nbytes = count * case.block


class PlainSide:
    """Threads that read the aligned ranges around each block, in turn into as many places as the queue has slots.

    One buffer over and over would stay in the CPU's cache, which no expert that is kept can do.
    """

    def __init__(self, path: Path, case: Case, blocks: Blocks, threads: int) -> None:
        self.reads = [
            [(offset // PAGE * PAGE, -(-(offset + nbytes) // PAGE) * PAGE) for offset, nbytes in ranges]
            for ranges in blocks.ranges
        ]
        self.threads = threads
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        longest = max(end - begin for ranges in self.reads for begin, end in ranges)
        # Private memory in huge pages, touched beforehand, as slots are: pinning small ones for each read is dear.
        total = -(-longest * case.parts * WINDOW // HUGE_PAGE) * HUGE_PAGE
        memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, total, HUGE_PAGE):
            memory[start : start + HUGE_PAGE] = bytes(HUGE_PAGE)
        self.places = [memoryview(memory)[i * longest : (i + 1) * longest] for i in range(case.parts * WINDOW)]

    def run(self, order: list[int]) -> float:
        """Seconds to read every block once."""
        items = [item for record in order for item in self.reads[record]]
        todo = iter(zip(items, itertools.cycle(self.places), strict=False))
        lock = threading.Lock()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while True:
                    with lock:
                        item = next(todo, None)
                    if item is None:
                        return
                    (begin, end), place = item
                    got = os.preadv(self.fd, [place[: end - begin]], begin)
                    if got != end - begin:
                        raise OSError(f"{got} of {end - begin} bytes at {begin}")
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(self.threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - start
        if errors:
            raise errors[0]
        return seconds

    def close(self) -> None:
        os.close(self.fd)


class QueueSide:
    """A queue over the blocks of one case, with WINDOW slots; built once, run in every round."""

    def __init__(self, path: Path, case: Case, blocks: Blocks, reader: str, workers: int) -> None:
        C = native.load()
        size_in = {"float32": 4, "bfloat16": 2}[case.src]
        size_out = {"float32": 4, "bfloat16": 2}[case.dst]
        part = case.block // case.parts // size_in
        table = C.RecordTable()
        file = table.add_file(str(path))
        cols = 256
        first, spread = (case.shift % PAGE, part * size_out + PAGE) if case.placed else (0, part * size_out)
        self.records = [
            table.add_record(
                [
                    (file, offset, nbytes, "t", case.src, first + p * spread, case.dst, part // cols, cols, cols, 1)
                    for p, (offset, nbytes) in enumerate(ranges)
                ]
            )
            for ranges in blocks.ranges
        ]
        slot_bytes = case.parts * spread
        self.slab = C.Slab(
            max(WINDOW, 8 * MIB // slot_bytes), slot_bytes
        )  # no slab is so small that huge pages miss it
        self.reader = C.make_reader(reader)
        self.queue = C.TransferQueue(self.slab, table, self.reader, workers=workers)

    def run(self, order: list[int]) -> float:
        groups: deque[list[int]] = deque()
        submit = self.queue.submit
        start = time.perf_counter()
        for first in range(0, len(order), GROUP):
            if len(groups) == WINDOW // GROUP:
                self._wait_for(groups.popleft())
            group = order[first : first + GROUP]
            groups.append([submit(self.records[r], (first + i) % WINDOW) for i, r in enumerate(group)])
        while groups:
            self._wait_for(groups.popleft())
        return time.perf_counter() - start

    def _wait_for(self, tickets: list[int]) -> None:
        for ticket in reversed(tickets):  # the last first: fewer times to fall asleep
            self.queue.wait(ticket)

    def close(self) -> None:
        self.queue.close()
        if not self.reader.direct:
            raise SystemExit(f"{self.reader.note}: nothing to compare")


def measure(path: Path, case: Case, readers: list[str], workers: int, rounds: int, quick: bool) -> dict[str, Any]:
    """One row: GB/s of the best round, CPU seconds of a GB (median), and queue / plain for each reader."""
    total = (32 if case.block <= 256 * KIB else 96) * MIB // (2 if quick else 1)
    blocks = Blocks(case, total)
    sides: dict[str, PlainSide | QueueSide] = {"plain": PlainSide(path, case, blocks, workers)}
    sides.update({reader: QueueSide(path, case, blocks, reader, workers) for reader in readers})
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)

    def best() -> dict[str, float]:
        return {name: blocks.nbytes / min(each) / 1e9 for name, each in seconds.items()}

    def below() -> bool:
        return any(best()[reader] < TARGET * best()["plain"] for reader in readers)

    round_number = 0
    while round_number <= rounds or (below() and round_number <= MORE * rounds):
        order = random.Random(round_number).sample(range(len(blocks.ranges)), len(blocks.ranges))
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            before = time.process_time()
            elapsed = sides[name].run(order)
            if round_number:  # the first warms up
                seconds[name].append(elapsed)
                cpu[name].append(time.process_time() - before)
        round_number += 1
    for side in sides.values():
        side.close()
    rates = best()
    return {
        "case": case.name,
        "block_bytes": case.block,
        "bytes": blocks.nbytes,
        "rounds": round_number - 1,
        "gb_per_s": rates,
        "median_gb_per_s": {name: blocks.nbytes / statistics.median(each) / 1e9 for name, each in seconds.items()},
        "cpu_s_per_gb": {name: statistics.median(each) / blocks.nbytes * 1e9 for name, each in cpu.items()},
        "ratio": {reader: rates[reader] / rates["plain"] for reader in readers},
    }


def write_file(path: Path) -> None:
    # Small bf16 numbers, random in their low bits: no file system can compress it away, no conversion meets a NaN.
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // MIB):
            words = bytearray(os.urandom(MIB))
            words[1::2] = b"\x3c" * (MIB // 2)
            file.write(words)
        file.flush()
        os.fsync(file.fileno())


def disk_folder(wanted: str | None) -> Path:
    """Beside the checkout, else in its build folder: both are on its disk, while /tmp may be memory."""
    for parent in [Path(wanted)] if wanted else [ROOT.parent, ROOT / "build"]:
        try:
            parent.mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="emoe-transfer-", dir=parent))
        except OSError as error:
            reason = error
    raise SystemExit(f"no folder for a file of {FILE_BYTES // MIB} MiB: {reason}")


def table_of(rows: list[dict[str, Any]], readers: list[str], workers: int) -> Table:
    table = Table(title=f"Transfer queue against plain O_DIRECT reads, {workers} threads each")
    table.add_column("record")
    table.add_column("bytes", justify="right")
    for heading in ("plain GB/s", "CPU s/GB"):
        table.add_column(heading, justify="right")
    for reader in readers:
        for heading in (f"{reader} GB/s", "CPU s/GB", f"{reader} / plain"):
            table.add_column(heading, justify="right")
    for row in rows:
        size = row["block_bytes"]
        cells = [row["case"], f"{size // MIB} MiB" if size % MIB == 0 else f"{size // KIB} KiB"]
        cells += [f"{row['gb_per_s']['plain']:.2f}", f"{row['cpu_s_per_gb']['plain']:.2f}"]
        for reader in readers:
            ratio = row["ratio"][reader]
            colour = "green" if ratio >= TARGET else "red"
            cells += [f"{row['gb_per_s'][reader]:.2f}", f"{row['cpu_s_per_gb'][reader]:.2f}"]
            cells.append(f"[{colour}]{ratio:.0%}[/]")
        table.add_row(*cells)
    return table


def copies_to(name: str, quick: bool) -> int:
    import transfer_cuda

    from emoe.compute.choose import open_device

    device = open_device(name)
    assert device is not None
    rows = transfer_cuda.measure(device, quick)
    Console().print(transfer_cuda.table_of(rows, name))
    return 0 if all(row["right"] for row in rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 where a ratio is below {100 * TARGET:.0f} %%"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and bytes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="a folder on the disk to measure; default: beside the checkout")
    parser.add_argument("--json", default=str(ROOT / "benchmarks" / "results" / "transfer.json"))
    parser.add_argument("--device", default="cpu", help="cuda:0 or emulated: copies to that device (transfer_cuda.py)")
    args = parser.parse_args()
    if args.device != "cpu":
        return copies_to(args.device, args.quick)
    readers = ["pread"]
    note = native.load().make_reader("auto").note
    if note:
        print(f"uring is not measured: {note}")
    else:
        readers.append("uring")
    folder = disk_folder(args.folder)
    try:
        path = folder / "blocks.bin"
        write_file(path)
        cases = QUICK if args.quick else CASES
        rows = [measure(path, case, readers, args.workers, args.rounds, args.quick) for case in cases]
    finally:
        shutil.rmtree(folder)
    Console().print(table_of(rows, readers, args.workers))
    below = [f"{r['case']} {r['block_bytes']} {k}: {v:.0%}" for r in rows for k, v in r["ratio"].items() if v < TARGET]
    result = {
        "benchmark": "transfer",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "workers": args.workers,
        "target": TARGET,
        "rows": rows,
        "below_target": below,
    }
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.json}")
    if below:
        print("below target: " + "; ".join(below))
    return 1 if args.check and below else 0


if __name__ == "__main__":
    sys.exit(main())
