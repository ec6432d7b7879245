"""Simulated slots count what real ones would, and the switch keeps a base set for the tasks that it helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_traces import task_trace

from emoe.errors import ConfigError
from emoe.replay import replay
from emoe.slots.policy import make
from emoe.slots.shadow import LAYERS, Between, Loading, Seen, Shadow, Switch


@pytest.mark.parametrize("policy", ["lru", "next-use"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_shadow_hits_what_a_replay_of_its_policy_hits(share, policy):
    trace = task_trace(1)
    trace = replace(trace, experts=np.sort(trace.experts, axis=2))  # as a running model asks for them
    shadow = Shadow([16, 16], [int(16 * share)] * 2, policy=make(policy))
    seen = sum((shadow.observe(trace.experts[:, token : token + 1]) for token in range(trace.tokens)), Seen())
    result = replay(trace, policy, [share])[0]
    assert (seen.hits, seen.loads) == (result.hits, result.loads)


def test_a_block_hits_what_was_in_slots_before_it_and_leaves_its_last_used():
    shadow = Shadow([8], [2])
    assert shadow.observe(np.array([[[0, 1], [2, 0], [-1, 3]]])) == Seen(0, 4, 5)
    assert shadow.observe(np.array([[[0, 3]]])) == Seen(2, 0, 2)
    assert shadow.observe(np.array([[[2, -1], [2, 1]]])) == Seen(0, 2, 3)
    assert shadow.observe(np.array([[[2, 1]]])) == Seen(2, 0, 2)


def test_a_protected_expert_leaves_only_where_nothing_else_can():
    shadow = Shadow([6], [3])
    shadow.protect(np.array([[True, False, False, False, False, False]]))
    for expert in (0, 1, 2, 3, 4):
        shadow.observe(np.array([[[expert]]]))
    assert set(shadow.held(0)) == {0, 3, 4}
    shadow.observe(np.array([[[3, 4, 5]]]))
    assert set(shadow.held(0)) == {3, 4, 5}


def test_a_shadow_with_fewer_slots_drops_what_was_used_longest_ago():
    shadow = Shadow([4], [3])
    for expert in (2, 0, 1):
        shadow.observe(np.array([[[expert]]]))
    shadow.resize([1])
    assert shadow.held(0) == [1]


def test_no_slots_no_hits():
    shadow = Shadow([4], [0])
    assert [shadow.observe(np.array([[[1]]])).hits for _ in range(3)] == [0, 0, 0]


def test_where_misses_are_loaded_a_few_layers_are_simulated_with_the_base_set_and_without():
    base = np.zeros((40, 4), dtype=bool)
    base[:, 0] = True
    rivals = Loading([4] * 40, [2] * 40, make("lru"))
    rivals.begin(base)
    for expert in (0, 1, 2, 0):
        rivals.observe(np.full((40, 1, 1), expert))
    ours, rival = rivals.take()
    assert (ours, rival) == (Seen(LAYERS, 3 * LAYERS, 4 * LAYERS), Seen(0, 4 * LAYERS, 4 * LAYERS))
    assert rivals.take() == (Seen(), Seen())


def test_where_nothing_is_loaded_the_rival_has_what_was_used_last_before_the_request():
    rivals = Between([4], [2])
    base, picks = np.array([[True, False, False, True]]), np.array([[[0, 1]]])
    rivals.begin(base)
    rivals.observe(picks)
    rivals.observe(picks)
    assert rivals.take() == (Seen(2, 2, 4), Seen(0, 0, 4))
    rivals.begin(base)
    rivals.observe(picks)
    assert rivals.take() == (Seen(1, 0, 2), Seen(2, 2, 2))


def _loads(count, picks=100):
    return Seen(0, count, picks)


def test_the_switch_waits_for_its_patience_says_why_and_finds_its_way_back():
    switch = Switch(loads_misses=True, patience=5, margin=0.01)
    assert [switch.saw("code", _loads(60), _loads(40)) for _ in range(5)] == [False] * 4 + [True]
    assert switch.off("code").startswith("over the last 5 requests 300 experts would have been loaded with a base set")
    assert "200 without" in switch.off("code")
    assert [switch.saw("code", _loads(20), _loads(40)) for _ in range(5)] == [False] * 4 + [True]
    assert switch.off("code") == ""


def test_tasks_are_switched_one_by_one_and_an_unknown_one_may_begin_off():
    switch = Switch(loads_misses=True, patience=2)
    switch.start_off("new", "nothing is known of it")
    for _ in range(2):
        switch.saw("math", _loads(60), _loads(40))
        switch.saw("code", _loads(20), _loads(40))
    assert switch.off("math")
    assert not switch.off("code")
    assert switch.off("new") == "nothing is known of it"
    assert [switch.saw("new", _loads(20), _loads(40)) for _ in range(2)] == [False, True]
    assert not switch.off("new")


def test_the_switch_looks_at_the_last_requests_only_and_allows_a_margin():
    switch = Switch(loads_misses=True, patience=3, margin=0.05)
    for _ in range(50):
        assert not switch.saw("code", _loads(40), _loads(50))
    assert [switch.saw("code", _loads(45), _loads(40)) for _ in range(4)] == [False] * 4  # within the margin
    assert [switch.saw("code", _loads(60), _loads(40)) for _ in range(2)] == [True, False]


def test_where_nothing_is_loaded_hits_count_first_and_then_moves():
    more_hits, fewer_moves = Switch(loads_misses=False, patience=1), Switch(loads_misses=False, patience=1)
    assert not more_hits.saw("code", Seen(60, 90, 100), Seen(50, 0, 100))
    assert fewer_moves.saw("code", Seen(50, 9, 100), Seen(50, 0, 100))
    assert "at 9 moves" in fewer_moves.off("code")
    assert more_hits.saw("code", Seen(40, 0, 100), Seen(50, 9, 100))
    assert "40.0% of the picks were in the base set" in more_hits.off("code")


def test_requests_without_picks_do_not_count():
    switch = Switch(loads_misses=True, patience=1)
    assert not switch.saw("code", Seen(), Seen())
    assert switch.totals("code") == (Seen(), Seen())


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Shadow([4, 4], [2]), "1 layers have slots, 2 have experts"),
    (lambda: Shadow([4], [5]), "5 slots for 4 experts"),
    (lambda: Switch(loads_misses=True, patience=0), "patience=0"),
    (lambda: Switch(loads_misses=True, margin=1.0), "margin=1.0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
