"""What the runtime asks of a device, and what a GPU is: slots in its memory, a queue that fills them, a stream.

`Gpu` is what `cuda.Cuda` and the emulation of the tests share; the CPU is in cpu.py. Which expert goes where is decided
elsewhere; the order between copies and kernels is kept in csrc/cuda.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from emoe import native
from emoe.compute import ops
from emoe.compute.experts import Compute, Part
from emoe.compute.gpu_experts import OnDevice
from emoe.compute.misses import MissRates
from emoe.compute.records import prefetch_bytes
from emoe.compute.slot_tables import SlotTables
from emoe.errors import BudgetError, ConfigError, UnsupportedModelError
from emoe.memory import available_memory, format_bytes
from emoe.model.layout import SlotLayout
from emoe.model.spec import SLOT_ALIGNMENT
from emoe.options import parse_budget
from emoe.slots.loader import Loader
from emoe.store import StoreLayer

logger = logging.getLogger(__name__)

# One each for the workers of the queue, one for an expert that the CPU computes.
SMALLEST_PINNED_SLOTS = 3


class Device:
    """Where slots lie and experts are computed.

    Attributes:
        lends: whether memory of single slots can be given back.
        module: the native module all objects of this device come from.
        name: as `choose.open_device` takes it.
        tensors: where torch's tensors have to be.
        slot_alignment: bytes; kernels and torch ask that arrays start at multiples of it in a slot.
    """

    module: Any
    name: str
    tensors: torch.device
    lends = False
    slot_alignment = SLOT_ALIGNMENT

    def free_bytes(self) -> int:
        """Bytes of its memory that nobody has."""
        raise NotImplementedError

    def place(self, model: Any) -> None:
        """Moves what the model holds outside experts to where its tensors have to be."""
        raise NotImplementedError

    def check(self, layers: Sequence[StoreLayer], layouts: Sequence[SlotLayout], kernels: str) -> None:
        """UnsupportedModelError where a layer's experts cannot be computed here, ConfigError for kernels it lacks."""
        raise NotImplementedError

    def check_pinned(self, pinned_memory: int | str | None, records: int, slot_bytes: int) -> None:
        """BudgetError or ConfigError where the host cannot pin what `queue` would be asked for."""
        raise NotImplementedError

    def slab(self, slots: int, slot_bytes: int) -> Any:
        """Slots in its memory."""
        raise NotImplementedError

    def give_back(self, slab: Any, slot: int) -> None:
        """The memory of a slot that nobody uses is free for something else until the slot is written to again."""
        raise NotImplementedError

    def queue(self, slab: Any, table: Any, reader: Any, *, records: int, pinned_memory: int | str | None) -> Any:
        """What fills the slab, with the manners of `_C.TransferQueue`; `records` is how many the table has."""
        raise NotImplementedError

    def tables(
        self, loader: Loader, experts_per_layer: Sequence[int], lock: AbstractContextManager[Any]
    ) -> SlotTables | None:
        """Slot tables in its memory, with which steps do not need the host; None where the host computes anyway."""
        raise NotImplementedError

    def computes(self, parts: Sequence[Part], *, kernels: str, miss: str) -> Sequence[Compute]:
        """What computes the experts of each layer."""
        raise NotImplementedError

    def preload(self, queue: Any, records: int, progress: bool) -> int:
        """Brings records into what lies between disk and slots, where there is such a thing; how many were read."""
        return 0

    def counts(self, transfer: dict[str, Any], computes: Sequence[Any]) -> dict[str, Any]:
        """What `stats` says of it, from its queue's own numbers and what `computes` gave."""
        raise NotImplementedError


class Gpu(Device):
    """What `cuda.Cuda` and `emulated.Emulated` share."""

    def __init__(self, module: Any, index: int) -> None:
        self.module = module
        self.native = module.CudaDevice(index)
        self._threads: ThreadPoolExecutor | None = None
        self._beside: Future[torch.Tensor] | None = None

    def stream(self) -> int:
        """The stream that the caller's torch work is on, as an integer."""
        raise NotImplementedError

    def call(self, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
        """A context manager: one forward of one layer (`CudaCall`)."""
        raise NotImplementedError

    @contextmanager
    def beside(self, work: Callable[[], torch.Tensor]) -> Iterator[Future[torch.Tensor]]:
        """Has a thread do CPU work of a layer while the block gives the device its own; over when the block is.

        One at a time: what an interrupt left running is waited for first, as it uses the same pinned memory.
        """
        if self._beside is not None:
            wait([self._beside])
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "emoe-experts-on-cpu")
        self._beside = self._threads.submit(work)
        try:
            yield self._beside
        finally:
            wait([self._beside])

    def table(self, experts: int) -> Any:
        """A `slot_tables.DeviceTable` of so many experts, none of which has a slot."""
        raise NotImplementedError

    def capturing(self) -> bool:
        """Whether the current stream captures a CUDA graph."""
        return bool(self.native.capturing(self.stream()))

    def follow(self) -> None:
        """What the current stream gets from now on runs after what the stream of the call before has got."""

    @contextmanager
    def reading(self, slab: Any, slots: Any) -> Iterator[None]:
        """In the block, work on the current stream reads these slots: nobody fills one before it has."""
        stream = self.stream()
        self.native.begin_read(slab, slots, stream)
        try:
            yield
        finally:
            self.native.end_read(slab, slots, stream)

    def check(self, layers: Sequence[StoreLayer], layouts: Sequence[SlotLayout], kernels: str) -> None:
        if kernels != "native":
            raise ConfigError(f"kernels='{kernels}' runs on the CPU only; device='{self.name}' takes kernels='native'")
        for layer, where in zip(layers, layouts, strict=True):
            reason = where.reason or self.refusal(ops.make_layout(where.native or {}, self.module))
            if reason:
                raise UnsupportedModelError(
                    f"the experts of {layer.path} cannot be computed on {self.name}: {reason.rstrip('.')}; "
                    "device='cpu' computes them"
                )

    def check_pinned(self, pinned_memory: int | str | None, records: int, slot_bytes: int) -> None:
        pinned_slots(pinned_memory, records, slot_bytes)

    def slab(self, slots: int, slot_bytes: int) -> Any:
        return self.native.slab(slots, slot_bytes)

    def queue(
        self, slab: Any, table: Any, reader: Any, *, records: int, pinned_memory: int | str | None
    ) -> DeviceQueue:
        """A queue that fills the slab through pinned memory of the host."""
        pinned = pinned_slots(pinned_memory, records, slab.slot_bytes)
        store = self._pinned(pinned, slab.slot_bytes)
        bound = prefetch_bytes(slab.slot_bytes)
        queue = self.module.DeviceQueue(self.native, slab, table, reader, store, prefetch_bytes=bound)
        return DeviceQueue(self, queue, store)

    def _pinned(self, slots: int, slot_bytes: int) -> Any:
        """A pinned cache of so many slots, or of half, a quarter, ... where the system pins no more at once."""
        while True:
            try:
                return self.module.PinnedCache(slots, slot_bytes, self.native.index)
            except BudgetError as error:
                fewer = max(SMALLEST_PINNED_SLOTS, slots // 2)
                if fewer == slots:
                    raise
                logger.warning(
                    "emoe: %d experts of %s are pinned in place of %d: %s",
                    fewer, format_bytes(slot_bytes), slots, error,
                )  # fmt: skip
                slots = fewer

    def tables(
        self, loader: Loader, experts_per_layer: Sequence[int], lock: AbstractContextManager[Any]
    ) -> SlotTables | None:
        return SlotTables(self, loader, experts_per_layer, lock)

    def computes(self, parts: Sequence[Part], *, kernels: str, miss: str) -> list[OnDevice]:
        first = parts[0]
        rates = self.miss_rates(first.layout.native, first.slab.slot_bytes) if miss == "auto" else None
        return [OnDevice(self, part, miss=miss, rates=rates) for part in parts]

    def preload(self, queue: DeviceQueue, records: int, progress: bool) -> int:
        wanted = [record for record in range(min(records, queue.store.slots)) if not queue.store.holds(record)]
        for record in tqdm(wanted, "Pinning experts", unit="expert", disable=None if progress else True):
            with queue.on_host([record]):
                pass
        return len(wanted)

    def counts(self, transfer: dict[str, Any], computes: Sequence[Any]) -> dict[str, Any]:
        return {
            "bytes_read": transfer["file_bytes"],
            "host_hits": transfer["host_hits"],
            "host_misses": transfer["host_misses"],
            "on_cpu": sum(each.on_cpu for each in computes),
            "settled": sum(each.settled for each in computes),
        }

    def refusal(self, layout: Any) -> str:
        """Why the kernels do not take a layout, or ""."""
        return str(self.module.cuda_refusal(layout))

    def miss_rates(self, layout: Any, slot_bytes: int) -> MissRates:
        """Measures what moving an expert and computing it on the CPU cost here (some milliseconds).

        Args:
            layout: the arguments of an `MlpLayout`.
            slot_bytes: bytes of a slot.
        """
        copy_seconds = slot_bytes / self.native.copy_rate(slot_bytes)
        mlp = ops.make_layout(layout)
        slab = native.load().Slab(4, slot_bytes)  # more than one, so that caches do not keep it
        slot_of = np.zeros(1, dtype=np.int32)

        def seconds(rows: int) -> float:
            hidden = torch.zeros((rows, mlp.hidden))
            index = torch.zeros((rows, 1), dtype=torch.int64)
            weights = torch.ones((rows, 1))
            out = torch.zeros((rows, 1, mlp.hidden_out))
            best = float("inf")
            for turn in range(4):
                slot_of[0] = turn
                started = time.perf_counter()
                ops.gather_mlp(mlp, slab, slot_of, hidden, index, weights, out, "pairs")
                best = min(best, time.perf_counter() - started)
            return best

        one, many = seconds(1), seconds(17)
        per_row = max(0.0, (many - one) / 16)
        return MissRates(copy_seconds, max(0.0, one - per_row), per_row)


class DeviceQueue:
    """A `_C.DeviceQueue` with the manners of `_C.TransferQueue`, so that `Loader` works with either.

    A demand is "done" when its copy is in its stream, and waiting for it orders torch's current stream after the copy:
    the host goes on. A prefetch is done when its bytes are there, so that collecting it holds up nothing.
    """

    def __init__(self, device: Gpu, queue: Any, store: Any) -> None:
        self._device, self._queue, self.store = device, queue, store
        self._prefetches: set[int] = set()

    def submit(self, record: int, slot: int, prefetch: bool = False) -> int:
        ticket = int(self._queue.submit(record, slot, prefetch))
        if prefetch:
            self._prefetches.add(ticket)
        return ticket

    def promote(self, ticket: int) -> None:
        self._prefetches.discard(ticket)
        self._queue.promote(ticket)

    def cancel(self, ticket: int) -> bool:
        return bool(self._queue.cancel(ticket))

    def done(self, ticket: int) -> bool:
        return bool(self._queue.done(ticket) if ticket in self._prefetches else self._queue.issued(ticket))

    def wait(self, ticket: int) -> None:
        self._prefetches.discard(ticket)
        self._queue.order_after(ticket, self._device.stream())

    def ticket_of(self, slot: int) -> int | None:
        found = self._queue.ticket_of(slot)
        return None if found is None else int(found)

    def stats(self) -> dict[str, Any]:
        return dict(self._queue.stats())

    def close(self) -> None:
        self._queue.close()
        self.store = None  # the pinned memory goes with it

    @contextmanager
    def on_host(self, records: list[int]) -> Iterator[list[int]]:
        """Host slots of records, which stay in pinned memory inside the block; at most `store.slots` at a time.

        One block at a time, under the runtime's lock: what an interrupted one before it left is taken back first.
        """
        self._queue.reclaim_host()
        try:
            tickets = [self._queue.submit_host(record) for record in records]
            yield [self._queue.wait(ticket) for ticket in tickets]
        finally:
            self._queue.reclaim_host()  # an interrupt may have taken tickets and slots from the lists above


def pinned_slots(pinned_memory: int | str | None, records: int, slot_bytes: int) -> int:
    """Slots of pinned host memory: one for each record, or as many as fit; BudgetError where they are too few."""
    nbytes = available_memory() // 2 if pinned_memory is None else parse_budget(pinned_memory).nbytes
    slots = min(records, nbytes // slot_bytes)
    if slots < SMALLEST_PINNED_SLOTS:
        raise BudgetError(
            f"pinned_memory of {format_bytes(nbytes)} holds {slots} experts of {format_bytes(slot_bytes)}; "
            f"{SMALLEST_PINNED_SLOTS} are needed",
            needed=SMALLEST_PINNED_SLOTS * slot_bytes,
        )
    return slots
