"""Resident sets on a trace: what policies hit at each budget, how far from the optimum, how tasks' hot sets overlap.

No model. Hit rates are those of `emoe.replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe import replay
from emoe.errors import ConfigError, TraceError
from emoe.predictor import top
from emoe.replay.mix import mixed, split
from emoe.trace.trace import Trace, join

Floats = NDArray[np.float64]

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LOADING = ("lru", "lfu", "next-use", "belady", "base+slack", "trained-next-use")
GOING_WITHOUT = ("task-table", "recent", "trained-next-use")


@dataclass(frozen=True)
class HitRates:
    """Hit rate of each policy at each budget, on prompts in random order of which the first half was learned from.

    Attributes:
        shares: [B] resident shares.
        loading: policy -> [B] hit rate in percent where misses are loaded.
        without: policy -> [B] coverage in percent where a pick that is not resident goes without.
        loads: policy -> [B] experts loaded per token, the policies of `without` with " (without)" after their name.
        tokens: tokens replayed.
    """

    shares: tuple[float, ...]
    loading: dict[str, list[float]]
    without: dict[str, list[float]]
    loads: dict[str, list[float]]
    tokens: int

    def regret(self) -> dict[str, list[float]]:
        """Points of hit rate that each loading policy is below Belady's optimum."""
        best = self.loading["belady"]
        return {
            name: [round(top - mine, 3) for top, mine in zip(best, rates, strict=True)]
            for name, rates in self.loading.items()
            if name != "belady"
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "shares": self.shares, "hit_rate": self.loading, "coverage": self.without, "belady_regret": self.regret(),
            "loads_per_token": self.loads, "tokens": self.tokens,
        }  # fmt: skip


def hit_rates(
    trace: Trace, shares: Sequence[float] = SHARES, *, seed: int = 0, on_step: Callable[[str], None] = lambda name: None
) -> HitRates:
    """Replays all policies.

    Args:
        trace: with at least four prompts in some task.
        shares: those that give a layer no more slots than a token has picks are left out.
        on_step: told the policy that runs.

    Raises:
        ConfigError: no share is left.
        TraceError: too few prompts.
    """
    usable = tuple(
        share for share in shares if trace.top_k < replay.slots_of(share, trace.num_experts) < trace.num_experts
    )
    if not usable:
        raise ConfigError(f"no share of {list(shares)} holds more than the {trace.top_k} picks of a token")
    profile, rest = _halves(trace)
    profile, rest = mixed(profile, seed + 1), mixed(rest, seed)
    loading: dict[str, list[float]] = {}
    without: dict[str, list[float]] = {}
    loads: dict[str, list[float]] = {}
    for miss, names, rates in (("load", LOADING, loading), ("substitute", GOING_WITHOUT, without)):
        for name in names:
            on_step(name)
            options = replay.Options(miss=miss if name == "trained-next-use" else "load")
            results = replay.replay(rest, name, usable, profile=profile, options=options)
            rates[name] = [round(100 * result.hit_rate, 3) for result in results]
            key = name if miss == "load" else f"{name} (without)"
            loads[key] = [round(result.loads / rest.tokens, 3) for result in results]
    return HitRates(usable, loading, without, loads, rest.tokens)


def _halves(trace: Trace) -> tuple[Trace, Trace]:
    """The first half of each task's prompts, and the rest; tasks of one prompt are all rest.

    Raises:
        TraceError: no task has four prompts, which a fit with tables of other prompts takes.
    """
    profile, rest, most = [], [], 0
    for task in np.unique(trace.task):
        mine = trace.take(trace.task == task)
        prompts = len(np.unique(mine.prompt))
        most = max(most, prompts)
        first, second = split(mine, 0.5) if prompts > 1 else (None, mine)
        profile += [first] if first else []
        rest.append(second)
    if most < 4:
        raise TraceError(f"policies learn from half of a task's prompts; the largest task has {most}, of at least 4")
    return join(profile), join(rest)


@dataclass(frozen=True)
class Overlap:
    """How far the experts that one task uses most are those of another.

    Attributes:
        tasks: [N] names.
        jaccard: [N, N] shared over joint members of two tasks' hot sets, mean over layers. The diagonal compares the
            two halves of a task's own prompts, so it is below 1 by the noise of the profile; NaN for a single prompt.
        share: size of a hot set, as a share of the experts.
        by_chance: what random sets of this size have.
    """

    tasks: tuple[str, ...]
    jaccard: Floats
    share: float
    by_chance: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        matrix = [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in self.jaccard]
        return {"tasks": self.tasks, "jaccard": matrix, "share": self.share, "by_chance": round(self.by_chance, 4)}


def overlap(trace: Trace, share: float = 0.3) -> Overlap:
    """Overlap of the tasks' hot sets; each half of a task's prompts (every second one) gives a set of its own.

    A pair of tasks is the mean over its four pairs of halves, so that it and the diagonal rest on equally many prompts.
    """
    size = replay.slots_of(share, trace.num_experts)
    names, sets = [], []
    for task in np.unique(trace.task):
        prompts = np.unique(trace.prompt[trace.task == task])
        names.append(trace.task_names[task])
        halves = [prompts[::2], prompts[1::2]]
        sets.append([_hot(trace.take(np.isin(trace.prompt, half)), size) for half in halves if len(half)])
    matrix = np.full((len(names), len(names)), np.nan)
    for row, mine in enumerate(sets):
        for column, theirs in enumerate(sets):
            pairs = [
                _jaccard(first, second)
                for one, first in enumerate(mine)
                for two, second in enumerate(theirs)
                if row != column or one < two
            ]
            if pairs:
                matrix[row, column] = float(np.mean(pairs))
    return Overlap(tuple(names), matrix, share, size / (2 * trace.num_experts - size))


def _hot(trace: Trace, size: int) -> NDArray[np.bool_]:
    """[L, E] mask of the experts used most."""
    counts = np.stack(
        [
            np.bincount(picks[picks >= 0], minlength=trace.num_experts)
            for picks in trace.experts.reshape(trace.layers, -1)
        ]
    )
    return top(counts.astype(np.float64), size)


def _jaccard(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float(((first & second).sum(axis=1) / (first | second).sum(axis=1)).mean())
