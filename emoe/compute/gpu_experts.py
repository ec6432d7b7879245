"""One layer's experts on a GPU: rounds over its slots, and misses that the CPU computes from pinned memory.

What cpu.py is to the CPU. Which misses stay on the CPU is decided by misses.py, bytes and order by csrc/cuda.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
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
        # What `miss="auto"` knows of how often an expert is used once it was moved.
        self._hits = self._moved = 0
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
        load, on_cpu, ids = self._decide(index)
        slot_of = self._slot_of
        with ExitStack() as stack:
            call = stack.enter_context(self._device.call(self._mlp, self._slab, hidden, index, weights))
            beside = None
            if on_cpu:  # on their way before the device gets work of this layer
                work = partial(self._compute_here, call.fetch(), ids, on_cpu)
                beside = stack.enter_context(self._device.beside(work))
            with closing(self._loader.rounds(self._layer, load)) as rounds:
                for group in rounds:
                    slot_of.fill(-1)
                    for expert, slot in group:
                        slot_of[expert] = slot
                    call.gather(slot_of)
            if beside is not None:
                call.add_pairs(beside.result())
                self.on_cpu += len(on_cpu)
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

    def _decide(self, index: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
        """Experts for the slots, experts for the CPU, and the ids of all pairs: all that the host asks the device."""
        ids: list[int] = index.flatten().tolist()
        wanted = ops.distinct(ids, len(self._records))
        layer, cache = self._layer, self._loader.cache
        T, K = index.shape
        if self._miss == "load" or 4 * T * K * self._mlp.hidden_out > CPU_PAIR_BYTES:
            return wanted, [], ids
        missing = [expert for expert in wanted if cache.lookup(layer, expert) is None]
        self._hits += len(wanted) - len(missing)
        if not missing:
            return wanted, [], ids
        counts = Counter(ids)
        plan = misses.split(
            {expert: counts[expert] for expert in missing},
            self._rates,
            mode=self._miss,
            free_slots=cache.free(layer),
            expected_uses=1 + self._hits / max(1, self._moved),
        )
        self._moved += len(plan.load)
        on_cpu = set(plan.cpu)
        return [expert for expert in wanted if expert not in on_cpu], sorted(on_cpu), ids

    def _compute_here(
        self, fetched: Callable[[], tuple[torch.Tensor, torch.Tensor]], ids: list[int], experts: list[int]
    ) -> torch.Tensor:
        """Pairs of these experts, computed by the CPU from pinned memory: [T, K, Ho] float32, zero elsewhere.

        Args:
            fetched: gives hidden states and weights on the host once they are there.
            ids: of all pairs.
        """
        hidden, weights = fetched()
        T, K = weights.shape
        index = torch.tensor(ids, dtype=torch.int64).view(T, K)
        out = torch.zeros((T, K, self._mlp.hidden_out), dtype=torch.float32)
        store = self._queue.store
        slot_of = np.full(len(self._records), -1, dtype=np.int32)
        at_once = max(1, store.slots // 2)  # the other half is left to the copies of other layers
        for first in range(0, len(experts), at_once):
            some = experts[first : first + at_once]
            with self._queue.on_host([self._records[expert] for expert in some]) as slots:
                slot_of.fill(-1)
                slot_of[some] = slots
                ops.gather_mlp(self._cpu_mlp, store, slot_of, hidden, index, weights, out, "pairs")
        return out
