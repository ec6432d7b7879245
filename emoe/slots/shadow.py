"""Whether a predictor earns its slots: caches simulated with its base set and without, and the switch between the two.

Decides on counts alone. Moves nothing, and does not know what the slots of the running model hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.slots.policy import LRU, Policy, PolicyFactory

PATIENCE = 20  # requests of a task that are compared
MARGIN = 0.005  # share of picks by which one has to be ahead; two equals differ by less over 20 requests
LAYERS = 8  # where misses are loaded, so many layers are simulated, evenly spread: a simulation is not free

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """Counts of simulated slots.

    Attributes:
        hits: picks that were in a slot.
        loads: experts that were moved into one.
        picks: all picks.
    """

    hits: int = 0
    loads: int = 0
    picks: int = 0

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.hits + other.hits, self.loads + other.loads, self.picks + other.picks)


class Shadow:
    """Slots of some layers that are only counted, from picks alone.

    Args:
        experts_per_layer: routed experts of each layer.
        slots_per_layer: slots of each layer; 0 for none.
        policy: who leaves.
        layers: those that are simulated; None for all.

    Raises:
        ConfigError: the two do not fit together.
    """

    def __init__(
        self, experts_per_layer: Sequence[int], slots_per_layer: Sequence[int], *,
        policy: PolicyFactory = lambda layer: LRU(), layers: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        if len(experts_per_layer) != len(slots_per_layer):
            raise ConfigError(f"{len(slots_per_layer)} layers have slots, {len(experts_per_layer)} have experts")
        for layer, (experts, slots) in enumerate(zip(experts_per_layer, slots_per_layer, strict=True)):
            if not 0 <= slots <= experts:
                raise ConfigError(f"layer {layer}: {slots} slots for {experts} experts")
        self.layers = tuple(range(len(slots_per_layer)) if layers is None else layers)
        self._slots = tuple(slots_per_layer)
        self._policies: dict[int, Policy] = {layer: policy(layer) for layer in self.layers}
        self._protected: dict[int, frozenset[int]] = {}
        self._step = 0

    def resize(self, slots_per_layer: Sequence[int]) -> None:
        """Layers have so many slots from now on; who is too many leaves."""
        self._slots = tuple(slots_per_layer)
        for layer in self.layers:
            self._make_room(layer, 0, ())

    def protect(self, base: Mask) -> None:
        """[L, E] experts that leave only where nothing else can."""
        self._protected = {layer: frozenset(np.flatnonzero(base[layer]).tolist()) for layer in self.layers}

    def held(self, layer: int) -> list[int]:
        """The experts in a layer's slots; of LRU the least recent first."""
        return list(self._policies[layer].known())

    def observe(self, picks: NDArray[np.integer]) -> Seen:
        """One forward of all layers: [L, T, K] expert ids, -1 for no pick; a pick hits what was there before it."""
        self._step += 1
        return sum((self._observe(layer, picks[layer]) for layer in self.layers), Seen())

    def _observe(self, layer: int, picks: NDArray[np.integer]) -> Seen:
        policy, slots = self._policies[layer], self._slots[layer]
        saw: Any = getattr(policy, "saw", None)
        if saw is not None:
            saw(picks)
        ids = [expert for expert in picks.reshape(-1).tolist() if expert >= 0]
        before = policy.known()
        hits = sum(expert in before for expert in ids)
        # In the order of their last use; within it hits come before misses, as a cache serves them.
        used = list(reversed(dict.fromkeys(reversed(ids))))
        missed = [expert for expert in used if expert not in before]
        for expert in used if slots else ():
            if expert in before:
                policy.touch(expert, self._step)
        if missed and slots:
            self._make_room(layer, len(missed), used)
            for expert in missed[-slots:]:  # a prompt may have more experts than there are slots
                policy.touch(expert, self._step)
        return Seen(hits, len(missed), len(ids))

    def _make_room(self, layer: int, count: int, used: Collection[int]) -> None:
        """Evicts until so many experts find a slot, those of the step and then protected ones last."""
        policy = self._policies[layer]
        over = min(len(policy.known()), len(policy.known()) + count - self._slots[layer])
        if over <= 0:
            return
        known = set(policy.known())
        protected = self._protected.get(layer, frozenset())
        free = known.difference(used)
        groups = [free - protected, free & protected, known - free]
        for group in groups:
            while over > 0 and group:
                victim = policy.victim(group)
                policy.forget(victim)
                group.discard(victim)
                over -= 1


class Rivals:
    """The same requests with a base set and without; what was counted of either."""

    def __init__(self) -> None:
        self._ours = self._rival = Seen()

    def begin(self, base: Mask) -> None:
        """A request begins for which this base set [L, E] would be kept."""
        raise NotImplementedError

    def observe(self, picks: NDArray[np.integer]) -> None:
        """One forward of all layers: [L, T, K] expert ids, -1 for no pick."""
        raise NotImplementedError

    def resize(self, slots_per_layer: Sequence[int]) -> None:
        """Layers have so many slots from now on."""
        raise NotImplementedError

    def take(self) -> tuple[Seen, Seen]:
        """With a base set and without, since the last call."""
        taken = self._ours, self._rival
        self._ours = self._rival = Seen()
        return taken


class Loading(Rivals):
    """Rivals where misses are loaded: a base set is protected in the slots of one, and nothing in those of the other.

    Args:
        experts_per_layer, slots_per_layer, policy: as of `Shadow`.
    """

    def __init__(self, experts_per_layer: Sequence[int], slots_per_layer: Sequence[int], policy: PolicyFactory) -> None:
        super().__init__()
        L = len(experts_per_layer)
        layers = sorted({round(layer) for layer in np.linspace(0, L - 1, min(L, LAYERS))}) if L else []
        self._with, self._without = (
            Shadow(experts_per_layer, slots_per_layer, policy=policy, layers=layers) for _ in range(2)
        )

    def begin(self, base: Mask) -> None:
        self._with.protect(base)

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._ours += self._with.observe(picks)
        self._rival += self._without.observe(picks)

    def resize(self, slots_per_layer: Sequence[int]) -> None:
        self._with.resize(slots_per_layer)
        self._without.resize(slots_per_layer)


class Between(Rivals):
    """Rivals where nothing is loaded while a request runs: a base set, and the experts that LRU would have then.

    Args:
        experts_per_layer, slots_per_layer: as of `Shadow`.
    """

    def __init__(self, experts_per_layer: Sequence[int], slots_per_layer: Sequence[int]) -> None:
        super().__init__()
        self._lru = Shadow(experts_per_layer, slots_per_layer)
        shape = (len(experts_per_layer), max(experts_per_layer, default=0))
        self._base, self._last_used = (np.zeros(shape, dtype=bool) for _ in range(2))

    def begin(self, base: Mask) -> None:
        held = self.held()
        self._ours += Seen(loads=int((base & ~self._base).sum()))
        self._rival += Seen(loads=int((held & ~self._last_used).sum()))
        self._base, self._last_used = base.copy(), held

    def held(self) -> Mask:
        """[L, E] what LRU has by now."""
        mask = np.zeros_like(self._base)
        for layer in self._lru.layers:
            mask[layer, self._lru.held(layer)] = True
        return mask

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._lru.observe(picks)
        L = len(picks)
        layers, ids = np.repeat(np.arange(L), picks[0].size), picks.reshape(-1)
        layers, ids = layers[ids >= 0], ids[ids >= 0]
        self._ours += Seen(int(self._base[layers, ids].sum()), 0, len(ids))
        self._rival += Seen(int(self._last_used[layers, ids].sum()), 0, len(ids))

    def resize(self, slots_per_layer: Sequence[int]) -> None:
        self._lru.resize(slots_per_layer)


class Switch:
    """For which tasks a base set is kept: not where the last requests had it worse than without, until it is better.

    Where misses are loaded, fewer loads are better. Where nothing is, more hits are, and of as many hits fewer loads.

    Args:
        loads_misses: which of the two holds.
        patience: requests of a task that are compared; a bad predictor is off after so many, and so is a way back.
        margin: share of picks by which one has to be ahead.
    """

    def __init__(self, *, loads_misses: bool, patience: int = PATIENCE, margin: float = MARGIN) -> None:
        if patience < 1:
            raise ConfigError(f"patience={patience} is not a number of requests of at least 1")
        if not 0 <= margin < 1:
            raise ConfigError(f"margin={margin} is not a share of at least 0 and below 1")
        self.loads_misses, self.patience, self.margin = loads_misses, patience, margin
        self._requests: dict[Hashable, deque[tuple[Seen, Seen]]] = {}
        self._off: dict[Hashable, str] = {}

    def off(self, task: Hashable) -> str:
        """Why no base set is kept for the task, in words for a log; "" where one is."""
        return self._off.get(task, "")

    def start_off(self, task: Hashable, reason: str) -> None:
        """No base set for this task before its requests have shown that it helps."""
        self._off.setdefault(task, reason)

    def saw(self, task: Hashable, ours: Seen, rival: Seen) -> bool:
        """A request ended, with a base set as counted in `ours`, and without. Returns whether its task was switched."""
        if not ours.picks:
            return False
        requests = self._requests.setdefault(task, deque(maxlen=self.patience))
        requests.append((ours, rival))
        if len(requests) < self.patience:
            return False
        ours, rival = self.totals(task)
        better = self._better(ours, rival)
        if better == 0 or (better > 0) == (not self.off(task)):
            return False
        requests.clear()
        if better > 0:
            del self._off[task]
        else:
            self._off[task] = self._reason(ours, rival)
        return True

    def totals(self, task: Hashable) -> tuple[Seen, Seen]:
        """Of the task's last requests, with a base set and without."""
        pairs = self._requests.get(task, ())
        return sum((ours for ours, _ in pairs), Seen()), sum((rival for _, rival in pairs), Seen())

    def _better(self, ours: Seen, rival: Seen) -> int:
        """1 where a base set is ahead by the margin, -1 where it is behind, 0 between."""
        margin = self.margin * ours.picks
        fewer_loads = _beyond(rival.loads - ours.loads, margin)
        if self.loads_misses:
            return fewer_loads
        return _beyond(ours.hits - rival.hits, margin) or min(0, fewer_loads)

    def _reason(self, ours: Seen, rival: Seen) -> str:
        what = (
            f"{ours.loads} experts would have been loaded with a base set and {rival.loads} without"
            if self.loads_misses
            else f"{ours.hits / ours.picks:.1%} of the picks were in the base set, at {ours.loads} moves; the experts "
            f"used last would have had {rival.hits / rival.picks:.1%}, at {rival.loads}"
        )
        return f"over the last {self.patience} requests {what}"


def _beyond(ahead: float, margin: float) -> int:
    return int(ahead > margin) - int(-ahead > margin)
