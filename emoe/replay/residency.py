"""Residency that a predictor decides: a base set refreshed between prompts, with or without LRU slack; swaps by score.

Per layer, one budget at a time. `run_base` and `run_swaps` replay.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emoe.predictor import UNKNOWN_TASK, ExpertPredictor, top
from emoe.replay.counts import Counts
from emoe.slots.refresh import Refresh
from emoe.trace.trace import Trace

Mask = NDArray[np.bool_]


def run_base(trace: Trace, predictor: ExpertPredictor, slots: int, slack: int, refresh: Refresh) -> Counts:
    """A base set of `slots - slack` experts per layer, and LRU in the rest. Without slack a miss goes without.

    With slack, nothing is moved ahead: experts of the base set are kept once a miss has loaded them, and a prompt of a
    task that the predictor does not know is left to LRU.

    Args:
        trace: with prompts; each begins with a chance to refresh.
        slack: slots of each layer into which misses are loaded; 0, or at least `trace.top_k`.
        refresh: when the base set is chosen anew.
    """
    L, E = trace.layers, trace.num_experts
    rows = np.arange(L)[:, None]
    counts = Counts.of(trace)
    in_slot = np.zeros((L, E + 1), dtype=bool)  # the last column is "no pick"
    base = own = np.zeros((L, E), dtype=bool)
    rivals = [base] * len(refresh.rivals_due)
    last = np.zeros((L, E + 1), dtype=np.int64)
    covers: list[float] = []
    for step, picks in enumerate(_by_token(trace)):
        if step == 0 or trace.prompt[step] != trace.prompt[step - 1]:
            if step:
                refresh.saw(*covers)
            predictor.begin(int(trace.task[step]))
            renewed = top(predictor.rank(), slots - slack)
            before, mine = base, own
            if refresh.due([int(trace.task[step])] if predictor.names else ()):
                own = renewed
            rivals = [renewed if due else rival for due, rival in zip(refresh.rivals_due, rivals, strict=True)]
            base = own if refresh.follows is None else rivals[refresh.follows]
            covers = _coverage(trace, step, mine, renewed, *rivals)
            if base is not before and not slack:
                counts.loads += (base & ~in_slot[:, :E]).sum(axis=1)
                in_slot[:, :E] |= base
                counts.evictions += _trim(in_slot, base, last, slots)
            kept = np.zeros_like(base) if predictor.names and trace.task[step] == UNKNOWN_TASK else base
        valid = picks >= 0
        missed = valid & ~in_slot[rows, picks]
        counts.hits += valid.sum(axis=1) - missed.sum(axis=1)
        last[rows, picks] = 2 * (step + 1) + missed  # as a running model: its hits are older than its misses
        if slack and missed.any():
            counts.loads += missed.sum(axis=1)
            in_slot[rows, picks] = True
            held = kept.copy()
            held[np.broadcast_to(rows, picks.shape)[valid], picks[valid]] = True
            counts.evictions += _trim(in_slot, held, last, slots)
        predictor.observe(picks[:, None])
    return counts


def run_swaps(
    trace: Trace, predictor: ExpertPredictor, slots: int, *, moves: float, start: NDArray[np.floating]
) -> Counts:
    """Misses go without; between tokens the likeliest experts outside replace the least likely inside.

    A swap is made where the scores differ by more than a margin. Too many moves in the long run raise the margin, so
    that bursts (a new prompt) pass and the mean stays at `moves`.

    Args:
        moves: experts to move per token, summed over layers.
        start: [L, E] scores of the first residents.
    """
    L, E = trace.layers, trace.num_experts
    rows = np.arange(L)[:, None]
    counts = Counts.of(trace)
    in_slot = np.zeros((L, E + 1), dtype=bool)
    in_slot[:, :E] = top(start, slots)
    counts.loads += slots
    margin = 0.1
    for step, picks in enumerate(_by_token(trace)):
        if step == 0 or trace.prompt[step] != trace.prompt[step - 1]:
            predictor.begin(int(trace.task[step]))
        moved = _swap(in_slot[:, :E], predictor.rank(), margin)
        counts.loads += moved
        counts.evictions += int(moved.sum())
        margin = float(np.clip(margin * np.exp(_MARGIN_GAIN * (moved.sum() / moves - 1)), 1e-4, 1.0))
        counts.hits += ((picks >= 0) & in_slot[rows, picks]).sum(axis=1)
        predictor.observe(picks[:, None])
    return counts


_MARGIN_GAIN = 0.002  # over some 500 tokens of constant excess the margin changes by a factor of e
_MOST_SWAPS = 8  # of a layer between two tokens


def _swap(in_slot: Mask, scores: NDArray[np.floating], margin: float) -> NDArray[np.int64]:
    """Best outside for worst inside, as long as they differ by more than the margin; returns swaps of each layer."""
    outside = np.where(in_slot, -np.inf, scores)
    inside = np.where(in_slot, scores, np.inf)
    rows = np.arange(len(scores))
    moved = np.zeros(len(scores), dtype=np.int64)
    for _ in range(_MOST_SWAPS):
        best, worst = outside[rows].argmax(axis=1), inside[rows].argmin(axis=1)
        better = outside[rows, best] - inside[rows, worst] > margin
        if not better.any():
            break
        rows, best, worst = rows[better], best[better], worst[better]
        in_slot[rows, best], in_slot[rows, worst] = True, False
        outside[rows, best], inside[rows, worst] = -np.inf, np.inf
        moved[rows] += 1
    return moved


def _trim(in_slot: Mask, held: Mask, last: NDArray[np.int64], slots: int) -> int:
    """Takes the least recently used experts out that are not held, until each layer fits; returns how many."""
    over = in_slot[:, :-1].sum(axis=1) - slots
    evicted = 0
    while (over > 0).any():
        rows = np.flatnonzero(over > 0)
        age = np.where(in_slot[rows, :-1] & ~held[rows], last[rows, :-1], np.iinfo(np.int64).max)
        in_slot[rows, age.argmin(axis=1)] = False
        over[rows] -= 1
        evicted += len(rows)
    return evicted


def _coverage(trace: Trace, step: int, *masks: Mask) -> list[float]:
    """Share of the prompt's picks that each set holds. It is told to `Refresh` only when the prompt is over."""
    end = step + int(np.argmax(np.append(trace.prompt[step:] != trace.prompt[step], True)))
    picks = trace.experts[:, step:end]
    valid = picks >= 0
    rows = np.arange(trace.layers)[:, None, None]
    total = max(int(valid.sum()), 1)
    return [float((mask[rows, picks] & valid).sum() / total) for mask in masks]


def _by_token(trace: Trace) -> NDArray[np.int64]:
    return np.ascontiguousarray(trace.experts.transpose(1, 0, 2)).astype(np.int64)
