"""The cost model of misses: ids and numbers only."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.compute.misses import MissRates, split
from emoe.errors import ConfigError

RATES = MissRates(copy_seconds=1.0, cpu_seconds=0.4, cpu_seconds_per_row=0.1)


def seconds(load, cpu, rows, rates=RATES):
    return max(len(load) * rates.copy_seconds, sum(rates.on_cpu(rows[e]) for e in cpu))


def test_load_moves_every_expert_and_cpu_moves_none():
    rows = {3: 1, 5: 2}
    assert split(rows, RATES, mode="load").load == (5, 3)
    assert split(rows, None, mode="load").cpu == ()
    assert set(split(rows, None, mode="cpu").cpu) == {3, 5}


def test_empty_slots_are_filled_in_every_mode_with_the_experts_that_have_most_rows():
    rows = {1: 1, 2: 8, 3: 4}
    for mode, rates in (("cpu", None), ("auto", MissRates(100.0, 0.0, 0.0))):
        plan = split(rows, rates, mode=mode, free_slots=2)
        assert set(plan.load) == {2, 3}
        assert plan.cpu == (1,)


def test_a_slow_bus_leaves_experts_on_the_cpu_and_a_slow_cpu_moves_them():
    rows = dict.fromkeys(range(6), 1)
    assert len(split(rows, MissRates(10.0, 0.1, 0.0)).cpu) == 6
    assert split(rows, MissRates(0.1, 10.0, 0.0)).cpu == ()


def test_bus_and_cpu_share_the_work_when_they_are_equally_fast():
    plan = split(dict.fromkeys(range(8), 1), MissRates(1.0, 1.0, 0.0))
    assert (len(plan.load), len(plan.cpu)) == (4, 4)
    assert plan.seconds == 4.0


def test_experts_with_many_rows_are_moved_and_those_with_few_stay():
    plan = split({0: 1, 1: 100, 2: 1, 3: 100}, RATES)
    assert set(plan.load) >= {1, 3}
    assert set(plan.cpu) <= {0, 2}


def test_an_expert_that_will_be_used_again_is_moved_sooner():
    rows = dict.fromkeys(range(8), 1)
    assert len(split(rows, RATES, expected_uses=4.0).cpu) < len(split(rows, RATES).cpu)


@given(
    st.dictionaries(st.integers(0, 63), st.integers(1, 64), max_size=7),
    st.floats(0.01, 10),
    st.floats(0, 10),
    st.floats(0, 1),
)
def test_every_expert_goes_to_one_place_and_the_step_is_never_longer_than_moving_all(rows, copy, cpu, per_row):
    rates = MissRates(copy, cpu, per_row)
    plan = split(rows, rates)
    assert sorted(plan.load + plan.cpu) == sorted(rows)
    assert plan.seconds == pytest.approx(seconds(plan.load, plan.cpu, rows, rates))
    assert plan.seconds <= len(rows) * copy + 1e-9


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_the_greedy_choice_is_at_most_one_expert_worse_than_the_best(counts):
    rows = dict(enumerate(counts))
    best = min(
        seconds([e for e in rows if e not in cpu], cpu, rows)
        for size in range(len(rows) + 1)
        for cpu in itertools.combinations(rows, size)
    )
    assert split(rows, RATES).seconds <= best + RATES.copy_seconds


def test_what_makes_no_sense_is_refused_by_name():
    with pytest.raises(ConfigError, match="load, cpu, auto"):
        split({}, RATES, mode="gpu")
    with pytest.raises(ConfigError, match="needs measured rates"):
        split({1: 1}, None, mode="auto")
    with pytest.raises(ConfigError, match="expected_uses"):
        split({}, RATES, expected_uses=0.5)
    with pytest.raises(ConfigError, match="copy_seconds"):
        MissRates(-1.0, 0.0, 0.0)
