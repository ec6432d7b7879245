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
from typing import Any, Protocol, TypeVar

from emoe.engine.generation import Event
from emoe.errors import ClosedError, one_line
from emoe.serve.inbox import Deliveries, Inbox, Job, Record

logger = logging.getLogger(__name__)

T = TypeVar("T")

FAULTS = 3  # steps in a row that raise, after which the engine is given up
_CALL_SECONDS = 0.02  # of calls between two steps: a crowd that arrives does not stop those that run
_IDLE_SECONDS = 0.001


class EngineLike(Protocol):
    """What of `emoe.Engine` is used."""

    @property
    def busy(self) -> bool: ...
    @property
    def model(self) -> Any: ...
    def submit(self, prompt: Any, **given: Any) -> Hashable: ...
    def step(self) -> list[Event]: ...
    def cancel(self, id: Hashable) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class EngineThread:
    """Runs an engine until `stop`, and closes it then.

    Args:
        engine: an `emoe.Engine`; only this thread uses it from `start` on.
        ended: told of each job that ends, with its last event; on the event loop.
    """

    def __init__(self, engine: EngineLike, ended: Callable[[Record, Event], None] = lambda record, event: None) -> None:
        self._engine, self._deliveries = engine, Deliveries(ended)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="emoe-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._given: set[Hashable] = set()  # jobs that the engine has; the engine's thread alone uses it
        self._stopping = False
        self._faults = 0
        self.fault: BaseException | None = None  # why the engine was given up

    def end(self, ids: Sequence[Hashable], error: BaseException) -> None:
        """On the event loop, as `Backend.end`."""
        self._deliveries.end(ids, error, "error")

    @property
    def records(self) -> dict[Hashable, Record]:
        """Of jobs that wait or run."""
        return self._deliveries.records

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
        inbox = self._deliveries.open(jobs, self.forget)
        try:
            await self.call(lambda: self._submit(jobs))
        except asyncio.CancelledError:  # the call may still run; what it hands over is cancelled right after
            inbox.close()
            raise
        except BaseException:
            self._deliveries.drop(jobs)
            raise
        return inbox

    def forget(self, ids: Sequence[str]) -> None:
        """Cancels those of these jobs that have not ended; their events go nowhere."""
        left = self._deliveries.forget(ids)
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

    async def look(self) -> dict[str, Any]:
        """`engine` (`Engine.stats`), `model` (`Runtime.stats`, or None), `layers` (experts in memory)."""
        return await self.call(self._look)

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

    def _look(self) -> dict[str, Any]:
        runtime = getattr(self._engine.model, "emoe", None) or None
        if runtime is None:
            return {"engine": self._engine.stats(), "model": None, "layers": []}
        return {"engine": self._engine.stats(), "model": runtime.stats(), "layers": runtime.residents()}

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
            self._tell(lambda: self._deliveries.end(list(self.records), ClosedError("the server ends"), "cancelled"))

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
            self._tell(self._deliveries.deliver, events, now)
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
        self._tell(self._deliveries.end, list(given), error, "error")
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


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
