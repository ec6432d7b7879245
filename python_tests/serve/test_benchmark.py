"""The arithmetic of benchmarks/serving.py, and how it tells outcomes apart; no model runs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import httpx
import numpy as np
import pytest
from benchmark_files import benchmark

from emoe.tasks import Prompt

bench = benchmark("serving")

PROMPTS = [Prompt(task, f"{task} {n}") for task in ("code", "math", "qa") for n in range(4)]


def answered(first: float, last: float, tokens: int, task: str = "math") -> bench.Answer:
    return bench.Answer(task, "answered", first=first, last=last, tokens=tokens)


def test_time_per_token_leaves_out_the_first_and_is_none_where_there_is_no_other():
    assert answered(1.0, 3.0, 5).tpot == 0.5
    assert answered(1.0, 1.0, 1).tpot is None
    assert bench.Answer("math", "cut", first=1.0, last=3.0, tokens=5).tpot is None


@pytest.mark.parametrize(
    ("answer", "met"),
    [
        (answered(1.0, 3.0, 5), True),
        (answered(1.01, 3.0, 5), False),
        (answered(1.0, 3.01, 5), False),
        (answered(1.0, 1.0, 1), True),
        (bench.Answer("math", "refused"), False),
        (bench.Answer("math", "failed", first=0.1, last=0.1, tokens=1), False),
        (bench.Answer("math", "cut", first=0.1, last=0.1, tokens=1), False),
    ],
)
def test_targets_are_met_by_whole_answers_within_both(answer, met):
    assert answer.met(bench.Targets(1.0, 0.5)) is met


def test_targets_go_to_the_server_in_milliseconds_and_only_where_there_are_any():
    assert bench.Targets(1.5, None).fields() == {"ttft_slo_ms": 1500.0}
    assert bench.Targets().fields() == {}


def test_percentiles_are_those_of_what_is_known():
    found = bench.percentiles([None, *range(101)])
    assert found == {"p50": 50.0, "p95": 95.0, "mean": 50.0}
    assert bench.percentiles([None]) == {}


def test_calibrated_targets_are_met_by_the_share_that_was_asked_for():
    random = np.random.default_rng(0)
    answers = [answered(first, first + 10 * each, 11) for first, each in random.exponential(1.0, (100, 2))]
    answers += [bench.Answer("math", "refused")] * 10
    targets = bench.targets_for(answers, 0.7, None, None)
    assert sum(each.met(targets) for each in answers) == 77
    only = bench.targets_for(answers, 0.7, None, 100.0)
    assert only.tpot == 100.0 and sum(each.met(only) for each in answers) == 77


def test_no_target_is_made_up_where_too_few_were_answered():
    answers = [answered(1.0, 2.0, 3), bench.Answer("math", "refused"), bench.Answer("math", "failed")]
    with pytest.raises(bench.LoadError, match="less than 70%"):
        bench.targets_for(answers, 0.7, None, None)
    with pytest.raises(bench.LoadError, match="none of 2"):
        bench.targets_for(answers[1:], 0.7, None, None)


def test_what_a_server_can_do_counts_tokens_of_answers_that_were_cut():
    answers = [answered(0.5, 1.0, 8), answered(0.5, 1.0, 4), bench.Answer("code", "cut")]
    assert bench.requests_per_second(bench.Part(answers, 5.0, Counter(emoe_output_tokens_total=60))) == 2.0
    assert bench.requests_per_second(bench.Part(answers[2:], 5.0, Counter(emoe_output_tokens_total=60))) == 0.0


def test_goodput_and_shares_are_of_all_that_was_sent_over_all_rounds():
    targets = bench.Targets(1.0, None)
    counted = Counter({"emoe_output_tokens_total": 20.0, "emoe_read_bytes_total": 1000.0})
    counted |= Counter({"emoe_expert_hits_total": 3.0, "emoe_expert_misses_total": 1.0})
    one = bench.Part([answered(0.5, 1.0, 8), answered(2.0, 3.0, 8, "code"), bench.Answer("code", "cut")], 4.0, counted)
    two = bench.Part([bench.Answer("math", "refused", "429 overloaded"), answered(1.0, 1.0, 4)], 6.0, counted)
    found = bench.figures([one, two], targets)
    assert (found["requests"], found["met"], found["late"]) == (5, 2, 1)
    assert (found["refused"], found["failed"], found["cut"]) == (1, 0, 1)
    assert found["attained"] == 0.4 and found["attained_by_round"] == [1 / 3, 0.5]
    assert found["goodput"] == 0.2 and found["tokens_per_second"] == 4.0
    assert found["read_bytes_per_token"] == 50.0 and found["hit_rate"] == 0.75
    assert found["why"] == {"429 overloaded": 1}
    assert found["tasks"]["code"]["attained"] == 0.0 and found["tasks"]["math"]["attained"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["poisson", "bursty", "drifting"])
def test_arrivals_are_the_same_for_a_seed_within_their_time_and_as_many_as_the_rate_says(kind):
    given = {"rate": 5.0, "seconds": 1000.0, "kind": kind}
    dues = bench.arrivals(PROMPTS, seed=1, **given)
    assert dues == bench.arrivals(PROMPTS, seed=1, **given) != bench.arrivals(PROMPTS, seed=2, **given)
    times = np.array([due.at for due in dues])
    assert (np.diff(times) >= 0).all() and times[-1] < 1000.0
    assert len(dues) == pytest.approx(5000, rel=0.15)
    spread = np.diff(times).std() / np.diff(times).mean()
    assert spread == pytest.approx(2.5 if kind == "bursty" else 1.0, rel=0.15)
    assert len({due.prompt for due in dues}) == len(dues)
    assert all(due.prompt.split(". ", 1)[1].split()[0] == due.task == due.told for due in dues)


def test_a_mix_that_drifts_goes_on_from_round_to_round():
    def shares(span):
        dues = bench.arrivals(PROMPTS, rate=100.0, seconds=20.0, kind="drifting", seed=3, span=span)
        return Counter(due.task for due in dues)

    assert shares((0.0, 0.01)).most_common(1)[0][0] == "code"
    assert shares((0.16, 0.17)).most_common(1)[0][0] == "math"
    assert shares((0.33, 0.34)).most_common(1)[0][0] == "qa"


def test_a_share_of_requests_is_told_as_another_task():
    dues = bench.arrivals(PROMPTS, rate=10.0, seconds=300.0, kind="poisson", seed=0, misclassified=0.2)
    assert sum(due.task != due.told for due in dues) / len(dues) == pytest.approx(0.2, abs=0.03)


def test_counters_of_a_metrics_page_are_summed_over_labels():
    page = (
        '# TYPE emoe_read_bytes_total counter\nemoe_read_bytes_total{lane="demand"} 3.0\n'
        'emoe_read_bytes_total{lane="ahead"} 4.0\n# TYPE emoe_running_requests gauge\nemoe_running_requests 2.0\n'
    )
    assert bench.counters(page) == {"emoe_read_bytes_total": 7.0, "emoe_running_requests": 2.0}


def _event(value):
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


TOKEN, USAGE = {"choices": [{"delta": {"content": "a"}}]}, {"choices": [], "usage": {"completion_tokens": 3}}


@pytest.mark.parametrize(
    ("status", "text", "outcome", "why", "tokens"),
    [
        (200, _event(TOKEN) + ": waiting\n\n" + _event(TOKEN) + _event(USAGE) + _event("[DONE]"), "answered", "", 3),
        (200, _event(TOKEN) + _event(USAGE), "failed", "a stream without an end", 3),
        (200, _event(TOKEN) + _event({"error": {"code": "read_error"}}), "failed", "in a stream: read_error", 0),
        (429, json.dumps({"error": {"code": "overloaded"}}), "refused", "429 overloaded", 0),
        (500, json.dumps({"error": {"code": "internal"}}), "failed", "500 internal", 0),
    ],
)
def test_how_a_request_ended_is_told_apart(status, text, outcome, why, tokens):
    sent = []

    def handle(request):
        sent.append(json.loads(request.content))
        return httpx.Response(status, text=text)

    async def go():
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(handle)) as client:
            due = bench.Due(0.0, "math", "code", "2 + 2?")
            return await bench.ask(client, due, {"max_tokens": 3}, iter(np.arange(1.0, 9.0)).__next__)

    answer = asyncio.run(go())
    assert (answer.task, answer.outcome, answer.why, answer.tokens) == ("math", outcome, why, tokens)
    assert sent[0]["task"] == "code" and sent[0]["stream"] is True and sent[0]["max_tokens"] == 3
    if outcome == "answered":
        assert (answer.lag, answer.first, answer.last, answer.tpot) == (1.0, 2.0, 3.0, 0.5)


def test_load_is_open_and_what_has_not_ended_is_cut_off():
    begun = []

    async def handle(request):
        begun.append(request)
        await asyncio.sleep(60 if len(begun) == 1 else 0)  # the first one holds nobody up
        return httpx.Response(200, text=_event(TOKEN) + _event(USAGE) + _event("[DONE]"))

    async def go():
        dues = [bench.Due(at, "math", "math", "x") for at in (0.0, 0.01, 0.02, 90.0)]
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(handle)) as client:
            return await bench.play(client, dues, 0.5, {})

    part = asyncio.run(go())
    assert [each.outcome for each in part.answers] == ["cut", "answered", "answered", "cut"]
    assert len(begun) == 3 and 0.4 < part.seconds < 5.0


def test_a_client_that_cannot_reach_the_server_counts_as_failed():
    def handle(request):
        raise httpx.ConnectError("gone")

    async def go():
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(handle)) as client:
            return await bench.ask(client, bench.Due(0.0, "qa", "qa", "x"), {}, lambda: 0.0)

    answer = asyncio.run(go())
    assert (answer.outcome, answer.why) == ("failed", "ConnectError")


def _results(attained, read, speed):
    load = {"attained": attained, "read_bytes_per_token": read, "failed": 0}
    return {"load": load, "overload": {"tokens_per_second": speed, "failed": 0}}


def test_the_check_wants_points_bytes_and_throughput_at_a_load_where_fcfs_loses_some():
    base = _results(0.7, 100.0, 10.0)
    for attained, read, speed, good in [
        (0.86, 60.0, 15.0, [True] * 5),
        (0.84, 60.0, 15.0, [True, False, True, True, True]),
        (0.86, 61.0, 15.0, [True, True, False, True, True]),
        (0.86, 60.0, 14.9, [True, True, True, False, True]),
    ]:
        found = bench.checks({"fcfs": base, "slo+affinity": _results(attained, read, speed)})
        assert [each for _, each in found] == good
    easy = bench.checks({"fcfs": _results(0.81, 100.0, 10.0), "slo+affinity": _results(1.0, 60.0, 15.0)})
    assert [each for _, each in easy] == [False, True, True, True, True]
