"""Any order of events: no request is lost, bytes are never over, nobody starves, and who ended is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from emoe.engine.costs import Costs, Step
from emoe.engine.scheduler import POLICIES, Scheduler, Ticket
from emoe.errors import BudgetError, OverloadedError

EXPERTS = [frozenset((layer, expert) for layer in range(2) for expert in range(n, n + 4)) for n in (0, 2, 8)]
TARGETS = st.one_of(st.none(), st.floats(0.01, 50.0))
TICKETS = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 9),
        "most_new": st.integers(1, 6),
        "kv_bytes": st.sampled_from([0, 1, 1, 5, 9]),
        "ttft": TARGETS,
        "tpot": TARGETS,
        "ttlt": TARGETS,
        "experts": st.sampled_from([frozenset(), *EXPERTS]),
        "whole": st.booleans(),
        "task": st.sampled_from([None, "a", "b"]),
    }
)
CHUNK, PASSES, QUEUE = 6, 1, 8


class Events(RuleBasedStateMachine):
    policy = "fcfs"

    @initialize(kv=st.integers(3, 8), most=st.integers(1, CHUNK))
    def begin(self, kv, most):
        self.resident: set = set()
        self.scheduler = Scheduler(
            self.policy,
            costs=Costs(0.01, 0.01, 1e-6, 0.0),
            kv_bytes=kv,
            chunk_rows=CHUNK,
            most_running=most,
            queue_limit=QUEUE,
            resident=lambda: self.resident,
            expert_bytes=1000,
            most_passes=PASSES,
        )
        self.now = 0.0
        self.number = 0
        self.live: dict[int, Ticket] = {}  # accepted and not ended, as an engine would know
        self.out: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.later_first: dict[int, int] = {}  # admissions of requests that came later, while it waited

    @rule(tickets=st.lists(TICKETS, min_size=1, max_size=4))
    def submit(self, tickets):
        for ticket in tickets:
            self._submit(Ticket(self.number, **ticket))
            self.number += 1

    def _submit(self, made):
        full = len(self.scheduler.waiting) >= QUEUE
        try:
            self.scheduler.submit(made, self.now)
        except BudgetError as error:
            assert made.kv_bytes > self.scheduler.kv_bytes and error.needed == made.kv_bytes
        except OverloadedError as error:
            assert error.retry_after >= 1.0
            assert full or (self.scheduler.policy.startswith("slo") and (made.ttft or made.ttlt))
        else:
            assert not full
            self.live[made.id] = made
            self.later_first[made.id] = 0

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds):
        self.now += seconds

    @rule(seconds=st.floats(0.001, 5.0), early=st.integers(0, 9), loaded=st.integers(0, 10**6))
    def step(self, seconds, early, loaded):
        waited = set(self.scheduler.waiting)
        batch = self.scheduler.next(self.now)
        for id in sorted(waited - set(self.scheduler.waiting)):
            for other in self.scheduler.waiting:
                self.later_first[other] += other < id
        self._check_batch(batch)
        tokens = {}
        for id, rows in batch:
            self.done[id] = self.done.get(id, 0) + rows
            total = self.live[id].prompt + self.out.get(id, 0)
            assert self.done[id] <= total
            if self.done[id] == total:
                tokens[id] = 1
                self.out[id] = self.out.get(id, 0) + 1
        self.now += seconds
        self.scheduler.ran(Step(seconds, dict(batch), tokens, loaded), self.now)
        for id in tokens:
            if self.out[id] == self.live[id].most_new or (early == 0 and id % 3 == 0):
                self.scheduler.finished(id, self.now)
                self._forget(id)
        self.resident = set(EXPERTS[early % 3])

    def _check_batch(self, batch):
        running = self.scheduler.running
        assert len({id for id, _ in batch}) == len(batch) and {id for id, _ in batch} <= set(running)
        assert bool(batch) == bool(running)
        rows = dict(batch)
        assert all(count > 0 for count in rows.values())
        if sum(rows.values()) > CHUNK:
            assert any(self.live[id].whole and count > 1 for id, count in batch)
        for id in running:
            if self.out.get(id, 0) and self.done[id] == self.live[id].prompt + self.out[id] - 1:
                assert rows[id] == 1  # who decodes is in every step
        for id in running:
            if self.live[id].whole and id in rows:
                assert rows[id] == self.live[id].prompt + self.out.get(id, 0) - self.done.get(id, 0)

    @rule(pick=st.integers(0, 99))
    def cancel(self, pick):
        ids = [*self.live, -1]
        self.scheduler.cancel(ids[pick % len(ids)], self.now)
        self._forget(ids[pick % len(ids)])

    @rule(pick=st.integers(0, 99))
    def lose_a_state(self, pick):
        if ids := self.scheduler.running:
            self.scheduler.restart(ids[pick % len(ids)])
            self.done[ids[pick % len(ids)]] = 0

    @rule(more=st.integers(0, 6))
    def split_anew(self, more):
        self.scheduler.kv_bytes = self.scheduler.least_kv_bytes + more

    def _forget(self, id):
        for known in (self.live, self.out, self.done, self.later_first):
            known.pop(id, None)

    @invariant()
    def nothing_is_lost_and_bytes_hold(self):
        if not hasattr(self, "scheduler"):
            return
        waiting, running = self.scheduler.waiting, self.scheduler.running
        assert sorted([*waiting, *running]) == sorted(self.live)
        assert self.scheduler.kv_used == sum(self.live[id].kv_bytes for id in running) <= self.scheduler.kv_bytes
        assert len(running) <= self.scheduler.most_running and len(waiting) <= QUEUE
        assert all(count <= PASSES for count in self.later_first.values())

    def teardown(self):
        """Whatever came before: everybody ends, in no more steps than there are rows."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(sum(ticket.prompt + 2 * ticket.most_new for ticket in self.live.values())):
            if not self.live:
                break
            self.step(0.01, 1, 0)
        assert not self.live and not self.scheduler.running and not self.scheduler.waiting
        assert self.scheduler.kv_used == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_in_any_order_of_events_nobody_is_lost_or_starves_and_bytes_hold(policy):
    machine = type("Machine", (Events,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
    )
