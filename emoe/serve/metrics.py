"""Counts for Prometheus. Labels come from bounded sets: names of tasks are those of `TaskNames`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emoe.engine.generation import Event
from emoe.serve.inbox import Record
from emoe.serve.tasks import UNKNOWN

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_LANES = {"demand": "demand_bytes", "ahead": "prefetch_bytes"}


@dataclass
class TaskCounts:
    """Sums over the answers of a task that ended.

    Attributes:
        first_seconds: to the first token, of those that had one.
        firsts: how many those are.
        met, targets: targets that were kept, of so many.
    """

    answers: int = 0
    output_tokens: int = 0
    firsts: int = 0
    first_seconds: float = 0.0
    met: int = 0
    targets: int = 0


class Metrics:
    """What requests count, and what the engine's statistics say when they are asked for."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskCounts] = {}  # by label
        self.registry = CollectorRegistry()
        self._engine = _EngineStats()
        self.registry.register(self._engine)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"emoe_{name}", what, labels, registry=self.registry)

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"emoe_{name}_seconds", what, ("task",), registry=self.registry, buckets=_SECONDS)

        self._answers = counter("answers", "Answers that ended, by how (finish_reason).", "task", "reason")
        self._refused = counter("refused", "Requests that were refused, by status.", "status")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "task")
        self._shared = counter("shared_prompt_tokens", "Of these, copied from another request's state.", "task")
        self._output = counter("output_tokens", "Tokens of answers.", "task")
        self._slo = counter("slo", "Targets of answers that ended, by whether they were met.", "task", "target", "met")
        self._times = {
            "ttft": seconds("ttft", "From arrival to the first token."),
            "tpot": seconds("tpot", "Mean over the tokens after the first, one value an answer."),
            "ttlt": seconds("ttlt", "From arrival to the last token."),
        }

    def ended(self, record: Record, event: Event) -> None:
        """An answer ended."""
        task = record.job.task or UNKNOWN
        counts = self.tasks.setdefault(task, TaskCounts())
        counts.answers += 1
        counts.output_tokens += record.output_tokens
        self._answers.labels(task, event.finish_reason or UNKNOWN).inc()
        self._prompt.labels(task).inc(len(record.job.tokens))
        self._shared.labels(task).inc(record.shared_tokens)
        self._output.labels(task).inc(record.output_tokens)
        seconds = record.seconds
        for name, value in seconds.items():
            self._times[name].labels(task).observe(value)
        if "ttft" in seconds:
            counts.firsts += 1
            counts.first_seconds += seconds["ttft"]
        if event.finish_reason == "cancelled":
            return  # a client that left neither met nor missed its targets
        for name, target in record.job.slo_ms.items():
            if name == "tpot" and record.output_tokens == 1:
                met = True  # no token came after the first
            else:
                met = name in seconds and 1000 * seconds[name] <= target and event.finish_reason != "error"
            counts.met += met
            counts.targets += 1
            self._slo.labels(task, name, str(met).lower()).inc()

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def text(self, snapshot: Mapping[str, Any]) -> bytes:
        """Prometheus' text format."""
        self._engine.snapshot = snapshot
        return generate_latest(self.registry)


class _EngineStats(Collector):
    """`Engine.stats` and `Runtime.stats`, as they were last seen."""

    def __init__(self) -> None:
        self.snapshot: Mapping[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        if not self.snapshot:
            return
        yield _gauge("up", "1 while the engine runs.", float(self.snapshot["running"]))
        engine, model = self.snapshot.get("engine") or {}, self.snapshot.get("model") or {}
        scheduler, kv = engine.get("scheduler", {}), engine.get("kv", {})
        yield _gauge("waiting_requests", "Answers that wait for their first step.", scheduler.get("waiting"))
        yield _gauge("running_requests", "Answers that have state.", scheduler.get("running"))
        yield _family("kv_bytes", "State of requests: what there is, is taken, is kept for prefixes.", "part", {
            part: kv.get(name) for part, name in (("all", "bytes"), ("used", "used"), ("kept", "kept"))
        })  # fmt: skip
        if "replicas" in self.snapshot:
            yield _gauge("replicas", "Replicas that run.", len(self.snapshot["replicas"]))
            yield _counter("retried_answers", "Answers that began on another replica: theirs ended.",
                           self.snapshot["retried"])  # fmt: skip
        yield _counter("steps", "Steps of the engine.", engine.get("steps"))
        yield _counter("restarts", "Requests that ran again since a step failed.", engine.get("restarts"))
        if not model:
            return
        yield _counter("expert_hits", "Routed experts that were in a slot.", model.get("hits"))
        yield _counter("expert_misses", "Routed experts that were not.", model.get("misses"))
        yield _gauge("expert_hit_rate", "Hits of hits and misses since the start.", model.get("hit_rate"))
        yield _counter("expert_evictions", "Experts that left a slot.", model.get("evictions"))
        yield _counter("stall_seconds", "Time that steps waited for bytes.", model.get("stall_ms", 0.0) / 1000)
        lanes = {lane: model.get(name) for lane, name in _LANES.items()}
        yield _family("read_bytes", "Bytes of experts read.", "lane", lanes, counts=True)
        routing = model.get("routing", {})
        yield _gauge("substituted_mass", "Mean share of router mass substituted.", routing.get("substituted_mass"))
        yield _gauge("coarse_mass", "Mean share of router mass computed with copies.", routing.get("coarse_mass"))
        tasks = {task or UNKNOWN: tally for task, tally in routing.get("tasks", {}).items()}
        for name, what in (
            ("picks", "Experts that tokens were routed to"),
            ("absent", "Of these, not in memory then"),
            ("substituted", "Of these, another took their place"),
            ("coarse", "Of these, their copies were computed"),
        ):
            of_tasks = {task: tally.get(name) for task, tally in tasks.items()}
            yield _family(f"task_{name}", f"{what}, where routing looks at it.", "task", of_tasks, counts=True)
        masses = {task: tally.get("substituted_mass") for task, tally in tasks.items()}
        yield _family("task_substituted_mass", "Mean share of router mass substituted.", "task", masses)


def _gauge(name: str, what: str, value: float | None) -> Metric:
    return GaugeMetricFamily(f"emoe_{name}", what, value=value or 0.0)


def _counter(name: str, what: str, value: float | None) -> Metric:
    return CounterMetricFamily(f"emoe_{name}", what, value=value or 0.0)


def _family(name: str, what: str, label: str, values: Mapping[str, float | None], counts: bool = False) -> Metric:
    made = (CounterMetricFamily if counts else GaugeMetricFamily)(f"emoe_{name}", what, labels=[label])
    for key, value in values.items():
        made.add_metric([key], value or 0.0)
    return made
