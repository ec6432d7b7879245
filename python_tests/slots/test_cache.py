"""The slot state machine: allowed transitions, refused ones, and a random walk that checks integrity at each step."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emoe.errors import CacheError, CacheFullError, ConfigError
from emoe.slots.cache import CacheManager

EXPERTS = 7


def _filled(*experts, slots=None, policy="lru"):
    cache = CacheManager([slots or len(experts)], policy=policy)
    for expert in experts:
        cache.admit(0, expert)
        cache.ready(0, expert)
    return cache


def test_slots_are_numbered_through_the_layers():
    cache = CacheManager([2, 3])
    assert list(cache.slots(0)) == [0, 1]
    assert list(cache.slots(1)) == [2, 3, 4]
    assert cache.admit(1, 0).slot in cache.slots(1)


def test_a_slot_goes_from_free_through_loading_and_ready_to_held_and_back():
    cache = CacheManager([1])
    assert cache.state(0) == "free"
    assert cache.admit(0, 4) == (0, None)
    assert cache.state(0) == "loading"
    assert cache.lookup(0, 4) == 0
    assert cache.resident(0) == []
    cache.ready(0, 4)
    assert cache.state(0) == "ready"
    assert cache.hold(0, 4) == 0
    assert cache.state(0) == "held"
    cache.release(0, 4)
    cache.drop(0, 4)
    assert cache.state(0) == "free"
    assert cache.lookup(0, 4) is None


def test_a_failed_load_frees_its_slot():
    cache = CacheManager([1])
    cache.admit(0, 4)
    cache.fail(0, 4)
    assert cache.state(0) == "free"
    cache.check_integrity()


def test_holds_are_counted():
    cache = _filled(1)
    cache.hold(0, 1)
    cache.hold(0, 1)
    cache.release(0, 1)
    assert cache.state(0) == "held"
    cache.release(0, 1)
    assert cache.state(0) == "ready"


def test_a_layer_evicts_only_its_own_experts():
    cache = CacheManager([1, 1])
    for layer in (0, 1):
        cache.admit(layer, 0)
        cache.ready(layer, 0)
    assert cache.admit(1, 5).evicted == 0
    assert cache.resident(0) == [0]


def test_a_held_expert_is_not_evicted():
    cache = _filled(1, 2)
    cache.hold(0, 1)
    assert cache.admit(0, 3).evicted == 2


def test_an_expert_to_be_kept_is_not_evicted():
    cache = _filled(1, 2)
    assert cache.admit(0, 3, keep={1}).evicted == 2


def test_a_loading_expert_is_not_evicted():
    cache = CacheManager([2])
    cache.admit(0, 1)
    cache.admit(0, 2)
    cache.ready(0, 2)
    assert cache.admit(0, 3).evicted == 2


def test_a_full_layer_says_in_which_states_its_slots_are():
    cache = _filled(1, 2)
    cache.hold(0, 1)
    with pytest.raises(CacheFullError, match=r"\(0, 3\).*0 loading, 1 held, 1 ready, and 1 experts are to be kept"):
        cache.admit(0, 3, keep={2})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda cache: cache.admit(0, 1), "ready in slot .* admitted"),
        (lambda cache: cache.ready(0, 1), "ready in slot .* made ready"),
        (lambda cache: cache.fail(0, 1), "ready in slot .* failed"),
        (lambda cache: cache.release(0, 1), "ready in slot .* released"),
        (lambda cache: cache.hold(0, 5), "in no slot .* held"),
        (lambda cache: cache.hold(0, 2), "loading in slot .* held"),
        (lambda cache: cache.drop(0, 2), "loading in slot .* dropped"),
        (lambda cache: cache.touch(0, 5), "in no slot .* touched"),
    ],
)
def test_a_transition_that_the_state_does_not_allow_is_refused(call, words):
    cache = _filled(1, slots=2)
    cache.admit(0, 2)
    with pytest.raises(CacheError, match=words):
        call(cache)
    cache.check_integrity()


def test_a_layer_without_a_slot_is_refused():
    with pytest.raises(ConfigError, match="layer 1 has 0 slots"):
        CacheManager([1, 0])


def test_check_integrity_finds_a_slot_that_is_in_two_places():
    cache = _filled(1, 2)
    cache._slot_of[0][2] = cache._slot_of[0][1]
    with pytest.raises(CacheError):
        cache.check_integrity()
    cache = _filled(1, 2)
    cache._free[0].append(1)
    with pytest.raises(CacheError, match="free list"):
        cache.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "classlru", "next-use"])
def test_any_sequence_of_calls_keeps_the_integrity(policy):
    class Walk(RuleBasedStateMachine):
        """Keeps its own simple model: expert -> state, and compares after each step."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes = [1, 3]
            self.cache = CacheManager(self.sizes, policy=policy)
            self.model: list[dict[int, int]] = [{}, {}]  # expert -> -1 loading, else holds
            self.protected: list[frozenset[int]] = [frozenset(), frozenset()]

        @rule(layer=st.integers(0, 1), experts=st.frozensets(st.integers(0, EXPERTS - 1), max_size=3))
        def protect(self, layer, experts):
            self.cache.protect(layer, experts)
            self.protected[layer] = experts

        @rule(
            layer=st.integers(0, 1),
            expert=st.integers(0, EXPERTS - 1),
            keep=st.frozensets(st.integers(0, EXPERTS - 1), max_size=3),
        )
        def admit(self, layer, expert, keep):
            model = self.model[layer]
            evictable = {e for e, holds in model.items() if holds == 0 and e not in keep}
            if expert in model:
                with pytest.raises(CacheError):
                    self.cache.admit(layer, expert, keep)
            elif len(model) == self.sizes[layer] and not evictable:
                with pytest.raises(CacheFullError):
                    self.cache.admit(layer, expert, keep)
            else:
                full = len(model) == self.sizes[layer]
                slot, evicted = self.cache.admit(layer, expert, keep)
                assert slot in self.cache.slots(layer)
                assert (evicted in evictable) if full else (evicted is None)
                assert evicted not in self.protected[layer] or evictable <= self.protected[layer]
                model.pop(evicted, None)
                model[expert] = -1

        def _some(self, data, wanted):
            choices = [(la, e) for la in (0, 1) for e, holds in self.model[la].items() if wanted(holds)]
            return data.draw(st.sampled_from(choices))

        def _any(self, wanted):
            return any(wanted(holds) for layer in self.model for holds in layer.values())

        @rule(layer=st.integers(0, 1))
        def close_a_slot(self, layer):
            model, size = self.model[layer], self.sizes[layer]
            evictable = {e for e, holds in model.items() if holds == 0}
            if size == 1:
                with pytest.raises(CacheError):
                    self.cache.close(layer)
                return
            closed = self.cache.close(layer)
            if closed is None:
                assert len(model) == size and not evictable
                return
            assert self.cache.state(closed.slot) == "closed" and closed.slot in self.cache.slots(layer)
            assert (closed.evicted is None) == (len(model) < size)
            assert closed.evicted not in self.protected[layer] or evictable <= self.protected[layer]
            model.pop(closed.evicted, None)
            self.sizes[layer] -= 1

        @rule(layer=st.integers(0, 1))
        def open_a_slot(self, layer):
            if self.sizes[layer] == len(self.cache.slots(layer)):
                with pytest.raises(CacheError):
                    self.cache.open(layer)
            else:
                assert self.cache.state(self.cache.open(layer)) == "free"
                self.sizes[layer] += 1

        @rule(layer=st.integers(0, 1))
        def repair(self, layer):
            if all(holds == 0 for holds in self.model[layer].values()):
                self.cache.repair(layer, ())

        @precondition(lambda self: self._any(lambda holds: holds == -1))
        @rule(data=st.data(), well=st.booleans())
        def end_a_load(self, data, well):
            layer, expert = self._some(data, lambda holds: holds == -1)
            if well:
                self.cache.ready(layer, expert)
                self.model[layer][expert] = 0
            else:
                self.cache.fail(layer, expert)
                del self.model[layer][expert]

        @precondition(lambda self: self._any(lambda holds: holds >= 0))
        @rule(data=st.data())
        def hold(self, data):
            layer, expert = self._some(data, lambda holds: holds >= 0)
            self.cache.hold(layer, expert)
            self.model[layer][expert] += 1

        @precondition(lambda self: self._any(lambda holds: holds > 0))
        @rule(data=st.data())
        def release(self, data):
            layer, expert = self._some(data, lambda holds: holds > 0)
            self.cache.release(layer, expert)
            self.model[layer][expert] -= 1

        @precondition(lambda self: self._any(lambda holds: holds == 0))
        @rule(data=st.data())
        def drop(self, data):
            layer, expert = self._some(data, lambda holds: holds == 0)
            self.cache.drop(layer, expert)
            del self.model[layer][expert]

        @rule(layer=st.integers(0, 1), experts=st.lists(st.integers(0, EXPERTS - 1), unique=True))
        def hold_resident(self, layer, experts):
            held, missing = self.cache.hold_resident(layer, experts)
            assert [e for e, _ in held] == [e for e in experts if self.model[layer].get(e, -1) >= 0]
            assert missing == [e for e in experts if self.model[layer].get(e, -1) < 0]
            for expert, _ in held:
                self.model[layer][expert] += 1

        @invariant()
        def agrees_with_the_model(self):
            self.cache.check_integrity()
            for layer, model in enumerate(self.model):
                assert self.cache.resident(layer) == sorted(e for e, holds in model.items() if holds >= 0)
                for expert, holds in model.items():
                    state = self.cache.state(self.cache.lookup(layer, expert))
                    assert state == ("loading" if holds < 0 else "held" if holds else "ready")

    Walk.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
    Walk.TestCase("runTest").runTest()
