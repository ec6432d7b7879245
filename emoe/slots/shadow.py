"""Whether a predictor earns its slots: an LRU of equal slots simulated beside it, and the switch that compares the two.

Decides on counts alone. Moves nothing, and does not know what the slots of the running model hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.slots.policy import LRU

PATIENCE = 20  # requests that a predictor has to show itself
MARGIN = 0.005  # share of picks by which LRU has to be ahead; two equals differ by less over 20 requests


class ShadowLRU:
    """What per-layer LRU would have had in its slots, from picks alone; 1 microsecond for each pick of a token.

    Args:
        experts_per_layer: routed experts of each layer.
        slots_per_layer: slots of each layer; 0 for none.
        between_requests: the rival of a predictor whose misses are substituted: it too loads nothing while a request
            runs. Hits are counted in the slots as they were at `begin`.

    Raises:
        ConfigError: the two do not fit together.
    """

    def __init__(
        self, experts_per_layer: Sequence[int], slots_per_layer: Sequence[int], *, between_requests: bool = False
    ) -> None:
        if len(experts_per_layer) != len(slots_per_layer):
            raise ConfigError(f"{len(slots_per_layer)} layers have slots, {len(experts_per_layer)} have experts")
        for layer, (experts, slots) in enumerate(zip(experts_per_layer, slots_per_layer, strict=True)):
            if not 0 <= slots <= experts:
                raise ConfigError(f"layer {layer}: {slots} slots for {experts} experts")
        self._slots = tuple(slots_per_layer)
        self._between = between_requests
        self._lru = [LRU() for _ in slots_per_layer]
        self._start: list[frozenset[int]] = [frozenset() for _ in slots_per_layer]

    def resize(self, slots_per_layer: Sequence[int]) -> None:
        """Layers have so many slots from now on; those used longest ago leave."""
        self._slots = tuple(slots_per_layer)
        for lru, slots in zip(self._lru, self._slots, strict=True):
            for expert in list(lru.known())[: max(0, len(lru.known()) - slots)]:
                lru.forget(expert)

    def begin(self) -> None:
        """A request begins; matters with `between_requests` alone."""
        if self._between:
            self._start = [frozenset(lru.known()) for lru in self._lru]

    def held(self, layer: int) -> list[int]:
        """The experts in a layer's slots, the least recent first."""
        return list(self._lru[layer].known())

    def observe(self, picks: NDArray[np.integer]) -> int:
        """One forward of all layers: [L, T, K] expert ids, -1 for no pick. Returns how many of them hit."""
        return sum(self.observe_layer(layer, picks[layer]) for layer in range(len(picks)))

    def observe_layer(self, layer: int, picks: NDArray[np.integer]) -> int:
        """One forward of one layer: [T, K]. A pick hits where its expert had a slot before the forward."""
        ids = picks.reshape(-1).tolist()
        before = self._start[layer] if self._between else self._lru[layer].known()
        hits = sum(expert in before for expert in ids)  # -1 is in neither
        # In the order of their last use; within it hits come before misses, as a cache serves them.
        used = [expert for expert in reversed(dict.fromkeys(reversed(ids))) if expert >= 0]
        self._lru[layer].serve(used, self._slots[layer])
        return hits


class Switch:
    """Says "off" once a predictor had fewer hits than its shadow over its last requests. Off is for good.

    Args:
        patience: requests that are compared; a bad predictor is off after so many.
        margin: share of picks by which the shadow has to be ahead.

    Attributes:
        off: whether it said so.
        reason: why, in words for a log; "" before.
    """

    def __init__(self, patience: int = PATIENCE, margin: float = MARGIN) -> None:
        if patience < 1:
            raise ConfigError(f"patience={patience} is not a number of requests of at least 1")
        if not 0 <= margin < 1:
            raise ConfigError(f"margin={margin} is not a share of at least 0 and below 1")
        self.patience, self.margin = patience, margin
        self.off = False
        self.reason = ""
        self._requests: deque[tuple[int, int, int]] = deque(maxlen=patience)

    def saw(self, request_hits: int, shadow_hits: int, picks: int) -> bool:
        """A request ended. Returns whether the predictor is off; requests without picks do not count.

        Args:
            request_hits: picks that were resident.
            shadow_hits: picks that `ShadowLRU` had in its slots.
            picks: all picks of the request.
        """
        if self.off or not picks:
            return self.off
        self._requests.append((request_hits, shadow_hits, picks))
        if len(self._requests) == self.patience:
            ours, rival = self.rates()
            if ours < rival - self.margin:
                self.off = True
                self.reason = (
                    f"over the last {self.patience} requests {ours:.1%} of the picks were resident; "
                    f"LRU in as many slots would have had {rival:.1%}"
                )
        return self.off

    def rates(self) -> tuple[float, float]:
        """Hit rates over the last requests, 0 to 1: the predictor's and its shadow's; (0, 0) before the first."""
        hits, shadow, picks = (
            (sum(column) for column in zip(*self._requests, strict=True)) if self._requests else (0, 0, 1)
        )
        return hits / picks, shadow / picks
