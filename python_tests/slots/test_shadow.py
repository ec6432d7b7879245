"""The shadow LRU counts what a real LRU would, and the switch turns predictors off that it beats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_traces import task_trace

from emoe.errors import ConfigError
from emoe.replay import replay
from emoe.slots.shadow import ShadowLRU, Switch


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_shadow_hits_what_a_replay_of_lru_hits(share):
    trace = task_trace(1)
    trace = replace(trace, experts=np.sort(trace.experts, axis=2))  # as a running model asks for them
    shadow = ShadowLRU([16, 16], [int(16 * share)] * 2)
    hits = sum(shadow.observe(trace.experts[:, token : token + 1]) for token in range(trace.tokens))
    assert hits == replay(trace, "lru", [share])[0].hits


def test_a_block_hits_what_was_in_slots_before_it_and_leaves_its_last_used():
    shadow = ShadowLRU([8], [2])
    assert shadow.observe(np.array([[[0, 1], [2, 0], [-1, 3]]])) == 0
    assert shadow.observe(np.array([[[0, 3]]])) == 2
    assert shadow.observe(np.array([[[2, -1], [2, 1]]])) == 0
    assert shadow.observe(np.array([[[2, 1]]])) == 2


def test_between_requests_the_shadow_loads_nothing():
    shadow = ShadowLRU([4], [2], between_requests=True)
    picks = np.array([[[0, 1]]])
    shadow.begin()
    assert (shadow.observe(picks), shadow.observe(picks)) == (0, 0)
    shadow.begin()
    assert (shadow.observe(picks), shadow.observe(picks)) == (2, 2)


def test_no_slots_no_hits():
    shadow = ShadowLRU([4], [0])
    assert [shadow.observe(np.array([[[1]]])) for _ in range(3)] == [0, 0, 0]


def test_the_switch_waits_for_its_patience_and_says_why():
    switch = Switch(patience=5, margin=0.01)
    assert [switch.saw(40, 60, 100) for _ in range(5)] == [False] * 4 + [True]
    assert switch.reason.startswith("over the last 5 requests 40.0% of the picks were resident")
    assert "60.0%" in switch.reason
    assert switch.saw(100, 0, 100)  # off is for good


def test_the_switch_looks_at_the_last_requests_only():
    switch = Switch(patience=3, margin=0.0)
    for _ in range(50):
        assert not switch.saw(90, 50, 100)
    assert [switch.saw(0, 50, 100) for _ in range(3)] == [False, True, True]


def test_the_switch_weighs_requests_by_their_picks_and_allows_a_margin():
    switch = Switch(patience=2, margin=0.05)
    assert not switch.saw(0, 10, 10)
    assert not switch.saw(900, 900, 990)  # 10 of 1000 behind
    assert not switch.saw(0, 0, 0)
    assert switch.rates() == (0.9, 0.91)
    assert Switch().rates() == (0.0, 0.0)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ShadowLRU([4, 4], [2]), "1 layers have slots, 2 have experts"),
    (lambda: ShadowLRU([4], [5]), "5 slots for 4 experts"),
    (lambda: Switch(patience=0), "patience=0"),
    (lambda: Switch(margin=1.0), "margin=1.0"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
