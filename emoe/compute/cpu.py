"""The CPU as a device, and the native kernels on its slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import torch

from emoe import native
from emoe.compute import ops
from emoe.compute.device import Device
from emoe.compute.experts import Compute, Part
from emoe.compute.records import prefetch_bytes
from emoe.compute.stock import Stock
from emoe.memory import available_memory, give_back
from emoe.model.layout import SlotLayout
from emoe.slots.loader import Group, Loader
from emoe.store import StoreLayer

# Above this many bytes of fp32 pair outputs a prefill adds expert outputs as they come, in one [T, H] buffer: the order
# of the additions then follows residency and the result is close, not bit-identical, between budgets.
PAIR_BYTES = 32 << 20
FEW_ROWS = 8  # up to here pairs lie in scratch that a thread keeps, and one native call does all


class CpuDevice(Device):
    """Slots in the host's memory, experts computed by its cores."""

    name = "cpu"
    tensors = torch.device("cpu")
    lends = True
    slot_alignment = 8  # unaligned loads take as long; torch's views ask for whole elements

    def __init__(self) -> None:
        self.module = native.load()

    def free_bytes(self) -> int:
        return available_memory()

    def place(self, model: Any) -> None:
        """A model is on the CPU when it comes."""

    def check(self, layers: Sequence[StoreLayer], layouts: Sequence[SlotLayout], kernels: str) -> None:
        """What the native kernels do not compute runs Transformers' own code."""

    def check_pinned(self, pinned_memory: int | str | None, records: int, slot_bytes: int) -> None:
        """Nothing is pinned."""

    def slab(self, slots: int, slot_bytes: int) -> Any:
        return self.module.Slab(slots, slot_bytes)

    def give_back(self, slab: Any, slot: int) -> None:
        give_back(slab.address + slot * slab.slot_bytes, slab.slot_bytes)

    def queue(self, slab: Any, table: Any, reader: Any, *, records: int, pinned_memory: int | str | None) -> Any:
        return self.module.TransferQueue(slab, table, reader, prefetch_bytes=prefetch_bytes(slab.slot_bytes))

    def tables(self, loader: Loader, experts_per_layer: Sequence[int], lock: AbstractContextManager[Any]) -> None:
        return None

    def computes(self, parts: Sequence[Part], *, kernels: str, miss: str) -> list[Compute]:
        wanted = kernels == "native"
        return [Native(part) if wanted and part.layout.native is not None else Stock(part) for part in parts]

    def counts(self, transfer: dict[str, Any], computes: Sequence[Any]) -> dict[str, Any]:
        return {"bytes_read": transfer["demand_bytes"] + transfer["prefetch_bytes"]}


class Native:
    """Computes one layer with the native kernels."""

    name = "native"

    def __init__(self, part: Part) -> None:
        self._layer, self._experts, self._loader, self._slab = part.number, len(part.records), part.loader, part.slab
        self._mlp = ops.make_layout(part.layout.native or {})
        self._slot_of = np.full(self._experts, -1, dtype=np.int32)
        self.pair_bytes = PAIR_BYTES

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._compute(hidden, index, weights, ops.routed(index, self._experts))

    def _compute(
        self,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
        beside: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str], object] | None = None,
    ) -> torch.Tensor:
        """Args:
        experts: that are computed in slots.
        beside: adds the others to the output in the mode that it is told, while the first reads are under way.
        """
        T, K = index.shape
        H = hidden.shape[1]
        pairs = self.pair_bytes >= T * K * H * 4
        hidden, index, weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
        with closing(self._loader.rounds(self._layer, experts)) as rounds:
            group = next(rounds, [])
            if pairs and beside is None and T <= FEW_ROWS and len(group) == len(experts):
                result = torch.empty((T, H), dtype=hidden.dtype)
                self._gather(group, hidden, index, weights, result, "sum")
                return result
            mode = "pairs" if pairs else "accumulate"
            out = torch.zeros((T, K, H) if pairs else (T, H), dtype=torch.float32)
            while group:
                self._gather(group, hidden, index, weights, out, mode)
                if beside is not None:
                    beside(hidden, index, weights, out, mode)
                    beside = None
                group = next(rounds, [])
        if beside is not None:
            beside(hidden, index, weights, out, mode)
        return ops.combine(out, hidden.dtype) if pairs else out.to(hidden.dtype)

    def _gather(
        self, group: Group, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, out: torch.Tensor,
        mode: str,
    ) -> None:  # fmt: skip
        slot_of = self._slot_of
        slot_of.fill(-1)
        for expert, slot in group:
            slot_of[expert] = slot
        ops.gather_mlp(self._mlp, self._slab, slot_of, hidden, index, weights, out, mode)
