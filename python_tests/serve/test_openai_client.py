"""The official client against the server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
import serving
import torch
from openai import AsyncOpenAI


def _alone(tiny, text, count, **given):
    """Text and ids of `generate` alone."""
    model, tokenizer = tiny
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=count, pad_token_id=0, **{"do_sample": False} | given)
    new = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new


def _prompt(text):
    return f"u: {text}\na: "


def test_a_chat_is_answered_with_the_tokens_that_generate_gives(server, tiny):
    server.until_idle()
    text, new = _alone(tiny, _prompt("hello"), 12)
    answer = server.chat("hello", max_tokens=12)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == len(new)
    assert answer.usage.prompt_tokens == len(_prompt("hello"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(new)
    assert answer.object == "chat.completion" and answer.model == "tiny"


def test_a_completion_is_answered_with_the_tokens_that_generate_gives(server, tiny):
    server.until_idle()
    text, new = _alone(tiny, "once upon", 10)
    answer = server.client.completions.create(model="tiny", prompt="once upon", max_tokens=10)
    assert answer.choices[0].text == text
    assert answer.usage.completion_tokens == len(new)
    assert answer.choices[0].finish_reason == ("length" if len(new) == 10 else "stop")


def test_prompts_may_be_tokens(server, tiny):
    ids = tiny[1]("once upon")["input_ids"]
    as_text = server.client.completions.create(model="tiny", prompt="once upon", max_tokens=6)
    as_ids = server.client.completions.create(model="tiny", prompt=ids, max_tokens=6)
    both = server.client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=6)
    assert as_ids.choices[0].text == as_text.choices[0].text
    assert [each.text for each in both.choices] == [as_text.choices[0].text] * 2
    assert both.usage.prompt_tokens == 2 * len(ids)


def test_several_prompts_and_answers_come_in_the_order_of_openai(server):
    answer = server.client.completions.create(
        model="tiny", prompt=["abc", "xyz"], n=2, max_tokens=5, temperature=1.0, seed=3
    )
    assert [each.index for each in answer.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(["abc", "xyz"]):
        alone = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=1.0, seed=3)
        assert answer.choices[2 * number].text == alone.choices[0].text
    assert answer.usage.prompt_tokens == 6, "each prompt counts once"


@pytest.mark.parametrize("counted", [False, True])
def test_a_stream_gives_the_same_text_and_usage_where_it_was_asked_for(server, counted):
    whole = server.chat("stream this", max_tokens=16)
    options = {"stream_options": {"include_usage": True}} if counted else {}
    pieces = list(server.chat("stream this", max_tokens=16, stream=True, **options))
    text = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    reasons = [each.choices[0].finish_reason for each in pieces if each.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    usages = [each.usage for each in pieces if each.usage]
    assert len(usages) == counted
    if counted:
        assert not pieces[-1].choices
        assert usages[0].completion_tokens == whole.usage.completion_tokens
        assert usages[0].prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_of_completions_and_of_several_answers_keeps_each_apart(server):
    whole = server.client.completions.create(model="tiny", prompt="ab", n=3, max_tokens=9, temperature=1.2, seed=11)
    texts = ["", "", ""]
    for piece in server.client.completions.create(
        model="tiny", prompt="ab", n=3, max_tokens=9, temperature=1.2, seed=11, stream=True
    ):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [each.text for each in whole.choices]
    assert len(set(texts)) > 1, "each answer has a seed of its own"


def test_a_seed_gives_what_generate_gives_after_it(server, tiny):
    server.until_idle()
    torch.manual_seed(5)
    text, _ = _alone(tiny, "abcdef", 10, do_sample=True, temperature=1.3, top_k=0)
    answers = [
        server.client.completions.create(model="tiny", prompt="abcdef", max_tokens=10, temperature=1.3, seed=5)
        for _ in range(2)
    ]
    assert [each.choices[0].text for each in answers] == [text, text]


def test_a_stop_string_ends_the_text_before_it(server):
    whole = server.chat("hello", max_tokens=20).choices[0].message.content
    stop = whole[4:6]
    for given in (stop, ["never comes", stop]):
        answer = server.chat("hello", max_tokens=20, stop=given)
        assert answer.choices[0].message.content == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    pieces = server.chat("hello", max_tokens=20, stop=stop, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == whole[: whole.index(stop)]


def test_log_probabilities_of_a_chat_are_those_of_the_model(server, tiny):
    server.until_idle()
    model, tokenizer = tiny
    answer = server.chat("hello", max_tokens=3, logprobs=True, top_logprobs=4)
    ids = tokenizer(_prompt("hello"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logged = model(ids).logits[0, -1].log_softmax(-1)
    first = answer.choices[0].logprobs.content[0]
    assert first.logprob == pytest.approx(logged.max().item(), abs=1e-4)
    assert first.token == tokenizer.decode([int(logged.argmax())])
    assert [each.logprob for each in first.top_logprobs] == pytest.approx(logged.topk(4).values.tolist(), abs=1e-4)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    for each in answer.choices[0].logprobs.content:
        assert each.bytes is None or bytes(each.bytes).decode() == each.token


def test_log_probabilities_without_alternatives_have_none(server):
    answer = server.chat("hello", max_tokens=2, logprobs=True)
    assert [each.top_logprobs for each in answer.choices[0].logprobs.content] == [[], []]
    assert server.chat("hello", max_tokens=2).choices[0].logprobs is None


def test_log_probabilities_of_completions_come_as_lists_also_in_a_stream(server):
    given = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "logprobs": 2}
    whole = server.client.completions.create(**given).choices[0]
    logged = whole.logprobs
    assert len(logged.tokens) == len(logged.token_logprobs) == len(logged.top_logprobs) == len(logged.text_offset) == 6
    offsets = [0]
    for token in logged.tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    assert logged.text_offset == offsets
    pieces = [each.choices[0].logprobs for each in server.client.completions.create(**given, stream=True)]
    assert [token for each in pieces for token in each.tokens] == logged.tokens
    assert [offset for each in pieces for offset in each.text_offset] == offsets


def test_penalties_and_bias_reach_the_sampler(server, tiny):
    token = tiny[1].convert_tokens_to_ids("q")
    biased = server.chat("hello", max_tokens=4, logit_bias={str(token): 100})
    assert biased.choices[0].message.content == "qqqq"
    repeated = server.chat("hello", max_tokens=12).choices[0].message.content
    assert len(set(repeated)) < len(repeated), "the model repeats itself, or this shows nothing"
    punished = server.chat("hello", max_tokens=12, logprobs=True, presence_penalty=2.0, frequency_penalty=2.0,
                           logit_bias={})  # fmt: skip
    assert punished.choices[0].message.content != repeated
    assert server.chat("hello", max_tokens=12, frequency_penalty=0.0).choices[0].message.content == repeated


def test_fields_of_other_servers_work(server):
    answer = server.chat("hello", max_tokens=5, extra_body={"ignore_eos": True, "top_k": 1, "min_p": 0.0})
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_fields_that_change_nothing_are_taken(server):
    plain = server.chat("hello").choices[0].message.content
    answer = server.chat("hello", user="me", metadata={"a": "b"}, tools=[], tool_choice="none", store=False)
    assert answer.choices[0].message.content == plain


def test_an_answer_can_be_sent_back(server):
    answer = server.chat("hello").choices[0].message
    again = server.client.chat.completions.create(
        model="tiny",
        max_tokens=3,
        messages=[
            {"role": "user", "content": "hello"},
            answer.model_dump(),
            {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": " then"}]},
        ],
    )
    assert again.usage.completion_tokens == 3


def test_a_developer_speaks_as_the_system(server):
    given = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}]
    answers = [
        server.client.chat.completions.create(
            model="tiny", max_tokens=6, messages=[{**given[0], "role": role}, given[1]]
        ).choices[0]
        for role in ("developer", "system")
    ]
    assert answers[0].message.content == answers[1].message.content


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": 7}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"max_tokns": 3}}, "max_tokns"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"task": "../etc/passwd"}}, "task"),
        ({"extra_body": {"ttft_slo_ms": -1}}, "ttft_slo_ms"),
        ({"extra_headers": {"X-SLO-TTFT-ms": "soon"}}, "x-slo-ttft-ms"),
        ({"extra_headers": {"X-SLO-TPOT-ms": "nan"}}, "x-slo-tpot-ms"),
        ({"extra_headers": {"X-Emoe-Task": "a" * 100}}, "x-emoe-task"),
        ({"extra_body": {"tpot_slo_ms": 5.0}, "extra_headers": {"X-SLO-TPOT-ms": "6"}}, "tpot_slo_ms"),
        ({"logit_bias": {"-1": 3}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_cannot_be_served_is_a_bad_request_that_names_the_field(server, given, named):
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("hello", **given)
    assert named in str(caught.value.body)
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "user"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ],
)
def test_messages_that_are_no_text_are_refused_by_name(server, message):
    with pytest.raises(openai.BadRequestError, match="messages"):
        server.client.chat.completions.create(model="tiny", messages=[message])


def test_a_prompt_over_the_context_is_refused_with_openais_code(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("a" * 300)
    assert caught.value.code == "context_length_exceeded"
    assert "256" in str(caught.value)


def test_another_model_is_not_found(server):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        server.client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    assert [each.id for each in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt/4")


def test_many_clients_at_once_each_get_their_own_answer(server):
    texts = [f"client {number}" for number in range(12)]
    alone = [server.chat(text, max_tokens=10).choices[0].message.content for text in texts]

    async def ask():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            calls = (
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": text}], max_tokens=10
                )
                for text in texts
            )
            return [each.choices[0].message.content for each in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == alone


def test_a_stream_that_is_closed_cancels_its_request(server):
    server.until_idle()
    before = server.http.get("/status").json()["scheduler"]["cancelled"]
    stream = server.chat("hello", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert len(server.records()) == 1
    stream.close()
    server.until_idle()
    serving.until(lambda: server.http.get("/status").json()["scheduler"]["cancelled"] == before + 1)


def test_a_call_that_is_given_up_cancels_its_request(server):
    server.until_idle()
    before = server.http.get("/status").json()["scheduler"]["cancelled"]

    async def leave():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            call = asyncio.create_task(
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=240,
                    extra_body={"ignore_eos": True},
                )
            )  # fmt: skip
            while not server.records():
                await asyncio.sleep(0.005)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    asyncio.run(leave())
    server.until_idle()
    serving.until(lambda: server.http.get("/status").json()["scheduler"]["cancelled"] == before + 1)


def test_a_json_schema_holds_the_answer_to_it(server):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    for stream in (False, True):
        answer = server.chat("json", max_tokens=60, temperature=1.0, seed=2, response_format=form, stream=stream)
        if stream:
            text = "".join(each.choices[0].delta.content or "" for each in answer)
        else:
            text = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
        found = json.loads(text)
        assert set(found) == {"a", "b"} and found["a"] <= 99 and found["b"] in ("x", "yy")


def test_a_schema_that_makes_no_sense_is_a_bad_request(server):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("json", response_format=form)
    assert caught.value.code == "invalid_schema"


def test_without_llguidance_a_response_format_is_refused_and_says_why(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="pip install llguidance"):
        server.chat("json", response_format={"type": "json_object"})
    assert server.chat("json", response_format={"type": "text"}).choices
