"""A transfer queue without threads or bytes: the tests decide when a job runs, ends, or fails.

It remembers which record each slot holds, so a test sees at once when a slot that is in use is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from emoe.errors import CancelledError, QueueFullError, ReadError, TransferError


@dataclass
class Job:
    record: int
    slot: int
    prefetch: bool
    state: str = "queued"  # queued, running, done, failed, cancelled
    waited: bool = False


class FakeQueue:
    """Interface of `emoe._C.TransferQueue` as emoe/_C.pyi states it.

    Args:
        workers: jobs that `advance` starts before it ends the first.
        prefetch_bound: queued prefetches that are let in.
        eager: jobs end as soon as they are submitted.
    """

    def __init__(self, *, workers: int = 2, prefetch_bound: int = 1000, eager: bool = False) -> None:
        self.jobs: list[Job] = []
        self.content: dict[int, int | None] = {}  # slot -> record; None: half written
        self.failing: set[int] = set()  # records whose next read fails
        self.workers, self.prefetch_bound, self.eager = workers, prefetch_bound, eager
        self.log: list[tuple[str, int]] = []

    def submit(self, record: int, slot: int, prefetch: bool = False) -> int:
        if prefetch and len(self._queued(True)) >= self.prefetch_bound:
            raise QueueFullError("the prefetch lane is full")
        for job in self.jobs:
            assert job.slot != slot or job.state not in ("queued", "running"), f"two jobs for slot {slot}"
        self.jobs.append(Job(record, slot, prefetch))
        self.log.append(("prefetch" if prefetch else "demand", record))
        if self.eager:
            self.run_all()
        return len(self.jobs) - 1

    def promote(self, ticket: int) -> None:
        self.jobs[ticket].prefetch = False

    def cancel(self, ticket: int) -> bool:
        job = self.jobs[ticket]
        if job.state == "queued":
            job.state = "cancelled"
        return job.state == "cancelled"

    def done(self, ticket: int) -> bool:
        return self.jobs[ticket].state in ("done", "failed", "cancelled")

    def wait(self, ticket: int) -> None:
        job = self.jobs[ticket]
        if job.waited:
            raise TransferError(f"ticket {ticket} was waited for already")
        while not self.done(ticket):
            self.advance()
        job.waited = True
        if job.state == "failed":
            raise ReadError("read failed", file="weights", tensor=f"record {job.record}", offset=0, nbytes=1)
        if job.state == "cancelled":
            raise CancelledError(f"ticket {ticket} was cancelled")

    def ticket_of(self, slot: int) -> int | None:
        return next((n for n, job in reversed(list(enumerate(self.jobs))) if job.slot == slot and not job.waited), None)

    def advance(self) -> bool:
        """Starts jobs up to the number of workers, demand first, then ends the oldest running one."""
        running = [job for job in self.jobs if job.state == "running"]
        for job in (self._queued(False) + self._queued(True))[: self.workers - len(running)]:
            job.state = "running"
            self.content[job.slot] = None
            running.append(job)
        if running:
            job = running[0]
            if job.record in self.failing:
                self.failing.discard(job.record)
                job.state = "failed"
            else:
                job.state = "done"
                self.content[job.slot] = job.record
        return bool(running)

    def run_all(self) -> None:
        while self.advance():
            pass

    def unwaited(self) -> list[Job]:
        """Jobs whose tickets the queue has to remember."""
        return [job for job in self.jobs if not job.waited]

    def _queued(self, prefetch: bool) -> list[Job]:
        return [job for job in self.jobs if job.state == "queued" and job.prefetch == prefetch]
