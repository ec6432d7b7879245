"""A trace through `emoe.slots.cache.CacheManager`, as a loader that never waits would drive it.

Slow; the faster ones are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from emoe.errors import CacheFullError
from emoe.replay.counts import Counts
from emoe.slots import policy as policies
from emoe.slots.cache import CacheManager
from emoe.slots.loader import GROUPS
from emoe.trace.trace import DECODE, PREFILL, Trace


def run(trace: Trace, policy: str, slots: int, per_layer: bool, *, batched: bool = False) -> Counts:
    """One policy at one budget; `slots` of each layer, or of all together, which then is token by token.

    Args:
        batched: the prefill of each prompt is one step, which picks each of its experts once, as a forward does.
    """
    L, E = trace.layers, trace.num_experts
    counts = Counts.of(trace)
    counts.picks[:] = 0
    counts.decode_picks = counts.decode_loads = 0
    if per_layer:
        steps = _steps(trace, batched)
        picks = [[_experts(trace.experts[layer, step]) for step in steps] for layer in range(L)]
        cache = CacheManager([slots] * L, policy=_factory(policy, picks))
        for layer, chosen in enumerate(picks):
            for step, experts in zip(steps, chosen, strict=True):
                cache.saw(layer, trace.experts[layer, step])
                before = int(counts.loads[layer])
                _step(cache, layer, experts, counts, layer)
                if trace.phase[step.start] == DECODE:
                    counts.decode_picks += len(experts)
                    counts.decode_loads += int(counts.loads[layer]) - before
        return counts
    # One partition: expert ids count through the layers, and a step is one layer of one token.
    tokens = np.sort(trace.experts, axis=2).tolist()
    walk = [[layer * E + e for e in tokens[layer][t] if e >= 0] for t in range(trace.tokens) for layer in range(L)]
    cache = CacheManager([slots], policy=_factory(policy, [walk]))
    for number, experts in enumerate(walk):
        _step(cache, 0, experts, counts, number % L)
    counts.decode_picks = counts.decode_loads = None
    return counts


def _steps(trace: Trace, batched: bool) -> list[slice]:
    """The tokens of each step."""
    if not batched:
        return [slice(t, t + 1) for t in range(trace.tokens)]
    joined = (trace.phase[1:] == PREFILL) & (trace.phase[:-1] == PREFILL) & (trace.prompt[1:] == trace.prompt[:-1])
    starts = [0, *(np.flatnonzero(~joined) + 1).tolist(), trace.tokens]
    return [slice(first, end) for first, end in pairwise(starts)]


def _experts(picks: NDArray[np.integer]) -> list[int]:
    """The distinct experts of a step [T, K], ascending, as a running model asks for them."""
    return [e for e in np.unique(picks).tolist() if e >= 0]


def _factory(name: str, future: Sequence[Sequence[Sequence[int]]]) -> str | Callable[[int], policies.Policy]:
    return policies.belady(future) if name == "belady" else name


def _step(cache: CacheManager, partition: int, experts: list[int], counts: Counts, layer: int) -> None:
    """As `Loader.rounds` whose reads are there at once: where no slot is left, the last of those held are let go."""
    held, missing = cache.hold_resident(partition, experts)
    holding = [expert for expert, _ in held]
    counts.picks[layer] += len(experts)
    counts.hits[layer] += len(held)
    counts.loads[layer] += len(missing)
    arrived: list[int] = []
    ordered = False
    for expert in missing:
        try:
            evicted = cache.admit(partition, expert).evicted
        except CacheFullError:
            if not ordered:
                protected = cache.protected(partition)
                holding.sort(key=lambda each: each not in protected)
                ordered = True
            _ready(cache, partition, arrived, holding)
            stay = max(0, len(holding) - max(1, cache.capacity(partition) // GROUPS))
            for other in holding[stay:]:
                cache.release(partition, other)
            del holding[stay:]
            evicted = cache.admit(partition, expert).evicted
        counts.evictions += evicted is not None
        arrived.append(expert)
    _ready(cache, partition, arrived, holding)
    for expert in holding:
        cache.release(partition, expert)


def _ready(cache: CacheManager, partition: int, arrived: list[int], holding: list[int]) -> None:
    for expert in arrived:
        cache.ready(partition, expert)
        cache.hold(partition, expert)
    holding += arrived
    arrived.clear()
