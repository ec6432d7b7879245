"""Runs jobs on replicas elsewhere: what a lost replica had not begun begins on another. Knows no Ray, only calls."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import pickle
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from emoe.engine.generation import Event
from emoe.errors import ClosedError, EmoeError, OverloadedError, one_line
from emoe.serve.engine_thread import EngineThread
from emoe.serve.inbox import Deliveries, Inbox, Job, Record
from emoe.serve.refusals import Refusal
from emoe.serve.routes import UNKNOWN, Hint, merged

logger = logging.getLogger(__name__)

TRIES = 4  # replicas that a request is lost with before it is taken for what ends them
_PAUSE_SECONDS = 0.2  # before another replica is tried: the router may not have heard yet of the one that ended
_MOST_WAIT_SECONDS = 5.0  # of what a full replica says, for what another one had accepted
_BATCH_SECONDS = 30.0

Item = list[Event] | EmoeError  # events, none at first; or why nothing was begun


@dataclass(frozen=True)
class Call:
    """What a replica is asked to run; can be pickled."""

    jobs: Sequence[Job]
    hint: Hint


class Reply(Protocol):
    """What a replica says to a call; an error of `Fleet`'s `lost` where it ended."""

    def __aiter__(self) -> AsyncIterator[Item]: ...
    def cancel(self) -> None: ...


async def answer(
    thread: EngineThread, call: Call, ready: Callable[[Sequence[Job]], None] = lambda jobs: None
) -> AsyncIterator[Item]:
    """The replica's side of a call; closing it cancels the jobs.

    Args:
        ready: gives jobs what a pickle cannot have.
    """
    try:
        ready(call.jobs)
        inbox = await thread.submit(call.jobs)
    except EmoeError as error:
        yield _sendable(error)
        return
    try:
        yield []
        left = {job.id for job in call.jobs}
        while left:
            events = await inbox.take(_BATCH_SECONDS)
            left.difference_update(str(event.id) for event in events if event.finish_reason is not None)
            if events:
                yield [each if each.error is None else replace(each, error=_sendable(each.error)) for each in events]
    finally:
        inbox.close()


def _sendable(error: BaseException) -> EmoeError:
    """The error, or what is left of one that a pickle cannot carry."""
    if isinstance(error, EmoeError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            logger.debug("emoe: %s cannot be sent", type(error).__name__)
        else:
            return error
    logger.error("emoe: a request failed", exc_info=error)
    return EmoeError(one_line(error))


class Fleet:
    """A `Backend` of replicas.

    Args:
        send: sends a call to a replica of a router's choice.
        look: gives what each replica that runs says of itself, by its name: `EngineThread.look`.
        ended: told of each job that ends, with its last event; on the event loop.
        lost: errors that say that a replica ended.
        patience: seconds in which a replica must take a request.
    """

    def __init__(
        self,
        send: Callable[[Call], Reply],
        look: Callable[[], Awaitable[Mapping[str, Mapping[str, Any]]]],
        ended: Callable[[Record, Event], None],
        lost: tuple[type[BaseException], ...],
        patience: float = 600.0,
    ) -> None:
        self._patience = patience
        self._send, self._look = send, look
        self._lost: tuple[type[BaseException], ...] = (*lost, ClosedError)
        self._deliveries = Deliveries(ended)
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}  # by job
        self._seen: dict[str, Mapping[str, Any]] = {}  # the last look at each replica there ever was
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.name = uuid.uuid4().hex
        self.retried = 0  # answers that began on another replica than they were accepted by
        self.fault: BaseException | None = None  # a replica that fails is replaced

    def end(self, ids: Sequence[Hashable], error: BaseException) -> None:
        """On the event loop, as `Backend.end`."""
        self._deliveries.end(ids, error, "error")

    @property
    def records(self) -> dict[Hashable, Record]:
        """Of jobs that wait or run."""
        return self._deliveries.records

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def submit(self, jobs: Sequence[Job]) -> Inbox:
        """Hands all jobs to one replica, or none; waits until it has them.

        Raises:
            EmoeError: as `Engine.submit` of the replica.
            ClosedError: this was stopped.
            Refusal: no replica took them in time.
        """
        if self._closed:
            raise ClosedError("no replica is asked any more")
        inbox = self._deliveries.open(jobs, self.forget)
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # In a context of its own: what a client's connection brings with it does not end what runs for it here.
        task = contextvars.Context().run(asyncio.create_task, self._run(jobs, accepted))
        self._tasks.update((job.id, task) for job in jobs)
        timer = asyncio.get_running_loop().call_later(self._patience, self._too_long, accepted)
        try:
            await accepted
        except asyncio.CancelledError:
            inbox.close()
            raise
        except BaseException:
            task.cancel()
            self._deliveries.drop(jobs)
            raise
        finally:
            timer.cancel()
        return inbox

    def _too_long(self, accepted: asyncio.Future[None]) -> None:
        if not accepted.done():
            message = f"no replica took this request within {self._patience:g} seconds"
            accepted.set_exception(Refusal(503, message, "unavailable", retry_after=30))

    def forget(self, ids: Sequence[str]) -> None:
        """Cancels those of these jobs that have not ended."""
        left = self._deliveries.forget(ids)
        tasks = {task for id in left if (task := self._tasks.get(id)) is not None}
        self._deliveries.end(left, None, "cancelled")
        for task in tasks:
            if all(id not in self.records for id, of in self._tasks.items() if of is task):
                task.cancel()

    async def look(self) -> dict[str, Any]:
        found = await self._look()
        gone = [seen for name, seen in self._seen.items() if name not in found]
        self._seen.update(found)
        return {**merged(found, gone), "retried": self.retried}

    def stop(self, seconds: float = 5.0) -> bool:
        """Cancels what runs."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all)
        return True

    def _end_all(self) -> None:
        for task in set(self._tasks.values()):
            task.cancel()
        self._deliveries.end(list(self.records), ClosedError("the server ends"), "cancelled")

    # One call

    async def _run(self, jobs: Sequence[Job], accepted: asyncio.Future[None]) -> None:
        """Runs jobs until all have ended, on as many replicas as it takes."""
        try:
            lost = 0
            while lost < TRIES:
                left = [job for job in jobs if job.id in self.records]
                if not left or await self._try(left, accepted, anew=lost > 0):
                    return
                self._end_begun(left)
                lost += 1
                await asyncio.sleep(_PAUSE_SECONDS * 2**lost)
            self._fail(jobs, accepted, Refusal(
                503, f"{TRIES} replicas ended while they had this request; it is not tried again", "replica_lost",
                retry_after=30,
            ))  # fmt: skip
        except Exception as error:
            logger.error("emoe: a call of a replica failed", exc_info=error)
            self._fail(jobs, accepted, error)
        finally:
            for job in jobs:
                self._tasks.pop(job.id, None)

    async def _try(self, jobs: Sequence[Job], accepted: asyncio.Future[None], *, anew: bool) -> bool:
        """Runs jobs on one replica, once one has room; False where it was lost before all had ended."""
        self.retried += len(jobs) if anew else 0
        call = Call(jobs, Hint(self.name, jobs[0].task or UNKNOWN, len(jobs)))
        ended = None
        while ended is None:
            ended = await self._send_once(call, accepted)
        return ended

    async def _send_once(self, call: Call, accepted: asyncio.Future[None]) -> bool | None:
        """As `_try`; None where a replica had no room for what another one had accepted."""
        left = {job.id for job in call.jobs}
        reply = self._send(call)
        try:
            async for item in reply:
                if isinstance(item, OverloadedError) and accepted.done():  # another replica had taken it
                    await asyncio.sleep(min(item.retry_after, _MOST_WAIT_SECONDS))
                    return None
                if isinstance(item, BaseException):
                    if isinstance(item, self._lost):
                        return False
                    self._fail(call.jobs, accepted, item)
                    left.clear()
                    return True
                if not accepted.done():
                    accepted.set_result(None)
                # A replica that is taken down cancels what it has.
                kept = [each for each in item if not (each.finish_reason == "cancelled" and each.error is not None)]
                self._deliveries.deliver(kept, time.monotonic())
                left.difference_update(str(each.id) for each in kept if each.finish_reason is not None)
        except self._lost as error:
            logger.warning("emoe: a replica was lost with %d answers: %s", len(left), one_line(error)[:200])
        finally:
            if left:
                reply.cancel()
        return not left

    def _end_begun(self, jobs: Sequence[Job]) -> None:
        """Those of a lost replica that had given tokens cannot go on elsewhere: sampling may give others there."""
        begun = [job.id for job in jobs if (record := self.records.get(job.id)) and record.first is not None]
        error = Refusal(
            503, "the replica that ran this request ended in the middle of the answer; send it again", "replica_lost",
            retry_after=1,
        )  # fmt: skip
        self._deliveries.end(begun, error, "error")

    def _fail(self, jobs: Sequence[Job], accepted: asyncio.Future[None], error: BaseException) -> None:
        if not accepted.done():
            accepted.set_exception(error)
        else:
            self._deliveries.end([job.id for job in jobs], error, "error")


class Desk:
    """What a replica tells routers: whose requests of which task it has and had."""

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self._here: dict[str, Counter[str]] = {}

    def came(self, hint: Hint) -> None:
        self.served[hint.task] += hint.answers
        self._here.setdefault(hint.front, Counter())[hint.task] += hint.answers

    def left(self, hint: Hint) -> None:
        self._here[hint.front][hint.task] -= hint.answers
        self._here[hint.front] += Counter()  # without zeros
        if not self._here[hint.front]:
            del self._here[hint.front]

    @property
    def requests(self) -> dict[str, dict[str, int]]:
        """By front and task, of those that are here."""
        return {front: dict(tasks) for front, tasks in self._here.items()}
