"""Keeps the experts in slots that a predictor names: watches requests, chooses the base set, keeps it, reports.

docs/slots.md tells the story. Decides about ids; bytes are moved by the loader. Callers hold the runtime's lock.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.options import Options
from emoe.predictor import UNKNOWN_TASK, ExpertPredictor
from emoe.requests import Kind, Request, Requests, Span
from emoe.routing.resident import Residency
from emoe.slots.load_score import Expected, load_score
from emoe.slots.loader import Loader
from emoe.slots.next_layer import NextLayer
from emoe.slots.options import insensitive_layers, require_shape
from emoe.slots.policy import make
from emoe.slots.refresh import Refresh
from emoe.slots.shadow import PATIENCE, Between, Loading, Switch
from emoe.slots.streams import Streams

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 512  # picks of so many tokens are kept before they are handed on

Mask = NDArray[np.bool_]
_Routed = tuple[torch.Tensor, torch.Tensor]  # picks [T, K] of a layer and its residents [E]


class _Chosen(NamedTuple):
    """A base set [L, E], and the scores that it was chosen by."""

    base: Mask
    scores: NDArray[np.float64]


class BaseSet:
    """The base set of one runtime.

    Args:
        loader: whose cache holds the experts.
        residency: which experts are resident.
        experts_per_layer: routed experts of each layer.
        top_k: picks of a token in a layer.
        options: the predictor and how it runs.
        loads_misses: False in mode `resident` without a contract: nothing else loads, so the base set takes all slots.
        ahead: True in modes `resident` and `coarse`: the base set is loaded as a request begins. Elsewhere its experts
            are kept once a miss has loaded them.
        waits: True in mode `resident`: the request waits for that.
        observed: layers whose router picks come by `picked`; those of the others are what they compute with.
        requests: tells of requests, and which forwards are users'.

    Raises:
        ConfigError: the predictor is for a model of another shape.
    """

    def __init__(
        self,
        loader: Loader,
        residency: Residency,
        experts_per_layer: Sequence[int],
        top_k: int,
        options: Options,
        *,
        loads_misses: bool,
        ahead: bool,
        waits: bool,
        observed: Sequence[int] = (),
        requests: Requests | None = None,
    ) -> None:
        self._loader, self._cache, self._residency = loader, loader.cache, residency
        self._experts = list(experts_per_layer)
        self._options, self._top_k = options, top_k
        self._loads_misses, self._ahead, self._waits = loads_misses, ahead, waits
        self._observed = frozenset(observed)
        L = len(self._experts)
        slots = self._slots()
        self.sizes = self._sizes(slots)
        none = np.zeros((L, max(self._experts)), dtype=bool)
        self._chosen = self._own = _Chosen(none, np.zeros(none.shape))  # what serves, and the choice of `_refresh`
        self._expected: dict[int, frozenset[tuple[int, int]]] = {}  # by task, as of refresh `_expected_at`
        self._expected_at = 0
        self._choices: tuple[Mask, ...] = (none, none)  # of this request: kept, best now, and of each rival
        self._pending: list[list[int]] = [[] for _ in range(L)]
        self._refresh = Refresh(options.period)
        self._others = [self._own] * len(self._refresh.rivals_due)
        self._between = Between(self._experts, self.sizes) if ahead else None
        self._rivals = self._between or Loading(self._experts, slots, make(options.policy))
        self._switch = Switch(loads_misses=not ahead)
        if options.predictor is not None and options.predictor.names:
            self._switch.start_off(UNKNOWN_TASK, "the predictor does not know the task")
        self._kept = False  # whether the base set is, for the requests that run
        self._mean_tokens: dict[int, float] = {}
        self._seen: set[int] = set()  # tasks that requests had
        self._strange: set[str] = set()
        self._milliseconds: deque[float] = deque(maxlen=PATIENCE)
        self._covered: deque[tuple[int, int]] = deque(maxlen=PATIENCE)
        self._resident: deque[tuple[int, int]] = deque(maxlen=PATIENCE)
        self.requests = self.refreshes = self.loads = 0
        self._task = UNKNOWN_TASK
        self._request: Request | None = None  # what the base set is for
        self._requests = Requests([self]) if requests is None else requests
        self._clear()
        self._next_layer = (
            NextLayer(loader, self._experts, top_k, options.prefetch) if options.prefetch is not None else None
        )
        self._insensitive = self._layers_that_do_not_count()
        self._streams = Streams(options.predictor, self._insensitive) if options.predictor is not None else None
        if options.predictor is not None:
            require_shape(options.predictor, *self._base.shape)
            if not any(self.sizes):
                logger.warning(
                    "emoe: no layer has more slots (%d) than the slack (%d), so the predictor decides nothing; "
                    "a larger budget or slack= changes that",
                    max(slots),
                    max(map(self._slack, slots)),
                )

    def _slots(self) -> list[int]:
        return [self._cache.capacity(layer) for layer in range(len(self._experts))]

    def _slack(self, slots: int) -> int:
        return max(self._top_k, round(self._options.slack * slots)) if self._loads_misses else 0

    def _sizes(self, slots: Sequence[int]) -> list[int]:
        """Experts of the base set in each layer."""
        return [max(0, count - self._slack(count)) for count in slots]

    def resized(self) -> None:
        """Layers have other numbers of slots: the base set loses those of the lowest scores, or grows by the next."""
        slots = self._slots()
        self.sizes = self._sizes(slots)
        self._rivals.resize(slots if self._between is None else self.sizes)
        if self._base.any():
            again = {id(each): self._best(each.scores) for each in (self._chosen, self._own, *self._others)}
            self._chosen, self._own = again[id(self._chosen)], again[id(self._own)]
            self._others = [again[id(each)] for each in self._others]
            self._choices = self._base, self._base
            if self._kept:
                self._bring(self._base)

    @property
    def _base(self) -> Mask:
        """As chosen, kept or not."""
        return self._chosen.base

    def _best(self, scores: NDArray[np.float64]) -> _Chosen:
        return _Chosen(_best(scores, self.sizes, self._experts), scores)

    def _layers_that_do_not_count(self) -> dict[int, NDArray[np.bool_]]:
        """[L] of each task that the predictor and the sensitivity profile know."""
        options = self._options
        if options.sensitivity is None:
            return {}
        if options.predictor is None or not options.predictor.names:
            logger.warning("emoe: sensitivity= has no effect: there is no predictor that knows tasks")
        return insensitive_layers(options.predictor, options.sensitivity, len(self._experts))

    @property
    def watches(self) -> bool:
        """Whether forwards matter to it: there is a predictor, or prefetch for the next layer."""
        return self._options.predictor is not None or self._next_layer is not None

    # Requests

    def begin(self, request: Request, first: bool = True) -> None:
        """A request begins; the base set is for the first, and for what runs beside it or within.

        Requests that join others, each with tokens of its own, are a mixture, for which it is chosen as they come.
        """
        if not first and not request.joined:
            return
        self._loader.begin()
        try:
            if first:
                self._finish()  # of one whose begin failed
                self._clear()  # an interrupted end leaves counts behind
                if self._streams is not None:
                    self._streams.clear()
            self._begin(request)
        finally:
            self._loader.over()

    def _begin(self, request: Request) -> None:
        self._request = request
        self.requests += 1
        predictor = self._options.predictor
        self._task = self._number(request.task)
        if predictor is None:
            return
        self._seen.add(self._task)
        means = self._mean_tokens
        typical = means.get(self._task) or (sum(means.values()) / len(means) if means else 1.0)
        requests = [Expected(self._number(name), count) for name, count in request.others]
        requests.append(Expected(self._task, typical if request.tokens is None else request.tokens))
        if request.joined and self._streams is not None:
            self._streams.join(request, self._task)
            if not self._streams.counts(self._task):
                return
        self._predict(predictor, requests, typical, alone=not request.joined)
        self._rivals.begin(self._base)
        self._keep(self._wanted(request))

    def _number(self, task: str | None) -> int:
        names = self._options.predictor.names if self._options.predictor is not None else ()
        if task in names:
            return names.index(task)
        if task is not None and names and task not in self._strange:
            self._strange.add(task)
            logger.warning(
                "emoe: task %r is unknown to the predictor, so no base set is kept for it; it knows: %s",
                task,
                ", ".join(names),
            )
        return UNKNOWN_TASK

    def _predict(
        self, predictor: ExpertPredictor, requests: Sequence[Expected], typical: float, *, alone: bool
    ) -> None:
        streams = None if alone else self._streams
        running = [] if streams is None else streams.tasks()
        tasks = [*running, *(task for task, _ in requests)] if predictor.names else []
        due = self._refresh.due(tasks, known=bool(self._own.base.any()))
        if due or self._options.period == "adaptive":
            started = time.perf_counter()
            if streams is None:
                scores = load_score(predictor, requests, self._insensitive)
            else:
                scores = streams.scores(requests[:-1], typical)
            self._renew(self._best(scores), due)
            self._milliseconds.append(1e3 * (time.perf_counter() - started))
        elif streams is None:
            predictor.begin(self._task)

    def _renew(self, renewed: _Chosen, due: bool) -> None:
        self._choices = self._own.base, renewed.base
        if not renewed.base.any():
            return
        refresh, before = self._refresh, self._chosen
        if due:
            self._own = renewed
        self._others = [
            renewed if now or not other.base.any() else other
            for now, other in zip(refresh.rivals_due, self._others, strict=True)
        ]
        self._choices += tuple(other.base for other in self._others)
        self._chosen = self._own if refresh.follows is None else self._others[refresh.follows]
        self.refreshes += self._chosen is not before

    def _wanted(self, request: Request) -> bool:
        """Whether a base set helps at least half of the requests that run."""
        tasks = self._streams.tasks() if request.joined and self._streams is not None else [self._task]
        return 2 * sum(not self._switch.off(task) for task in tasks) >= len(tasks)

    def _keep(self, wanted: bool) -> None:
        self._kept = wanted
        if wanted:
            # Also where it stays: a prompt may have needed more slots at once than the slack has.
            self._bring(self._base)
        elif self._between is not None:
            self._bring(self._between.held())  # what was used last: nothing loads while a request runs
        else:
            self._bring(np.zeros_like(self._base))

    def end(self, request: Request, last: bool = True) -> None:
        """The last that ran ended, or one that joined: what was shown goes to predictor, shadow and drift test."""
        if not last and not request.joined:
            return
        self._loader.begin()
        try:
            self._finish(request, last)
        finally:
            self._loader.over()

    def _finish(self, ended: Request | None = None, last: bool = True) -> None:
        if self._request is None:
            return
        if last:
            self._request = None
        self._flush()
        predictor = self._options.predictor
        task, tokens = self._task, self._tokens
        if ended is not None and self._streams is not None and ended in self._streams:
            task, tokens = self._streams.leave(ended)
        picks = int(self._counts.sum())
        if predictor is None or not picks:
            self._clear()
            return
        covered = int(self._counts[self._base].sum())
        self._covered.append((covered, picks))
        self._resident.append((self._hits, picks))
        if self._options.period == "adaptive":
            self._refresh.saw(*(float(self._counts[choice].sum()) / picks for choice in self._choices))
        if any(self.sizes) and self._switch.saw(task, *self._rivals.take()):
            self._switched(task)
        mean = self._mean_tokens.get(task)
        self._mean_tokens[task] = tokens if mean is None else 0.9 * mean + 0.1 * tokens
        self._clear()

    def _clear(self) -> None:
        self._forwards: list[list[_Routed | None]] = []
        self._spans: list[Sequence[Span]] = []  # whose the rows of these forwards are
        self._last_layer = len(self._experts)
        self._waiting_tokens = self._tokens = 0
        self._counts = np.zeros(self._base.shape, dtype=np.int64)
        self._hits = 0
        self._rivals.take()

    # The base set

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks that the predictor knows by name."""
        return () if self._options.predictor is None else self._options.predictor.names

    def expected(self, task: str | None) -> frozenset[tuple[int, int]]:
        """(layer, expert) that a request of this task will use most, as many as the base set has; empty: not known.

        Between requests, or beside those that joined. As it was at the last choice of a base set, where it is known.
        """
        predictor, number = self._options.predictor, self._number(task)
        if (
            predictor is None
            or self._switch.off(number)
            or (self._streams is not None and not self._streams.counts(number))
        ):
            return frozenset()
        if self._expected_at != self.refreshes:
            self._expected.clear()
            self._expected_at = self.refreshes
        if number not in self._expected:
            scores = load_score(predictor, [Expected(number, 1.0)], self._insensitive)
            pairs = np.argwhere(_best(scores, self.sizes, self._experts)).tolist()
            self._expected[number] = frozenset((layer, expert) for layer, expert in pairs)
        return self._expected[number]

    def _bring(self, wanted: Mask) -> None:
        """Protects these experts [L, E], from when they arrive; what is missing is loaded where it is to be.

        Where misses are loaded, moving experts ahead of them moves more bytes than it saves (docs/slots.md).
        """
        for layer in range(len(self._experts)):
            self._cache.protect(layer, np.flatnonzero(wanted[layer]).tolist())
        if not self._ahead:
            return
        self._loader.cancel_prefetch()
        for layer in range(len(self._experts)):
            experts = sorted(self._cache.protected(layer))
            self._pending[layer] = [expert for expert in experts if self._cache.lookup(layer, expert) is None]
            self._load(layer)
            while self._waits and self._pending[layer]:
                # Substitutes would be taken from what the last base set left.
                self._loader.finish_prefetch(layer)
                if not self._load(layer):
                    break
        for layer in range(len(self._experts) if self._waits else 0):
            self._loader.finish_prefetch(layer)

    def _load(self, layer: int) -> int:
        """Submits what is still missing of a layer's base set, as far as the prefetch lane takes it."""
        pending = self._pending[layer]
        started = self._loader.prefetch(layer, pending)
        self.loads += started
        self._pending[layer] = [expert for expert in pending if self._cache.lookup(layer, expert) is None]
        return started

    def _name(self, task: int) -> str:
        return self.names[task] if task != UNKNOWN_TASK else "unknown" if self.names else "any"

    def _switched(self, task: int) -> None:
        reason = self._switch.off(task)
        if reason:
            logger.warning("emoe: no base set is kept for task '%s' from now on: %s", self._name(task), reason)
        else:
            logger.info("emoe: a base set is kept for task '%s' again", self._name(task))

    # Layers

    def picked(self, layer: int, index: torch.Tensor) -> None:
        """The router's own picks [T, K] of a layer, before a routing mode exchanges any."""
        if self._options.predictor is None or self._request is None or self._requests.kind is not Kind.ASKED:
            return
        # Both are never changed after they were made, so no copy: the counting waits for the end of the request.
        routed = (index, self._residency.mask(layer))
        if layer <= self._last_layer or not self._forwards:
            if self._waiting_tokens >= BLOCK_TOKENS:
                self._flush()
            forward: list[_Routed | None] = [None] * len(self._experts)
            forward[layer] = routed  # before it is in the list: an interrupt leaves none without a layer
            self._spans.append(self._requests.spans(len(index)) if self._streams else ())
            self._forwards.append(forward)
            self._waiting_tokens += len(index)
        else:
            self._forwards[-1][layer] = routed
        self._last_layer = layer

    def before(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        if layer not in self._observed:
            self.picked(layer, index)
        if self._next_layer is not None:
            self._next_layer.before(layer, hidden, index)

    def after(self, layer: int) -> None:
        if self._next_layer is not None:
            self._next_layer.after()
        # Only now: earlier, room for the base set could be made with an expert that this forward needs.
        if self._pending[layer]:
            self._load(layer)

    def _flush(self) -> None:
        """Hands the waiting forwards on."""
        predictor = self._options.predictor
        forwards, self._forwards = self._forwards, []
        spans, self._spans = self._spans, []
        self._last_layer, self._waiting_tokens = len(self._experts), 0
        if predictor is None or not forwards:
            return
        blocks: list[NDArray[np.int16]] = []
        streams = self._streams
        for number, forward in enumerate(forwards):
            block, hits = _block(forward, self._top_k)
            if streams:
                for request, rows in spans[number]:
                    streams.observe(request, block[:, rows])
            self._hits += hits
            self._rivals.observe(block)
            blocks.append(block)
        picks = np.concatenate(blocks, axis=1)
        self._tokens += len(picks[0])
        for layer, each in enumerate(picks):
            self._counts[layer] += np.bincount(each[each >= 0], minlength=max(self._experts))
        if not streams:
            predictor.observe(picks)

    def stats(self) -> dict[str, Any]:
        """Counts and states; docs/slots.md says what each means."""
        predictor = self._options.predictor
        return {
            "predictor": type(predictor).__name__ if predictor is not None else "",
            "period": self._options.period,
            "base": sum(self.sizes),
            "requests": self.requests,
            "refreshes": self.refreshes,
            "loads": self.loads,
            "hit_rate": _share(self._resident),
            "recall": _share(self._covered),
            "milliseconds": median(self._milliseconds) if self._milliseconds else 0.0,
            "tasks": {self._name(task): self._of_task(task) for task in sorted(self._seen)},
            "next_layer": self._next_layer.state if self._next_layer is not None else "",
        }

    def _of_task(self, task: int) -> dict[str, Any]:
        ours, rival = self._switch.totals(task)
        picks = max(1, ours.picks)
        return {
            "off": self._switch.off(task),
            "hit_rate": ours.hits / picks,
            "loads_per_pick": ours.loads / picks,
            "hit_rate_without": rival.hits / picks,
            "loads_per_pick_without": rival.loads / picks,
        }


def _share(parts: Iterable[tuple[int, int]]) -> float:
    """Sum of the first of each pair as a share of the sum of the second."""
    first, whole = (sum(column) for column in zip((0, 0), *parts, strict=True))
    return first / whole if whole else 0.0


def _best(scores: NDArray[np.float64], sizes: Sequence[int], experts: Sequence[int]) -> Mask:
    """[L, E] mask of the `sizes[layer]` highest scores of each layer; of equals the lowest ids.

    A layer whose scores are all equal gets none: nothing is known of it yet.
    """
    mask = np.zeros(scores.shape, dtype=bool)
    for layer, (size, count) in enumerate(zip(sizes, experts, strict=True)):
        mine = scores[layer, :count]
        if mine.max() > mine.min():
            mask[layer, np.argsort(-mine, kind="stable")[:size]] = True
    return mask


def _block(forward: Sequence[_Routed | None], top_k: int) -> tuple[NDArray[np.int16], int]:
    """Picks [L, T, K] of one forward, and how many were resident. Layers that computed fewer tokens: the last ones."""
    T = max(len(each[0]) for each in forward if each is not None)
    block = np.full((len(forward), T, top_k), -1, dtype=np.int16)
    hits = 0
    for layer, each in enumerate(forward):
        if each is None:
            continue
        index, mask = (tensor.cpu().numpy() for tensor in each)
        valid = (index >= 0) & (index < len(mask))
        hits += int(mask[index[valid]].sum())
        block[layer, T - len(index) :, : index.shape[1]] = np.where(valid, index, -1)
    return block, hits
