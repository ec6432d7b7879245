"""One layer's experts on a GPU: rounds over its slots, and misses that the CPU computes from pinned memory.

What experts.py is to the CPU. Which misses stay on the CPU is decided by misses.py, bytes and order by csrc/cuda.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emoe.compute import misses, ops
from emoe.compute.device import Device, DeviceQueue
from emoe.compute.misses import MissRates
from emoe.slots.loader import Loader

if TYPE_CHECKING:
    from emoe.compute.slot_tables import Settled

# [T, K, Ho] of float32 is made at most this large at once; more tokens go in parts.
PAIR_BYTES = 256 << 20
# A step whose pairs take more than this has so many rows that the CPU would not be sooner done.
CPU_PAIR_BYTES = 16 << 20


class DeviceExperts:
    """Args:
    device, queue: from device.py.
    layout: the arguments of the layer's `MlpLayout`.
    slab: slots in the device's memory.
    records: the queue's record of each expert.
    miss: what happens to a routed expert that has no slot, one of `emoe.options.MISSES`.
    rates: measured costs; None only where `miss` is not "auto".
    """

    def __init__(
        self,
        device: Device,
        queue: DeviceQueue,
        slab: Any,
        layout: Mapping[str, Any],
        records: Sequence[int],
        *,
        miss: str = "load",
        rates: MissRates | None = None,
        pair_bytes: int = PAIR_BYTES,
    ) -> None:
        self.name = device.name
        self.on_cpu = 0  # experts computed by the CPU so far
        self.settled = 0  # forwards that asked the device for no value
        self._device, self._queue, self._slab = device, queue, slab
        self._records = records
        self._miss, self._rates = miss, rates
        self._pair_bytes = pair_bytes
        self._mlp = device.module.MlpLayout(**layout)
        self._cpu_mlp = ops.make_layout(layout) if miss != "load" else None
        self._slot_of = np.full(len(records), -1, dtype=np.int32)

    def forward(
        self,
        layer: int,
        loader: Loader,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        wanted: list[int],
    ) -> torch.Tensor:
        """As `ExpertLayer.forward`; the result is enqueued on torch's current stream and the host does not wait for it.

        Args:
            layer: number of the experts module.
            loader: fills the slots.
            hidden, index, weights: [T, H], [T, K], [T, K].
            wanted: the distinct experts of `index`.
        """
        T, K = index.shape
        part = max(1, self._pair_bytes // (4 * K * self._mlp.hidden_out))
        if part < T:
            parts = []
            for t in range(0, T, part):
                ids = index[t : t + part]
                mine = sorted({e for e in ids.flatten().tolist() if 0 <= e < len(self._records)})
                parts.append(self.forward(layer, loader, hidden[t : t + part], ids, weights[t : t + part], mine))
            return torch.cat(parts)
        load, on_cpu = self._decide(layer, loader, index, wanted)
        slot_of = self._slot_of
        with self._device.call(self._mlp, self._slab, hidden, index, weights) as call:
            with closing(loader.rounds(layer, load)) as rounds:
                for group in rounds:
                    slot_of.fill(-1)
                    for expert, slot in group:
                        slot_of[expert] = slot
                    call.gather(slot_of)
            if on_cpu:
                call.add_pairs(self._compute_here(hidden, index, weights, on_cpu))
            result: torch.Tensor = call.combine(hidden.dtype)
            return result

    def forward_settled(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, settled: Settled
    ) -> torch.Tensor:
        """As `forward` where all picks are in the layer's slot table: no value is asked of the device.

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

    def _decide(
        self, layer: int, loader: Loader, index: torch.Tensor, wanted: list[int]
    ) -> tuple[list[int], list[int]]:
        """Experts for the slots, and experts for the CPU."""
        T, K = index.shape
        if self._miss == "load" or 4 * T * K * self._mlp.hidden_out > CPU_PAIR_BYTES:
            return wanted, []
        missing = [expert for expert in wanted if loader.cache.lookup(layer, expert) is None]
        if not missing:
            return wanted, []
        counts = Counter(index.flatten().tolist())
        plan = misses.split(
            {expert: counts[expert] for expert in missing},
            self._rates,
            mode=self._miss,
            free_slots=loader.cache.free(layer),
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
