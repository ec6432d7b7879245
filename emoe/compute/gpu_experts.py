"""One layer's experts on a GPU: rounds over its slots, and misses that the CPU computes from pinned memory.

What cpu.py is to the CPU. Which misses stay on the CPU is decided by misses.py, bytes and order by csrc/cuda.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from emoe.compute import misses, ops
from emoe.compute.experts import Part
from emoe.compute.misses import MissRates

if TYPE_CHECKING:
    from emoe.compute.device import DeviceQueue, Gpu
    from emoe.compute.slot_tables import Settled

# [T, K, Ho] of float32 is made at most this large at once; more tokens go in parts.
PAIR_BYTES = 256 << 20
# A step whose pairs take more than this has so many rows that the CPU would not be sooner done.
CPU_PAIR_BYTES = 16 << 20


class OnDevice:
    """Computes one layer on a GPU.

    Args:
        device: from device.py.
        part: the layer.
        miss: what happens to a routed expert that has no slot, one of `emoe.options.MISSES`.
        rates: measured costs; None only where `miss` is not "auto".

    Attributes:
        on_cpu: experts computed by the CPU so far.
        settled: forwards that asked the device for no value.
    """

    def __init__(
        self,
        device: Gpu,
        part: Part,
        *,
        miss: str = "load",
        rates: MissRates | None = None,
        pair_bytes: int = PAIR_BYTES,
    ) -> None:
        self.name = device.name
        self.on_cpu = self.settled = 0
        self._device, self._queue, self._slab = device, cast("DeviceQueue", part.queue), part.slab
        self._layer, self._loader, self._tables = part.number, part.loader, part.tables
        self._records = part.records
        self._miss, self._rates = miss, rates
        self._pair_bytes = pair_bytes
        layout = part.layout.native or {}
        self._mlp = ops.make_layout(layout, device.module)
        self._cpu_mlp = ops.make_layout(layout) if miss != "load" else None
        self._slot_of = np.full(len(part.records), -1, dtype=np.int32)

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `ExpertLayer.forward`; the result is enqueued on torch's current stream and the host does not wait for it.

        Args:
            hidden, index, weights: [T, H], [T, K], [T, K].
        """
        settled = None if self._tables is None else self._tables.take(self._layer, index)
        if settled is not None:
            return self._settled(hidden, index, weights, settled)
        T, K = index.shape
        part = max(1, self._pair_bytes // (4 * K * self._mlp.hidden_out))
        if part < T:
            parts = []
            for t in range(0, T, part):
                parts.append(self._part(hidden[t : t + part], index[t : t + part], weights[t : t + part]))
            return torch.cat(parts)
        return self._part(hidden, index, weights)

    def _part(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As many rows as may go at once."""
        load, on_cpu = self._decide(index)
        slot_of = self._slot_of
        with self._device.call(self._mlp, self._slab, hidden, index, weights) as call:
            with closing(self._loader.rounds(self._layer, load)) as rounds:
                for group in rounds:
                    slot_of.fill(-1)
                    for expert, slot in group:
                        slot_of[expert] = slot
                    call.gather(slot_of)
            if on_cpu:
                call.add_pairs(self._compute_here(hidden, index, weights, on_cpu))
            result: torch.Tensor = call.combine(hidden.dtype)
            return result

    def _settled(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, settled: Settled
    ) -> torch.Tensor:
        """Where all picks are in the layer's slot table: no value is asked of the device.

        Args:
            hidden, index, weights: [T, H], [T, K], [T, K].
            settled: the table and the slots it names, which nobody fills until this returns.
        """
        T, K = index.shape
        self.settled += 1
        part = max(1, self._pair_bytes // (4 * K * self._mlp.hidden_out))
        parts = []
        for t in range(0, max(1, T), part):
            rows = slice(t, t + part)
            with self._device.call(self._mlp, self._slab, hidden[rows], index[rows], weights[rows]) as call:
                call.gather_settled(settled)
                parts.append(call.combine(hidden.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decide(self, index: torch.Tensor) -> tuple[list[int], list[int]]:
        """Experts for the slots, and experts for the CPU."""
        wanted = ops.routed(index, len(self._records))
        layer, cache = self._layer, self._loader.cache
        T, K = index.shape
        if self._miss == "load" or 4 * T * K * self._mlp.hidden_out > CPU_PAIR_BYTES:
            return wanted, []
        missing = [expert for expert in wanted if cache.lookup(layer, expert) is None]
        if not missing:
            return wanted, []
        counts = Counter(index.flatten().tolist())
        plan = misses.split(
            {expert: counts[expert] for expert in missing},
            self._rates,
            mode=self._miss,
            free_slots=cache.free(layer),
        )
        on_cpu = set(plan.cpu)
        return [expert for expert in wanted if expert not in on_cpu], sorted(on_cpu)

    def _compute_here(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: list[int]
    ) -> torch.Tensor:
        """Pairs of these experts, computed by the CPU from pinned memory: [T, K, Ho] float32, zero elsewhere."""
        T, K = index.shape
        out = torch.zeros((T, K, self._mlp.hidden_out), dtype=torch.float32)
        hidden, index, weights = hidden.cpu().contiguous(), index.cpu().contiguous(), weights.cpu().contiguous()
        store = self._queue.store
        slot_of = np.full(len(self._records), -1, dtype=np.int32)
        at_once = max(1, store.slots // 2)  # the other half is left to the copies of other layers
        for first in range(0, len(experts), at_once):
            some = experts[first : first + at_once]
            with self._queue.on_host([self._records[expert] for expert in some]) as slots:
                slot_of.fill(-1)
                slot_of[some] = slots
                ops.gather_mlp(self._cpu_mlp, store, slot_of, hidden, index, weights, out, "pairs")
        self.on_cpu += len(experts)
        return out
