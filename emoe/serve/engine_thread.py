"""The one thread that runs an engine, and how asyncio speaks with it: calls go in, events come out.

Nothing waits for a client here: events go to an `Inbox`, which holds at most what its request may give.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from emoe.engine.generation import Event, FinishReason
from emoe.engine.sampling import Sampling
from emoe.errors import ClosedError, one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

FAULTS = 3  # steps in a row that raise, after which the engine is given up
_CALL_SECONDS = 0.02  # of calls between two steps: a crowd that arrives does not stop those that run
_IDLE_SECONDS = 0.001


class EngineLike(Protocol):
    """What of `emoe.Engine` is used."""

    @property
    def busy(self) -> bool: ...
    def submit(self, prompt: Any, **given: Any) -> Hashable: ...
    def step(self) -> list[Event]: ...
    def cancel(self, id: Hashable) -> None: ...
    def close(self) -> None: ...


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
    """Events of the jobs of one request of a client. Belongs to the event loop."""

    def __init__(self, thread: EngineThread, jobs: Sequence[Job]) -> None:
        self._thread = thread
        self.jobs = jobs
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
        self._thread.forget([job.id for job in self.jobs])


class EngineThread:
    """Runs an engine until `stop`, and closes it then.

    Args:
        engine: an `emoe.Engine`; only this thread uses it from `start` on.
        ended: told of each job that ends, with its last event; on the event loop.
    """

    def __init__(self, engine: EngineLike, ended: Callable[[Record, Event], None] = lambda record, event: None) -> None:
        self._engine, self._ended = engine, ended
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="emoe-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[Hashable, Inbox] = {}
        self.records: dict[Hashable, Record] = {}  # of jobs that wait or run
        self._given: set[Hashable] = set()  # jobs that the engine has; the engine's thread alone uses it
        self._stopping = False
        self._faults = 0
        self.fault: BaseException | None = None  # why the engine was given up

    def start(self) -> None:
        """Begins; from a coroutine, whose loop gets the events."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, jobs: Sequence[Job]) -> Inbox:
        """Hands all jobs to the engine, or none.

        Raises:
            EmoeError: as `Engine.submit`.
            ClosedError: the engine was stopped, or given up.
        """
        inbox, now = Inbox(self, jobs), time.monotonic()
        for job in jobs:
            self._inboxes[job.id] = inbox
            self.records[job.id] = Record(job, now)
        try:
            await self.call(lambda: self._submit(jobs))
        except asyncio.CancelledError:  # the call may still run; what it hands over is cancelled right after
            inbox.close()
            raise
        except BaseException:
            for job in jobs:
                self._inboxes.pop(job.id, None)
                self.records.pop(job.id, None)
            raise
        return inbox

    def forget(self, ids: Sequence[str]) -> None:
        """Cancels those of these jobs that have not ended; their events go nowhere."""
        left = [id for id in ids if self._inboxes.pop(id, None) is not None]
        if left:
            self._put(lambda: self._cancel(left))

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs in the engine's thread, between two steps.

        Raises:
            ClosedError: the engine was stopped, or given up.
        """
        assert self._loop is not None, "start() comes first"
        if self._stopping or self.fault is not None:
            raise ClosedError("the engine does not run any more")
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            if self._stopping or self.fault is not None:
                self._tell(_fail, future, ClosedError("the engine does not run any more"))
                return
            try:
                result = function()
            except BaseException as error:
                self._tell(_fail, future, error)
            else:
                self._tell(_resolve, future, result)

        self._put(run)
        return await future

    def stop(self, seconds: float = 5.0) -> bool:
        """Cancels all jobs and ends the thread; whether it ended in that time (a step may be in progress)."""
        self._stopping = True
        self._put(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    # In the engine's thread

    def _submit(self, jobs: Sequence[Job]) -> None:
        done: list[str] = []
        try:
            for job in jobs:
                targets = {f"{name}_slo_ms": value for name, value in job.slo_ms.items()}
                self._engine.submit(
                    list(job.tokens), max_new_tokens=job.max_new_tokens, sampling=job.sampling, task=job.task,
                    id=job.id, **targets,
                )  # fmt: skip
                done.append(job.id)
                self._given.add(job.id)
        except BaseException:
            for id in done:
                self._engine.cancel(id)
            raise

    def _cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._engine.cancel(id)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_calls()
                if not self._stopping and self.fault is None and self._engine.busy:
                    self._step()
        finally:
            try:
                self._engine.close()
            except Exception:
                logger.exception("emoe: closing the engine failed")
            self._stopping = True
            while not self._calls.empty():  # nobody waits for ever
                self._calls.get()()
            self._tell(lambda: self._end(list(self.records), ClosedError("the server ends"), "cancelled"))

    def _take_calls(self) -> None:
        """Runs calls for a while; waits for one where the engine has nothing to do."""
        until = time.monotonic() + _CALL_SECONDS
        idle = self.fault is not None or not self._engine.busy
        while True:
            try:
                call = self._calls.get(block=idle)
            except queue.Empty:
                return
            try:
                call()
            except Exception:
                logger.exception("emoe: a call between two steps failed")
            idle = False
            if time.monotonic() > until:
                return

    def _step(self) -> None:
        began = time.monotonic()
        try:
            events = self._engine.step()
        except Exception as error:
            self._failed(error)
            return
        self._faults = 0
        now = time.monotonic()
        self._given.difference_update(event.id for event in events if event.finish_reason is not None)
        if events:
            self._tell(self._deliver, events, now)
        elif now - began < _IDLE_SECONDS:
            time.sleep(_IDLE_SECONDS)  # an engine that waits for something else than rows

    def _failed(self, error: Exception) -> None:
        """A step raised, which is no request's own failure: all that ran are ended with it."""
        self._faults += 1
        logger.error("emoe: a step of the engine failed (%d of %d)", self._faults, FAULTS, exc_info=error)
        if self._faults >= FAULTS:
            self.fault = error
            logger.error("emoe: the engine is given up; restart the server: %s", one_line(error))
        given, self._given = self._given, set()
        self._tell(self._end, list(given), error, "error")
        for id in given:
            try:
                self._engine.cancel(id)
            except Exception as other:
                logger.error("emoe: cancelling %s failed: %s", id, one_line(other))

    def _put(self, call: Callable[[], Any]) -> None:
        self._calls.put(call)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:  # the loop is closed: nobody listens any more
                logger.debug("emoe: events came after the event loop was closed")

    # On the event loop

    def _deliver(self, events: Sequence[Event], at: float) -> None:
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

    def _end(self, ids: Sequence[Hashable], error: BaseException, reason: FinishReason) -> None:
        events = []
        for id in ids:
            if (record := self.records.get(id)) is not None:
                counts = len(record.job.tokens), record.shared_tokens, record.output_tokens
                events.append(Event(id, (), "", None, reason, error, *counts, record.job.task))
        self._deliver(events, time.monotonic())


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
