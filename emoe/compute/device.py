"""A GPU as the runtime and the experts see it: slots in its memory, a queue that fills them, calls on torch's stream.

`Emulated` is the same on the fake CUDA runtime of the tests: tensors stay on the CPU and are copied to "device" memory.
Which expert goes where is decided elsewhere; the order between copies and kernels is kept in csrc/cuda.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from emoe import native
from emoe.compute.cuda import CudaCall, CudaTable, EmulatedCall, EmulatedTable
from emoe.compute.misses import MissRates
from emoe.errors import BackendUnavailable, BudgetError, ConfigError, UnsupportedModelError
from emoe.memory import available_memory, format_bytes
from emoe.model.layout import SlotLayout
from emoe.options import DEVICES, parse_budget
from emoe.store import StoreLayer

# One each for the workers of the queue, one for an expert that the CPU computes.
SMALLEST_PINNED_SLOTS = 3

# Of what is free, left to activations and to other programs when memory_budget="auto".
RESERVE_SHARE = 0.1


def open_device(name: str) -> Device | None:
    """The device of that name; None is the CPU.

    Raises:
        ConfigError: the name is none of `emoe.options.DEVICES`, or no device has that index.
        BackendUnavailable: says which of driver, device, build is missing.
    """
    if name == "cpu":
        return None
    if name == "emulated":
        return Emulated(native.load_emulated(), 0)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise ConfigError(f"device='{name}' is not one of: {DEVICES}")
    module = native.load()
    problem = module.cuda_status()["problem"]
    if problem:
        raise BackendUnavailable(f"device='{name}': {problem}")
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"device='{name}': this torch ({torch.__version__}) is built without CUDA")
    return Cuda(module, int(index) if index else torch.cuda.current_device())


class Device:
    """What `Cuda` and `Emulated` share.

    Attributes:
        module: the native module all objects of this device come from.
        name: as `open_device` takes it.
    """

    name: str

    def __init__(self, module: Any, index: int) -> None:
        self.module = module
        self.native = module.CudaDevice(index)

    def stream(self) -> int:
        """The stream that the caller's torch work is on, as an integer."""
        raise NotImplementedError

    def free_bytes(self) -> int:
        """Bytes of its memory that a model may take."""
        raise NotImplementedError

    def place(self, model: Any) -> None:
        """Moves what the model holds outside experts to where its tensors have to be."""
        raise NotImplementedError

    def call(self, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
        """A context manager: one forward of one layer (`CudaCall`)."""
        raise NotImplementedError

    def table(self, experts: int) -> Any:
        """A `slot_tables.DeviceTable` of so many experts, none of which has a slot."""
        raise NotImplementedError

    def capturing(self) -> bool:
        """Whether the current stream captures a CUDA graph."""
        return bool(self.native.capturing(self.stream()))

    def follow(self) -> None:
        """What the current stream gets from now on runs after what the stream of the call before has got."""

    def queue(self, slab: Any, table: Any, reader: Any, host_slots: int) -> DeviceQueue:
        """A queue that fills the slab through `host_slots` slots of pinned memory."""
        store = self.module.HostStore(host_slots, slab.slot_bytes, self.native.index)
        return DeviceQueue(self, self.module.DeviceQueue(self.native, slab, table, reader, store), store)

    def refusal(self, layout: Any) -> str:
        """Why the kernels do not take a layout, or ""."""
        return str(self.module.cuda_refusal(layout))

    def miss_rates(self, layout: Any, slot_bytes: int) -> MissRates:
        """Measures what moving an expert and computing it on the CPU cost here (some milliseconds).

        Args:
            layout: the arguments of an `MlpLayout`.
            slot_bytes: bytes of a slot.
        """
        from emoe.compute import ops

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

    def __init__(self, device: Device, queue: Any, store: Any) -> None:
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

    def stats(self) -> dict[str, Any]:
        return dict(self._queue.stats())

    def close(self) -> None:
        self._queue.close()
        self.store = None  # the pinned memory goes with it

    @contextmanager
    def on_host(self, records: list[int]) -> Iterator[list[int]]:
        """Host slots of records, which stay in pinned memory inside the block; at most `store.slots` at a time."""
        tickets = [self._queue.submit_host(record) for record in records]
        slots: list[int] = []
        try:
            while tickets:
                slots.append(self._queue.wait(tickets.pop(0)))
            yield slots
        finally:
            for ticket in tickets:
                if not self._queue.cancel(ticket):
                    slots.append(self._queue.wait(ticket))
            for slot in slots:
                self._queue.release_host(slot)


class Cuda(Device):
    """A CUDA device that torch uses too."""

    def __init__(self, module: Any, index: int) -> None:
        super().__init__(module, index)
        self.name = f"cuda:{index}"
        self._followed: torch.cuda.Stream | None = None

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.name).cuda_stream)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.name)[0] * (1 - RESERVE_SHARE))

    def place(self, model: Any) -> None:
        model.to(self.name)

    def call(
        self, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> CudaCall:
        return CudaCall(self, layout, slab, hidden, index, weights)

    def table(self, experts: int) -> CudaTable:
        return CudaTable(self, experts)

    def follow(self) -> None:
        stream = torch.cuda.current_stream(self.name)
        # A capture starts on a stream that is in order already, and no wait may cross its border.
        if stream == self._followed or self.capturing():
            return
        if self._followed is not None:
            stream.wait_stream(self._followed)
        self._followed = stream


class Emulated(Device):
    """The fake CUDA runtime of the tests (emoe._C_emulated)."""

    name = "emulated"

    def stream(self) -> int:
        return 0

    def free_bytes(self) -> int:
        return 1 << 30

    def place(self, model: Any) -> None:
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise ConfigError("device='emulated' takes a model on the CPU")

    def call(
        self, layout: Any, slab: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> EmulatedCall:
        return EmulatedCall(self, layout, slab, hidden, index, weights)

    def table(self, experts: int) -> EmulatedTable:
        return EmulatedTable(self, experts)


def check_layouts(device: Device, layers: Sequence[StoreLayer], layouts: Sequence[SlotLayout], kernels: str) -> None:
    """UnsupportedModelError where a layer's experts cannot be computed on the device."""
    if kernels != "native":
        raise ConfigError(f"kernels='{kernels}' runs on the CPU only; device='{device.name}' takes kernels='native'")
    for layer, where in zip(layers, layouts, strict=True):
        reason = where.reason or device.refusal(device.module.MlpLayout(**(where.native or {})))
        if reason:
            raise UnsupportedModelError(f"the experts of {layer.path} cannot be computed on {device.name}: {reason}")


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
