"""What replicas publish, and where a router then sends requests: numbers and names, without Ray."""

from __future__ import annotations

import json

import pytest

from emoe.engine.expert_sets import overlap
from emoe.errors import ConfigError
from emoe.serve.routes import PLACES, UNKNOWN, Books, Hint, Published, merged, number_of

A, B = (number_of([(layer, expert) for layer in range(3) for expert in experts], 8) for experts in ((0, 1), (4, 5, 6)))
EXPECTED = {"a": A, "b": B}
ME, OTHER = "me", "another front"


def says(places=4, resident=None, requests=(), served=(), expected=EXPECTED):
    return Published(places, resident, expected, dict(served), dict(requests))


def first(books, replicas, request, task, answers=1):
    return books.order(replicas, request, Hint(ME, task, answers))[0]


def test_sets_of_two_replicas_compare_whatever_the_order_in_which_experts_were_met():
    one, other = [(0, 3), (2, 7), (1, 0)], [(1, 0), (2, 7), (0, 3)]
    assert number_of(one, 8) == number_of(other, 8) == 1 << 3 | 1 << 23 | 1 << 8
    assert number_of([], 8) == 0
    assert overlap(A, B) == 0.0


def test_what_is_published_survives_json():
    published = says(3, A | B, {ME: {"a": 2}}, {"a": 9})
    assert Published.of(json.loads(json.dumps(published.to_dict()))) == published
    assert Published.of({}) == Published(PLACES)


def test_requests_go_where_their_kin_runs_as_the_router_sent_them():
    books, replicas = Books("affinity"), {"r0": says(), "r1": says()}
    first_a, first_b = (first(books, replicas, number, task) for number, task in enumerate("ab"))
    assert {first_a, first_b} == {"r0", "r1"}
    assert [first(books, replicas, f"{task}2", task) for task in "ab"] == [first_a, first_b]


def test_a_request_goes_to_a_stranger_rather_than_to_a_long_queue():
    books, replicas = Books("affinity"), {"r0": says(), "r1": says()}
    kin = first(books, replicas, 0, "a", answers=3)
    assert first(books, replicas, 1, "a") != kin


def test_an_idle_replica_is_chosen_by_the_experts_in_its_memory():
    replicas = {"r0": says(resident=B), "r1": says(resident=A)}
    assert first(Books("affinity"), replicas, 0, "a") == "r1"
    assert first(Books("affinity"), replicas, 0, "b") == "r0"


def test_requests_of_other_fronts_count_as_published_and_own_ones_as_sent():
    replicas = {"r0": says(requests={OTHER: {"b": 1}}), "r1": says(requests={ME: {"a": 3}})}  # these three are over
    assert first(Books("affinity"), replicas, 0, "b") == "r0"
    assert first(Books("least"), replicas, 0, "b") == "r1"


def test_what_ended_or_went_elsewhere_counts_no_more():
    books, replicas = Books("least"), {"r0": says(), "r1": says()}
    assert first(books, replicas, "x", "a") == "r0"
    books.sent("r1", "x", Hint(ME, "a"))  # r0 took no more
    assert first(books, replicas, "y", "a") == "r0"
    books.over("r1", "x")
    assert first(books, replicas, "z", "a") == "r1"
    books.over("r1", "never sent")


def test_a_replica_that_is_gone_takes_its_requests_along():
    books = Books("least")
    assert first(books, {"r0": says(), "r1": says()}, 0, "a", answers=3) == "r0"
    assert books.order({"r1": says()}, 1, Hint(ME, "a")) == ["r1"]
    assert first(books, {"r0": says(), "r1": says()}, 2, "a") == "r0"


def test_every_replica_has_its_rank_so_that_a_full_one_is_passed_over():
    replicas = {name: says(requests={OTHER: {"b": load}}) for name, load in (("r0", 2), ("r1", 0), ("r2", 1))}
    assert Books("least").order(replicas, 0, Hint(ME, "a")) == ["r1", "r2", "r0"]


def test_a_task_is_predicted_by_the_replica_that_served_most_of_it():
    replicas = {
        "r0": says(resident=A, served={"a": 1}, expected={"a": B}),
        "r1": says(resident=B, served={"a": 5}, expected={"a": A}),
        "r2": says(served={"a": 9}, expected={"a": 0}),  # it does not know
    }
    assert first(Books("affinity"), replicas, 0, "a") == "r0"


def test_a_task_that_no_predictor_knows_is_as_good_as_none():
    expected = {**EXPECTED, UNKNOWN: B}
    replicas = {"r0": says(resident=A, expected=expected), "r1": says(resident=B, expected=expected)}
    assert first(Books("affinity"), replicas, 0, "never heard of") == "r1"
    assert first(Books("affinity"), replicas, 0, UNKNOWN) == "r1"


def test_without_predictions_the_queue_alone_decides():
    replicas = {"r0": Published(4, requests={OTHER: {"": 1}}), "r1": Published(4)}
    assert first(Books("affinity"), replicas, 0, "a") == "r1"


def test_round_robin_goes_round_whatever_is_published():
    books, replicas = Books("round-robin"), {"r0": says(requests={OTHER: {"a": 9}}), "r1": says()}
    assert [first(books, replicas, number, "a") for number in range(4)] == ["r0", "r1", "r0", "r1"]


def test_an_unknown_router_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'sideways' is not one of: round-robin, least, power-of-two, affinity"):
        Books("sideways")


def look(hits, misses, rows=0, mass=0.0, running=1):
    tally = {"rows": rows, "picks": 8 * rows, "absent": 0, "substituted": 0, "misses": 0, "substituted_mass": mass}
    return {
        "engine": {"way": "packed", "steps": 2, "output_tokens": 3, "kv": {"bytes": 10, "used": 1},
                   "scheduler": {"policy": "fcfs", "running": running, "waiting": 2, "cost_error": None}},
        "model": {"hits": hits, "misses": misses, "hit_rate": 0.0, "stall_ms": 1.5, "budget_bytes": 100,
                  "routing": {"mode": "exact", **tally, "tasks": {"a": tally}}},
        "layers": [(4, [0])],
        "served": {"a": hits},
    }  # fmt: skip


def test_counts_of_replicas_are_summed_and_those_of_one_that_ended_stay():
    found = merged({"y": look(30, 10, rows=1, mass=0.3), "x": look(10, 0, rows=3, mass=0.1)}, [look(1, 5)])
    assert found["engine"]["steps"] == 6 and found["engine"]["scheduler"]["running"] == 2
    assert found["engine"]["kv"] == {"bytes": 20, "used": 2}
    model = found["model"]
    assert (model["hits"], model["misses"], model["budget_bytes"]) == (41, 15, 200)
    assert model["hit_rate"] == pytest.approx(41 / 56)
    assert model["routing"]["tasks"]["a"]["rows"] == 4
    assert model["routing"]["substituted_mass"] == pytest.approx((0.3 + 3 * 0.1) / 4)
    assert found["layers"] == [(4, [0]), (4, [0])]
    assert found["replicas"] == [{"name": "x", "served": {"a": 10}}, {"name": "y", "served": {"a": 30}}]
    assert merged({}) == {}
