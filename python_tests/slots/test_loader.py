"""Rounds and prefetch over a queue whose jobs end, fail and hang when the test says so."""

from __future__ import annotations

from contextlib import closing
from itertools import chain

import pytest
from fake_queue import FakeQueue
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emoe.errors import CacheFullError, ClosedError, ConfigError, ReadError
from emoe.slots.cache import CacheManager
from emoe.slots.loader import Loader

EXPERTS = 8


def _loader(slots=(4,), policy="lru", **options):
    queue = FakeQueue(**options)
    records = [[100 * layer + expert for expert in range(EXPERTS)] for layer in range(len(slots))]
    return Loader(CacheManager(slots, policy=policy), queue, records), queue


def _run(loader, layer, experts, together=False):
    """All groups' experts; checks in each group that the slots hold those experts' bytes."""
    groups = []
    with closing(loader.rounds(layer, experts, together=together)) as rounds:
        for group in rounds:
            _check(loader, layer, group)
            groups.append([expert for expert, _ in group])
    loader.cache.check_integrity()
    return groups


def _check(loader, layer, group):
    for expert, slot in group:
        assert loader.cache.state(slot) == "held"
        assert loader._queue.content[slot] == 100 * layer + expert


def _states(loader):
    return [loader.cache.state(slot) for layer in range(loader.cache.layers) for slot in loader.cache.slots(layer)]


def test_hits_come_first_and_misses_are_submitted_before_them():
    loader, queue = _loader()
    _run(loader, 0, [1, 2])
    queue.log.clear()
    with closing(loader.rounds(0, [1, 2, 3])) as rounds:
        assert [expert for expert, _ in next(rounds)] == [1, 2]
        assert queue.log == [("demand", 3)]
        assert [expert for expert, _ in next(rounds)] == [3]
        assert next(rounds, None) is None


def test_misses_are_submitted_all_at_once_and_what_has_arrived_comes_together():
    loader, queue = _loader()
    with closing(loader.rounds(0, [1, 2, 3, 4])) as rounds:
        first = [expert for expert, _ in next(rounds)]
        assert [record for _, record in queue.log] == [1, 2, 3, 4]
        queue.run_all()
        second = [expert for expert, _ in next(rounds)]
    assert first == [1]
    assert sorted(second) == [2, 3, 4]


def test_all_hits_are_one_group_without_touching_the_queue():
    loader, queue = _loader()
    _run(loader, 0, [1, 2, 3])
    queue.log.clear()
    assert _run(loader, 0, [1, 2, 3]) == [[1, 2, 3]]
    assert queue.log == []


def test_no_experts_are_no_groups():
    loader, _ = _loader()
    assert _run(loader, 0, []) == []


def test_together_is_one_group():
    loader, _ = _loader()
    _run(loader, 0, [5, 6])
    (group,) = _run(loader, 0, [1, 2, 5, 6], together=True)
    assert sorted(group) == [1, 2, 5, 6]


def test_together_beyond_the_slots_is_refused_before_anything_is_read():
    loader, queue = _loader()
    with pytest.raises(CacheFullError, match="5 experts of layer 0 cannot be held together in 4 slots"):
        _run(loader, 0, [1, 2, 3, 4, 5], together=True)
    assert queue.log == []


def test_one_slot_serves_any_number_of_experts():
    loader, _ = _loader(slots=(1,))
    groups = _run(loader, 0, list(range(EXPERTS)))
    assert groups == [[expert] for expert in range(EXPERTS)]


def test_more_experts_than_slots_run_in_rounds_that_refill_as_slots_come_free():
    loader, queue = _loader(slots=(3,))
    _run(loader, 0, [7])
    groups = _run(loader, 0, list(range(EXPERTS)))
    assert groups[0] == [7]
    assert sorted(chain(*groups)) == list(range(EXPERTS))
    assert len(queue.log) == EXPERTS


class _NeverDone(FakeQueue):
    """Reads complete when the test says so; whoever waits before is told off."""

    def wait(self, ticket):
        assert self.done(ticket), "waited for a read while an expert in a slot was not computed"
        super().wait(ticket)


def _with_resident(experts, slots, queue):
    """A loader with these experts in its slots."""
    loader = Loader(CacheManager((slots,)), queue, [list(range(16))])
    for expert in experts:
        group = loader.rounds(0, [expert])
        queue.eager = True
        assert [[each for each, _ in held] for held in group] == [[expert]]
    queue.eager = False
    queue.log.clear()
    return loader


def test_experts_in_slots_are_computed_before_any_read_is_waited_for():
    queue = _NeverDone()
    loader = _with_resident([1, 2, 3], 8, queue)
    with closing(loader.rounds(0, [0, 1, 2, 3, 4])) as rounds:
        assert [expert for expert, _ in next(rounds)] == [1, 2, 3]
        assert queue.log == [("demand", 0), ("demand", 4)]
        queue.run_all()
        assert sorted(expert for expert, _ in next(rounds)) == [0, 4]


def test_where_every_slot_is_needed_experts_are_computed_in_parts_and_reads_take_the_slots_of_those_that_were():
    queue = _NeverDone()
    loader = _with_resident(range(8), 8, queue)
    computed, reads = [], []
    with closing(loader.rounds(0, range(16))) as rounds:
        for _ in range(4):  # a quarter of the slots each; nothing has arrived
            computed.append({expert for expert, _ in next(rounds)})
            reads.append(len(queue.log))
        assert set().union(*computed) == set(range(8)) and {len(part) for part in computed} == {2}
        assert reads == [0, 2, 4, 6]  # while a part is computed, the slots of those before it are read into
        queue.run_all()
        rest = []
        for group in rounds:
            rest += [expert for expert, _ in group]
            queue.run_all()
    assert sorted(rest) == list(range(8, 16))
    loader.cache.check_integrity()


def test_of_experts_in_slots_those_that_are_to_stay_are_computed_last():
    queue = _NeverDone()
    loader = _with_resident(range(8), 8, queue)
    loader.cache.protect(0, [0, 5, 6, 7])
    with closing(loader.rounds(0, range(12))) as rounds:
        first = {expert for expert, _ in next(rounds)} | {expert for expert, _ in next(rounds)}
        assert first == {1, 2, 3, 4}
        queue.run_all()
        for _ in rounds:
            queue.run_all()
    assert {0, 5, 6, 7} <= set(loader.cache.resident(0))


def test_a_miss_never_evicts_an_expert_this_forward_needs():
    loader, queue = _loader(slots=(4,))
    _run(loader, 0, [0, 1, 2, 3])
    queue.log.clear()
    # 0 is the least recently used, but this forward needs it.
    _run(loader, 0, [0, 4])
    assert [record for _, record in queue.log] == [4]
    assert 0 in loader.cache.resident(0)


def test_a_failed_read_frees_its_slot_raises_and_leaves_the_others_unharmed():
    loader, queue = _loader()
    _run(loader, 0, [7])
    queue.failing = {2}
    with pytest.raises(ReadError, match="read failed") as caught:
        _run(loader, 0, [7, 1, 2, 3])
    assert caught.value.tensor == "record 2"
    assert "held" not in _states(loader)
    assert "loading" not in _states(loader)
    assert loader.cache.lookup(0, 2) is None
    assert 7 in loader.cache.resident(0)
    assert queue.unwaited() == []
    groups = _run(loader, 0, [7, 1, 2, 3])  # the second attempt works
    assert sorted(chain(*groups)) == [1, 2, 3, 7]


def test_leaving_early_cancels_what_has_not_started_and_waits_for_the_rest():
    loader, queue = _loader()
    with closing(loader.rounds(0, [1, 2, 3, 4])) as rounds:
        next(rounds)  # 1 is there, 2 is running
    assert [job.state for job in queue.jobs] == ["done", "done", "cancelled", "cancelled"]
    assert loader.cache.resident(0) == [1, 2]
    assert _states(loader) == ["ready", "ready", "free", "free"]
    assert queue.unwaited() == []


def test_an_exception_in_the_loop_releases_every_hold():
    loader, queue = _loader()
    with pytest.raises(ZeroDivisionError), closing(loader.rounds(0, [1, 2, 3])) as rounds:
        for _ in rounds:
            _ = 1 / 0
    assert set(_states(loader)) <= {"ready", "free"}
    assert queue.unwaited() == []


def test_an_interrupted_wait_leaves_no_slot_half_filled():
    class Interrupting(FakeQueue):
        interrupted = False

        def wait(self, ticket):
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            super().wait(ticket)

    loader, _ = _loader()
    loader._queue = queue = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        _run(loader, 0, [1, 2])
    assert set(_states(loader)) <= {"ready", "free"}
    assert queue.unwaited() == []
    _run(loader, 0, [1, 2])


def test_a_submit_that_raises_frees_the_slot():
    loader, queue = _loader()
    original = queue.submit

    def submit(record, slot, prefetch=False):
        if record == 2:
            raise ClosedError("the queue is closed")
        return original(record, slot, prefetch)

    queue.submit = submit
    with pytest.raises(ClosedError):
        _run(loader, 0, [1, 2])
    assert set(_states(loader)) <= {"ready", "free"}
    assert loader.cache.lookup(0, 2) is None


def test_slots_held_by_another_call_are_an_error_and_not_a_deadlock():
    loader, _ = _loader(slots=(2,))
    _run(loader, 0, [1, 2])
    with closing(loader.rounds(0, [1, 2])) as outer:
        next(outer)
        with pytest.raises(CacheFullError, match="other calls hold all 2"):
            _run(loader, 0, [3])
    _run(loader, 0, [3])


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_that_does_not_exist_is_refused(expert):
    loader, queue = _loader()
    with pytest.raises(ConfigError, match=f"experts 0 to 7, not {expert}"):
        _run(loader, 0, [1, expert])
    with pytest.raises(ConfigError):
        loader.prefetch(0, [expert])
    assert queue.log == []


def test_layers_of_cache_and_records_must_agree():
    with pytest.raises(ConfigError, match="2 layers, the records have 1"):
        Loader(CacheManager([1, 1]), FakeQueue(), [[0]])


def test_a_prefetched_expert_is_a_hit_and_counted_once():
    loader, queue = _loader()
    assert loader.prefetch(0, [3, 4]) == 2
    queue.run_all()
    assert _run(loader, 0, [3]) == [[3]]
    _run(loader, 0, [3])
    counters = loader.snapshot()
    assert (counters["hits"], counters["misses"], counters["prefetch_hits"], counters["prefetch_late"]) == (2, 0, 1, 0)
    assert queue.log == [("prefetch", 3), ("prefetch", 4)]


def test_a_prefetch_on_its_way_is_promoted_and_not_read_twice():
    loader, queue = _loader()
    loader.prefetch(0, [3, 4])
    with closing(loader.rounds(0, [1, 4])) as rounds:
        assert [expert for expert, _ in next(rounds)] == [4]
        assert not queue.jobs[1].prefetch
    counters = loader.snapshot()
    assert (counters["prefetch_hits"], counters["prefetch_late"], counters["loads"]) == (1, 1, 3)


def test_a_queued_prefetch_gives_its_slot_to_a_demand():
    loader, queue = _loader(slots=(2,))
    loader.prefetch(0, [3, 4])
    groups = _run(loader, 0, [1, 2], together=True)
    assert groups == [[1, 2]]
    assert [job.state for job in queue.jobs[:2]] == ["cancelled", "cancelled"]


def test_a_running_prefetch_is_waited_for_where_a_demand_needs_its_slot():
    loader, queue = _loader(slots=(1,))
    loader.prefetch(0, [3])
    queue.jobs[0].state = "running"
    assert _run(loader, 0, [1]) == [[1]]
    assert loader.snapshot()["prefetch_wasted"] == 1
    assert queue.unwaited() == []


def test_prefetch_stops_at_the_bound_of_the_queue_and_resumes_when_one_ends():
    loader, queue = _loader(prefetch_bound=1)
    assert loader.prefetch(0, [1, 2, 3]) == 1
    submitted = len(queue.log)
    assert loader.prefetch(0, [2, 3]) == 0
    assert len(queue.log) == submitted
    queue.run_all()
    assert loader.prefetch(0, [2]) == 1
    loader.cache.check_integrity()


def test_prefetch_keeps_the_experts_it_was_asked_for():
    loader, _ = _loader(slots=(2,))
    _run(loader, 0, [1])
    _run(loader, 0, [2])
    assert loader.prefetch(0, [1, 3]) == 1
    assert loader.cache.lookup(0, 1) is not None
    assert loader.cache.lookup(0, 2) is None


def test_a_failed_prefetch_frees_its_slot_and_the_demand_reads_again():
    loader, queue = _loader()
    loader.prefetch(0, [3])
    queue.failing = {3}
    queue.run_all()
    assert _run(loader, 0, [3]) == [[3]]
    assert loader.snapshot()["unused_failed"] == 1


def test_a_promoted_prefetch_that_fails_raises():
    loader, queue = _loader()
    loader.prefetch(0, [3])
    queue.failing = {3}
    with pytest.raises(ReadError):
        _run(loader, 0, [3])
    assert set(_states(loader)) == {"free"}


def test_cancelling_prefetches_frees_their_slots():
    loader, queue = _loader(slots=(2, 2))
    loader.prefetch(0, [1, 2])
    loader.prefetch(1, [3])
    assert loader.cancel_prefetch(0) == 2
    assert loader.cancel_prefetch() == 1
    assert set(_states(loader)) == {"free"}
    assert queue.unwaited() == []


def test_close_leaves_no_slot_loading_and_refuses_more():
    loader, queue = _loader(slots=(4,))
    loader.prefetch(0, [1, 2, 3])
    queue.advance()
    loader.close()
    loader.close()
    assert sorted(_states(loader)) == ["free", "free", "ready", "ready"]
    assert queue.unwaited() == []
    with pytest.raises(ClosedError):
        next(loader.rounds(0, [1]))
    with pytest.raises(ClosedError):
        loader.prefetch(0, [1])


def test_counters_of_the_layers_sum_to_the_total():
    loader, _ = _loader(slots=(2, 4))
    for experts in ([0, 1, 2], [2, 3], [0, 1]):
        _run(loader, 0, experts)
        _run(loader, 1, experts)
    total = loader.snapshot()
    layers = total.pop("layers")
    assert total == {name: sum(layer[name] for layer in layers) for name in total}
    assert (layers[1]["hits"], layers[1]["misses"], layers[1]["evictions"]) == (3, 4, 0)
    assert layers[0]["evictions"] == layers[0]["loads"] - 2


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
def test_any_sequence_of_rounds_prefetches_and_faults_keeps_slots_and_bytes_right(policy):
    class Walk(RuleBasedStateMachine):
        """Layers of 1, 3 and 8 slots; generators of different layers stay open across steps."""

        def __init__(self) -> None:
            super().__init__()
            self.loader, self.queue = _loader(slots=(1, 3, 8), policy=policy, prefetch_bound=2)
            self.open: dict[int, tuple] = {}  # layer -> (generator, current group, experts still to come)

        @rule(
            layer=st.integers(0, 2),
            experts=st.sets(st.integers(0, EXPERTS - 1)),
            together=st.booleans(),
        )
        def begin(self, layer, experts, together):
            if layer not in self.open:
                together = together and len(experts) <= self.loader.capacity(layer)
                self.open[layer] = (self.loader.rounds(layer, sorted(experts), together), [], set(experts), together)

        @precondition(lambda self: self.open)
        @rule(data=st.data())
        def step(self, data):
            layer = data.draw(st.sampled_from(sorted(self.open)))
            rounds, _, rest, together = self.open[layer]
            try:
                group = next(rounds, None)
            except ReadError:
                del self.open[layer]
                self._ended(layer)
                return
            if group is None:
                assert not rest
                del self.open[layer]
                self._ended(layer)
                return
            experts = {expert for expert, _ in group}
            assert group
            assert len(experts) == len(group)
            assert experts <= rest
            assert not together or experts == rest
            self.open[layer] = (rounds, group, rest - experts, together)

        @precondition(lambda self: self.open)
        @rule(data=st.data())
        def leave_early(self, data):
            layer = data.draw(st.sampled_from(sorted(self.open)))
            self.open.pop(layer)[0].close()
            self._ended(layer)

        @rule(layer=st.integers(0, 2), experts=st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=4))
        def prefetch(self, layer, experts):
            self.loader.prefetch(layer, experts)

        @rule()
        def cancel(self):
            self.loader.cancel_prefetch()

        @rule()
        def time_passes(self):
            self.queue.advance()

        @rule(layer=st.integers(0, 2), expert=st.integers(0, EXPERTS - 1))
        def the_next_read_fails(self, layer, expert):
            self.queue.failing = {100 * layer + expert}

        def _ended(self, layer):
            states = [self.loader.cache.state(slot) for slot in self.loader.cache.slots(layer)]
            assert "held" not in states
            assert states.count("loading") == len(self.loader._prefetching[layer])

        @invariant()
        def slots_are_right(self):
            self.loader.cache.check_integrity()
            for layer, (_, group, _, _) in self.open.items():
                _check(self.loader, layer, group)
            for layer in range(3):
                for expert in self.loader.cache.resident(layer):
                    assert self.queue.content[self.loader.cache.lookup(layer, expert)] == 100 * layer + expert

        def teardown(self):
            for layer in list(self.open):
                self.open.pop(layer)[0].close()
            self.loader.close()
            assert set(_states(self.loader)) <= {"ready", "free"}
            assert self.queue.unwaited() == []

    Walk.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
    Walk.TestCase("runTest").runTest()


@pytest.fixture
def native_loader(tmp_path):
    """A loader over the native queue: 2 slots, and 6 experts of 4096 bytes, filled with id + 1."""
    from emoe import native

    core = native.load()
    path = tmp_path / "weights"
    path.write_bytes(b"".join(bytes([expert + 1]) * 4096 for expert in range(6)))
    table = core.RecordTable()
    file = table.add_file(str(path))
    records = [
        table.add_record([(file, 4096 * e, 4096, f"expert.{e}", "float32", 0, "float32", 32, 32, 32, 1)])
        for e in range(6)
    ]

    def make(**faults):
        reader = core.make_reader("pread")
        queue = core.TransferQueue(slab, table, core.FaultyReader(reader, **faults) if faults else reader)
        queues.append(queue)
        return Loader(CacheManager([2]), queue, [records])

    slab, queues = core.Slab(2, 4096), []
    make.slab = slab
    yield make
    for queue in queues:
        queue.close()


def _bytes_of(slab, slot):
    import ctypes

    return set(ctypes.string_at(slab.address + slot * slab.slot_bytes, 4096))


def test_the_native_queue_fills_the_slots_that_are_yielded(native_loader):
    loader = native_loader()
    for experts in ([0, 1, 2, 3, 4, 5], [5, 0], [3]):
        seen = []
        with closing(loader.rounds(0, experts)) as rounds:
            for group in rounds:
                for expert, slot in group:
                    assert _bytes_of(native_loader.slab, slot) == {expert + 1}
                    seen.append(expert)
        assert sorted(seen) == sorted(experts)
        loader.cache.check_integrity()
    assert loader.prefetch(0, [1]) == 1
    with closing(loader.rounds(0, [1])) as rounds:
        ((_, slot),) = next(rounds)
        assert _bytes_of(native_loader.slab, slot) == {2}
    assert loader.snapshot()["prefetch_hits"] == 1
    loader.close()


def test_a_native_read_error_names_the_tensor_and_a_second_attempt_works(native_loader):
    loader = native_loader(fail_at=1)
    with pytest.raises(ReadError) as caught, closing(loader.rounds(0, [0, 1])) as rounds:
        for _ in rounds:
            pass
    assert caught.value.tensor in ("expert.0", "expert.1")
    assert set(_states(loader)) <= {"ready", "free"}
    with closing(loader.rounds(0, [0, 1])) as rounds:
        assert sorted(expert for group in rounds for expert, _ in group) == [0, 1]


def test_leaving_early_with_the_native_queue_leaves_nothing_loading(native_loader):
    loader = native_loader(delay_ms=5)
    loader.prefetch(0, [4])
    with closing(loader.rounds(0, [0, 1, 2, 3])) as rounds:
        next(rounds)
    assert "held" not in _states(loader)
    loader.close()  # the prefetch may still have been running
    assert set(_states(loader)) <= {"ready", "free"}
    loader.cache.check_integrity()


def test_a_watcher_is_told_of_every_transfer_by_layer_and_expert_and_no_longer_than_asked():
    told = []

    class Watcher:
        def __getattr__(self, name):
            return lambda ticket, *more: told.append((name, *more))

    loader, own = _loader((3, 3))
    with loader.watch(Watcher()):
        loader.prefetch(1, [2])
        loader.cancel_prefetch(1)
        assert _run(loader, 0, [1]) == [[1]]
    assert told[:2] == [("submitted", 1, 2, True), ("cancelled",)]
    assert ("submitted", 0, 1, False) in told and told[-1] == ("ended",)
    count = len(told)
    loader.prefetch(1, [0])
    assert len(told) == count and loader._queue is own
