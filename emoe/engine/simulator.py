"""A server on paper: the scheduler's own code, an LRU of experts in ids, and a clock that steps move by what they cost.

Routing is a trace's: a request is a stretch of it, its rows touch the experts that those tokens were routed to.
Discrete events, any number of replicas; one seed gives the same figures. docs/serving.md says what is left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.engine.costs import Costs, Step
from emoe.engine.expert_sets import ExpertSets
from emoe.engine.placement import CHOICES, Choice, State
from emoe.engine.scheduler import Expert, Scheduler, Ticket
from emoe.errors import BudgetError, ConfigError, OverloadedError
from emoe.predictor import top
from emoe.trace.trace import Trace

NEVER = float("inf")
_KEPT = 1 << 62
_BASE_STEPS = 4  # between two choices of a base set


@dataclass(frozen=True)
class Arrival:
    """A request on its way: when it comes, what the scheduler is told, and what it does not know.

    Attributes:
        at: seconds.
        ticket: as an engine would submit it.
        first: place of its first token in the trace.
        tokens: tokens that it will give, at most `ticket.most_new`.
        task: its true task; `ticket.task` may be another.
    """

    at: float
    ticket: Ticket
    first: int
    tokens: int
    task: str


class ExpertLRU:
    """Slots of every layer, least recently used leaves: `emoe.slots.policy.LRU.serve`, all layers at once.

    Args:
        layers, experts: of the model.
        slots: of each layer.
    """

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        self._slots, self._experts = slots, experts
        self._key: NDArray[np.int64] = np.full((layers, experts), -1, dtype=np.int64)  # of the last use; -1: in no slot
        self._clock = 0
        self._kept: NDArray[np.bool_] = np.zeros((layers, experts), dtype=bool)
        self._ids = np.arange(experts)

    @property
    def resident(self) -> NDArray[np.bool_]:
        """[layers, experts]."""
        return self._key >= 0

    def protect(self, kept: NDArray[np.bool_]) -> None:
        """These leave only where nothing else can, as `CacheManager.protect`."""
        self._kept = kept

    def serve(self, used: NDArray[np.bool_]) -> NDArray[np.int64]:
        """One step that uses the experts of a mask [layers, experts]; gives the loads of each layer."""
        miss = used & (self._key < 0)
        self._clock += 1
        # Hits are touched before misses come; of equals the lower id came first.
        np.copyto(self._key, (2 * self._clock + miss) * self._experts + self._ids, where=used)
        over = np.flatnonzero((self._key >= 0).sum(axis=1) > self._slots)
        if over.size:
            keys = self._key[over]
            worth = keys + np.where(self._kept[over] & (keys >= 0), _KEPT, 0)
            least = np.partition(worth, self._experts - self._slots, axis=1)[:, self._experts - self._slots]
            self._key[over] = np.where(worth < least[:, None], -1, keys)
        loads: NDArray[np.int64] = miss.sum(axis=1)
        return loads


class BaseSet:
    """The experts worth most to the requests that run: what each used lately, and before that what its task uses.

    Args:
        frequency: [layers, experts] uses per token by task; None as a task is the mean of all.
        size: experts kept in each layer.
    """

    PRIOR = 20.0  # tokens that the task's frequencies count for
    FADE = 0.97  # of what a request used, a token

    def __init__(self, frequency: dict[str | None, NDArray[np.float64]], size: int) -> None:
        self._frequency, self._size = frequency, size
        self._uses: dict[Hashable, NDArray[np.float64]] = {}  # the last place has the weight of all
        self._own: dict[Hashable, NDArray[np.float64]] = {}  # what it used, and nothing of what its task does

    def saw(self, id: Hashable, task: str | None, picks: NDArray[np.int32]) -> None:
        """Rows [T, layers * K] of a request ran."""
        uses = self._uses.get(id)
        if uses is None:
            known = self._frequency.get(task, self._frequency[None])
            uses = self._uses[id] = np.append(known.ravel(), 1.0) * self.PRIOR
        kept = self.FADE ** len(picks)
        weight = (1 - kept) / (1 - self.FADE)
        counts = np.bincount(picks.ravel(), minlength=len(uses) - 1)
        uses *= kept
        uses[:-1] += counts * (weight / len(picks))
        uses[-1] += weight
        own = self._own.get(id)
        self._own[id] = counts.astype(np.float64) if own is None else own + counts

    def ended(self, id: Hashable) -> None:
        self._uses.pop(id, None)
        self._own.pop(id, None)

    def likeliest(self, id: Hashable) -> str | None:
        """The task whose uses are most like those of a request that ran, by their cosine, whatever task it was told."""
        own = self._own[id]

        def likeness(task: str) -> float:
            known = self._frequency[task].ravel()
            return float(own @ known / np.sqrt(known @ known))

        return max((task for task in self._frequency if task is not None), key=likeness)

    def chosen(self, running: Iterable[Hashable]) -> NDArray[np.bool_]:
        """[layers, experts] mask for the requests that run; those of which nothing ran yet do not count."""
        total = np.zeros(self._frequency[None].size + 1)
        for id in running:
            if id in self._uses:
                total += self._uses[id] / self._uses[id][-1]
        scores = total[:-1].reshape(self._frequency[None].shape)
        return top(scores, self._size) & (scores > 0)


class _Resident:
    """What `Scheduler` asks: whether an expert is in memory."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._rows: list[list[bool]] = mask.tolist()

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, tuple) and self._rows[expert[0]][expert[1]]


class Replica:
    """One server: a scheduler, slots, and a clock.

    Args:
        scheduler: makes one; it is told what is resident.
        picks: [tokens, layers * K] numbers layer * experts + expert of the trace.
        shape: layers and experts.
        slots: of each layer.
        costs: what steps cost in truth.
        expert_bytes: of one expert.
        sets: one for all replicas, for their router.
        base: the base set that a predictor keeps; None for an LRU alone.
        noise: standard deviation of the logarithm of a step's seconds.
        seed: of that noise.
        probe: rows of a request's first step at most, so that what it routes to is seen before its prompt has run; None
            for as many as the scheduler gives.
    """

    def __init__(
        self,
        scheduler: Callable[[Callable[[], _Resident]], Scheduler],
        picks: NDArray[np.int32],
        shape: tuple[int, int],
        slots: int,
        costs: Costs,
        expert_bytes: int,
        sets: ExpertSets,
        base: BaseSet | None = None,
        noise: float = 0.0,
        seed: int = 0,
        probe: int | None = None,
    ) -> None:
        self._probe = probe
        self._picks, self._shape, self._costs, self._expert_bytes = picks, shape, costs, expert_bytes
        self.cache = ExpertLRU(*shape, slots)
        self.scheduler = scheduler(lambda: _Resident(self.cache.resident))
        self._noise, self._random = noise, np.random.default_rng(seed)
        self._base = base
        self._here: dict[Hashable, _Progress] = {}
        self._sets = sets
        self._step: tuple[Step, NDArray[np.bool_]] | None = None
        self.loaded_bytes = self.used = self.loads = self.steps = self.tokens = 0
        self.busy = 0.0
        self.begun: list[_Progress] = []  # ran their first rows in the last step and go on

    def submit(self, arrival: Arrival, progress: _Progress, now: float) -> None:
        self.scheduler.submit(arrival.ticket, now)
        self._here[arrival.ticket.id] = progress

    def give_up(self, progress: _Progress, now: float) -> None:
        """It goes on elsewhere, from its tokens."""
        id = progress.arrival.ticket.id
        self.scheduler.cancel(id, now)
        del self._here[id]
        if self._base is not None:
            self._base.ended(id)

    def mistaken(self, progress: _Progress) -> str | None:
        """The task that a request's first rows show it to be of, where it is another than was told; else None."""
        if self._base is None:
            return None
        task = self._base.likeliest(progress.arrival.ticket.id)
        return None if task == progress.arrival.ticket.task else task

    @property
    def state(self) -> State:
        """What a router is told."""
        sets = [self._sets.number(each.arrival.ticket.experts) for each in self._here.values()]
        return State(len(sets), self.scheduler.most_running, sets)

    @property
    def idle(self) -> bool:
        return self._step is None

    def begin(self, now: float) -> float | None:
        """Begins a step and says when it ends; None where there is nothing to do."""
        batch = self.scheduler.next(now)
        if not batch:
            return None
        if self._base is not None and self.steps % _BASE_STEPS == 0:
            self.cache.protect(self._base.chosen(self.scheduler.running))
        rows: list[NDArray[np.int64]] = []
        counts: dict[Hashable, int] = {}
        tokens: dict[Hashable, int] = {}
        for id, given in batch:
            each = self._here[id]
            count = given if each.shown or self._probe is None else min(given, self._probe)
            counts[id] = count
            rows.append(np.arange(each.done, each.done + count) + each.arrival.first)
            if self._base is not None:
                self._base.saw(id, each.arrival.ticket.task, self._picks[rows[-1] % len(self._picks)])
            if each.done + count == each.arrival.ticket.prompt + each.out:
                tokens[id] = 1
        used = np.zeros(self._shape[0] * self._shape[1], dtype=bool)
        used[self._picks[np.concatenate(rows) % len(self._picks)].ravel()] = True
        mask = used.reshape(self._shape)
        bytes_ = int(self.cache.serve(mask).sum()) * self._expert_bytes
        experts = int(used.sum())
        seconds = self._costs.step(sum(counts.values()), bytes_, experts)
        if self._noise:
            seconds *= float(np.exp(self._random.normal(0.0, self._noise)))
        self._step = Step(seconds, counts, tokens, bytes_, experts), mask
        return now + seconds

    def end(self, now: float) -> list[_Progress]:
        """The step is over; gives the requests that ended with it."""
        assert self._step is not None
        step, _ = self._step
        self._step = None
        self.loaded_bytes += step.loaded_bytes
        self.used += step.experts or 0
        self.loads += step.loaded_bytes // self._expert_bytes
        self.steps += 1
        self.tokens += len(step.tokens)
        self.busy += step.seconds
        self.scheduler.ran(step, now)
        ended = []
        self.begun = []
        for id, count in step.rows.items():
            each = self._here[id]
            each.done += count
            if not each.shown:
                each.shown = True
                self.begun.append(each)
            if id in step.tokens:
                each.out += 1
                each.first = now if each.first is None else each.first
                if each.out == each.arrival.tokens:
                    each.last = now
                    del self._here[id]
                    self.scheduler.finished(id, now)
                    if self._base is not None:
                        self._base.ended(id)
                    ended.append(each)
        return ended


@dataclass(slots=True)
class _Progress:
    arrival: Arrival
    done: int = 0
    out: int = 0
    first: float | None = None
    last: float | None = None
    shown: bool = False  # its first rows ran


@dataclass(frozen=True)
class Outcome:
    """One request, afterwards. Seconds; None where it was refused.

    Attributes:
        met: whether every target that it has was kept; False for one that was refused.
    """

    arrival: Arrival
    ttft: float | None
    tpot: float | None
    ttlt: float | None
    met: bool


@dataclass(frozen=True)
class Report:
    """What a run came to.

    Attributes:
        outcomes: of every request that came.
        seconds: from the start to the last event.
        tokens: that were given, by requests that ended and others.
        loaded_bytes, used, loads, steps, busy: sums over replicas; experts that steps used, those that were loaded for
            it; busy in seconds.
        scheduler: `Scheduler.to_dict` of each replica.
    """

    outcomes: list[Outcome]
    seconds: float
    tokens: int
    loaded_bytes: int
    used: int
    loads: int
    steps: int
    busy: float
    scheduler: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, shares from 0 to 1, bytes, tokens of output."""
        served = [each for each in self.outcomes if each.ttft is not None]
        met = sum(each.met for each in self.outcomes)
        return {
            "requests": len(self.outcomes),
            "refused": len(self.outcomes) - len(served),
            "seconds": self.seconds,
            "ttft": _percentiles(each.ttft for each in served),
            "tpot": _percentiles(each.tpot for each in served),
            "ttlt": _percentiles(each.ttlt for each in served),
            "attained": met / max(1, len(self.outcomes)),
            "goodput": met / self.seconds if self.seconds else 0.0,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "loaded_bytes": self.loaded_bytes,
            "hit_rate": 1 - self.loads / self.used if self.used else 0.0,
            "loaded_bytes_per_token": self.loaded_bytes / max(1, self.tokens),
            "steps": self.steps,
            "busy": self.busy / (self.seconds * len(self.scheduler)) if self.seconds else 0.0,
            "scheduler": self.scheduler,
        }


def _percentiles(values: Iterable[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    if not known:
        return {}
    return {f"p{at}": float(np.percentile(known, at)) for at in (50, 90, 99)} | {"mean": float(np.mean(known))}


def flat_picks(trace: Trace) -> NDArray[np.int32]:
    """[tokens, layers * K] numbers layer * experts + expert of a trace.

    Raises:
        ConfigError: a token has fewer picks than others: such traces cannot be simulated yet.
    """
    if (trace.experts < 0).any():
        raise ConfigError("the trace has tokens without a pick in some layer; simulate one in which each has all")
    offsets = (np.arange(trace.layers, dtype=np.int32) * trace.num_experts)[:, None]
    flat = trace.experts.transpose(1, 0, 2).astype(np.int32) + offsets
    return np.ascontiguousarray(flat.reshape(trace.tokens, -1))


def simulate(
    arrivals: Sequence[Arrival],
    replicas: Sequence[Replica],
    *,
    sets: ExpertSets,
    route: str = "least",
    until: float = NEVER,
    experts: dict[str, frozenset[Expert]] | None = None,
    told: Callable[[int], None] = lambda done: None,
) -> Report:
    """Runs requests through replicas until the last has ended.

    Args:
        arrivals: in order of time.
        replicas: fresh ones.
        sets: what the replicas were made with.
        route: a name in `emoe.engine.placement.CHOICES`.
        until: stops there; requests that did not end count as not met.
        experts: predicted sets by task. With them, a request whose first rows show it to be of another task than was
            told goes to a replica of its kin, where its tokens so far run again.
        told: how many requests ended since it was told last, for a progress bar.
    """
    choose = CHOICES[route]
    events: list[tuple[float, int, int]] = [(each.at, 0, number) for number, each in enumerate(arrivals)]
    heapq.heapify(events)
    ended: list[_Progress] = []
    known: list[_Progress | None] = []
    now = 0.0
    while events:
        at, kind, number = heapq.heappop(events)
        if at > until:
            break
        now = at
        woken: set[int] = set()
        if kind == 0:
            arrival = arrivals[number]
            states = [replica.state for replica in replicas] if len(replicas) > 1 else [State(0, 1)]
            where = choose(states, sets.number(arrival.ticket.experts), number)
            progress = _Progress(arrival)
            try:
                replicas[where].submit(arrival, progress, now)
                known.append(progress)
            except (OverloadedError, BudgetError):
                known.append(None)
                told(1)
            touched = where
        else:
            touched = number
            over = replicas[number].end(now)
            ended += over
            told(len(over))
            if experts is not None:
                woken = _move(replicas, number, experts, sets, choose, now)
        for each in {touched, *woken}:
            if replicas[each].idle:
                end = replicas[each].begin(now)
                if end is not None:
                    heapq.heappush(events, (end, 1, each))
    outcomes = [_outcome(arrival, progress) for arrival, progress in zip(arrivals, known, strict=False)]
    return Report(
        outcomes,
        now,
        sum(replica.tokens for replica in replicas),
        sum(replica.loaded_bytes for replica in replicas),
        sum(replica.used for replica in replicas),
        sum(replica.loads for replica in replicas),
        sum(replica.steps for replica in replicas),
        sum(replica.busy for replica in replicas),
        [replica.scheduler.to_dict() for replica in replicas],
    )


def _move(
    replicas: Sequence[Replica],
    here: int,
    experts: dict[str, frozenset[Expert]],
    sets: ExpertSets,
    choose: Choice,
    now: float,
) -> set[int]:
    """Sends requests whose first rows showed another task to a replica of their kin; gives where they went."""
    woken = set()
    for each in replicas[here].begun:
        task = replicas[here].mistaken(each) if each.last is None else None
        if task is None:
            continue
        there = choose([replica.state for replica in replicas], sets.number(experts[task]), here)
        ticket = each.arrival.ticket
        each.arrival = replace(each.arrival, ticket=replace(ticket, task=task, experts=experts[task]))
        if there == here:
            continue
        ticket = replace(
            ticket,
            prompt=ticket.prompt + each.out,
            most_new=ticket.most_new - each.out,
            task=task,
            experts=experts[task],
            ttft=None if ticket.ttft is None or each.out else max(1e-6, each.arrival.at + ticket.ttft - now),
        )
        done, each.done = each.done, 0
        try:
            replicas[there].submit(replace(each.arrival, ticket=ticket), each, now)
        except OverloadedError:
            each.done = done
            continue
        replicas[here].give_up(each, now)
        woken.add(there)
    return woken


def _outcome(arrival: Arrival, progress: _Progress | None) -> Outcome:
    if progress is None or progress.first is None or progress.last is None:
        return Outcome(arrival, None, None, None, False)
    ttft, ttlt = progress.first - arrival.at, progress.last - arrival.at
    further = progress.out - 1
    tpot = (progress.last - progress.first) / further if further else None
    ticket = arrival.ticket
    met = all(
        target is None or value is None or value <= target
        for value, target in ((ttft, ticket.ttft), (tpot, ticket.tpot), (ttlt, ticket.ttlt))
    )
    return Outcome(arrival, ttft, tpot, ttlt, met)


def predicted_experts(scores: NDArray[np.floating], count: int) -> frozenset[Expert]:
    """The `count` highest of each layer of scores [layers, experts], as (layer, expert) pairs."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return frozenset((layer, int(expert)) for layer, row in enumerate(best.tolist()) for expert in row)
