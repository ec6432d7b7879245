"""Requests that run at once: each has a predictor of its own, and the base set is for the mixture."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch

import emoe
from emoe.predictor import UNKNOWN_TASK
from emoe.predictor.table import Recent, TaskTable
from emoe.requests import Request
from emoe.slots.load_score import Expected
from emoe.slots.streams import Streams

NAMES = ("chat", "code")


def table(layers=2, experts=8):
    """Experts 0 to 2 for chat, 5 to 7 for code, in every layer."""
    frequency = np.zeros((2, layers, experts), dtype=np.float32)
    frequency[0, :, :3], frequency[1, :, 5:] = 1.0, 1.0
    return TaskTable(frequency, NAMES)


def picks(*experts, layers=2):
    return np.array([[[expert] for expert in experts]] * layers, dtype=np.int16)  # [L, T, 1]


def test_the_mixture_is_weighed_by_the_tokens_to_come():
    streams = Streams(table(), {})
    streams.join(Request("chat", tokens=30), 0)
    streams.join(Request("code", tokens=90), 1)
    scores = streams.scores([], 1.0)
    assert scores[0].argsort(kind="stable")[-3:].tolist() == [5, 6, 7]
    assert scores.sum(axis=1) == pytest.approx([120, 120])
    assert scores[0, 0] == pytest.approx(10) and scores[0, 7] == pytest.approx(30)


def test_what_a_request_has_had_counts_no_more_and_what_waits_counts():
    streams = Streams(table(), {})
    code = Request("code", tokens=90)
    streams.join(code, 1)
    streams.observe(code, picks(*[5] * 80))
    scores = streams.scores([Expected(0, 60)], 1.0)
    assert scores[0, 7] == pytest.approx(10 / 3) and scores[0, 0] == pytest.approx(20)


def test_each_request_is_seen_by_a_predictor_of_its_own():
    streams = Streams(Recent(layers=2, experts=8), {})
    one, other = Request(tokens=10), Request(tokens=10)
    streams.join(one, UNKNOWN_TASK)
    streams.join(other, UNKNOWN_TASK)
    streams.observe(one, picks(1, 1))
    streams.observe(other, picks(2, 2))
    scores = streams.scores([], 1.0)
    assert scores[0].tolist() == pytest.approx([0, 8, 8, 0, 0, 0, 0, 0])


def test_the_shared_predictor_learns_from_requests_that_ended():
    shared = Recent(layers=2, experts=8)
    streams = Streams(shared, {})
    request = Request(tokens=10)
    streams.join(request, UNKNOWN_TASK)
    streams.observe(request, picks(3))
    streams.observe(request, picks(4, 4))
    assert not shared.rank().any()
    assert streams.leave(request) == (UNKNOWN_TASK, 3)
    assert shared.rank()[0].tolist() == [0, 0, 0, 1, 2, 0, 0, 0]
    assert len(streams) == 0 and request not in streams
    streams.join(Request(tokens=6), UNKNOWN_TASK)
    assert streams.scores([], 1.0)[0, 4] == pytest.approx(4)


def test_a_task_without_a_layer_that_counts_is_not_predicted_for():
    streams = Streams(table(), {0: np.array([True, True]), 1: np.array([True, False])})
    streams.join(Request("chat", tokens=1000), 0)
    streams.join(Request("code", tokens=10), 1)
    assert not streams.counts(0) and streams.counts(1) and streams.tasks() == [1]
    scores = streams.scores([Expected(0, 1000)], 1.0)
    assert not scores[0].any() and scores[1].sum() == pytest.approx(10)


# In a runtime


@pytest.fixture
def model():
    built = families.build("qwen3_moe")
    emoe.wrap(built, memory_budget=0.75, predictor=table(), period=2, slack=0.5)
    yield built
    built.emoe.close()


def base(model):
    return {int(expert) for expert in np.flatnonzero(model.emoe.base._base[0])}


def run(model, *requests):
    rows = [(request, 4) for request in requests]
    with torch.no_grad(), model.emoe.routing.rows(rows):
        model(torch.arange(3, 3 + 4 * len(rows))[None])


def test_a_request_of_another_task_that_joins_changes_the_base_set_at_once(model):
    chat, code = Request("chat", tokens=10), Request("code", tokens=100)
    requests = model.emoe.requests
    requests.begin(chat)
    assert base(model) == {0, 1, 2}
    run(model, chat)
    requests.begin(code)
    assert base(model) == {5, 6, 7}
    run(model, chat, code)
    requests.end(chat)
    requests.end(code)
    assert model.emoe.stats()["prediction"]["requests"] == 2
    assert not requests.running


def test_what_waits_is_part_of_the_mixture(model):
    request = Request("chat", tokens=10, others=[("code", 100.0)])
    model.emoe.requests.begin(request)
    assert base(model) == {5, 6, 7}
    model.emoe.requests.end(request)


def test_the_period_counts_requests_that_join(model):
    requests = [Request("chat", tokens=10) for _ in range(5)]
    for request in requests:
        model.emoe.requests.begin(request)
    assert model.emoe.stats()["prediction"]["refreshes"] == 3  # 0, 2, 4
    for request in requests:
        model.emoe.requests.end(request)


def test_each_request_of_a_batch_teaches_what_its_own_rows_were_routed_to(model):
    one, other = Request("chat", tokens=10), Request("code", tokens=10)
    model.emoe.requests.begin(one)
    model.emoe.requests.begin(other)
    with torch.no_grad(), model.emoe.routing.rows([(one, 3), (other, 5)]):
        model(torch.arange(3, 11)[None])
    model.emoe.base._flush()
    running = model.emoe.base._streams._running
    assert [stream.tokens for stream in running.values()] == [3, 5]
    model.emoe.requests.end(one)
    assert list(running) == [id(other)]
    model.emoe.requests.end(other)


def test_a_generate_beside_requests_is_nobodys_and_teaches_nothing(model):
    request = Request("chat", tokens=10)
    model.emoe.requests.begin(request)
    with torch.no_grad():
        model(torch.arange(3, 11)[None])
    model.emoe.base._flush()
    assert next(iter(model.emoe.base._streams._running.values())).tokens == 0
    model.emoe.requests.end(request)


def test_the_experts_of_a_task_are_known_before_a_request_of_it_begins(model):
    assert model.emoe.base.expected("chat") == {(layer, expert) for layer in (0, 1) for expert in (0, 1, 2)}
    assert model.emoe.base.expected("code") == {(layer, expert) for layer in (0, 1) for expert in (5, 6, 7)}


def test_slots_that_are_lent_shrink_the_base_set_to_its_best_and_it_grows_back(model):
    request = Request("chat", tokens=10)
    model.emoe.requests.begin(request)
    run(model, request)
    model.emoe.lending.lend(2)  # one of each layer's six
    assert model.emoe.base.sizes == [2, 2] and base(model) == {0, 1}
    model.emoe.lending.take_back(2)
    assert model.emoe.base.sizes == [3, 3] and base(model) == {0, 1, 2}
    run(model, request)
    model.emoe.requests.end(request)
    model.emoe.check_integrity()


def test_a_request_ends_once_and_one_whose_begin_fails_has_ended(model):
    request, ended = Request("chat"), []

    class Watcher:
        def begin(self, request, first):
            if request.name == "bad":
                raise RuntimeError("no")

        def end(self, request, last):
            ended.append((request.name, last))

    model.emoe._told.append(Watcher())
    model.emoe.requests.begin(request)
    with pytest.raises(RuntimeError):
        model.emoe.requests.begin(Request("chat", "bad"))
    assert model.emoe.requests.running
    model.emoe.requests.end(request)
    model.emoe.requests.end(request)
    assert ended == [(None, True)] and not model.emoe.requests.running
    assert len(model.emoe.base._streams) == 0
    model.emoe._told.pop()
