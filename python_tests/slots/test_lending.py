"""Slots that are out of use: every layer keeps its least, the same share everywhere, and what runs goes on."""

from __future__ import annotations

from contextlib import closing
from threading import RLock

import pytest
from fake_queue import FakeQueue

from emoe.errors import ClosedError
from emoe.slots.cache import CacheManager
from emoe.slots.lending import Lending
from emoe.slots.loader import Loader

EXPERTS = 8


class Bench:
    def __init__(self, slots=(4, 4), least=(2, 2)):
        self.queue = FakeQueue(eager=True)
        self.cache = CacheManager(slots)
        records = [[layer * EXPERTS + expert for expert in range(EXPERTS)] for layer in range(len(slots))]
        self.loader = Loader(self.cache, self.queue, records)
        self.given, self.resizes = [], 0
        self.lending = Lending(
            self.loader, least, lock=RLock(), give_back=self.given.append, resized=self._resized,
        )  # fmt: skip

    def _resized(self):
        self.resizes += 1

    def run(self, layer, *experts):
        with closing(self.loader.rounds(layer, experts)) as rounds:
            held = [expert for group in rounds for expert, _ in group]
        assert sorted(held) == sorted(experts)

    def sizes(self):
        return [self.cache.capacity(layer) for layer in range(self.cache.layers)]


def test_the_same_share_of_every_layer_is_lent_and_the_least_stays():
    bench = Bench(slots=(8, 4, 2), least=(2, 2, 2))
    assert bench.lending.most == 8
    assert bench.lending.lend(3) == 3
    assert bench.sizes() == [6, 3, 2]
    assert bench.lending.lend(100) == 5
    assert bench.sizes() == [2, 2, 2] and bench.lending.lent == 8
    assert bench.lending.lend(1) == 0
    assert len(set(bench.given)) == 8 and bench.resizes == 2


def test_slots_come_back_empty_and_the_least_full_layer_first():
    bench = Bench(slots=(8, 4), least=(2, 2))
    bench.run(0, *range(8))
    bench.lending.lend(8)
    assert bench.lending.take_back(3) == 3
    assert bench.sizes() == [5, 2]
    assert bench.lending.take_back(100) == 5 and bench.lending.lent == 0
    assert len(bench.cache.resident(0)) == 2
    bench.cache.check_integrity()


def test_free_slots_go_first_then_what_the_policy_would_evict():
    bench = Bench(slots=(4,), least=(1,))
    bench.run(0, 5)
    bench.run(0, 6)
    bench.lending.lend(2)
    assert bench.cache.resident(0) == [5, 6]
    bench.lending.lend(1)
    assert bench.cache.resident(0) == [6]


def test_a_layer_runs_in_the_slots_that_are_left():
    bench = Bench(slots=(4,), least=(1,))
    bench.lending.lend(3)
    bench.run(0, 0, 1, 2, 3, 4)
    bench.lending.take_back(3)
    bench.run(0, 0, 1, 2, 3, 4)
    bench.cache.check_integrity()


def test_a_prefetch_gives_way_and_its_read_is_over_before_the_slot_is_given_back():
    bench = Bench(slots=(2,), least=(1,))
    bench.queue.eager = False
    bench.loader.prefetch(0, [3, 4])
    assert bench.lending.lend(1) == 1
    assert all(job.state in ("cancelled", "done", "failed") for job in bench.queue.jobs if job.slot == bench.given[0])
    bench.cache.check_integrity()


def test_what_a_forward_holds_is_not_lent():
    bench = Bench(slots=(3,), least=(1,))
    for expert in (1, 2, 3):
        bench.cache.admit(0, expert)
        bench.cache.ready(0, expert)
    bench.cache.hold(0, 1)
    bench.cache.hold(0, 2)
    assert bench.lending.lend(2) == 1
    assert bench.cache.resident(0) == [1, 2]


def test_a_closed_loader_lends_nothing():
    bench = Bench()
    bench.loader.close()
    assert bench.lending.closed
    with pytest.raises(ClosedError):
        bench.lending.lend(1)
