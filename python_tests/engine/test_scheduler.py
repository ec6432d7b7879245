"""Scheduling on paper: ids, rows, bytes and seconds, without a model."""

from __future__ import annotations

import numpy as np
import pytest

import emoe
from emoe.engine.costs import Step
from emoe.engine.scheduler import Scheduler, Ticket
from emoe.errors import BudgetError, ConfigError, OverloadedError


def run_step(scheduler: Scheduler, now: float, seconds: float = 1.0) -> list[tuple[object, int]]:
    """One step as an engine runs it: a request whose last row ran gives a token, and ends with its last one."""
    batch = scheduler.next(now)
    live = {id: scheduler._running[id] for id, _ in batch}
    tokens = {id: 1 for id, rows in batch if rows == live[id].left}
    scheduler.ran(Step(seconds, dict(batch), tokens), now + seconds)
    for id, _ in batch:
        if live[id].out == live[id].ticket.most_new:
            scheduler.finished(id, now + seconds)
    return batch


def test_it_is_a_name_of_the_package():
    assert emoe.Scheduler is Scheduler


def test_a_prompt_runs_in_chunks_and_decode_rows_come_first():
    scheduler = Scheduler("fcfs", chunk_rows=4)
    scheduler.submit(Ticket("a", prompt=2, most_new=3), 0.0)
    assert run_step(scheduler, 0.0) == [("a", 2)]
    scheduler.submit(Ticket("b", prompt=5, most_new=2), 1.0)
    assert run_step(scheduler, 1.0) == [("a", 1), ("b", 3)]
    assert run_step(scheduler, 2.0) == [("a", 1), ("b", 2)]
    assert scheduler.running == ["b"]
    assert run_step(scheduler, 3.0) == [("b", 1)]
    assert run_step(scheduler, 4.0) == [] and scheduler.to_dict()["finished"] == 2


def test_fcfs_admits_in_order_of_arrival_as_far_as_bytes_and_places_go():
    scheduler = Scheduler("fcfs", kv_bytes=10, chunk_rows=8, most_running=2)
    for name in "abc":
        scheduler.submit(Ticket(name, prompt=2, most_new=1, kv_bytes=4), 0.0)
    assert run_step(scheduler, 0.0) == [("a", 2), ("b", 2)]
    assert run_step(scheduler, 1.0) == [("c", 2)]


def test_a_large_request_that_does_not_fit_lets_small_ones_pass_but_only_so_many():
    scheduler = Scheduler("fcfs", kv_bytes=10, chunk_rows=8, most_passes=2)
    scheduler.submit(Ticket("long", prompt=1, most_new=9, kv_bytes=4), 0.0)
    run_step(scheduler, 0.0)
    scheduler.submit(Ticket("large", prompt=1, most_new=1, kv_bytes=8), 0.0)
    for name in ("s1", "s2", "s3"):
        scheduler.submit(Ticket(name, prompt=1, most_new=1, kv_bytes=1), 0.0)
    assert run_step(scheduler, 1.0) == [("long", 1), ("s1", 1), ("s2", 1)]
    steps = [run_step(scheduler, 2.0 + step) for step in range(8)]
    assert steps[:7] == [[("long", 1)]] * 7  # nobody passes "large" any more
    assert steps[7] == [("large", 1), ("s3", 1)]


def test_a_request_larger_than_all_bytes_is_refused_with_both_numbers():
    with pytest.raises(BudgetError, match=r"'x' needs 11 bytes.*of 10") as caught:
        Scheduler("fcfs", kv_bytes=10).submit(Ticket("x", prompt=1, most_new=1, kv_bytes=11), 0.0)
    assert (caught.value.needed, caught.value.budget) == (11, 10)


def test_a_full_queue_refuses_and_says_when_to_come_again():
    scheduler = Scheduler("fcfs", queue_limit=1)
    scheduler.submit(Ticket("a", prompt=1, most_new=1), 0.0)
    with pytest.raises(OverloadedError) as caught:
        scheduler.submit(Ticket("b", prompt=1, most_new=1), 0.0)
    assert caught.value.retry_after > 0


def test_a_cancelled_request_frees_its_bytes_wherever_it_is():
    scheduler = Scheduler("fcfs", kv_bytes=4)
    for name in "ab":
        scheduler.submit(Ticket(name, prompt=1, most_new=4, kv_bytes=4), 0.0)
    scheduler.next(0.0)
    scheduler.cancel("a", 0.0)
    assert scheduler.kv_used == 0 and scheduler.next(0.0) == [("b", 1)]
    scheduler.ran(Step(1.0, {"a": 1, "b": 1}, {"b": 1}), 1.0)  # the step was on its way: "a" is ignored
    scheduler.cancel("nobody", 1.0)
    assert scheduler.to_dict()["cancelled"] == 1


def test_a_whole_prompt_runs_in_one_step_even_if_it_is_longer_than_a_step():
    scheduler = Scheduler("fcfs", chunk_rows=4)
    scheduler.submit(Ticket("a", prompt=3, most_new=2), 0.0)
    scheduler.submit(Ticket("b", prompt=9, most_new=1, whole=True), 0.0)
    assert run_step(scheduler, 0.0) == [("a", 3)]
    assert run_step(scheduler, 1.0) == [("a", 1), ("b", 9)]


def test_what_a_lost_state_held_runs_again_and_copied_rows_do_not():
    scheduler = Scheduler("fcfs", chunk_rows=8)
    scheduler.submit(Ticket("a", prompt=6, most_new=4), 0.0)
    scheduler.next(0.0)
    scheduler.computed("a", 4)
    assert run_step(scheduler, 0.0) == [("a", 2)]
    assert run_step(scheduler, 1.0) == [("a", 1)]
    scheduler.restart("a")
    assert run_step(scheduler, 2.0) == [("a", 8)]
    assert run_step(scheduler, 3.0) == [("a", 1)]
    with pytest.raises(ConfigError, match="last row"):
        scheduler.computed("a", 6)


def test_bytes_can_be_split_anew_while_requests_run_but_never_below_what_they_hold_or_need():
    scheduler = Scheduler("fcfs", kv_bytes=10, most_running=1)
    for name, size in (("a", 3), ("b", 7)):
        scheduler.submit(Ticket(name, prompt=1, most_new=2, kv_bytes=size), 0.0)
    scheduler.next(0.0)
    with pytest.raises(ConfigError, match="kv_bytes=6 is less than 7"):
        scheduler.kv_bytes = 6
    scheduler.kv_bytes = 7
    assert scheduler.kv_bytes == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 0}, "prompt=0 is less than 1"),
        ({"most_new": 0}, "most_new=0 is less than 1"),
        ({"kv_bytes": -1}, "kv_bytes=-1 is less than 0"),
        ({"ttft": 0.0}, "ttft=0.0 is not over 0"),
        ({"tpot": float("nan")}, "tpot=nan is not a number of at least 0"),
        ({"ttlt": "1s"}, "ttlt='1s' is not a number of at least 0"),
        ({"prompt": float("nan")}, "prompt=nan is not a whole number of at least 1"),
        ({"most_new": 2.5}, "most_new=2.5 is not a whole number of at least 1"),
        ({"kv_bytes": True}, "kv_bytes=True is not a whole number of at least 0"),
    ],
)
def test_a_ticket_that_makes_no_sense_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Scheduler().submit(Ticket("x", **{"prompt": 1, "most_new": 1, **arguments}), 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": float("nan")}, "patience=nan is not a number of at least 0"),
        ({"patience": -0.5}, "patience=-0.5 is less than 0"),
        ({"queue_limit": 1.5}, "queue_limit=1.5 is not a whole number of at least 0"),
        ({"chunk_rows": 0}, "chunk_rows=0 is less than 1"),
        ({"most_running": "4"}, "most_running='4' is not a whole number of at least 1"),
    ],
)
def test_a_scheduler_of_numbers_that_make_no_sense_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Scheduler(**arguments)


def test_numbers_of_numpy_and_endless_patience_are_numbers():
    Scheduler(patience=float("inf"), queue_limit=np.int64(3), kv_bytes=10**400).submit(
        Ticket("x", prompt=np.int32(1), most_new=1, ttft=np.float32(0.5)), 0.0
    )


def test_an_id_is_used_once_at_a_time():
    scheduler = Scheduler()
    scheduler.submit(Ticket("x", prompt=1, most_new=1), 0.0)
    with pytest.raises(ConfigError, match="'x' is in use"):
        scheduler.submit(Ticket("x", prompt=1, most_new=1), 0.0)
    scheduler.cancel("x", 0.0)
    scheduler.submit(Ticket("x", prompt=1, most_new=1), 0.0)


def test_an_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"policy='lifo' is not one of: fcfs"):
        Scheduler("lifo")
