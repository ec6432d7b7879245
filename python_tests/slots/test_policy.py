"""Who is evicted: each policy on small sequences whose answer can be worked out by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from emoe.errors import ConfigError
from emoe.slots import policy
from emoe.slots.cache import CacheManager


def _use(kind, *experts):
    for step, expert in enumerate(experts):
        kind.touch(expert, step)
    return kind


def test_lru_evicts_the_expert_whose_last_use_is_longest_ago():
    assert _use(policy.LRU(), 1, 2, 3, 1).victim({1, 2, 3}) == 2


def test_lru_passes_over_experts_that_are_no_candidates():
    assert _use(policy.LRU(), 1, 2, 3).victim({3}) == 3


def test_lfu_evicts_the_expert_used_in_the_fewest_steps():
    assert _use(policy.LFU(), 1, 1, 2, 3, 3).victim({1, 2, 3}) == 2


def test_lfu_breaks_ties_by_recency():
    assert _use(policy.LFU(), 2, 1, 1, 2).victim({1, 2}) == 1


def test_lfu_counts_a_step_once_and_remembers_experts_that_left():
    lfu = policy.LFU()
    for _ in range(3):
        lfu.touch(1, 0)
    lfu.touch(2, 1)
    lfu.touch(2, 2)
    assert lfu.victim({1, 2}) == 1
    lfu.forget(2)
    lfu.touch(2, 3)
    assert lfu.victim({1, 2}) == 1


def test_lfru_evicts_what_was_used_little_and_long_ago():
    lfru = policy.LFRU()
    for step, experts in enumerate([(1, 2), (1, 2), (1, 3), (3,)]):
        lfru.saw(None)
        for expert in experts:
            lfru.touch(expert, step)
    # Uses over age: 1 has 3 / 2, 2 has 2 / 3, 3 has 2 / 1, but for what they faded.
    assert lfru.victim({1, 2, 3}) == 2
    assert lfru.victim({1, 3}) == 1


def test_classlru_evicts_the_least_recent_of_the_class_that_is_used_least():
    classes = policy.ClassLRU()
    for step, experts in enumerate([(1, 2), (1, 2, 3), (1, 2), (1, 2), (4,), (3,)]):
        classes.saw(None)
        for expert in experts:
            classes.touch(expert, step)
    # Uses of 3 to 7 are a class, those of 1 to 3 another, of which old ones leave the class.
    assert classes.victim({1, 2, 3, 4}) == 4
    assert classes.victim({1, 2, 3}) == 3
    assert classes.victim({1, 2}) == 1
    for _ in range(5 * 128):
        classes.saw(None)
    assert classes.victim({1, 2, 3, 4}) == 1  # all faded into the lowest


def test_lfru_compares_as_of_the_step_that_began():
    lfru = policy.LFRU()
    for step in range(6):
        lfru.saw(None)
        lfru.touch(1, step)
    lfru.saw(None)
    lfru.touch(2, 6)
    assert lfru.victim({1, 2}) == 2  # 6 / 2 against 1 / 1
    for _ in range(600):
        lfru.saw(None)
    assert lfru.victim({1, 2}) == 2  # both faded alike


def test_next_use_evicts_what_does_not_follow_the_present_picks():
    kind = policy.NextUse()
    # After 1 comes 2, after 4 comes 5; both pairs are as frequent and alternate in blocks.
    for step, expert in enumerate([1, 2, 4, 5] * 50 + [1]):
        kind.saw(np.array([[expert]]))
        kind.touch(expert, step)
    assert kind.victim({2, 5}) == 5
    kind.saw(np.array([[4]]))
    kind.touch(4, 201)
    assert kind.victim({2, 5}) == 2


def test_next_use_without_picks_evicts_in_the_order_of_lru():
    assert _use(policy.NextUse(), 1, 2, 3, 1).victim({1, 2, 3}) == 2


def test_a_learning_policy_remembers_experts_that_left():
    kind = policy.NextUse()
    for step in range(100):
        kind.saw(np.array([[7]]))
        kind.touch(7, step)
    kind.saw(np.array([[8]]))
    kind.touch(8, 100)
    kind.forget(7)
    kind.touch(7, 101)
    assert kind.victim({7, 8}) == 8


def test_belady_evicts_the_expert_whose_next_use_is_farthest():
    kind = policy.Belady([[1, 2, 3], [2], [3], [1]])
    for expert in (1, 2, 3):
        kind.touch(expert, 0)
    assert kind.victim({1, 2, 3}) == 1
    kind.touch(2, 1)
    assert kind.victim({1, 2, 3}) == 2  # never used again


def test_no_policy_beats_belady():
    rng = random.Random(5)
    steps = [rng.sample(range(12), 2) for _ in range(300)]

    def misses(kind):
        cache = CacheManager([5], policy=kind)
        count = 0
        for experts in steps:
            held, missing = cache.hold_resident(0, experts)
            for expert in missing:
                cache.admit(0, expert)
                cache.ready(0, expert)
                count += 1
            for expert, _ in held:
                cache.release(0, expert)
        return count

    best = misses(policy.belady([steps]))
    assert best < misses("lru")
    assert best < misses("lfu")


def test_an_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'random'.*lru, lfu, lfru, classlru, next-use, belady"):
        CacheManager([2], policy="random")


def test_belady_by_name_is_refused_where_the_future_is_not_known():
    with pytest.raises(ConfigError, match="emoe replay"):
        CacheManager([2], policy="belady")


def test_lru_serves_hits_before_misses_and_the_oldest_leave():
    lru = policy.LRU()
    assert lru.serve([3, 1, 2], 3) == [3, 1, 2]
    assert lru.serve([4, 3], 3) == [4]
    assert list(lru.known()) == [2, 3, 4]
    assert lru.serve([5, 6, 7, 8], 3) == [5, 6, 7, 8]
    assert list(lru.known()) == [6, 7, 8]
    assert lru.serve([1], 0) == [1]
    assert not lru.known()
