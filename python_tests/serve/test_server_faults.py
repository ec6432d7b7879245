"""An engine that fails, refuses, or hangs: clients hear of it in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import asyncio

import openai
import pytest
import serving

from emoe.engine.generation import Event
from emoe.errors import BackendUnavailable, BudgetError, ClosedError, ConfigError, OverloadedError, ReadError
from emoe.serve.engine_thread import FAULTS
from emoe.serve.inbox import Inbox


@pytest.fixture
def fake(tiny):
    engine = serving.FakeEngine(*tiny)
    with serving.running(engine, tiny[1]) as server:
        yield server, engine
    assert engine.closed


def test_the_fake_engine_answers(fake):
    server, _ = fake
    answer = server.chat(max_tokens=3)
    assert answer.choices[0].message.content == "xxx" and answer.choices[0].finish_reason == "length"


def test_a_step_that_fails_ends_its_requests_and_no_later_one(fake):
    server, engine = fake
    engine.faults = [RuntimeError("a secret of the server")]
    with pytest.raises(openai.InternalServerError) as caught:
        server.chat()
    assert "secret" not in str(caught.value) and "RuntimeError" in str(caught.value)
    assert server.chat(max_tokens=2).choices[0].message.content == "xx"
    assert server.http.get("/health").status_code == 200


def test_a_step_that_fails_in_the_middle_of_a_stream_is_an_event_of_it(fake):
    server, engine = fake
    engine.pace = 0.02
    stream = iter(server.chat(max_tokens=100, stream=True))
    next(stream)
    engine.faults = [RuntimeError("gone")]
    with pytest.raises(openai.APIError, match="RuntimeError"):
        for _ in stream:
            pass
    assert server.chat(max_tokens=2).choices


def test_an_engine_that_fails_again_and_again_is_given_up(fake):
    server, engine = fake
    engine.open.clear()
    engine.faults = [RuntimeError("broken")] * (FAULTS + 3)
    with pytest.raises(openai.InternalServerError):
        server.chat()
    serving.until(lambda: server.service.fault is not None)
    with pytest.raises(openai.InternalServerError) as caught:
        server.chat()
    assert caught.value.status_code == 503
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/status").json()["state"] == "failed"
    assert "emoe_up 0.0" in server.http.get("/metrics").text


def test_steps_that_fail_now_and_then_do_not_add_up(fake):
    server, engine = fake
    for _ in range(FAULTS + 1):
        engine.faults = [RuntimeError("now and then")]
        with pytest.raises(openai.InternalServerError):
            server.chat()
        assert server.chat(max_tokens=2).choices
    assert server.service.fault is None


def test_a_request_that_fails_leaves_the_others_alone_and_names_no_file(fake):
    server, engine = fake
    engine.failing["poison"] = ReadError("/srv/models/secret.safetensors: Input/output error", file="/srv/models/s")
    good = server.chat("good", max_tokens=5)
    with pytest.raises(openai.InternalServerError) as caught:
        server.chat("poison", max_tokens=5)
    assert "secret" not in str(caught.value) and "ReadError" in str(caught.value)
    assert good.choices[0].message.content == "xxxxx"


def test_one_answer_of_several_that_fails_ends_the_request_and_cancels_the_rest(fake):
    server, engine = fake
    engine.failing["poison"] = ReadError("gone")
    with pytest.raises(openai.InternalServerError):
        server.client.completions.create(model="tiny", prompt=["fine", "poison"], max_tokens=100)
    serving.until(lambda: not engine.live)
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("too many", retry_after=2.3), 429, "overloaded"),
        (BudgetError("no room", needed=9, budget=3), 400, "request_too_large"),
        (ConfigError("not so"), 400, "invalid_value"),
        (ClosedError("closed"), 503, "unavailable"),
        (BackendUnavailable("no device"), 503, "unavailable"),
        (ReadError("/srv/secret"), 500, "internal_error"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
def test_errors_of_the_engine_have_a_status_each(fake, error, status, code):
    server, engine = fake
    engine.refusals = [error]
    answer = server.http.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == status
    told = answer.json()["error"]
    assert told["code"] == code and set(told) == {"message", "type", "param", "code"}
    assert "secret" not in told["message"]
    assert answer.headers.get("retry-after") == {429: "3", 503: "30"}.get(status)
    assert not server.records()


def test_of_several_answers_none_begins_where_one_is_refused(fake):
    server, engine = fake
    engine.refusals = []
    submit, count = engine.submit, iter(range(10))

    def refuse_the_third(*args, **given):
        if next(count) == 2:
            raise OverloadedError("full", retry_after=1)
        return submit(*args, **given)

    engine.submit = refuse_the_third
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model="tiny", prompt="x", n=4, temperature=1, max_tokens=50)
    serving.until(lambda: not engine.live)
    assert len(engine.cancelled) == 2 and not server.records()


def test_targets_and_tasks_reach_the_engine_from_headers_and_from_the_body(fake):
    server, engine = fake
    server.chat(max_tokens=1, extra_headers={"X-Emoe-Task": "code", "X-SLO-TTFT-ms": "250", "X-SLO-TPOT-ms": "5.5"})
    server.chat(max_tokens=1, extra_body={"task": "code", "ttft_slo_ms": 250.0, "tpot_slo_ms": 5.5})
    server.chat(max_tokens=1, extra_body={"task": "code", "ttlt_slo_ms": 9.0}, extra_headers={"x-emoe-task": "code"})
    given = [{name: each[name] for name in each if name != "sampling"} for each in engine.given.values()]
    assert given[0] == given[1] == {"task": "code", "ttft_slo_ms": 250.0, "tpot_slo_ms": 5.5}
    assert given[2] == {"task": "code", "ttlt_slo_ms": 9.0}


def test_a_classifier_names_the_task_of_requests_that_do_not(tiny):
    class Classifier:
        names = ("code", "math")

        def classify(self, text):
            return type("Answer", (), {"task": "code" if "def" in text else None})

    engine = serving.FakeEngine(*tiny)
    with serving.running(engine, tiny[1], classifier=Classifier()) as server:
        server.chat("def f", max_tokens=1)
        server.chat("hello", max_tokens=1)
        server.chat("def f", max_tokens=1, extra_body={"task": "math"})
        server.client.completions.create(model="tiny", prompt="def g", max_tokens=1)
    assert [each["task"] for each in engine.given.values()] == ["code", None, "math", "code"]


def test_metrics_count_answers_targets_and_tokens_by_task(fake):
    server, engine = fake
    server.chat("a", max_tokens=4, extra_body={"task": "code", "ttft_slo_ms": 60_000.0, "ttlt_slo_ms": 1e-6})
    server.chat("b", max_tokens=1, extra_body={"task": "code", "tpot_slo_ms": 1e-6})
    engine.failing["poison"] = ReadError("gone")
    with pytest.raises(openai.InternalServerError):
        server.chat("poison", extra_body={"task": "code", "ttft_slo_ms": 60_000.0})
    assert server.http.get("/v1/nothing").status_code == 404
    assert server.http.delete("/metrics").status_code == 405
    shown = server.http.get("/status").json()["tasks"]["code"]
    assert {name: shown[name] for name in ("answers", "output_tokens", "firsts", "met", "targets")} == {
        "answers": 3, "output_tokens": 5, "firsts": 2, "met": 2, "targets": 4,
    }  # fmt: skip
    text = server.http.get("/metrics").text
    for line in (
        'emoe_slo_total{met="true",target="ttft",task="code"} 1.0',
        'emoe_slo_total{met="false",target="ttft",task="code"} 1.0',
        'emoe_slo_total{met="false",target="ttlt",task="code"} 1.0',
        'emoe_slo_total{met="true",target="tpot",task="code"} 1.0',
        'emoe_output_tokens_total{task="code"} 5.0',
        'emoe_answers_total{reason="length",task="code"} 2.0',
        'emoe_answers_total{reason="error",task="code"} 1.0',
        'emoe_ttft_seconds_count{task="code"} 2.0',
        'emoe_tpot_seconds_count{task="code"} 1.0',
        'emoe_refused_total{status="404"} 1.0',
        'emoe_refused_total{status="405"} 1.0',
        'emoe_refused_total{status="500"} 1.0',
        "emoe_up 1.0",
    ):
        assert line in text.splitlines(), line


def test_a_server_that_ends_tells_those_that_wait(tiny):
    engine = serving.FakeEngine(*tiny)
    engine.open.clear()

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            call = asyncio.create_task(client.completions.create(model="tiny", prompt="x"))
            while not engine.live:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(server.service.stop)
            return (await asyncio.gather(call, return_exceptions=True))[0]

    with serving.running(engine, tiny[1]) as server:
        error = asyncio.run(ask())
        assert isinstance(error, openai.InternalServerError) and error.status_code == 503
    assert engine.closed


def test_a_request_that_is_cancelled_just_as_a_token_comes_is_cancelled():
    """`asyncio.wait_for` gives the token and forgets the cancellation, up to Python 3.11."""

    async def both_at_once():
        inbox = Inbox([], lambda ids: None)
        waiting = asyncio.create_task(inbox.take(10))
        await asyncio.sleep(0)
        inbox.put(Event("a", (3,)))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(both_at_once())
