"""The policies that predict, as replays: which predictor, which slots are base and slack, what a miss does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.predictor import UNKNOWN_TASK, ExpertPredictor, load
from emoe.predictor.next_use import NextUse, walk
from emoe.predictor.oracle import Oracle
from emoe.predictor.prompts import tasks_by_name
from emoe.predictor.table import Recent, TaskTable
from emoe.replay import residency, rows
from emoe.replay.counts import Counts
from emoe.slots.refresh import Refresh
from emoe.trace.trace import Trace

POLICIES = ("task-table", "recent", "base+slack", "trained-next-use", "oracle")
FROM_FILE = "predictor:"  # and the path of a file of `emoe train-predictor`
LEARNING = ("task-table", "base+slack", "trained-next-use")  # from a profile
MISSES = ("load", "substitute")


@dataclass(frozen=True)
class Options:
    """How predicting policies run.

    Attributes:
        miss: "load" a pick that is in no slot, or "substitute" it: it goes without. `trained-next-use` and
            `predictor:PATH` do either; `task-table`, `recent` and `oracle` have no slots for misses, `base+slack` has
            slack for nothing else.
        period: prompts between two choices of the base set, or "adaptive": when observed routing drifts.
        slack: share of the slots that `base+slack`, and `predictor:PATH` where it loads misses, leave to LRU; at least
            the picks of a token.
        moves: experts that `trained-next-use` may move where misses are substituted, as a share of LRU's loads on the
            profile.
        offset: prompts after the first at which a fixed period begins.
    """

    miss: str = "load"
    period: int | str = 1
    slack: float = 0.5
    moves: float = 0.3
    offset: int = 0

    def __post_init__(self) -> None:
        if self.miss not in MISSES:
            raise ConfigError(f"miss={self.miss!r} is not one of: {', '.join(MISSES)}")
        if self.period != "adaptive" and not (isinstance(self.period, int) and self.period >= 1):
            raise ConfigError(f"period={self.period!r} is not a number of prompts of at least 1, nor 'adaptive'")
        if not 0 < self.slack < 1:
            raise ConfigError(f"slack={self.slack} is not a share between 0 and 1")
        if not self.moves > 0:
            raise ConfigError(f"moves={self.moves} is not over 0")


@dataclass(frozen=True)
class Outcome:
    """Counts, what misses did, and how often a base set was chosen (None: it has none)."""

    counts: Counts
    miss: str
    refreshes: int | None


def run(trace: Trace, profile: Trace | None, policy: str, slots: list[int], options: Options) -> list[Outcome]:
    """One policy at several budgets of at least `trace.top_k` slots a layer.

    Raises:
        ConfigError: the policy needs a profile and there is none, slack leaves no base, or the predictor is for a model
            of another shape.
        CheckpointError: the file of a predictor is something else.
    """
    if policy.startswith(FROM_FILE):
        return _from_file(trace, policy.removeprefix(FROM_FILE), slots, options)
    if policy == "recent":
        return [_base(trace, Recent(trace.layers, trace.num_experts), count, 0, options) for count in slots]
    if policy == "oracle":
        return [_base(trace, Oracle(trace), count, 0, options) for count in slots]
    if profile is None:
        raise ConfigError(f"policy '{policy}' needs a profile: part of the traces that is not replayed")
    if policy == "trained-next-use":
        return _next_use(trace, profile, slots, options)
    if policy == "base+slack" and options.miss == "substitute":
        raise ConfigError(
            "base+slack loads its misses into the slack; with miss='substitute' take task-table or trained-next-use"
        )
    table = TaskTable.profile(profile)
    known = np.where(np.isin(trace.task, profile.task), trace.task, UNKNOWN_TASK)
    trace = replace(trace, task=known.astype(trace.task.dtype))
    slack = [0 if policy == "task-table" else _slack(count, trace.top_k, options.slack) for count in slots]
    return [_base(trace, table, count, each, options) for count, each in zip(slots, slack, strict=True)]


def _slack(slots: int, top_k: int, share: float) -> int:
    slack = max(top_k, round(share * slots))
    if slack >= slots:
        raise ConfigError(f"of {slots} slots a layer, {slack} for slack leave none for the base set")
    return slack


def _from_file(trace: Trace, path: str, slots: list[int], options: Options) -> list[Outcome]:
    predictor = load(path)
    shape, expected = predictor.rank().shape, (trace.layers, trace.num_experts)
    if shape != expected:
        raise ConfigError(f"{path}: predicts [layers, experts] = {list(shape)}, the trace has {list(expected)}")
    known = replace(trace, task=tasks_by_name(trace, predictor.names))
    slack = [0 if options.miss == "substitute" else _slack(count, trace.top_k, options.slack) for count in slots]
    return [_base(known, predictor.anew(), count, each, options) for count, each in zip(slots, slack, strict=True)]


def _base(trace: Trace, predictor: ExpertPredictor, slots: int, slack: int, options: Options) -> Outcome:
    refresh = Refresh(options.period, options.offset)
    counts = residency.run_base(trace, predictor, slots, slack, refresh)
    return Outcome(counts, "load" if slack else "substitute", refresh.count)


def _next_use(trace: Trace, profile: Trace, slots: list[int], options: Options) -> list[Outcome]:
    fitted = NextUse.fit(profile)
    if options.miss == "load":
        counts = rows.advance(trace, _ByNextUse(fitted, trace), slots)
        return [Outcome(each, "load", None) for each in counts]
    outcomes = []
    for count, shadow in zip(slots, rows.run(profile, "lru", slots), strict=True):
        moves = options.moves * float(shadow.loads.sum()) / profile.tokens
        start = fitted.table.of(UNKNOWN_TASK)
        swapped = residency.run_swaps(trace, fitted.anew(), count, moves=moves, start=start)
        outcomes.append(Outcome(swapped, "substitute", None))
    return outcomes


class _ByNextUse:
    """`rows.RowPolicy`: the expert whose next use is farthest, as far as the predictor knows, leaves."""

    def __init__(self, predictor: NextUse, trace: Trace) -> None:
        self._predictor, self._layers = predictor, trace.layers
        self._walk = walk(trace, predictor)
        self._step = 0
        self._seen = -1

    def scores(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        self._catch_up()
        return self._predictor.rank()[rows % self._layers].astype(np.float64)

    def used(self, step: int, places: NDArray[np.intp], miss: NDArray[np.bool_]) -> None:
        self._catch_up()
        self._step = step + 1

    def _catch_up(self) -> None:
        """A layer knows the picks of the token it serves before it evicts for them."""
        while self._seen < self._step:
            self._seen = next(self._walk)
