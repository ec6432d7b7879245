"""What clients may not do: bodies, counts, slowness, keys. Bounded memory, a clear status, and others are served."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time

import httpx
import openai
import pytest
import serving

from emoe.errors import ConfigError
from emoe.serve.limits import Limits
from emoe.serve.listen import listen
from emoe.serve.tasks import TaskNames

KEY = "a-key-of-tests"


@pytest.fixture
def fake(tiny):
    return serving.FakeEngine(*tiny)


def _head(length, *more, path="/v1/completions"):
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def _answer(sock):
    """Status and body of what a connection gets until it is closed."""
    data = b""
    with sock:
        sock.settimeout(20)
        while part := sock.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else None), body


def _refused(answer, status, code):
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    return error["message"]


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "x"',
        b'{"prompt": "\xff\xfe"}',
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "max_tokens": 99999999999999999999999999999999999999}',
        b'{"prompt": "x", "max_tokens": "5"}',
        b'{"prompt": "x", "max_tokens": true}',
        b'{"prompt": "x", "n": 1.5}',
        b'{"prompt": ["x", 3]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [128]}',
        b'{"prompt": [4294967296]}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": ""}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "user": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"prompt": "x", "seed": 9223372036854775808}',
        b'{"prompt": "x", "logit_bias": {"1": 1000}}',
        b'{"prompt": "x", "logit_bias": {"\xd9\xa1": 1}}',
        b'{"prompt": "x", "response_format": {"type": "json_schema"}}',
        b'{"prompt": "x", "echo": true}',
        b'{"prompt": "x", "echo": 0}',
        b'{"prompt": "x", "best_of": 4}',
        b'{"prompt": "x", "__class__": "y"}',
        b'{"prompt": "x", "' + b"k" * 5000 + b'": 1}',
    ],
)
def test_bodies_that_make_no_sense_are_bad_requests(server, body):
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) <= 1000


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\u202e", "👩‍👩‍👧", "é" * 9, "\ufffd", "<eos>", "\ufeff"])
def test_strange_text_is_served_or_refused_and_never_a_failure(server, text):
    answer = server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 2})
    assert answer.status_code in (200, 400), answer.text
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "stop": text}
    assert server.http.post("/v1/chat/completions", json=chat).status_code == 200


def test_only_json_is_taken_so_that_no_page_of_another_site_can_send_it(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": kind})
        _refused(answer, 415, "invalid_content_type")
    given = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.http.post("/v1/completions", content=b'{"prompt": "x"}', headers=given).status_code == 200
    assert "access-control-allow-origin" not in server.http.get("/status", headers={"origin": "http://x"}).headers


def test_what_is_not_there_is_said_in_openais_shape(server):
    _refused(server.http.get("/v1/nothing"), 404, "not_found")
    _refused(server.http.get("/v1/completions"), 405, "method_not_allowed")
    _refused(server.http.post("/health"), 405, "method_not_allowed")
    _refused(server.http.get("/../../etc/passwd"), 404, "not_found")
    _refused(server.http.get("/v1/models/..%2f..%2fetc"), 404, "model_not_found")


def test_a_body_over_the_limit_is_refused_before_it_is_read(fake, tiny):
    with serving.running(fake, tiny[1], body_bytes=1000) as server:
        _refused(server.http.post("/v1/completions", content=b" " * 1001), 413, "body_too_large")
        assert _answer(server.connect(_head(10**15)))[0] == 413
        assert _answer(server.connect(_head(10**4000)))[0] in (400, 413)

        def chunks():
            for _ in range(100):
                yield b" " * 500

        _refused(server.http.post("/v1/completions", content=chunks()), 413, "body_too_large")
        assert server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_bodies_together_have_a_bound(fake, tiny):
    with serving.running(fake, tiny[1], body_bytes=1000, all_body_bytes=1500) as server:
        first = server.connect(_head(1000) + b" " * 900)
        second = server.connect(_head(900) + b" " * 890)
        full = {"prompt": "x", "max_tokens": 100, "user": "u" * 900}
        fake.open.clear()
        with httpx.Client(base_url=server.url, timeout=60) as client, client.stream(
            "POST", "/v1/completions", json=full | {"stream": True}
        ):  # fmt: skip
            answer = server.http.post("/v1/completions", json=full)
            message = _refused(answer, 429, "overloaded")
            assert "1500" in message and answer.headers["retry-after"] == "1"
        first.close()
        second.close()
        serving.until(lambda: server.http.post("/v1/completions", json={"prompt": ""}).status_code == 400)


def test_half_a_body_and_no_more_is_given_up(fake, tiny):
    with serving.running(fake, tiny[1], body_seconds=0.3) as server:
        status, body = _answer(server.connect(_head(100) + b'{"prompt"'))
        assert status == 408 and json.loads(body)["error"]["code"] == "timeout"
        assert server.chat(max_tokens=1).choices


def test_a_client_that_leaves_in_the_middle_of_a_body_leaves_nothing_behind(fake, tiny):
    with serving.running(fake, tiny[1], requests=5) as server:
        for _ in range(20):
            server.connect(_head(100) + b'{"prompt"').close()
        serving.until(lambda: server.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200)
        assert not fake.live


def test_headers_that_do_not_come_close_the_connection(fake, tiny):
    with serving.running(fake, tiny[1], header_seconds=0.3, keep_alive_seconds=1) as server:
        silent, half = server.connect(), server.connect(b"POST /v1/completions HTTP/1.1\r\nhost:")
        assert _answer(silent) == (None, b"") and _answer(half) == (None, b"")
        # A connection that had an answer has the same time for the next headers once they begin.
        reused = server.connect(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in reused.recv(4096)
        reused.sendall(b"GET /health HTTP")
        began = time.monotonic()
        reused.settimeout(20)
        while reused.recv(4096):
            pass
        assert time.monotonic() - began < 5
        reused.close()


def test_no_http_is_answered_and_closed(server):
    status, _ = _answer(server.connect(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n"))
    assert status in (400, None)
    status, _ = _answer(server.connect(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n"))
    assert status in (400, 431, None)
    assert server.http.get("/health").status_code == 200


# Counts


def test_connections_beyond_the_limit_are_closed_and_make_room_again(fake, tiny):
    with serving.running(fake, tiny[1], connections=3) as server:
        held = [server.connect() for _ in range(3)]
        serving.until(lambda: len(server.server.server_state.connections) == 3)
        status, _ = _answer(server.connect())
        assert status == 503
        for each in held:
            each.close()
        serving.until(lambda: not server.server.server_state.connections)
        assert server.http.get("/health").status_code == 200


def test_far_more_requests_than_there_is_room_for_are_served_or_refused_at_once(fake, tiny):
    """Far more clients than there is room for: as many as may wait do, all others hear of it at once."""
    fake.open.clear()

    async def crowd(server):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:

            async def ask():
                answer = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
                return answer.status_code, answer.headers.get("retry-after"), answer.json()

            calls = [asyncio.create_task(ask()) for _ in range(400)]
            while sum(call.done() for call in calls) < 350:
                await asyncio.sleep(0.01)
            most = fake.most_live
            fake.open.set()
            return most, await asyncio.gather(*calls)

    with serving.running(fake, tiny[1], requests=50) as server:
        most, answers = asyncio.run(crowd(server))
    assert most <= 50
    served = [body for status, _, body in answers if status == 200]
    assert all(body["choices"][0]["text"] == "xxx" for body in served) and len(served) == 50
    assert {(status, after) for status, after, _ in answers if status != 200} == {(429, "1")}


def test_a_full_queue_of_the_real_engine_is_too_many_requests(chat_folder):
    with serving.loaded(chat_folder, batch=1) as (model, tokenizer):
        engine = serving.engine_of(model, tokenizer, most_running=1)
        engine.scheduler.queue_limit = 2
        given = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True}

        async def crowd(server):
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=given) for _ in range(12)))

        with serving.running(engine, tokenizer) as server:
            answers = asyncio.run(crowd(server))
        found = [each.status_code for each in answers]
        assert set(found) == {200, 429} and 2 <= found.count(200) <= 11
        assert all(int(each.headers["retry-after"]) >= 1 for each in answers if each.status_code == 429)
        assert len({each.json()["choices"][0]["text"] for each in answers if each.status_code == 200}) == 1


def test_without_max_tokens_the_servers_default_holds(fake, tiny):
    with serving.running(fake, tiny[1], output_default=7) as server:
        answer = server.http.post("/v1/completions", json={"prompt": "ab"}).json()
        assert answer["usage"]["completion_tokens"] == 7


def test_prompts_and_answers_have_limits_of_the_operator(fake, tiny):
    with serving.running(fake, tiny[1], prompt_tokens=5, output_tokens=4, choices=2) as server:
        ask = lambda **given: server.http.post("/v1/completions", json=given)  # noqa: E731
        assert ask(prompt="abcde", max_tokens=4).status_code == 200
        assert "at most 5" in _refused(ask(prompt="abcdef"), 400, "context_length_exceeded")
        assert "at most 4" in _refused(ask(prompt="a", max_tokens=5), 400, "context_length_exceeded")
        assert ask(prompt="a").json()["usage"]["completion_tokens"] == 4
        assert "at most 2" in _refused(ask(prompt=["a", "b"], n=2), 400, "too_many_choices")


# Time


def test_an_answer_that_takes_too_long_is_ended_and_cancelled(fake, tiny):
    fake.open.clear()
    with serving.running(fake, tiny[1], request_seconds=0.3) as server:
        _refused(server.http.post("/v1/completions", json={"prompt": "x"}), 504, "timeout")
        with pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):
            list(server.chat(stream=True))
        serving.until(lambda: not fake.live)
        assert len(fake.cancelled) == 2


def test_a_client_that_takes_nothing_is_cancelled(tiny):
    engine = serving.FakeEngine(*tiny, text="y" * 200_000)
    body = json.dumps({"prompt": "x", "max_tokens": 250, "stream": True}).encode()
    with serving.running(engine, tiny[1], send_seconds=0.5) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(_head(len(body)) + body)
        serving.until(lambda: not server.records() and not server.server.server_state.tasks)
        serving.until(lambda: not server.server.server_state.connections)  # also what the system still held of it
        slow.close()


def test_a_slow_client_gets_all_of_its_answer_while_others_are_served(tiny):
    engine = serving.FakeEngine(*tiny, text="y" * 20_000)
    with (
        serving.running(engine, tiny[1]) as server,
        server.http.stream(
            "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 100, "stream": True}
        ) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        assert server.chat(max_tokens=1).choices
        serving.until(lambda: not engine.live)  # the engine does not wait for the client
        pieces = [line for line in [first, *lines] if line.startswith("data: {")]
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in pieces)
        assert text == "y" * 2_000_000


def test_a_stream_that_waits_says_that_it_lives(fake, tiny, monkeypatch):
    monkeypatch.setattr("emoe.serve.app._ALIVE_SECONDS", 0.05)
    fake.open.clear()
    with serving.running(fake, tiny[1]) as server:
        body = {"prompt": "x", "max_tokens": 1, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(3)] == [": waiting", "", ": waiting"]
            fake.open.set()
            assert [line for line in lines if line.startswith("data")][-1] == "data: [DONE]"


@pytest.mark.parametrize(("body", "param"), [
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "echo": True}, "echo"),
    ({"prompt": "x", "best_of": 2}, "best_of"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "nonsense": 1}, "nonsense"),
    ({"prompt": "x", "repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"prompt": "x", "ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
])  # fmt: skip
def test_what_is_wrong_is_said_by_the_name_of_its_field(fake, tiny, body, param):
    with serving.running(fake, tiny[1]) as server:
        answer = server.http.post("/v1/completions" if "prompt" in body else "/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_temperature_that_is_next_to_nothing_takes_the_likeliest_tokens(server):
    answers = [
        server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 6, "temperature": temperature})
        for temperature in (0, 1e-6, 1e-40, 1e-300)
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_whoever_gets_a_page_can_ask_for_its_head(fake, tiny):
    with serving.running(fake, tiny[1]) as server:
        for path in ("/", "/status", "/health", "/metrics", "/v1/models"):
            answer = server.http.head(path)
            assert (answer.status_code, answer.content) == (200, b""), path
        assert server.http.head("/v1/completions").status_code == 405


# Keys


@pytest.mark.parametrize("given", [None, "", "Bearer", f"Bearer {KEY}x", KEY, f"Basic {KEY}", b"Bearer \xff\xfe"])
def test_without_the_key_nothing_but_health_and_the_empty_page_is_there(fake, tiny, given):
    with serving.running(fake, tiny[1], key=KEY) as server:
        headers = {} if given is None else {"authorization": given}
        with httpx.Client(base_url=server.url, headers=headers) as client:
            for path in ("/metrics", "/status", "/v1/models", "/openapi.json", "/v1/completions", "/nothing"):
                answer = client.get(path)
                _refused(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
            assert client.get("/health").status_code == 200
            assert client.get("/").status_code == 200 and "tiny" not in client.get("/").text
        assert not fake.given


def test_with_the_key_clients_are_served(fake, tiny):
    with serving.running(fake, tiny[1], key=KEY) as server:
        assert server.chat(max_tokens=1).choices
        assert server.http.get("/metrics").status_code == 200
        small = server.http.get("/metrics", headers={"authorization": f"bearer {KEY}"})  # schemes know no capitals
        assert small.status_code == 200
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError), wrong:
            wrong.models.list()


def test_a_server_for_this_machine_is_none_for_pages_that_name_it_otherwise(fake, tiny):
    """A site may give its own name this machine's address; its page then asks from the same origin."""
    with serving.running(fake, tiny[1], local=True) as server:
        for host in ("localhost", f"localhost:{server.port}", "127.0.0.1:1", "[::1]", "[::1]:8000"):
            assert server.http.get("/status", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", "localhost:1:2", ""):
            for path in ("/status", "/", "/health"):
                _refused(server.http.get(path, headers={"host": host}), 403, "forbidden_host")
        answer = server.http.post("/v1/completions", json={"prompt": "x"}, headers={"host": "evil.example"})
        _refused(answer, 403, "forbidden_host")
        assert not fake.given


# Names and numbers


def test_names_of_tasks_are_bounded_and_those_beyond_are_unknown(fake, tiny):
    with serving.running(fake, tiny[1], tasks=3) as server:
        for number in range(10):
            server.chat(max_tokens=1, extra_body={"task": f"task-{number}"})
        text = server.http.get("/metrics").text
    given = [each["task"] for each in fake.given.values()]
    assert given == ["task-0", "task-1", "task-2", *[None] * 7]
    assert 'emoe_answers_total{reason="length",task="unknown"} 7.0' in text and "task-3" not in text


def test_names_that_are_known_take_no_room(caplog):
    names = TaskNames(["code"], 1)
    with caplog.at_level(logging.WARNING, "emoe"):
        assert [names.name(each) for each in ("code", "a", "b", "a", None, "unknown", "c")] == [
            "code", "a", None, "a", None, None, None,
        ]  # fmt: skip
    assert len(caplog.records) == 1, "said once"


@pytest.mark.parametrize(("name", "value"), [("requests", 0), ("send_seconds", 0), ("prompt_tokens", -1)])
def test_limits_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})


def test_an_address_that_cannot_be_had_is_said_with_what_to_do():
    with listen("127.0.0.1", 0, Limits()) as sock:
        with pytest.raises(ConfigError, match="choose another --host or --port"):
            listen("127.0.0.1", sock.getsockname()[1], Limits())
        with pytest.raises(ConfigError, match=r"198\.51\.100\.7"):
            listen("198.51.100.7", 0, Limits())
