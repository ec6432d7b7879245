"""Answers that are asked for, how far they are, and where their events go. All of it belongs to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from emoe.engine.generation import Event, FinishReason
from emoe.engine.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """One answer that is asked for.

    Attributes:
        id: its name.
        tokens: of the prompt.
        max_new_tokens: of the answer.
        sampling: how it is chosen.
        task: None where unknown.
        slo_ms: targets in milliseconds, of "ttft", "tpot", "ttlt".
    """

    id: str
    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    task: str | None = None
    slo_ms: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Record:
    """A job and how far it is; seconds of `time.monotonic`."""

    job: Job
    arrived: float
    first: float | None = None
    last: float | None = None
    output_tokens: int = 0
    shared_tokens: int = 0

    @property
    def seconds(self) -> dict[str, float]:
        """What there is of "ttft", "tpot" (mean of the tokens after the first) and "ttlt"."""
        found = {}
        if self.first is not None and self.last is not None:
            found = {"ttft": self.first - self.arrived, "ttlt": self.last - self.arrived}
            if self.output_tokens > 1:
                found["tpot"] = (self.last - self.first) / (self.output_tokens - 1)
        return found


class Inbox:
    """Events of the jobs of one request of a client.

    Args:
        jobs: its.
        forget: told of their ids when nobody waits for them any more.
    """

    def __init__(self, jobs: Sequence[Job], forget: Callable[[Sequence[str]], None]) -> None:
        self.jobs, self._forget = jobs, forget
        self._events: list[Event] = []
        self._ready = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._ready.set()

    async def take(self, seconds: float) -> list[Event]:
        """What came since the last call; none where nothing came in that time.

        Not `asyncio.wait_for`, which up to Python 3.11 loses a cancellation that comes together with a result.
        """
        timer = asyncio.get_running_loop().call_later(seconds, self._ready.set)
        try:
            await self._ready.wait()
        finally:
            timer.cancel()
        self._ready.clear()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Nobody waits for these jobs any more: those that have not ended are cancelled."""
        self._forget([job.id for job in self.jobs])


class Deliveries:
    """Which jobs wait or run, and the inboxes of those that somebody waits for.

    Args:
        ended: told of each job that ends, with its last event.
    """

    def __init__(self, ended: Callable[[Record, Event], None]) -> None:
        self.records: dict[Hashable, Record] = {}
        self._ended = ended
        self._inboxes: dict[Hashable, Inbox] = {}

    def open(self, jobs: Sequence[Job], forget: Callable[[Sequence[str]], None]) -> Inbox:
        inbox, now = Inbox(jobs, forget), time.monotonic()
        for job in jobs:
            self._inboxes[job.id] = inbox
            self.records[job.id] = Record(job, now)
        return inbox

    def drop(self, jobs: Sequence[Job]) -> None:
        """They never began."""
        for job in jobs:
            self._inboxes.pop(job.id, None)
            self.records.pop(job.id, None)

    def forget(self, ids: Sequence[str]) -> list[str]:
        """Those of these jobs that somebody waited for until now; their events go nowhere."""
        return [id for id in ids if self._inboxes.pop(id, None) is not None]

    def deliver(self, events: Sequence[Event], at: float) -> None:
        for event in events:
            record = self.records.get(event.id)
            if record is None:
                continue  # it was ended already, by a step that failed
            if event.tokens:
                record.first = at if record.first is None else record.first
                record.last = at
            record.output_tokens, record.shared_tokens = event.output_tokens, event.shared_tokens
            inbox = self._inboxes.get(event.id)
            if inbox is not None:
                inbox.put(event)
            if event.finish_reason is not None:
                del self.records[event.id]
                self._inboxes.pop(event.id, None)
                self._ended(record, event)

    def end(self, ids: Sequence[Hashable], error: BaseException | None, reason: FinishReason) -> None:
        """The last event of those of these jobs that have not ended."""
        events = []
        for id in ids:
            if (record := self.records.get(id)) is not None:
                counts = len(record.job.tokens), record.shared_tokens, record.output_tokens
                events.append(Event(id, (), "", None, reason, error, *counts, record.job.task))
        self.deliver(events, time.monotonic())


class Backend(Protocol):
    """What runs jobs: an engine in a thread (`EngineThread`), or replicas elsewhere (`Fleet`).

    Attributes:
        records: of jobs that wait or run.
    """

    @property
    def records(self) -> dict[Hashable, Record]: ...
    @property
    def fault(self) -> BaseException | None:
        """Why it was given up."""

    def start(self) -> None:
        """From a coroutine, whose loop gets the events."""

    async def submit(self, jobs: Sequence[Job]) -> Inbox:
        """Takes all jobs, or none; raises EmoeError where it takes none."""
        ...

    def end(self, ids: Sequence[Hashable], error: BaseException) -> None:
        """The last event of those of these jobs that have not ended; what they still give goes nowhere."""

    async def look(self) -> dict[str, Any]:
        """`engine` (`Engine.stats`), `model` (`Runtime.stats`, or None), `layers` (experts in memory)."""
        ...

    def stop(self, seconds: float = 5.0) -> bool:
        """Cancels what runs; whether that was done in time. In any thread but the loop's."""
        ...
