"""One set of slots for all layers: a token's layers one after the other, in plain Python.

Ids count through the layers: layer * num_experts + expert. A step is one layer of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

import numpy as np

from emoe.replay.counts import Counts
from emoe.slots.policy import LRU
from emoe.trace.trace import Trace


def run(trace: Trace, policy: str, slots: int) -> Counts:
    """One policy at one budget of at least `trace.top_k` slots."""
    counts = Counts.of(trace)
    loads, evictions = RUNNERS[policy](trace, slots)
    counts.loads[:] = loads
    counts.hits[:] = counts.picks - counts.loads
    counts.evictions = evictions
    return counts


def _walk(trace: Trace) -> Iterator[tuple[int, list[int]]]:
    """(layer, picks of one layer of one token), in order; a block of tokens at a time becomes Python numbers."""
    offsets = (np.arange(trace.layers) * trace.num_experts)[:, None]
    padded = bool((trace.experts < 0).any())
    for start in range(0, trace.tokens, 1000):
        block = np.sort(trace.experts[:, start : start + 1000].transpose(1, 0, 2), axis=2)  # as a model asks
        for token in np.where(block < 0, -1, block + offsets).tolist():
            for layer, picks in enumerate(token):
                yield layer, [pick for pick in picks if pick >= 0] if padded else picks


def _lru(trace: Trace, slots: int) -> tuple[list[int], int]:
    lru = LRU()
    serve = lru.serve
    loads = [0] * trace.layers
    for layer, picks in _walk(trace):
        loads[layer] += len(serve(picks, slots))
    return loads, sum(loads) - len(lru.known())


def _lfu(trace: Trace, slots: int) -> tuple[list[int], int]:
    ids = trace.layers * trace.num_experts
    uses, last = [0] * ids, [0] * ids
    # Keys only grow, so an entry of the heap may be too low, never too high: it is renewed when it comes up.
    heap: list[tuple[int, int, int]] = []
    resident: set[int] = set()
    loads, clock = [0] * trace.layers, 0
    for layer, picks in _walk(trace):
        missing = []
        for pick in picks:
            if pick in resident:
                clock += 1
                uses[pick] += 1
                last[pick] = clock
            else:
                missing.append(pick)
        loads[layer] += len(missing)
        kept = []
        for pick in missing:
            while len(resident) >= slots:
                count, when, victim = heappop(heap)
                if (count, when) != (uses[victim], last[victim]):
                    heappush(heap, (uses[victim], last[victim], victim))
                elif victim in picks:
                    kept.append((count, when, victim))
                else:
                    resident.discard(victim)
            resident.add(pick)
            clock += 1
            uses[pick] += 1
            last[pick] = clock
            kept.append((uses[pick], clock, pick))
        for entry in kept:
            heappush(heap, entry)
    return loads, sum(loads) - len(resident)


def _belady(trace: Trace, slots: int) -> tuple[list[int], int]:
    from emoe.replay.rows import next_uses

    upcoming = next_uses(trace).astype(np.int64)  # [T, L, K] tokens, which become steps
    steps = np.where(upcoming < trace.tokens, upcoming * trace.layers + np.arange(trace.layers)[:, None], 1 << 60)
    current = [0] * (trace.layers * trace.num_experts)  # next use of each id that is in a slot
    heap: list[tuple[int, int]] = []  # (-next use, id); an entry counts only while it is the id's present one
    resident: set[int] = set()
    loads = [0] * trace.layers
    valid = np.sort(trace.experts.transpose(1, 0, 2), axis=2) >= 0
    for (layer, picks), token, there in zip(
        _walk(trace), steps.reshape(-1, trace.top_k).tolist(), valid.reshape(-1, trace.top_k).tolist(), strict=True
    ):
        following = token if len(picks) == len(token) else [use for use, real in zip(token, there, strict=True) if real]
        missing = [pick for pick in picks if pick not in resident]
        loads[layer] += len(missing)
        room = slots - len(resident)
        for _ in range(len(missing) - room):
            while True:
                use, victim = heappop(heap)
                if victim in resident and current[victim] == -use and victim not in picks:
                    break
            resident.discard(victim)
        resident.update(missing)
        for pick, use in zip(picks, following, strict=True):
            current[pick] = use
            heappush(heap, (-use, pick))
    return loads, sum(loads) - len(resident)


RUNNERS = {"lru": _lru, "lfu": _lfu, "belady": _belady}
