"""A trace through `emoe.slots.cache.CacheManager`, as a loader that never waits would drive it.

Slow; the faster ones are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emoe.errors import CacheFullError
from emoe.replay.counts import Counts
from emoe.slots import policy as policies
from emoe.slots.cache import CacheManager
from emoe.trace.trace import Trace


def run(trace: Trace, policy: str, slots: int, per_layer: bool) -> Counts:
    """One policy at one budget; `slots` of each layer, or of all together."""
    L, E = trace.layers, trace.num_experts
    picks = [[[e for e in token if e >= 0] for token in layer] for layer in trace.experts.tolist()]  # [L][T][<=K]
    counts = Counts.of(trace)
    if per_layer:
        cache = CacheManager([slots] * L, policy=_factory(policy, picks))
        for layer, tokens in enumerate(picks):
            for experts in tokens:
                _step(cache, layer, experts, counts, layer)
        return counts
    # One partition: expert ids count through the layers, and a step is one layer of one token.
    walk = [[layer * E + e for e in picks[layer][token]] for token in range(trace.tokens) for layer in range(L)]
    cache = CacheManager([slots], policy=_factory(policy, [walk]))
    for step, experts in enumerate(walk):
        _step(cache, 0, experts, counts, step % L)
    return counts


def _factory(name: str, future: Sequence[Sequence[Sequence[int]]]) -> str | Callable[[int], policies.Policy]:
    return policies.belady(future) if name == "belady" else name


def _step(cache: CacheManager, partition: int, experts: list[int], counts: Counts, layer: int) -> None:
    held, missing = cache.hold_resident(partition, experts)
    holding = [expert for expert, _ in held]
    counts.hits[layer] += len(held)
    counts.loads[layer] += len(missing)
    for expert in missing:
        try:
            evicted = cache.admit(partition, expert).evicted
        except CacheFullError:  # the next round: what was computed is let go
            for other in holding:
                cache.release(partition, other)
            holding.clear()
            evicted = cache.admit(partition, expert).evicted
        counts.evictions += evicted is not None
        cache.ready(partition, expert)
        cache.hold(partition, expert)
        holding.append(expert)
    for expert in holding:
        cache.release(partition, expert)
