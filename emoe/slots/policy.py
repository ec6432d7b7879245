"""Who leaves when a layer needs a slot: one policy object per layer, over expert ids. Knows no slots, bytes or tensors.

`emoe.replay` runs the same definitions on whole traces at once; its tests hold the two together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from emoe import native
from emoe.errors import CacheError, ConfigError


class Policy(Protocol):
    """Eviction order of one layer.

    One that learns from routing has a method `saw(picks)` as well: [T, K] ids of a step's tokens, -1 for no pick,
    before their experts are touched or any leaves for them.
    """

    def touch(self, expert: int, step: int) -> None:
        """The expert was used, or put into a slot, in this step; steps never decrease."""

    def victim(self, candidates: Collection[int]) -> int:
        """Which of these experts (all in slots, at least one) leaves; changes nothing."""

    def forget(self, expert: int) -> None:
        """The expert left its slot."""

    def known(self) -> Collection[int]:
        """Experts it believes to be in slots; for `CacheManager.check_integrity`."""


class LRU:
    """Least recently used: evicts the expert whose last touch is longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()  # oldest first

    def touch(self, expert: int, step: int) -> None:
        # Two operations, neither of which takes the expert out: an interrupt may cost its touch, never its place.
        self._order[expert] = None
        self._order.move_to_end(expert)

    def victim(self, candidates: Collection[int]) -> int:
        for expert in self._order:
            if expert in candidates:
                return expert
        raise CacheError(f"no candidate for eviction among {sorted(candidates)}")

    def _among(self, candidates: Collection[int]) -> list[int]:
        """Those of the candidates that are in slots, the least recent first; at least one."""
        ordered = [expert for expert in self._order if expert in candidates]
        if not ordered:
            raise CacheError(f"no candidate for eviction among {sorted(candidates)}")
        return ordered

    def forget(self, expert: int) -> None:
        self._order.pop(expert, None)

    def known(self) -> Collection[int]:
        return self._order.keys()

    def serve(self, experts: Iterable[int], slots: int) -> list[int]:
        """One step of a cache of so many slots that is only counted: hits are touched, then misses, the oldest leave.

        Args:
            experts: distinct.
            slots: at least 0.

        Returns:
            Those that missed.
        """
        order = self._order
        missed = []
        for expert in experts:
            if expert in order:
                order.move_to_end(expert)
            else:
                missed.append(expert)
        if missed:
            for expert in missed:
                order[expert] = None
            for _ in range(len(order) - slots):
                order.popitem(last=False)
        return missed


class LFU(LRU):
    """Least frequently used: evicts the expert used in the fewest steps, of equals the least recent one.

    Counts outlive an expert's stay in a slot: counts that start anew let every newcomer be the next victim.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def touch(self, expert: int, step: int) -> None:
        if self._last.get(expert) != step:
            self._count[expert] = self._count.get(expert, 0) + 1
            self._last[expert] = step
        super().touch(expert, step)  # last: whoever is in the order has a count, wherever this was cut off

    def victim(self, candidates: Collection[int]) -> int:
        # min() keeps the first of equals, which is the least recent.
        return min(self._among(candidates), key=self._count.__getitem__)


class LFRU(LRU):
    """Least frequently and recently used: evicts the lowest uses, of which those long ago count less, over its age.

    A use counts half after `HALF_LIFE` steps; the age is steps since the last use, and one. Counts outlive an expert's
    stay in a slot.
    """

    HALF_LIFE = 128.0

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, tuple[float, int]] = {}  # as they count at the step of the last one
        self._now = -1

    def saw(self, picks: Any) -> None:
        """The next step begins; who leaves in it is compared as of now."""
        self._now += 1

    def touch(self, expert: int, step: int) -> None:
        uses, last = self._uses.get(expert, (0.0, step - 1))
        if last != step:
            self._uses[expert] = (uses * 0.5 ** ((step - last) / self.HALF_LIFE) + 1.0, step)
        self._now = max(self._now, step)
        super().touch(expert, step)  # last: whoever is in the order has a count, wherever this was cut off

    def victim(self, candidates: Collection[int]) -> int:
        victim, lowest = None, math.inf
        for expert in self._order:
            if expert in candidates:
                uses, last = self._uses[expert]
                age = self._now - last
                worth = uses * 0.5 ** (age / self.HALF_LIFE) / (age + 1)
                if victim is None or worth < lowest:  # of equals the least recent
                    victim, lowest = expert, worth
        if victim is None:
            raise CacheError(f"no candidate for eviction among {sorted(candidates)}")
        return victim


class ClassLRU(LFRU):
    """Least recently used of the lowest of eight classes of use: the logarithm of uses, of which old ones count less.

    Uses count as in LFRU. Caches of experts in forks of llama.cpp put experts into classes like these.
    """

    CLASSES = 8

    def victim(self, candidates: Collection[int]) -> int:
        return min(self._among(candidates), key=self._class)  # of equals the first, which is the least recent

    def _class(self, expert: int) -> int:
        uses, last = self._uses[expert]
        return min(self.CLASSES - 1, int(math.log2(1.0 + uses * 0.5 ** ((self._now - last) / self.HALF_LIFE))))


class NextUse(LRU):
    """Evicts the expert least likely to be used soon, as learned from the layer's picks: no profile, no tasks.

    The model and its weights are in csrc/core/next_use.hpp. Picks come by `saw`; without them the order is LRU's. What
    is learned outlives an expert's stay in a slot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learned = native.load().NextUse()

    def saw(self, picks: Any) -> None:
        """What a step picked: an integer array [T, K] of T tokens, below 0 for no pick."""
        self.learned.saw(picks)

    def victim(self, candidates: Collection[int]) -> int:
        return int(self.learned.least(self._among(candidates)))


class Belady:
    """The optimum that knows the future: evicts the expert whose next use is farthest, of equals the lowest id.

    Args:
        future: the experts used in each step, from step 0 on, of this layer.
    """

    def __init__(self, future: Iterable[Sequence[int]]) -> None:
        self._uses: dict[int, list[int]] = {}
        self._steps = 0
        for step, experts in enumerate(future):
            self._steps = step + 1
            for expert in experts:
                self._uses.setdefault(expert, []).append(step)
        self._resident: set[int] = set()
        self._now = 0

    def touch(self, expert: int, step: int) -> None:
        self._resident.add(expert)
        self._now = step

    def victim(self, candidates: Collection[int]) -> int:
        return max(sorted(candidates), key=self._next_use)

    def forget(self, expert: int) -> None:
        self._resident.discard(expert)

    def known(self) -> Collection[int]:
        return self._resident

    def _next_use(self, expert: int) -> int:
        uses = self._uses.get(expert, [])
        index = bisect_right(uses, self._now)
        return uses[index] if index < len(uses) else self._steps


PolicyFactory = Callable[[int], Policy]  # layer -> its policy


def belady(future: Sequence[Iterable[Sequence[int]]]) -> PolicyFactory:
    """A factory of Belady policies; `future[layer]` gives the experts of each step of that layer."""
    return lambda layer: Belady(future[layer])


def _belady_needs_the_future(layer: int) -> Policy:
    raise ConfigError(
        "policy 'belady' knows the future, so it runs in 'emoe replay' only; choose next-use, lfru, classlru, lfu or "
        "lru here"
    )


POLICIES: Mapping[str, PolicyFactory] = {
    "lru": lambda layer: LRU(),
    "lfu": lambda layer: LFU(),
    "lfru": lambda layer: LFRU(),
    "classlru": lambda layer: ClassLRU(),
    "next-use": lambda layer: NextUse(),
    "belady": _belady_needs_the_future,
}


def make(policy: str | PolicyFactory) -> PolicyFactory:
    """The factory of a policy by name; a factory is what it is.

    Raises:
        ConfigError: the name is not in POLICIES; lists them.
    """
    if not isinstance(policy, str):
        return policy
    try:
        return POLICIES[policy]
    except KeyError:
        raise ConfigError(f"policy={policy!r} is not one of: {', '.join(POLICIES)}") from None
