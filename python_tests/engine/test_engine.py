"""An engine against `generate`: every request gets the tokens that it would get alone, and its own end."""

from __future__ import annotations

import threading

import families
import pytest
import torch
from engines import GREEDY, PROMPTS, Answers, alone, logits_alone, together
from transformers import GenerationConfig

import emoe
from emoe.engine.engine import Engine
from emoe.engine.sampling import Sampling
from emoe.errors import BudgetError, ClosedError, ConfigError, EmoeError, OverloadedError, UnsupportedModelError


@pytest.fixture(scope="module")
def olmoe():
    return families.build("olmoe")


@pytest.fixture
def engine(olmoe):
    with Engine(olmoe, chunk_rows=16) as made:
        yield made


def test_requests_that_join_and_leave_give_the_tokens_of_generate(olmoe):
    with Engine(olmoe, chunk_rows=11, most_running=3) as engine:
        assert together(engine, PROMPTS) == [alone(olmoe, prompt) for prompt in PROMPTS]


def test_generate_works_between_steps_and_after_the_engine(olmoe):
    expected = alone(olmoe, PROMPTS[0])
    with Engine(olmoe, chunk_rows=16) as engine:
        answers = Answers(engine)
        id = engine.submit(PROMPTS[0], max_new_tokens=8, sampling=GREEDY)
        while engine.busy:
            answers.step()
            assert alone(olmoe, PROMPTS[0]) == expected
        assert answers.tokens(id) == expected
    assert alone(olmoe, PROMPTS[0]) == expected
    assert olmoe.config._attn_implementation == "sdpa"


SAMPLING = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1, "temperature": 1.5},
    {"repetition_penalty": 1.8},
]


def test_each_request_has_its_own_sampling_and_seed(olmoe, engine):
    expected = [
        alone(olmoe, PROMPTS[i % 4], 12, i, do_sample=True, **{"top_k": 0, **own}) for i, own in enumerate(SAMPLING)
    ]
    answers = Answers(engine)
    ids = [
        engine.submit(PROMPTS[i % 4], max_new_tokens=12, sampling=Sampling(**{"temperature": 1, **own}, seed=i, eos=()))
        for i, own in enumerate(SAMPLING)
    ]
    greedy = engine.submit(PROMPTS[0], max_new_tokens=12, sampling=GREEDY)
    answers.run()
    assert [answers.tokens(id) for id in ids] == expected
    assert answers.tokens(greedy) == alone(olmoe, PROMPTS[0], 12)


def test_sampling_is_that_of_the_generation_config_where_none_is_given(olmoe):
    config = olmoe.generation_config
    config.do_sample, config.temperature, config.top_p = True, 0.5, 0.9
    try:
        assert Sampling.of(config, seed=3) == Sampling(temperature=0.5, top_p=0.9, seed=3)
    finally:
        config.do_sample, config.temperature, config.top_p = False, None, None
    assert Sampling.of(config) == Sampling()


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("num_return_sequences", 2), ("guidance_scale", 1.5)])
def test_what_one_sequence_cannot_do_is_refused(olmoe, engine, name, value):
    before = getattr(olmoe.generation_config, name)
    setattr(olmoe.generation_config, name, value)
    try:
        with pytest.raises(ConfigError, match=name):
            engine.submit(PROMPTS[0])
    finally:
        setattr(olmoe.generation_config, name, before)


def test_a_processor_of_a_request_sees_its_tokens_and_changes_no_other(olmoe, engine):
    seen = []

    def only_seven(ids, scores):
        seen.append(ids.shape[1])
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([7]), 0.0)

    answers = Answers(engine)
    bound = engine.submit(PROMPTS[1], max_new_tokens=3, sampling=Sampling(processors=[only_seven], eos=()))
    free = engine.submit(PROMPTS[0], max_new_tokens=3, sampling=GREEDY)
    answers.run()
    assert answers.tokens(bound) == [7, 7, 7] and seen == [5, 6, 7]
    assert answers.tokens(free) == alone(olmoe, PROMPTS[0], 3)


def test_log_probabilities_are_of_the_raw_logits(olmoe, engine):
    tokens, logits = logits_alone(olmoe, PROMPTS[1], 4)
    answers = Answers(engine)
    id = engine.submit(PROMPTS[1], max_new_tokens=4, sampling=Sampling(logprobs=3, repetition_penalty=1.0, eos=()))
    answers.run()
    logged = [each for event in answers.events[id] for each in event.logprobs]
    for token, mine, row in zip(tokens, logged, logits, strict=True):
        reference = row.log_softmax(-1)
        assert set(reference.topk(3).indices.tolist()) | {token} == set(mine) and next(iter(mine)) == token
        assert all(abs(reference[choice] - value) < 1e-4 for choice, value in mine.items())


def test_the_first_of_a_list_of_end_tokens_ends_a_request(olmoe, engine):
    tokens = alone(olmoe, PROMPTS[0])
    answers = Answers(engine)
    other = 127 if 127 not in tokens else 126
    id = engine.submit(PROMPTS[0], max_new_tokens=8, sampling=Sampling(eos=[other, tokens[3]]))
    answers.run()
    assert answers.tokens(id) == tokens[: tokens.index(tokens[3]) + 1] and answers.reason(id) == "stop"


def test_end_tokens_are_the_models_where_none_are_given(olmoe, engine):
    tokens = alone(olmoe, PROMPTS[0])
    olmoe.generation_config.eos_token_id = [1, tokens[2]]
    try:
        answers = Answers(engine)
        id = engine.submit(PROMPTS[0], max_new_tokens=8)
        answers.run()
    finally:
        olmoe.generation_config.eos_token_id = 2
    assert answers.tokens(id) == tokens[: tokens.index(tokens[2]) + 1] and answers.reason(id) == "stop"


FURTHER = [
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [41, 119]},
    {"bad_words_ids": [[41], [119, 38]]},
    {"sequence_bias": [[[41], -10.0]], "repetition_penalty": 1.3},
    {"typical_p": 0.3, "do_sample": True},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "do_sample": True},
    {"top_h": 0.3, "do_sample": True},
]


@pytest.mark.parametrize("settings", FURTHER, ids=lambda settings: "-".join(settings))
def test_what_a_generation_config_says_holds_for_a_request_too(engine, settings):
    model, config = engine.model, GenerationConfig(**settings, top_k=0, eos_token_id=2, pad_token_id=0)
    expected = alone(model, PROMPTS[0], 12, 5, generation_config=config, do_sample=config.do_sample)
    answers = Answers(engine)
    id = engine.submit(PROMPTS[0], max_new_tokens=12, sampling=Sampling.of(config, seed=5, eos=()))
    assert answers.run().tokens(id) == expected


@pytest.mark.parametrize(
    "settings", [{"min_new_tokens": 6}, {"forced_eos_token_id": 7}, {"begin_suppress_tokens": [3]}]
)
def test_what_a_request_cannot_have_of_a_generation_config_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling.of(GenerationConfig(**settings))


def test_a_processor_may_write_into_its_scores(olmoe, engine):
    def never(ids, scores):
        scores[:, [41, 119]] = -float("inf")
        return scores

    answers = Answers(engine)
    id = engine.submit(PROMPTS[0], max_new_tokens=8, sampling=Sampling(eos=(), processors=[never], logprobs=1))
    expected = alone(olmoe, PROMPTS[0], 8, suppress_tokens=[41, 119])
    assert answers.run().tokens(id) == expected


@pytest.mark.parametrize("at", [1, 4], ids=["in the middle", "at the last token"])
def test_what_is_cancelled_within_a_step_ends_with_that_step_and_has_no_event_after(engine, at):
    def cancel(ids, scores):
        if ids.shape[1] == len(PROMPTS[0]) + at - 1:
            engine.cancel("this")
            engine.cancel("other")
            with pytest.raises(EmoeError, match="in the middle of a step"):
                engine.submit(PROMPTS[1])
            with pytest.raises(EmoeError, match="in the middle of a step"):
                engine.close()
        return scores

    answers = Answers(engine)
    engine.submit(PROMPTS[0], max_new_tokens=4, sampling=Sampling(eos=(), processors=[cancel]), id="this")
    engine.submit(PROMPTS[1], max_new_tokens=9, sampling=GREEDY, id="other")
    last = engine.submit(PROMPTS[2], max_new_tokens=8, sampling=GREEDY)
    answers.run()
    assert answers.reason("this") == ("cancelled" if at < 4 else "length")
    assert answers.reason("other") == "cancelled"
    assert len(answers.tokens("this")) == at
    assert answers.tokens(last) == alone(engine.model, PROMPTS[2])


class Letters:
    """A tokenizer of one letter for each token; from 64 on a token is half of a character."""

    chat_template = "{messages}"

    def decode(self, tokens, skip_special_tokens=True):
        return "".join("ab c"[token % 4] if token < 64 else "\ufffd" for token in tokens)

    def __call__(self, text):
        return {"input_ids": [3 + "ab c".index(letter) for letter in text]}

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt and tokenize and return_dict
        return self("".join(message["content"] for message in messages))


@pytest.fixture(scope="module")
def letters(olmoe):
    """An engine whose greedy answers are letters only."""
    model = families.build("olmoe")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[64:] = 0
    with Engine(model, Letters(), chunk_rows=16) as engine:
        yield engine


def test_a_stop_string_ends_the_text_before_it_and_is_never_sent(letters):
    text = Letters().decode(alone(letters.model, PROMPTS[0], 24))
    stop = text[9:12]
    answers = Answers(letters)
    id = letters.submit(PROMPTS[0], max_new_tokens=24, sampling=Sampling(stop=[stop, "zzz"], eos=()))
    answers.run()
    assert answers.reason(id) == "stop" and answers.text(id) == text[: text.find(stop)]


def test_text_that_may_become_a_stop_string_is_sent_when_it_does_not(letters):
    text = Letters().decode(alone(letters.model, PROMPTS[0], 6))
    answers = Answers(letters)
    id = letters.submit(PROMPTS[0], max_new_tokens=6, sampling=Sampling(stop=text[-1] + "x", eos=()))
    answers.run()
    assert answers.text(id) == text and answers.reason(id) == "length"
    assert "".join(event.text for event in answers.events[id][:-1]) != text


def test_text_and_chats_are_prompts_too(letters):
    expected = alone(letters.model, [3, 4, 6], 4)
    answers = Answers(letters)
    ids = [letters.submit(prompt, max_new_tokens=4, sampling=GREEDY) for prompt in (
        "abc", [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}], torch.tensor([[3, 4, 6]]),
        {"input_ids": torch.tensor([[3, 4, 6]]), "attention_mask": torch.ones(1, 3)},
    )]  # fmt: skip
    answers.run()
    assert [answers.tokens(id) for id in ids] == [expected] * 4
    assert {event.prompt_tokens for id in ids for event in answers.events[id]} == {3}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([3, 128], "128"),
        ([3, -1], "-1"),
        ([[3], [4]], "one sequence"),
        ("abc", "tokenizer"),
        ([{"role": "user", "content": "a"}], "tokenizer"),
        ({"pixel_values": 1}, "input_ids"),
        ({"input_ids": torch.tensor([[0, 3]]), "attention_mask": torch.tensor([[0, 1]])}, "attention_mask"),
        (None, "NoneType"),
        (5, "int"),
        (torch.tensor(5), "Tensor"),
        ([[1.7]], "1.7"),
    ],
)
def test_a_prompt_that_is_none_is_refused(engine, prompt, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(prompt)
    assert not engine.busy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": 600}, "512"),
        ({"sampling": Sampling(stop="x")}, "tokenizer"),
        ({"ttft_slo_ms": -1}, "ttft"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(engine, options, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(PROMPTS[0], **options)
    assert not engine.busy


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"top_p": 1.5},
        {"top_k": "many"},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-300},
        {"logprobs": -1},
        {"logprobs": 1.5},
        {"top_k": 1.5},
        {"seed": "x"},
        {"seed": 1 << 70},
        {"eos": "x"},
        {"further": {"typical": 0.5}},
        {"stop": [""]},
    ],
)
def test_sampling_names_a_value_that_makes_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)


def test_a_cancelled_request_ends_with_what_it_has_and_the_others_go_on(olmoe, engine):
    answers = Answers(engine)
    first, second = (engine.submit(prompt, max_new_tokens=8, sampling=GREEDY) for prompt in PROMPTS[:2])
    while len(answers.tokens(first)) < 2:
        answers.step()
    engine.cancel(first)
    answers.run()
    had = answers.tokens(first)
    assert answers.reason(first) == "cancelled" and had == alone(olmoe, PROMPTS[0])[: len(had)]
    assert answers.tokens(second) == alone(olmoe, PROMPTS[1])


def test_a_request_that_waits_can_be_cancelled_and_gets_its_last_event(olmoe):
    with Engine(olmoe, most_running=1) as engine:
        answers = Answers(engine)
        first, second = (engine.submit(prompt, max_new_tokens=4, sampling=GREEDY) for prompt in PROMPTS[:2])
        answers.step()
        engine.cancel(second)
        engine.cancel("nobody")
        answers.run()
        assert answers.reason(second) == "cancelled" and answers.tokens(second) == []
        assert answers.tokens(first) == alone(olmoe, PROMPTS[0], 4)


def test_a_request_whose_sampling_fails_does_not_fail_the_others(olmoe, engine):
    def broken(*_):
        raise RuntimeError("broken")

    answers = Answers(engine)
    bad = engine.submit(PROMPTS[0], max_new_tokens=8, sampling=Sampling(processors=[broken]))
    good = engine.submit(PROMPTS[1], max_new_tokens=8, sampling=GREEDY)
    answers.run()
    assert answers.reason(bad) == "error" and "broken" in str(answers.error(bad))
    assert answers.tokens(good) == alone(olmoe, PROMPTS[1])


@pytest.mark.parametrize("way", ["packed", "forked", "alone"])
def test_a_forward_that_fails_ends_only_the_request_that_makes_it_fail(olmoe, way):
    expected = [alone(olmoe, prompt) for prompt in PROMPTS[1:3]]
    poison = min(set(range(3, 128)) - {token for tokens in [*expected, *PROMPTS[:3]] for token in tokens})

    def poisoned(_module, args):
        if (args[0] == poison).any():
            raise RuntimeError("poison")

    with Engine(olmoe, chunk_rows=40, way=way) as engine:
        answers = Answers(engine)
        handle = olmoe.get_input_embeddings().register_forward_pre_hook(poisoned)
        ids = [engine.submit(prompt, max_new_tokens=8, sampling=GREEDY) for prompt in PROMPTS[1:3]]
        answers.step()
        answers.step()
        bad = engine.submit([*PROMPTS[0][:5], poison, *PROMPTS[0][5:]], max_new_tokens=8, sampling=GREEDY)
        answers.run()
        handle.remove()
        assert answers.reason(bad) == "error" and "poison" in str(answers.error(bad))
        assert [answers.tokens(id) for id in ids] == expected
        assert engine.stats()["restarts"] == (0 if way == "alone" else 3)
        assert engine.scheduler.to_dict()["running"] == 0


def test_an_interrupt_in_a_step_loses_no_request(olmoe, engine):
    answers = Answers(engine)
    ids = [engine.submit(prompt, max_new_tokens=8, sampling=GREEDY) for prompt in PROMPTS[:2]]
    answers.step()
    answers.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = olmoe.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    handle.remove()
    assert [answers.run().tokens(id) for id in ids] == [alone(olmoe, prompt) for prompt in PROMPTS[:2]]


def test_a_common_prefix_is_computed_once(olmoe, engine):
    common, answers = PROMPTS[2], Answers(engine)
    engine.submit([*common, 5, 6], max_new_tokens=4, sampling=GREEDY)
    answers.run()
    prompts = [[*common, *tail] for tail in ([5, 6], [9], [7, 8, 9])]
    ids = [engine.submit(prompt, max_new_tokens=6, sampling=GREEDY) for prompt in prompts]
    answers.run()
    assert [answers.events[id][-1].shared_tokens for id in ids] == [27, 26, 26]
    assert [answers.tokens(id) for id in ids] == [alone(olmoe, prompt, 6) for prompt in prompts]
    assert engine.stats()["shared_tokens"] == 27 + 26 + 26


def test_requests_of_one_prompt_that_come_at_once_compute_it_once(olmoe):
    with Engine(olmoe, chunk_rows=11) as engine:
        answers = Answers(engine)
        ids = [engine.submit(PROMPTS[2], max_new_tokens=4, sampling=GREEDY) for _ in range(3)]
        other = engine.submit(PROMPTS[0], max_new_tokens=4, sampling=GREEDY)
        answers.run()
        assert [answers.tokens(id) for id in ids] == [alone(olmoe, PROMPTS[2], 4)] * 3
        assert answers.tokens(other) == alone(olmoe, PROMPTS[0], 4)
        assert [answers.events[id][-1].shared_tokens for id in ids] == [0, 25, 25]
        assert engine.stats()["prompt_tokens"] == 26 + 1 + 1 + 19


def test_a_request_that_waits_for_a_prefix_goes_on_when_the_other_is_cancelled(olmoe):
    with Engine(olmoe, chunk_rows=11) as engine:
        answers = Answers(engine)
        first, second = (engine.submit(PROMPTS[2], max_new_tokens=4, sampling=GREEDY) for _ in range(2))
        answers.step()
        engine.cancel(first)
        answers.run()
        assert answers.tokens(second) == alone(olmoe, PROMPTS[2], 4)
        assert answers.events[second][-1].shared_tokens == 11


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "jamba"])
def test_windows_and_states_are_not_shared(family):
    with Engine(families.build(family)) as engine:
        answers = Answers(engine)
        for _ in range(2):
            id = engine.submit(PROMPTS[0], max_new_tokens=2, sampling=GREEDY)
            answers.run()
        assert answers.events[id][-1].shared_tokens == 0


def test_a_request_that_can_never_fit_is_refused_and_one_that_can_later_waits(olmoe):
    row = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    with Engine(olmoe, kv_budget=40 * row, chunk_rows=16) as engine:
        with pytest.raises(BudgetError, match="41 tokens") as refused:
            engine.submit(PROMPTS[0], max_new_tokens=22)
        assert refused.value.needed == 41 * row and refused.value.budget == 40 * row
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=8, sampling=GREEDY) for prompt in (PROMPTS[0], PROMPTS[2])]
        answers.step()
        assert engine.scheduler.waiting == [ids[1]]
        answers.run()
        assert [answers.tokens(id) for id in ids] == [alone(olmoe, prompt) for prompt in (PROMPTS[0], PROMPTS[2])]


def test_a_queue_that_is_full_refuses_with_a_time(olmoe):
    scheduler = emoe.Scheduler(kv_bytes=1 << 20, queue_limit=1)
    with Engine(olmoe, scheduler=scheduler) as engine:
        engine.submit(PROMPTS[0], max_new_tokens=2)
        with pytest.raises(OverloadedError) as refused:
            engine.submit(PROMPTS[1])
        assert refused.value.retry_after > 0
        assert len(list(engine.run())) > 0


def test_two_engines_of_one_model_are_refused(olmoe):
    with Engine(olmoe), pytest.raises(ConfigError, match="another engine"):
        Engine(olmoe)
    Engine(olmoe).close()


def test_a_closed_engine_says_so_and_has_told_the_scheduler(olmoe):
    engine = Engine(olmoe)
    engine.submit(PROMPTS[0])
    engine.close()
    engine.close()
    assert engine.scheduler.to_dict()["waiting"] == 0
    for call in (engine.step, lambda: engine.submit(PROMPTS[0])):
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_a_forward_in_another_thread_during_a_step_is_refused(olmoe, engine):
    caught = []

    def other():
        try:
            olmoe(torch.tensor([[3]]))
        except EmoeError as error:
            caught.append(error)

    def start(*_):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = olmoe.model.layers[1].register_forward_pre_hook(start)
    engine.submit(PROMPTS[1], max_new_tokens=1, sampling=GREEDY)
    engine.step()
    handle.remove()
    assert len(caught) == 1 and "another thread" in str(caught[0])


def test_a_step_within_a_step_is_refused(olmoe, engine):
    def again(*_):
        engine.step()

    handle = olmoe.model.layers[1].register_forward_pre_hook(again)
    id = engine.submit(PROMPTS[1], max_new_tokens=1, sampling=GREEDY)
    answers = Answers(engine).run()
    handle.remove()
    assert answers.reason(id) == "error" and "middle of a step" in str(answers.error(id))


def test_attention_that_was_not_tried_is_refused(olmoe):
    olmoe.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(UnsupportedModelError, match=r"flex_attention.*sdpa"):
            Engine(olmoe)
    finally:
        olmoe.config._attn_implementation = "sdpa"


def test_an_unknown_way_is_refused(olmoe):
    with pytest.raises((ConfigError, UnsupportedModelError), match="packed, forked, alone"):
        Engine(olmoe, way="fast")
