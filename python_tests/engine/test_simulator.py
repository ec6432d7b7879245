"""Serving on paper: the LRU in ids against the cache's own policy, steps against a hand count, seeds, replicas."""

from __future__ import annotations

import numpy as np
import pytest
from made_traces import random_trace
from public_traces import DOMAINS, need

from emoe.engine.costs import Costs
from emoe.engine.expert_sets import ExpertSets
from emoe.engine.scheduler import POLICIES, Scheduler, Ticket
from emoe.engine.simulator import Arrival, BaseSet, ExpertLRU, Replica, flat_picks, predicted_experts, simulate
from emoe.errors import ConfigError
from emoe.slots.policy import LRU
from emoe.trace.trace import load_trace

COSTS = Costs(forward=1.0, row=0.1, byte=0.01, expert=0.0)


def test_all_layers_at_once_are_the_lru_of_the_cache():
    chance = np.random.default_rng(0)
    layers, experts, slots = 3, 12, 4
    ours, theirs = ExpertLRU(layers, experts, slots), [LRU() for _ in range(layers)]
    for _ in range(300):
        used = chance.random((layers, experts)) < chance.choice([0.1, 0.3, 0.8])  # up to more than fit
        loads = ours.serve(used)
        for layer, lru in enumerate(theirs):
            assert loads[layer] == len(lru.serve(np.flatnonzero(used[layer]).tolist(), slots))
            assert set(np.flatnonzero(ours.resident[layer])) == set(lru.known())


def test_protected_experts_leave_last():
    cache = ExpertLRU(1, 6, 3)
    kept = np.zeros((1, 6), dtype=bool)
    kept[0, :2] = True
    cache.protect(kept)
    for expert in (0, 1, 2, 3, 4, 5):
        used = np.zeros((1, 6), dtype=bool)
        used[0, expert] = True
        cache.serve(used)
    assert np.flatnonzero(cache.resident[0]).tolist() == [0, 1, 5]


def test_a_base_set_begins_with_what_the_task_uses_and_follows_what_the_request_does():
    frequency = {"a": np.array([[1.0, 0.5, 0.0, 0.0]]), None: np.full((1, 4), 0.25)}
    base = BaseSet(frequency, 1)
    base.saw("r", "a", np.array([[3]], dtype=np.int32))
    assert base.chosen(["r"]).tolist() == [[True, False, False, False]]
    base.saw("r", "a", np.full((200, 1), 3, dtype=np.int32))
    assert base.chosen(["r"]).tolist() == [[False, False, False, True]]
    base.ended("r")
    assert not base.chosen(["r"]).any()


def replica(trace, policy="fcfs", slots=4, sets=None, base=None, **options):
    def made(resident):
        return Scheduler(policy, costs=COSTS, resident=resident, expert_bytes=100, **options)

    return Replica(
        made, flat_picks(trace), (trace.layers, trace.num_experts), slots, COSTS, 100, sets or ExpertSets(), base
    )


def arrivals(count, rate, seed, trace, tokens=6):
    chance = np.random.default_rng(seed)
    at = np.cumsum(chance.exponential(1 / rate, count))
    found = []
    for number in range(count):
        first = int(chance.integers(0, trace.tokens - 40))
        ticket = Ticket(number, int(chance.integers(1, 20)), 20, 1, ttft=50.0, tpot=4.0)
        found.append(Arrival(float(at[number]), ticket, first, tokens, ""))
    return found


def test_steps_cost_what_their_rows_and_loads_do():
    trace = random_trace(0, layers=2, tokens=100, top_k=2, num_experts=6)
    one = Arrival(5.0, Ticket("x", 3, 9, 1, ttft=9.0), 10, 2, "")
    report = simulate([one], [replica(trace, slots=6)], sets=ExpertSets())
    prompt = sum(len(set(trace.experts[layer, 10:13].ravel())) for layer in range(2))
    token = sum(len(set(trace.experts[layer, 13]) - set(trace.experts[layer, 10:13].ravel())) for layer in range(2))
    outcome = report.outcomes[0]
    assert outcome.ttft == pytest.approx(1.0 + 0.3 + prompt)
    assert outcome.tpot == pytest.approx(1.0 + 0.1 + token)
    assert report.loaded_bytes == 100 * (prompt + token) and report.steps == 2
    used = prompt + sum(len(set(trace.experts[layer, 13])) for layer in range(2))
    assert report.to_dict()["hit_rate"] == pytest.approx(1 - (prompt + token) / used)
    assert outcome.met == (outcome.ttft <= 9.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_or_is_refused_and_a_seed_gives_the_same_figures(policy):
    trace = random_trace(1, layers=2, tokens=400, top_k=2, num_experts=8)
    told = []

    def figures():
        sets = ExpertSets()
        replicas = [replica(trace, policy, sets=sets, chunk_rows=16, queue_limit=6, kv_bytes=8) for _ in range(3)]
        found = simulate(arrivals(80, 0.5, 2, trace), replicas, sets=sets, route="affinity", told=told.append)
        return found.to_dict()

    first = figures()
    assert first["requests"] == 80 == sum(told)
    served = sum(each["finished"] for each in first["scheduler"])
    assert served + first["refused"] == 80
    assert first == figures()
    assert first["tokens_per_second"] == pytest.approx(6 * served / first["seconds"])


def test_a_run_that_is_stopped_counts_the_tokens_until_then():
    trace = random_trace(5, layers=2, tokens=200, top_k=2, num_experts=6)
    whole = simulate(some := arrivals(20, 10.0, 6, trace), [replica(trace)], sets=ExpertSets())
    half = simulate(some, [replica(trace)], sets=ExpertSets(), until=whole.seconds / 2)
    assert whole.tokens == 120 and 0 < half.tokens < 120
    assert half.seconds <= whole.seconds / 2
    assert len(half.outcomes) == 20 and not all(each.met for each in half.outcomes)


def test_a_trace_with_missing_picks_is_refused():
    with pytest.raises(ConfigError, match="without a pick"):
        flat_picks(random_trace(3, holes=0.2))


def test_the_scheduler_learns_what_the_machine_really_costs():
    trace = random_trace(4, layers=2, tokens=400, top_k=2, num_experts=8)
    wrong = Costs(forward=0.2, row=0.5, byte=0.002, expert=0.0)
    server = replica(trace)
    server.scheduler = Scheduler("fcfs", costs=wrong, expert_bytes=100)
    report = simulate(arrivals(400, 0.3, 5, trace), [server], sets=ExpertSets())
    assert report.scheduler[0]["cost_error"] < 0.03
    assert server.scheduler.costs.byte == pytest.approx(COSTS.byte, rel=0.1)


def test_on_public_traces_affinity_serves_a_backlog_of_three_domains_with_a_quarter_fewer_bytes():
    traces = {name: load_trace(need(f"{name}.npz")) for name in DOMAINS}
    layers = slice(0, 48, 8)
    picks, experts, start = [], {}, []
    for trace in traces.values():
        some = trace.experts[layers, :4000]
        uses = np.stack([np.bincount(row.ravel(), minlength=128) for row in some])
        experts[len(start)] = predicted_experts(uses.astype(float), 38)
        start.append(4000 * len(start))
        later = trace.experts[layers, 4000:8000].astype(np.int32) + 128 * np.arange(6, dtype=np.int32)[:, None, None]
        picks.append(later.transpose(1, 0, 2).reshape(4000, -1))
    chance = np.random.default_rng(0)
    backlog = []
    for number in range(60):
        domain = number % 3
        first = start[domain] + int(chance.integers(0, 3900))
        backlog.append(Arrival(1e-6 * number, Ticket(number, 16, 50, 1, experts=experts[domain]), first, 40, ""))
    moved = {}
    for policy in ("fcfs", "slo+affinity"):
        server = Replica(
            lambda resident, policy=policy: Scheduler(
                policy, costs=Costs(), resident=resident, expert_bytes=1, most_running=8
            ),
            np.concatenate(picks),
            (6, 128),
            38,
            Costs(),
            1,
            ExpertSets(),
        )
        moved[policy] = simulate(backlog, [server], sets=ExpertSets()).loaded_bytes
    assert moved["slo+affinity"] < 0.75 * moved["fcfs"]


def test_a_request_of_another_task_than_was_told_goes_on_among_its_kin_from_its_tokens():
    """Two replicas, two tasks with experts of their own; the last request says "a" and is of "b"."""
    picks = np.repeat(np.array([[0, 1], [4, 5]], dtype=np.int32), 100, axis=0)  # one layer: task a, then task b
    frequency = {
        "a": np.array([[1.0, 1, 0, 0, 0, 0, 0, 0]]),
        "b": np.array([[0.0, 0, 0, 0, 1, 1, 0, 0]]),
        None: np.full((1, 8), 0.25),
    }
    experts = {task: predicted_experts(frequency[task], 2) for task in ("a", "b")}
    sets = ExpertSets()

    def made(resident):
        return Scheduler("slo+affinity", costs=COSTS, resident=resident, expert_bytes=1, most_running=4)

    def server():
        return Replica(made, picks, (1, 8), 3, COSTS, 1, sets, BaseSet(frequency, 2))

    def arrival(at, number, told, task):
        first = 0 if task == "a" else 100
        return Arrival(at, Ticket(number, 40, 20, 1, told, experts[told], ttft=99.0), first, 8, task)

    some = [arrival(0.0, 0, "a", "a"), arrival(0.1, 1, "b", "b"), arrival(0.2, 2, "a", "b")]
    for given, ended in ((None, [2, 1]), (experts, [1, 2])):
        replicas = [server(), server()]
        report = simulate(some, replicas, sets=sets, route="affinity", experts=given)
        assert [each.scheduler.to_dict()["finished"] for each in replicas] == ended
        assert report.tokens == 24 and all(each.met for each in report.outcomes)
        assert replicas[0].scheduler.to_dict()["cancelled"] == (0 if given is None else 1)


def test_a_probe_shows_the_task_before_a_prompt_has_run_where_it_does_not_belong():
    frequency = {"a": np.zeros((1, 8)), "b": np.zeros((1, 8))}
    frequency["a"][0, :3] = frequency["b"][0, 5:] = 1.0
    frequency[None] = (frequency["a"] + frequency["b"]) / 2
    picks = np.concatenate([np.arange(100) % 3, 5 + np.arange(100) % 3]).astype(np.int32)[:, None]
    experts = {task: predicted_experts(frequency[task], 3) for task in ("a", "b")}

    def outcome(probe):
        sets = ExpertSets()
        replicas = [
            Replica(
                lambda resident: Scheduler("slo+affinity", costs=COSTS, resident=resident, most_running=4), picks,
                (1, 8), 3, COSTS, 1, sets, BaseSet(frequency, 2), probe=probe,
            ) for _ in range(2)
        ]  # fmt: skip
        tickets = [(0.0, "a", "a"), (0.1, "b", "b"), (0.2, "a", "b")]
        some = [
            Arrival(at, Ticket(n, 40, 20, 1, told, experts[told], ttft=99.0), 0 if task == "a" else 100, 8, task)
            for n, (at, told, task) in enumerate(tickets)
        ]
        return simulate(some, replicas, sets=sets, route="affinity", experts=experts), replicas

    (whole, _), (probed, replicas) = outcome(None), outcome(2)
    assert whole.tokens == probed.tokens == 24 and all(each.met for each in probed.outcomes)
    assert [each.scheduler.to_dict()["cancelled"] for each in replicas] == [1, 0]
    assert probed.busy < whole.busy
