"""An interrupt at any moment: the next call finds slots, holds and reads whole, and the right bytes in every slot."""

from __future__ import annotations

import logging
from contextlib import closing

import pytest
from fake_queue import FakeQueue
from interrupts import interrupted

from emoe.errors import EmoeError, QueueFullError
from emoe.slots.cache import CacheManager
from emoe.slots.loader import Loader

EXPERTS = 7


def _loader(policy="lru", **queue):
    queue = FakeQueue(**queue)
    records = [[layer * EXPERTS + expert for expert in range(EXPERTS)] for layer in range(2)]
    return Loader(CacheManager([3, 4], policy=policy), queue, records), queue


def _read(loader, layer, experts, **how):
    """Every expert of the call, with what its slot has while it is held."""
    seen = {}
    with closing(loader.rounds(layer, experts, **how)) as rounds:
        for group in rounds:
            seen.update({expert: loader._queue.content[slot] for expert, slot in group})
    return seen


def _story(loader, queue):
    """Everything that a loader does, in a few calls."""
    loader.prefetch(1, [0, 1])
    _read(loader, 0, [0, 1, 2])
    loader.cache.protect(0, [1])
    loader.prefetch_behind(1, [2, 3, 4])
    _read(loader, 0, [1, 3, 4, 5])
    _read(loader, 1, [0, 1, 4], together=True)
    queue.advance()
    loader.prefetch(0, [5, 6])
    with closing(loader.rounds(0, [6, 2])) as rounds:
        next(rounds)
    loader.prefetch(1, [5, 6])
    loader.cancel_prefetch(1)
    loader.finish_prefetch(0)
    _read(loader, 0, [6, 1])
    loader.prefetch_behind(0, [0, 3])
    loader.begin_behind()


def _assert_whole(loader, queue):
    loader.cache.check_integrity()
    under_way = {ticket for each in loader._prefetching for ticket in each.values()}
    assert {job.slot for job in queue.unwaited()} == {queue.jobs[ticket].slot for ticket in under_way}
    for layer in range(2):
        states = [loader.cache.state(slot) for slot in loader.cache.slots(layer)]
        assert "held" not in states
        assert states.count("loading") == len(loader._prefetching[layer])
        for expert in loader.cache.resident(layer):
            assert queue.content[loader.cache.lookup(layer, expert)] == layer * EXPERTS + expert


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
def test_after_an_interrupt_at_any_moment_slots_are_whole_and_have_the_right_bytes(policy, opcodes):
    at, step = 0, 11 if opcodes else 1
    while True:
        loader, queue = _loader(policy)
        where = interrupted(lambda: _story(loader, queue), at, ["slots"], opcodes=opcodes)  # noqa: B023
        if not where:
            break
        loader.recover()
        _assert_whole(loader, queue)
        for layer in (0, 1):
            wanted = [5, 0, 2, 3, 1, 6, 4]
            assert _read(loader, layer, wanted) == {expert: layer * EXPERTS + expert for expert in wanted}, where
        assert loader._open == 0
        at += step
    assert at > 1000 or not opcodes


def test_recovering_that_is_interrupted_itself_is_ended_by_the_next():
    lines = 0
    while interrupted(lambda: _story(*_loader()), lines, ["slots"]):
        lines += 50
    for at in range(7, lines, 29):
        again = 0
        while True:
            loader, queue = _loader()
            if not interrupted(lambda: _story(loader, queue), at, ["slots"]):  # noqa: B023
                break
            over = not interrupted(loader.recover, again, ["slots"])
            loader.recover()
            _assert_whole(loader, queue)
            if over:
                break
            again += 13


def test_an_error_that_a_signal_handler_raises_is_an_interrupt_too():
    for at in range(0, 600, 3):
        loader, queue = _loader()
        if interrupted(lambda: _story(loader, queue), at, ["slots"], error=TimeoutError):  # noqa: B023
            loader.recover()
            _assert_whole(loader, queue)


class _Lost(FakeQueue):
    """A queue whose tickets are lost: what CPython does with a signal that comes during a native call."""

    lose: bool | None = None  # the lane whose next ticket is lost

    def submit(self, record, slot, prefetch=False):
        ticket = super().submit(record, slot, prefetch)
        if self.lose == prefetch:
            self.lose = None
            raise KeyboardInterrupt
        return ticket


def _losing():
    queue = _Lost()
    records = [[layer * EXPERTS + expert for expert in range(EXPERTS)] for layer in range(2)]
    return Loader(CacheManager([1, 4]), queue, records), queue


@pytest.mark.parametrize("running", [False, True])
def test_a_demand_whose_ticket_was_lost_is_over_before_its_slot_is_given_away(running):
    loader, queue = _losing()
    _read(loader, 0, [0])
    queue.lose = False
    submit = queue.submit
    if running:
        queue.submit = lambda *a: (submit(*a), queue.advance())[0]
    with pytest.raises(KeyboardInterrupt):
        _read(loader, 0, [1])
    # The fake queue refuses two jobs for one slot, and tells who was written into it last.
    assert _read(loader, 0, [2]) == {2: 2}
    loader.recover()
    _assert_whole(loader, queue)


def test_a_prefetch_whose_ticket_was_lost_goes_on_as_a_prefetch():
    loader, queue = _losing()
    queue.lose = True
    with pytest.raises(KeyboardInterrupt):
        loader.prefetch(0, [1])
    assert loader.prefetching(0)
    loader.recover()
    assert loader.prefetching(0)
    assert _read(loader, 0, [2]) == {2: 2}
    assert _read(loader, 0, [1]) == {1: 1}
    _assert_whole(loader, queue)


def test_recovering_leaves_prefetches_under_way_alone():
    loader, queue = _loader()
    loader.prefetch(0, [1, 2])
    interrupted(lambda: _read(loader, 1, [0, 1, 2]), 25, ["slots"])
    loader.recover()
    assert loader.cache.lookup(0, 1) is not None
    assert queue.jobs[0].state == queue.jobs[1].state == "queued"
    assert _read(loader, 0, [1, 2]) == {1: 1, 2: 2}


def test_a_turn_in_the_middle_of_another_is_refused_and_one_that_was_cut_off_is_not():
    loader, queue = _loader()

    def turn(inside, cut=None):
        loader.begin()
        with closing(loader.rounds(0, [0, 1])) as rounds:
            held = next(rounds)
            for ask in inside:
                with pytest.raises(EmoeError, match="in the middle of a forward in this very thread"):
                    ask()
            assert all(loader.cache.state(slot) == "held" for _, slot in held)
            if cut is not None:
                raise cut
        loader.over()

    asks = [lambda: loader.begin(), lambda: loader.recover(), lambda: loader.require_idle(), lambda: turn([])]
    turn(asks)
    try:
        turn([], KeyboardInterrupt())
    except KeyboardInterrupt:  # its traceback has the frame of the turn
        turn(asks)
        loader.recover()
    _assert_whole(loader, queue)
    assert loader._turn is None


def test_a_call_that_was_given_up_does_nothing_when_it_is_closed_later():
    loader, queue = _loader()
    stale = loader.rounds(0, [0, 1])
    next(stale)
    loader.recover()  # as an exception's traceback keeps the generator, but nobody goes on with it
    with closing(loader.rounds(0, [0, 2])) as rounds:
        held = dict(next(rounds))
        stale.close()
        assert all(loader.cache.state(slot) == "held" for slot in held.values())
    _assert_whole(loader, queue)


def test_a_refused_prefetch_evicts_nobody():
    loader, queue = _loader(prefetch_bound=1)
    _read(loader, 0, [0, 1, 2])
    _read(loader, 0, [0])
    before = loader.cache.resident(0)
    assert loader.prefetch(1, [3]) == 1
    assert loader.prefetch(0, [4]) == 0
    assert loader.cache.resident(0) == before
    assert loader.snapshot()["evictions"] == 0
    queue.run_all()
    loader.finish_prefetch(1)
    assert loader.prefetch(0, [4]) == 1  # and 1 is still the least recent
    assert loader.cache.resident(0) == [0, 2]


def test_a_record_that_can_never_be_prefetched_is_said_once_and_others_are(caplog):
    loader, queue = _loader()
    submit = queue.submit

    def small(record, slot, prefetch=False):
        if prefetch and record < EXPERTS:
            raise QueueFullError("a prefetch of 90 bytes, with 0 queued or running, passes the bound of 64")
        return submit(record, slot, prefetch)

    queue.submit = small
    with caplog.at_level(logging.WARNING, logger="emoe"):
        for _ in range(3):
            assert loader.prefetch(0, [4]) == 0
            assert loader.prefetch(1, [4]) in (0, 1)
            loader.finish_prefetch(1)
    assert loader.cache.resident(1) == [4]
    assert [record.getMessage() for record in caplog.records] == [
        "emoe: experts of layer 0 are never prefetched: a prefetch of 90 bytes, with 0 queued or running, passes the "
        "bound of 64"
    ]


@pytest.mark.parametrize("wanted", [[4, 5], [0, 4, 5], [0, 1], [4, 5, 6, 0]])
def test_a_prefetch_of_the_next_layer_is_submitted_behind_the_demand_of_this_one(wanted):
    loader, queue = _loader()
    _read(loader, 0, [0, 1, 2])
    queue.log.clear()
    started = loader.prefetch_behind(1, [0, 3])
    assert not queue.log
    with closing(loader.rounds(0, wanted)) as rounds:
        next(rounds)
        if len(wanted) <= 3:  # before this layer computes
            assert started == [0, 3]
        for _ in rounds:
            pass
    missing = [("demand", expert) for expert in wanted if expert > 2]
    assert queue.log[: len(missing)] == missing
    assert [kind for kind, _ in queue.log].count("prefetch") == 2
    assert started == [0, 3]
