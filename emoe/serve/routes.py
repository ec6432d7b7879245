"""What replicas publish of themselves, and what a router makes of it. Whole numbers and names; no Ray, no model.

The choice itself is `emoe.engine.placement`, as in the simulator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emoe.engine.placement import CHOICES, State, ranked
from emoe.errors import ConfigError

PLACES = 8  # of a replica that has not published any yet
UNKNOWN = ""  # the task of requests that have none


def number_of(experts: Iterable[tuple[int, int]], width: int) -> int:
    """A set of (layer, expert) as a number that all replicas of a model understand.

    Args:
        width: experts of the layer that has most.
    """
    bits = bytearray()
    for layer, expert in experts:
        bit = layer * width + expert
        bits.extend(bytes(max(0, (bit >> 3) + 1 - len(bits))))
        bits[bit >> 3] |= 1 << (bit & 7)
    return int.from_bytes(bits, "little")


@dataclass(frozen=True)
class Published:
    """What one replica says of itself.

    Attributes:
        places: requests that it runs at once.
        resident: experts in memory, as a number; None for a plain model.
        expected: predicted set of each task that its predictor knows, as a number, and of UNKNOWN for all others; 0
            where nothing is known.
        served: requests of each task so far.
        requests: of each front, tasks of its requests that run or wait here.
    """

    places: int
    resident: int | None = None
    expected: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)
    requests: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For `record_routing_stats`."""
        return {
            "places": self.places,
            "resident": None if self.resident is None else f"{self.resident:x}",
            "expected": {task: f"{experts:x}" for task, experts in self.expected.items()},
            "served": dict(self.served),
            "requests": {front: dict(tasks) for front, tasks in self.requests.items()},
        }

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Published:
        """From `to_dict`; from nothing, what is assumed of a replica that has published nothing yet."""
        if not stats:
            return cls(PLACES)
        return cls(
            stats["places"],
            None if stats["resident"] is None else int(stats["resident"], 16),
            {task: int(experts, 16) for task, experts in stats["expected"].items()},
            stats["served"],
            stats["requests"],
        )


@dataclass(frozen=True)
class Hint:
    """What a router knows of a request: which front it comes from, its task, how many answers it wants."""

    front: str
    task: str = UNKNOWN
    answers: int = 1


class Books:
    """A router's own memory: what it sent where, beside what replicas published.

    What is published is a second or so old, so requests of the router's own front count as it sent them, and those of
    other fronts as they were published.

    Args:
        router: a name in `emoe.engine.placement.CHOICES`.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, router: str) -> None:
        if router not in CHOICES:
            raise ConfigError(f"router={router!r} is not one of: {', '.join(CHOICES)}")
        self._choose = CHOICES[router]
        self._sent: dict[Hashable, tuple[Hashable, Hint]] = {}  # by request: where to
        self._turn = 0

    def order(self, replicas: Mapping[Hashable, Published], request: Hashable, hint: Hint) -> list[Hashable]:
        """All replicas, the best for this request first; it counts as sent there until something else is told."""
        self.forget(replicas)
        self.withdraw(request)
        expected = _expected(replicas.values())
        states = self._states(replicas, expected, hint.front)
        keys = list(replicas)
        found = [keys[number] for number in ranked(self._choose, states, _set_of(hint.task, expected), self._turn)]
        self._turn += 1
        self.sent(found[0], request, hint)
        return found

    def sent(self, replica: Hashable, request: Hashable, hint: Hint) -> None:
        """The request went to this replica, and is nowhere else."""
        self._sent[request] = (replica, hint)

    def over(self, replica: Hashable, request: Hashable) -> None:
        """It ended there, however; it may be elsewhere by now."""
        if self._sent.get(request, (None,))[0] == replica:
            del self._sent[request]

    def withdraw(self, request: Hashable) -> None:
        """It is nowhere."""
        self._sent.pop(request, None)

    def forget(self, replicas: Collection[Hashable]) -> None:
        """Only these replicas are left."""
        for request in [request for request, (replica, _) in self._sent.items() if replica not in replicas]:
            del self._sent[request]

    def _states(self, replicas: Mapping[Hashable, Published], expected: Mapping[str, int], front: str) -> list[State]:
        tasks = {replica: Counter[str]() for replica in replicas}
        for replica, hint in self._sent.values():
            tasks[replica][hint.task] += hint.answers
        for replica, says in replicas.items():
            for other, requests in says.requests.items():
                if other != front:
                    tasks[replica].update(requests)
        sets = {replica: [_set_of(task, expected) for task in counted.elements()] for replica, counted in tasks.items()}
        return [
            State(len(sets[replica]), says.places, sets[replica], says.resident) for replica, says in replicas.items()
        ]


def _set_of(task: str, expected: Mapping[str, int]) -> int:
    return expected.get(task, expected.get(UNKNOWN, 0))


def _expected(replicas: Iterable[Published]) -> dict[str, int]:
    """The predicted set of each task, of the replica that served most of it among those that have one."""
    best: dict[str, tuple[int, int]] = {}
    for says in replicas:
        for task, experts in says.expected.items():
            served = says.served.get(task, 0)
            if experts and served >= best.get(task, (-1, 0))[0]:
                best[task] = (served, experts)
    return {task: experts for task, (_, experts) in best.items()}


def merged(named: Mapping[str, Mapping[str, Any]], gone: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """One `Backend.look` of those of replicas: counts are summed, those of replicas that ended too.

    Args:
        named: of replicas that run, by name.
        gone: the last of those that ended.

    Returns:
        `engine`, `model`, `layers` (of one replica after the other), and `replicas`: name, served (requests by task).
    """
    if not named:
        return {}
    parts = [named[name] for name in sorted(named)]
    replicas = [{"name": name, "served": named[name].get("served", {})} for name in sorted(named)]
    engines = [each["engine"] for each in parts]
    engine = {**engines[0], **_sums(engines, ("restarts", "steps", "prompt_tokens", "output_tokens", "shared_tokens"))}
    for name in ("steps", "prompt_tokens", "output_tokens", "shared_tokens", "restarts"):
        engine[name] += sum(each["engine"].get(name, 0) for each in gone)
    for name in ("kv", "scheduler"):
        inner = [each[name] for each in engines]
        numbers = [key for key, value in inner[0].items() if isinstance(value, int) and not isinstance(value, bool)]
        engine[name] = {**inner[0], **_sums(inner, numbers)}
    layers = [layer for each in parts for layer in each["layers"]]
    models = [each["model"] for each in parts]
    if models[0] is None:
        return {"engine": engine, "model": None, "layers": layers, "replicas": replicas}
    model = {**models[0], **_sums(models, ("budget_bytes",))}
    every = [*models, *(each["model"] for each in gone)]
    model |= _sums(every, ("hits", "misses", "evictions", "loads", "stall_ms", "demand_bytes", "prefetch_bytes"))
    asked = model["hits"] + model["misses"]
    model["hit_rate"] = model["hits"] / asked if asked else 0.0
    model["routing"] = _routing([each["routing"] for each in every])
    return {"engine": engine, "model": model, "layers": layers, "replicas": replicas}


_TALLIED = ("rows", "picks", "absent", "substituted", "coarse", "misses")


def _routing(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for each in parts:
        for task, tally in each.get("tasks", {}).items():
            tasks.setdefault(task, []).append(tally)
    return {**_tally(parts), "tasks": {task: _tally(tallies) for task, tallies in tasks.items()}}


def _tally(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums; masses are means over rows."""
    found = {**parts[0], **_sums(parts, _TALLIED)}
    rows = found["rows"]
    for name in ("substituted_mass", "coarse_mass"):
        mass = sum(each.get(name, 0.0) * each.get("rows", 0) for each in parts)
        found[name] = mass / rows if rows else 0.0
    return found


def _sums(parts: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    return {name: sum(each.get(name) or 0 for each in parts) for name in names}
