"""Slots divided per layer: all layers and budgets of a policy advance together, one token at a time, as rows of arrays.

A row is one layer at one budget. A policy is a score for each expert of a row; the lowest of those in slots leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoe.replay.counts import Counts
from emoe.slots import policy
from emoe.trace.trace import DECODE, Trace

Scores = NDArray[np.float64]


class RowPolicy(Protocol):
    """A policy over R rows of E experts."""

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        """[len(rows), E]; of the experts in slots the lowest leaves first, of equals the lowest id. Read only."""

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        """A token was served.

        Args:
            step: number of the token.
            places: [R, K] places in a flat [R, E] array (one more, R * E, stands for no pick).
            miss: [R, K] whether each was loaded.
        """


def run(trace: Trace, name: str, slots: list[int]) -> list[Counts]:
    """One policy at several budgets, each at least `trace.top_k` slots a layer."""
    return advance(trace, MAKERS[name](trace, len(slots)), slots)


def advance(trace: Trace, scored: RowPolicy, slots: list[int]) -> list[Counts]:
    """Runs a policy made for `len(slots)` budgets; rows count budgets first, layers second."""
    L, T, _ = trace.experts.shape
    E, R = trace.num_experts, len(slots) * L
    free = np.repeat(np.asarray(slots, dtype=np.int64), L)
    base = np.arange(R)[:, None] * E
    ids = picks_by_token(trace)
    in_slot = np.zeros(R * E + 1, dtype=bool)
    in_slot[-1] = True  # "no pick" is never missing
    loads = np.zeros(R, dtype=np.int64)
    evictions = np.zeros(R, dtype=np.int64)
    decode, decoded = trace.phase == DECODE, np.zeros(R, dtype=np.int64)
    for step in range(T):
        token = np.tile(ids[step], (len(slots), 1))  # [R, K]
        places = np.where(token < 0, R * E, token + base)
        miss = ~in_slot[places]
        needed = miss.sum(axis=1)
        loads += needed
        if decode[step]:
            decoded += needed
        free -= needed
        over = np.flatnonzero(free < 0)
        if over.size:
            # Picks of this token stay, whatever their score: they are being used.
            in_slot[places] = False
            _evict(scored.scores(over), in_slot[:-1].reshape(R, E), over, -free[over])
            evictions[over] -= free[over]
            free[over] = 0
        in_slot[places] = True
        scored.used(step, places, miss)
    results = []
    for budget in range(len(slots)):
        mine = slice(budget * L, (budget + 1) * L)
        counts = Counts.of(trace)
        counts.loads[:] = loads[mine]
        counts.hits[:] = counts.picks - counts.loads
        counts.evictions = int(evictions[mine].sum())
        counts.decode_picks = int((trace.experts[:, decode] >= 0).sum())
        counts.decode_loads = int(decoded[mine].sum())
        results.append(counts)
    return results


def picks_by_token(trace: Trace) -> NDArray[np.int64]:
    """[T, L, K], so that a token is one block of memory; ascending, as a running model asks for a token's experts."""
    return np.sort(trace.experts.transpose(1, 0, 2).astype(np.int64), axis=2)


def _evict(scores: Scores, in_slot: NDArray[np.bool_], rows: NDArray[np.intp], count: NDArray[np.int64]) -> None:
    """Takes the `count[i]` lowest of row `rows[i]` out of their slots."""
    left = np.where(in_slot[rows], scores, np.inf)
    at = np.arange(len(rows))
    for done in range(int(count.max())):
        if done:
            still = count[at] > done
            at = at[still]
        victims = left[at].argmin(axis=1) if done else left.argmin(axis=1)
        left[at, victims] = np.inf
        in_slot[rows[at], victims] = False


class _Table:
    """A flat [R * E + 1] array of scores; the last place takes what "no pick" writes."""

    def __init__(self, rows: int, experts: int) -> None:
        self.flat = np.zeros(rows * experts + 1)
        self.table = self.flat[:-1].reshape(rows, experts)


class LRU(_Table):
    """`emoe.slots.policy.LRU`: the score is the time of the last use; within a token hits come before misses."""

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        return self.table[rows]

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        K = places.shape[1]
        self.flat[places] = step * 2 * K + np.arange(K) + K * miss


class LFU(_Table):
    """`emoe.slots.policy.LFU`: uses so far, also before it left; of equals the least recent."""

    _CLOCK = 2.0**32  # of recency in the score; counts stay exact up to 2 ** 21

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        return self.table[rows]

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        K = places.shape[1]
        uses = np.floor(self.flat[places] / self._CLOCK) + 1
        self.flat[places] = uses * self._CLOCK + step * 2 * K + np.arange(K) + K * miss


class Belady(_Table):
    """`emoe.slots.policy.Belady`: the score is minus the step of the next use."""

    def __init__(self, trace: Trace, budgets: int) -> None:
        super().__init__(budgets * trace.layers, trace.num_experts)
        self._next = next_uses(trace)
        self._budgets = budgets

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        return self.table[rows]

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        self.flat[places] = -np.tile(self._next[step], (self._budgets, 1))


class LFRU(LRU):
    """`emoe.slots.policy.LFRU`; of equals the least recent."""

    def __init__(self, rows: int, experts: int) -> None:
        super().__init__(rows, experts)
        self._uses = np.zeros(rows * experts + 1)
        self._last = np.zeros(rows * experts + 1, dtype=np.int64)
        self._step = 0

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        shape = self.table.shape
        age = self._step - self._last[:-1].reshape(shape)[rows]
        worth = self._uses[:-1].reshape(shape)[rows] * 0.5 ** (age / policy.LFRU.HALF_LIFE) / (age + 1)
        return ties_by_order(worth, super().scores(rows))

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        age = step - self._last[places]
        self._uses[places] = self._uses[places] * 0.5 ** (age / policy.LFRU.HALF_LIFE) + 1.0
        self._last[places] = step
        self._step = step + 1  # experts leave for the picks of the next token
        super().used(step, places, miss)


class ClassLRU(LFRU):
    """`emoe.slots.policy.ClassLRU`; in a class the least recent."""

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        shape = self.table.shape
        age = self._step - self._last[:-1].reshape(shape)[rows]
        worth = self._uses[:-1].reshape(shape)[rows] * 0.5 ** (age / policy.LFRU.HALF_LIFE)
        classes = np.minimum(policy.ClassLRU.CLASSES - 1, np.floor(np.log2(1.0 + worth)))
        return ties_by_order(classes, LRU.scores(self, rows))


class NextUse(LRU):
    """`emoe.slots.policy.NextUse`: the same code learns, once for all budgets; of equals the least recent."""

    def __init__(self, trace: Trace, budgets: int) -> None:
        super().__init__(budgets * trace.layers, trace.num_experts)
        self._layers, self._experts = trace.layers, trace.num_experts
        self._learned = [policy.NextUse().learned for _ in range(trace.layers)]
        self._picks = picks_by_token(trace)
        self._scores = np.zeros((trace.layers, trace.num_experts))
        self._fresh = np.zeros(trace.layers, dtype=bool)
        self._step, self._seen = 0, -1

    def scores(self, rows: NDArray[np.intp]) -> Scores:
        self._catch_up()
        layers = rows % self._layers
        for layer in np.unique(layers[~self._fresh[layers]]).tolist():
            self._scores[layer] = self._learned[layer].scores(self._experts)
            self._fresh[layer] = True
        return ties_by_order(self._scores[layers], super().scores(rows))

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        self._catch_up()
        self._step = step + 1
        super().used(step, places, miss)

    def _catch_up(self) -> None:
        """A layer knows the picks of the token it serves before any expert leaves for them."""
        if self._seen < self._step:
            self._seen = self._step
            for layer, learned in enumerate(self._learned):
                learned.saw(self._picks[self._step, layer : layer + 1])
            self._fresh[:] = False


def ties_by_order(scores: Scores, order: Scores) -> Scores:
    """[rows, E] ranks of scores in each row, of equals the lower `order` first."""
    ranks: Scores = np.empty_like(scores)
    np.put_along_axis(ranks, np.lexsort((order, scores), axis=1), np.arange(scores.shape[1], dtype=float)[None], axis=1)
    return ranks


def next_uses(trace: Trace) -> NDArray[np.int32]:
    """[T, L, K]: the step at which each pick's expert is used next, T for never."""
    L, T, K = trace.experts.shape
    upcoming = np.full((L, trace.num_experts + 1), T, dtype=np.int32)  # the last column takes "no pick"
    layers = np.arange(L)[:, None]
    result = np.empty((T, L, K), dtype=np.int32)
    ids = picks_by_token(trace)
    for step in range(T - 1, -1, -1):
        result[step] = upcoming[layers, ids[step]]
        upcoming[layers, ids[step]] = step
    return result


def _sized(kind: Any) -> Callable[[Trace, int], RowPolicy]:
    return lambda trace, budgets: kind(budgets * trace.layers, trace.num_experts)


MAKERS: dict[str, Callable[[Trace, int], RowPolicy]] = {
    "lru": _sized(LRU),
    "lfu": _sized(LFU),
    "lfru": _sized(LFRU),
    "classlru": _sized(ClassLRU),
    "next-use": NextUse,
    "belady": Belady,
}
