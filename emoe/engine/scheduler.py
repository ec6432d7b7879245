"""Who runs, and how many rows: requests in, steps out. Ids, bytes and seconds only; no tensors, no clock of its own.

docs/serving.md has the rules. Not thread-safe: callers share one lock. Time is what callers pass as `now`, in seconds
of any clock that never goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import asdict
from typing import Any

from emoe.engine import policies
from emoe.engine.costs import CostFit, Costs, Step
from emoe.engine.expert_sets import Expert
from emoe.engine.outlook import NEVER, Outlook
from emoe.engine.policies import POLICIES
from emoe.engine.tickets import Live, Ticket, require_number
from emoe.errors import BudgetError, ConfigError, OverloadedError

__all__ = ["POLICIES", "Expert", "Scheduler", "Step", "Ticket"]

MOST_PASSES = 256  # requests that arrived later and may be admitted before one that waits


class Scheduler:
    """Decides which requests run, and how many rows each gets in the next step.

    Args:
        policy: one of POLICIES.
        costs: what steps cost on this machine (`emoe.engine.calibrate`); corrected by those that run.
        kv_bytes: for the state of all running requests; None for no limit.
        chunk_rows: rows of a step at most, unless a `whole` prompt is longer. Decode rows come first.
        most_running: requests that run at once; None for `chunk_rows`.
        queue_limit: requests that wait at most.
        resident: gives the (layer, expert) pairs in memory now; None where all are.
        expert_bytes: of one expert (their mean, where they differ).
        patience: policies that know targets refuse a request with one if the work of those that are due before it
            takes more than so many times its own time.
        most_passes: how many requests that arrived later may be admitted before one that waits.

    Raises:
        ConfigError: an unknown policy, or a number that is too small.
    """

    def __init__(
        self,
        policy: str = "slo+affinity",
        *,
        costs: Costs | None = None,
        kv_bytes: int | None = None,
        chunk_rows: int = 64,
        most_running: int | None = None,
        queue_limit: int = 1024,
        resident: Callable[[], Container[Expert]] | None = None,
        expert_bytes: int = 0,
        patience: float = 2.0,
        most_passes: int = MOST_PASSES,
    ) -> None:
        for name, value, least in (
            ("kv_bytes", kv_bytes, 0),
            ("chunk_rows", chunk_rows, 1),
            ("most_running", most_running, 1),
            ("queue_limit", queue_limit, 0),
            ("expert_bytes", expert_bytes, 0),
            ("patience", patience, 0),
            ("most_passes", most_passes, 0),
        ):
            if value is not None:
                require_number(name, value, least, whole=name != "patience")
        self.policy = policy
        self._fit = CostFit(costs or Costs())
        self.chunk_rows = chunk_rows
        # Each decoding request needs its row, and a prompt at least one beside them.
        self.most_running = min(most_running or chunk_rows, chunk_rows)
        self.queue_limit = queue_limit
        self.patience = patience
        self.most_passes = most_passes
        self._kv_bytes = kv_bytes
        self._kv_used = 0
        self._outlook = Outlook(lambda: self.costs, chunk_rows, expert_bytes, resident, self.most_running)
        self._policy = policies.make(policy, self._outlook)
        self._waiting: dict[Hashable, Live] = {}  # in order of arrival
        self._running: dict[Hashable, Live] = {}  # in order of admission
        self._arrivals = 0
        self._counts = dict.fromkeys(("submitted", "refused", "admitted", "finished", "cancelled", "steps"), 0)

    # Requests

    def submit(self, ticket: Ticket, now: float) -> None:
        """A request arrives and waits.

        Raises:
            ConfigError: the id is in use, or a number of the ticket makes no sense.
            BudgetError: its state is larger than `kv_bytes`, so it could never run.
            OverloadedError: too much waits already; `retry_after` says when to come again.
        """
        ticket.check()
        if ticket.id in self._waiting or ticket.id in self._running:
            raise ConfigError(f"id={ticket.id!r} is in use by a request that waits or runs; choose another")
        if self._kv_bytes is not None and ticket.kv_bytes > self._kv_bytes:
            self._counts["refused"] += 1
            raise BudgetError(
                f"request {ticket.id!r} needs {ticket.kv_bytes} bytes for its state, of {self._kv_bytes} for all; "
                "ask for fewer new tokens or a shorter prompt",
                needed=ticket.kv_bytes,
                budget=self._kv_bytes,
            )
        live = Live(ticket, self._arrivals, now, self._outlook.sets.number(ticket.experts))
        live.due = self._outlook.due(live)
        if len(self._waiting) >= self.queue_limit:
            self._counts["refused"] += 1
            work = self._outlook.work(self._running.values(), self.most_running)
            raise OverloadedError(
                f"{len(self._waiting)} requests wait, the most that may; come again later",
                retry_after=max(1.0, work / max(1, len(self._running))),
            )
        if self._policy.sheds and live.due < NEVER:
            self._shed(live, now)
        self._waiting[ticket.id] = live
        self._arrivals += 1
        self._counts["submitted"] += 1

    def cancel(self, id: Hashable, now: float) -> None:
        """It is not wanted any more. One that is not here is ignored: it may have ended meanwhile."""
        self._counts["cancelled"] += self._drop(id) is not None

    def finished(self, id: Hashable, now: float) -> None:
        """It gave its last token, or failed: it is forgotten, and its bytes are free."""
        live = self._drop(id)
        if live is not None:
            self._counts["finished"] += 1
            if live.out:
                self._outlook.lengths.ended(live.ticket.task, live.out)

    def restart(self, id: Hashable) -> None:
        """The state of a running request is lost: its prompt and what it gave so far run again. Others are ignored."""
        live = self._running.get(id)
        if live is not None:
            live.done = 0

    def computed(self, id: Hashable, rows: int) -> None:
        """A running request's first rows need not run: their state was copied from another's.

        Raises:
            ConfigError: it does not run, or not one row would be left.
        """
        live = self._running.get(id)
        if live is None or not live.done <= rows < live.ticket.prompt + live.out:
            raise ConfigError(f"computed rows={rows} of request {id!r}: it does not run, or its last row has to")
        live.done = rows

    def _shed(self, live: Live, now: float) -> None:
        """Refuses a request whose first token would come much too late, by the work of those who are due before it."""
        target = live.due - now
        ahead = [other for other in self._waiting.values() if now <= other.due <= live.due]
        wait = self._outlook.work(ahead, self.most_running)
        if wait > self.patience * target:
            self._counts["refused"] += 1
            raise OverloadedError(
                f"request {live.ticket.id!r} is due in {target:.3g} s, and what is due before it takes {wait:.3g} s; "
                "come again later, or with a later target",
                retry_after=max(1.0, wait - self.patience * target),
            )

    def _drop(self, id: Hashable) -> Live | None:
        waited, ran = self._waiting.pop(id, None), self._running.pop(id, None)
        self._count_bytes()
        return ran or waited

    def _count_bytes(self) -> None:
        """From the requests, so that an interrupt in the middle of a change leaves no wrong sum for long."""
        self._kv_used = sum(live.ticket.kv_bytes for live in self._running.values())

    # Steps

    def next(self, now: float) -> list[tuple[Hashable, int]]:
        """Admits who may run, and gives (id, rows) of the next step; empty where there is nothing to do.

        An id that was never in a step before was admitted with this one or one before, and holds its `kv_bytes`.
        """
        for id in self._running.keys() & self._waiting.keys():  # an interrupt came between the two
            self._waiting.pop(id, None)
        self._count_bytes()
        self._admit(now)
        batch: list[tuple[Hashable, int]] = []
        prompts: list[Live] = []
        room = self.chunk_rows
        for live in self._running.values():
            if live.out >= live.ticket.most_new:
                continue  # the engine has yet to say that it is finished
            if live.decoding:
                batch.append((live.ticket.id, 1))
                room -= 1
            else:
                prompts.append(live)
        for live in prompts:
            rows = min(live.left, max(room, 0))
            if live.ticket.whole and rows < live.left:
                rows = live.left if live is prompts[0] else 0
            if rows:
                batch.append((live.ticket.id, rows))
                room -= rows
        return batch

    def ran(self, step: Step, now: float) -> None:
        """A step is over. Requests that ended meanwhile are ignored."""
        self._counts["steps"] += 1
        rows_each = ((self._running.get(id), rows) for id, rows in step.rows.items())
        self._fit.saw(sum(step.rows.values()), step.loaded_bytes, step.experts, step.seconds)
        self._outlook.saw(step, all(live is not None and live.decoding and rows == 1 for live, rows in rows_each))
        for id, rows in step.rows.items():
            live = self._running.get(id)
            if live is None:
                continue
            live.done += rows
            tokens = step.tokens.get(id, 0)
            if tokens:
                live.out += tokens
                live.first = now if live.first is None else live.first
                live.last = now

    def _admit(self, now: float) -> None:
        while len(self._running) < self.most_running:
            live = self._choose(now)
            if live is None:
                return
            live.admitted = now
            self._running[live.ticket.id] = live  # before it leaves the others: an interrupt loses none
            self._waiting.pop(live.ticket.id, None)
            self._count_bytes()
            for other in self._waiting.values():
                other.passes += other.number < live.number
            self._counts["admitted"] += 1

    def _choose(self, now: float) -> Live | None:
        """Who is admitted next; nobody passes one that was passed `most_passes` times."""
        if not self._waiting:
            return None
        # Whoever passes a request passes all that came before it too: the first was passed most often.
        oldest = next(iter(self._waiting.values()))
        if oldest.passes >= self.most_passes:
            return oldest if self._fits(oldest) else None
        candidates = self._policy.candidates(self._waiting.values(), self._running.values(), now, self._fits)
        return next(candidates, None)

    def _fits(self, live: Live) -> bool:
        return self._kv_bytes is None or self._kv_used + live.ticket.kv_bytes <= self._kv_bytes

    # What may be seen

    @property
    def costs(self) -> Costs:
        """What steps cost, corrected by those that ran."""
        return self._fit.costs

    @property
    def kv_bytes(self) -> int | None:
        """Bytes for the state of all running requests. May be set at any time.

        Raises:
            ConfigError: set to less than `least_kv_bytes`.
        """
        return self._kv_bytes

    @kv_bytes.setter
    def kv_bytes(self, value: int | None) -> None:
        if value is not None and value < self.least_kv_bytes:
            raise ConfigError(
                f"kv_bytes={value} is less than {self.least_kv_bytes}, "
                "which running requests hold or one that waits needs"
            )
        self._kv_bytes = value

    @property
    def kv_used(self) -> int:
        """Bytes of running requests."""
        return self._kv_used

    @property
    def least_kv_bytes(self) -> int:
        """What `kv_bytes` may fall to: what running requests hold, and room for each that waits, alone."""
        return max([self._kv_used, *(live.ticket.kv_bytes for live in self._waiting.values())])

    @property
    def waiting(self) -> list[Hashable]:
        """Ids that wait, in order of arrival."""
        return list(self._waiting)

    @property
    def running(self) -> list[Hashable]:
        """Ids that run, in order of admission."""
        return list(self._running)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and metrics; `cost_error` is the mean relative error of forecasts of steps, None before any."""
        return {
            "policy": self.policy,
            "waiting": len(self._waiting),
            "running": len(self._running),
            "kv_bytes": self._kv_bytes,
            "kv_used": self._kv_used,
            **self._counts,
            "costs": asdict(self.costs),
            "cost_error": self._fit.error,
            "mean_tokens": self._outlook.lengths.mean(None),
        }
