"""Orders of admission, on requests and sets made for the purpose."""

from __future__ import annotations

import pytest

from emoe.engine.costs import Costs, Step
from emoe.engine.expert_sets import ExpertSets, overlap
from emoe.engine.lengths import MOST_TASKS, Lengths
from emoe.engine.placement import CHOICES, State, ranked
from emoe.engine.scheduler import Scheduler, Ticket
from emoe.errors import OverloadedError

COSTS = Costs(forward=0.1, row=0.01, byte=1e-3, expert=0.0)
A, B = (frozenset((layer, expert) for layer in range(4) for expert in range(first, first + 5)) for first in (0, 5))


def make(policy, **options):
    return Scheduler(policy, costs=COSTS, **{"chunk_rows": 16, "expert_bytes": 1, **options})


def admitted(scheduler, now):
    before = set(scheduler.running)
    scheduler.next(now)
    return [id for id in scheduler.running if id not in before]


def run(scheduler, steps, now=0.0, seconds=0.1, stop=()):
    """Steps as an engine runs them; requests in `stop` end with their next token. Gives the time after them."""
    for _ in range(steps):
        batch = scheduler.next(now)
        now += seconds
        tokens = {id: 1 for id, rows in batch if rows == scheduler._running[id].left}
        scheduler.ran(Step(seconds, dict(batch), tokens), now)
        for id in tokens:
            if id in stop:
                scheduler.finished(id, now)
    return now


def test_sjf_admits_the_fewest_rows_first_and_learns_what_a_task_gives():
    scheduler = make("sjf", most_running=1)
    for number in range(3):  # task "short" gives two tokens though it may give 500
        scheduler.submit(Ticket(f"s{number}", 4, 500, task="short"), 0.0)
        run(scheduler, 1)
        run(scheduler, 1, stop=(f"s{number}",))
    scheduler.submit(Ticket("long prompt", 9, 10, task="other"), 0.0)
    scheduler.submit(Ticket("short", 8, 500, task="short"), 0.0)
    assert admitted(scheduler, 0.0) == ["short"]


def test_slo_admits_the_tightest_deadline_first_and_those_without_one_last():
    scheduler = make("slo", most_running=1)
    scheduler.submit(Ticket("none", 2, 2), 0.0)
    scheduler.submit(Ticket("loose", 2, 2, ttft=9.0), 0.0)
    scheduler.submit(Ticket("tight", 2, 2, ttft=5.0), 0.0)
    scheduler.submit(Ticket("by its last token", 2, 2, ttlt=4.0), 0.0)
    order = []
    for _ in range(4):
        order += (first := admitted(scheduler, 0.0))
        scheduler.finished(first[0], 0.0)
    assert order == ["by its last token", "tight", "loose", "none"]


def test_who_cannot_be_on_time_any_more_does_not_make_others_late():
    scheduler = make("slo", most_running=1)
    scheduler.submit(Ticket("lost", 2, 2, ttft=1.0), 0.0)
    scheduler.submit(Ticket("saved", 2, 2, ttft=9.0), 0.0)
    assert admitted(scheduler, 2.0) == ["saved"]


def test_loads_are_charged_against_who_runs():
    """dE: 20 experts of 1 byte at 0.05 s a byte are a second, and a running request has not so much time."""

    def outcome(resident, spare):
        costs = Costs(forward=0.1, row=0.01, byte=0.05, expert=0.0)
        scheduler = Scheduler(
            "slo", costs=costs, chunk_rows=16, resident=lambda: resident, expert_bytes=1, most_running=4
        )
        scheduler.submit(Ticket("runs", 1, 8, experts=A, tpot=0.2 + spare), 0.0)
        now = run(scheduler, 2, seconds=0.11)
        scheduler.submit(Ticket("comes", 1, 2, experts=B), now)
        return admitted(scheduler, now)

    assert outcome(A, spare=0.0) == []
    assert outcome(A | B, spare=0.0) == ["comes"]
    assert outcome(A, spare=1.0) == ["comes"]


def test_a_row_more_in_every_step_is_charged_against_who_has_yet_to_give_its_first_token():
    def outcome(tpot):
        scheduler = make("slo", chunk_rows=4)
        scheduler.submit(Ticket("prompt", 12, 20, tpot=tpot), 0.0)
        now = run(scheduler, 1, seconds=COSTS.step(4))
        scheduler.submit(Ticket("comes", 1, 2), now)
        return admitted(scheduler, now)

    assert outcome(0.115) == []  # alone a token takes 0.11 s, beside another one 0.12 s
    assert outcome(0.125) == ["comes"]


def test_loads_are_charged_against_who_waits():
    def outcome(deadline):
        scheduler = Scheduler(
            "slo", costs=Costs(0.1, 0.01, 0.05, 0.0), chunk_rows=16, resident=lambda: A, expert_bytes=1, kv_bytes=2
        )
        scheduler.submit(Ticket("runs", 1, 50, kv_bytes=1, experts=A), 0.0)
        now = run(scheduler, 2)
        scheduler.submit(Ticket("too large for now", 1, 2, kv_bytes=2, experts=A, ttft=deadline), now)
        scheduler.submit(Ticket("comes", 1, 2, kv_bytes=1, experts=B), now)
        return admitted(scheduler, now)

    assert outcome(0.5) == []  # "comes" would load for a second
    assert outcome(5.0) == ["comes"]


def test_who_runs_is_never_told_to_wait_for_nobody():
    scheduler = make("slo+affinity")
    scheduler.submit(Ticket("hopeless", 16, 99, ttft=1e-6, tpot=1e-6, ttlt=1e-6), 0.0)
    assert admitted(scheduler, 0.0) == ["hopeless"]


def test_affinity_admits_who_uses_the_experts_in_use_whatever_the_task_is_called():
    scheduler = make("slo+affinity", most_running=2)
    for number, (experts, task) in enumerate([(A, "x"), (B, "x"), (A, "y"), (B, "y"), (A, "z")]):
        scheduler.submit(Ticket(number, 1, 50, experts=experts, task=task), 0.0)
    assert admitted(scheduler, 0.0) == [0, 2]
    scheduler.finished(0, 0.0)
    assert admitted(scheduler, 0.0) == [4]
    scheduler.finished(2, 0.0)
    scheduler.finished(4, 0.0)
    assert admitted(scheduler, 0.0) == [1, 3]  # no kin is left: the lead goes to those who wait


def test_strangers_without_a_target_wait_for_the_end_of_those_who_run_only_while_as_many_wait_as_run_at_most():
    scheduler = make("slo+affinity", most_running=2)
    for number, (experts, target) in enumerate([(A, None), (A, None), (B, None), (B, None), (B, 50.0)]):
        scheduler.submit(Ticket(number, 1, 50, experts=experts, ttft=target), 0.0)
    assert admitted(scheduler, 0.0) == [4, 2]  # who has a target leads
    scheduler.finished(4, 0.0)
    assert admitted(scheduler, 0.0) == [3]
    scheduler.finished(3, 0.0)
    assert admitted(scheduler, 0.0) == []  # as many wait as can run
    scheduler.cancel(0, 0.0)
    assert admitted(scheduler, 0.0) == [1]


def test_strangers_do_not_wait_where_fewer_wait_than_can_run():
    scheduler = make("slo+affinity", most_running=8)
    for number, experts in enumerate([A, B, B, A, B]):
        scheduler.submit(Ticket(number, 1, 50, experts=experts), 0.0)
    assert sorted(admitted(scheduler, 0.0)) == [0, 1, 2, 3, 4]


def test_a_stranger_whose_deadline_is_near_comes_before_kin():
    scheduler = make("slo+affinity", most_running=1)
    scheduler.submit(Ticket("a", 1, 50, experts=A), 0.0)
    assert admitted(scheduler, 0.0) == ["a"]
    scheduler.submit(Ticket("kin", 1, 50, experts=A, ttft=100.0), 0.0)
    scheduler.submit(Ticket("stranger", 1, 50, experts=B, ttft=10.0), 0.0)
    scheduler.submit(Ticket("more kin", 1, 50, experts=A, ttft=100.0), 0.0)
    scheduler.finished("a", 0.0)
    assert admitted(scheduler, 1.0) == ["kin"]
    scheduler.finished("kin", 9.0)
    assert admitted(scheduler, 9.0) == ["stranger"]


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "slo", "slo+affinity"])
def test_any_number_of_large_requests_lets_a_small_one_pass(policy):
    scheduler = make(policy, kv_bytes=10)
    scheduler.submit(Ticket("runs", 1, 50, kv_bytes=5), 0.0)
    scheduler.next(0.0)
    for number in range(100):
        scheduler.submit(Ticket(number, 1, 2, kv_bytes=9, ttft=50.0), 0.0)
    scheduler.submit(Ticket("small", 2, 3, kv_bytes=1, ttft=60.0), 0.0)
    assert admitted(scheduler, 0.0) == ["small"]


def test_without_predictions_affinity_is_slo():
    orders = []
    for policy in ("slo", "slo+affinity"):
        scheduler = make(policy, most_running=1)
        for number in range(6):
            scheduler.submit(Ticket(number, 1, 9, ttft=50.0 - 7 * (number % 3)), 0.0)
        order = []
        while scheduler.waiting:
            order += (first := admitted(scheduler, 0.0))
            scheduler.finished(first[0], 0.0)
        orders.append(order)
    assert orders[0] == orders[1]


def test_a_request_far_beyond_its_target_is_refused_with_when_to_come_again_and_others_are_not():
    scheduler = make("slo", most_running=1, patience=2.0)
    scheduler.submit(Ticket("runs", 1, 50), 0.0)
    scheduler.next(0.0)
    for number in range(20):
        scheduler.submit(Ticket(number, 10, 50, ttft=1000.0), 0.0)
    scheduler.submit(Ticket("tighter than all that wait", 10, 50, ttft=5.0), 0.0)
    scheduler.submit(Ticket("without a target", 10, 50), 0.0)
    for number in range(100):
        try:
            scheduler.submit(Ticket(f"more {number}", 10, 50, ttft=30.0), 0.0)
        except OverloadedError as error:
            assert error.retry_after >= 1.0 and "is due in 30 s" in str(error)
            break
    else:
        pytest.fail("nobody was refused")
    assert 1 < number < 20  # 60 s of work that is due before it, some 6 s each


def test_policies_without_targets_refuse_for_a_full_queue_only():
    for policy in ("fcfs", "sjf"):
        scheduler = make(policy, most_running=1)
        for number in range(500):
            scheduler.submit(Ticket(number, 10, 50, ttft=0.1), 0.0)


def test_lengths_are_those_of_the_task_and_of_requests_that_went_on_so_far():
    lengths = Lengths()
    for _ in range(50):
        lengths.ended("short", 4)
        lengths.ended("long", 300)
    assert lengths.remaining("short", 0, 1000) == pytest.approx(4)
    assert lengths.remaining("long", 0, 1000) == pytest.approx(300)
    assert lengths.remaining("long", 200, 1000) == pytest.approx(100, rel=0.1)
    assert 100 < lengths.remaining("never seen", 10, 1000) <= 300  # as all requests that gave more than 10
    assert lengths.remaining("long", 0, 20) == 20  # not more than it may give
    assert lengths.remaining("long", 20, 20) == 0


def test_lengths_follow_a_task_that_changes():
    lengths = Lengths()
    for _ in range(300):
        lengths.ended("task", 500)
    for _ in range(200):
        lengths.ended("task", 20)
    assert lengths.remaining("task", 0, 1000) < 40


def test_task_names_from_outside_cost_bounded_memory():
    lengths = Lengths()
    for number in range(3 * MOST_TASKS):
        lengths.ended(f"task {number}", 5)
        lengths.ended("kept", 7)
    assert len(lengths) == MOST_TASKS
    assert lengths.mean("kept") == pytest.approx(7)


def test_overlap_is_the_share_of_the_smaller_set():
    sets = ExpertSets()
    one, other = sets.number(A), sets.number(A | B)
    assert overlap(one, other) == 1.0 and overlap(one, sets.number(B)) == 0.0
    assert overlap(one, sets.number(frozenset(sorted(A)[:10]) | B)) == 0.5
    assert overlap(one, sets.number(frozenset())) == 0.0
    assert sets.within(A).bit_count() == 20


def test_a_replica_with_kin_is_chosen_until_it_is_much_fuller_than_the_emptiest():
    sets = ExpertSets()
    a, b = sets.number(A), sets.number(B)

    def choose(first, second):
        return CHOICES["affinity"]([State(len(first), 4, first), State(len(second), 4, second)], a, 0)

    assert choose([a, a], [b]) == 0
    assert choose([b], [a, a]) == 1
    assert choose([b], []) == 1  # rather an empty one than strangers
    assert choose([a], []) == 0
    assert choose([a, a, a], []) == 1  # three quarters of its places more than the other


def test_an_empty_replica_with_the_experts_in_memory_is_kin():
    sets = ExpertSets()
    a, b = sets.number(A), sets.number(B)
    states = [State(0, 4, resident=b), State(0, 4, resident=a), State(1, 4, (b,), resident=a)]
    assert CHOICES["affinity"](states, a, 0) == 1
    assert CHOICES["affinity"](states[:1] * 2, a, 0) == 0  # elsewhere it is as good as any
    assert ranked(CHOICES["affinity"], states, a, 0) == [1, 0, 2]


def test_power_of_two_takes_the_emptier_of_two_and_the_same_for_the_same_turn():
    states = [State(3, 4), State(0, 4), State(1, 4)]
    chosen = [CHOICES["power-of-two"](states, 0, turn) for turn in range(60)]
    assert chosen == [CHOICES["power-of-two"](states, 0, turn) for turn in range(60)]
    assert set(chosen) == {1, 2}  # two different ones are drawn, so never the fullest
    assert CHOICES["power-of-two"](states[:1], 0, 5) == 0


def test_other_choices_of_a_replica_know_no_experts():
    states = [State(3, 4), State(2, 4), State(4, 16)]
    assert CHOICES["least"](states, 0, 0) == 2
    assert [CHOICES["round-robin"](states, 0, turn) for turn in range(4)] == [0, 1, 2, 0]
