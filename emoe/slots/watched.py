"""A queue that tells a watcher what it is asked for; see `Loader.watch`."""

from __future__ import annotations

from typing import Any, Protocol


class Watcher(Protocol):
    """Told of every transfer; tickets are the queue's own."""

    def submitted(self, ticket: int, layer: int, expert: int, prefetch: bool) -> None:
        """The queue has taken it."""

    def waiting(self, ticket: int) -> None:
        """Somebody waits for its bytes from now on."""

    def ended(self, ticket: int) -> None:
        """It was seen to have ended, well or not; so has the waiting for it. Told once or more."""

    def cancelled(self, ticket: int) -> None:
        """It was taken back before it began."""


class WatchedQueue:
    """Stands between loader and queue; with the queue's own tickets it can come and go while transfers are under way.

    Args:
        queue: as `Loader` takes it.
        expert_of: layer and expert of each record.
        watcher: is told.
    """

    def __init__(self, queue: Any, expert_of: dict[int, tuple[int, int]], watcher: Watcher) -> None:
        self.queue = queue
        self._expert_of, self._watcher = expert_of, watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)

    def submit(self, record: int, slot: int, prefetch: bool = False) -> int:
        ticket: int = self.queue.submit(record, slot, prefetch)
        self._watcher.submitted(ticket, *self._expert_of[record], prefetch)
        return ticket

    def cancel(self, ticket: int) -> bool:
        cancelled: bool = self.queue.cancel(ticket)
        if cancelled:
            self._watcher.cancelled(ticket)
        return cancelled

    def done(self, ticket: int) -> bool:
        done: bool = self.queue.done(ticket)
        if done:
            self._watcher.ended(ticket)
        return done

    def wait(self, ticket: int) -> None:
        if not self.done(ticket):
            self._watcher.waiting(ticket)
        try:
            self.queue.wait(ticket)
        finally:
            self._watcher.ended(ticket)
