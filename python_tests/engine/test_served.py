"""An engine on models of emoe: budgets, checkpoints of few bits, tasks, predictors and policies beside it."""

from __future__ import annotations

import families
import numpy as np
import pytest
import quantized
import torch
import transformers as tf
from engines import GREEDY, PROMPTS, Answers, alone, together

import emoe
from emoe.engine import calibrate
from emoe.engine.costs import Costs
from emoe.engine.engine import Engine
from emoe.predictor.table import TaskTable


def table(layers=2, experts=families.EXPERTS):
    """Experts 0 to 2 for chat, 5 to 7 for code, in every layer."""
    frequency = np.zeros((2, layers, experts), dtype=np.float32)
    frequency[0, :, :3], frequency[1, :, 5:] = 1.0, 1.0
    return TaskTable(frequency, ("chat", "code"))


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_next", "jamba"]
)
def test_within_a_budget_requests_get_the_tokens_of_the_whole_model(checkpoint, family):
    full = families.build(family)
    expected = [alone(full, prompt) for prompt in PROMPTS]
    model = emoe.from_pretrained(checkpoint(family), memory_budget=0.5, context=64, batch=3)
    with Engine(model, chunk_rows=11) as engine:
        assert together(engine, PROMPTS) == expected
        assert [alone(model, prompt) for prompt in PROMPTS] == expected
    model.emoe.close(restore=False)


@pytest.mark.parametrize(
    "name", [next(each for each in quantized.FORMATS if kind in each) for kind in ("fp8", "mxfp4")]
)
def test_experts_of_few_bits_give_the_tokens_of_generate(tmp_path, name):
    quantized.write(tmp_path, quantized.FORMATS[name])
    model = emoe.from_pretrained(tmp_path / "quantized", memory_budget=0.5, dtype="float32", context=64, batch=2)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    with Engine(model, chunk_rows=11) as engine:
        assert together(engine, PROMPTS) == expected
    model.emoe.close(restore=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "jamba"])
def test_in_16_bits_requests_of_one_batch_give_what_they_give_alone_in_an_engine(checkpoint, family):
    """Sums of another shape differ in the last bit, so the reference is the engine, one request at a time."""
    model = emoe.from_pretrained(checkpoint(family, torch.bfloat16), memory_budget=0.5, context=64, batch=3)
    with Engine(model, chunk_rows=32) as engine:
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=4, sampling=GREEDY) for prompt in PROMPTS]
        answers.run()
        first = [answers.tokens(id)[0] for id in ids]
    assert sum(token == alone(model, prompt, 1)[0] for token, prompt in zip(first, PROMPTS, strict=True)) >= 3
    model.emoe.close(restore=False)


@pytest.mark.parametrize("policy", emoe.Scheduler.__init__.__globals__["POLICIES"])
def test_every_policy_changes_when_a_request_runs_and_never_what_it_gets(checkpoint, policy):
    full = families.build("qwen3_moe")
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.7, predictor=table(), context=64)
    with Engine(model, scheduler=policy, chunk_rows=11, most_running=2) as engine:
        answers, tasks = Answers(engine), ("chat", "code", None, "poetry")
        ids = [
            engine.submit(prompt, max_new_tokens=8, sampling=GREEDY, task=task, ttft_slo_ms=60_000, tpot_slo_ms=60_000)
            for prompt, task in zip(PROMPTS, tasks, strict=True)
        ]
        answers.run()
        assert [answers.tokens(id) for id in ids] == [alone(full, prompt) for prompt in PROMPTS]
        assert [answers.events[id][-1].task for id in ids] == list(tasks)
    model.emoe.close(restore=False)


class Tickets(emoe.Scheduler):
    def __init__(self, **options):
        super().__init__("fcfs", **options)
        self.seen = []

    def submit(self, ticket, now):
        self.seen.append(ticket)
        super().submit(ticket, now)


class Classifier:
    """Takes what has an `a` for chat, and knows nothing of the rest."""

    def classify(self, text):
        return type("Classification", (), {"task": "chat" if "a" in text else None})


class Letters:
    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % 60 for letter in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(97 + token % 20) for token in tokens)


def test_requests_are_classified_or_say_their_task_and_unknown_is_an_answer(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.75, predictor=table(), slack=0.5)
    scheduler = Tickets(kv_bytes=model.emoe.plan.kv_bytes)
    with Engine(model, Letters(), scheduler=scheduler, classifier=Classifier()) as engine:
        for text, task in (("a b", None), ("b c", None), ("a b", "code")):
            engine.submit(text, max_new_tokens=2, sampling=GREEDY, task=task)
        assert [ticket.task for ticket in scheduler.seen] == ["chat", None, "code"]
        chat, unknown, code = (ticket.experts for ticket in scheduler.seen)
        assert chat == {(layer, expert) for layer in (0, 1) for expert in (0, 1, 2)}
        assert code == {(layer, expert) for layer in (0, 1) for expert in (5, 6, 7)}
        assert not unknown  # left to the policy: nothing is known
        assert [event.task for event in engine.run()][-1] in ("chat", None, "code")
    assert model.emoe.stats()["prediction"]["requests"] == 3
    model.emoe.close(restore=False)


def test_the_base_set_is_for_what_runs_and_what_waits(checkpoint):
    model = emoe.from_pretrained(
        checkpoint("qwen3_moe"), memory_budget=0.75, predictor=table(), slack=0.5, context=64, batch=4
    )
    base = model.emoe.base
    with Engine(model, scheduler="fcfs", most_running=1) as engine:
        engine.submit(PROMPTS[1], max_new_tokens=4, sampling=GREEDY, task="chat")
        engine.submit(PROMPTS[2], max_new_tokens=30, sampling=GREEDY, task="code")
        engine.step()
        assert {int(expert) for expert in np.flatnonzero(base._base[0])} == {5, 6, 7}
        list(engine.run())
    assert base.stats()["requests"] == 2 and len(base._streams) == 0
    model.emoe.close(restore=False)


def test_a_step_tells_the_scheduler_what_it_read(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.4)
    scheduler, steps = Tickets(kv_bytes=model.emoe.plan.kv_bytes), []
    scheduler.ran = lambda step, now: (steps.append(step), emoe.Scheduler.ran(scheduler, step, now))
    with Engine(model, scheduler=scheduler) as engine:
        id = engine.submit(PROMPTS[0], max_new_tokens=3, sampling=GREEDY)
        list(engine.run())
    assert [step.rows for step in steps] == [{id: 19}, {id: 1}, {id: 1}]
    assert [step.tokens for step in steps] == [{id: 1}] * 3
    assert sum(step.loaded_bytes for step in steps) == model.emoe.stats()["bytes_read"] > 0
    assert all(step.seconds > 0 for step in steps)
    model.emoe.close(restore=False)


def test_steps_stay_within_the_chunk_that_activations_were_planned_for(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.5, prefill_chunk=8, context=64)
    with Engine(model) as engine:
        assert engine.scheduler.chunk_rows == 8 and engine.context == 64
    model.emoe.close(restore=False)


def test_a_read_that_fails_ends_no_request_that_goes_on_without_it(checkpoint, monkeypatch):
    """The step fails; each request runs again alone, and reads again."""
    full = families.build("qwen3_moe")
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.4, context=64, batch=2)
    with Engine(model) as engine:
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=6, sampling=GREEDY) for prompt in PROMPTS[:2]]
        answers.step()
        rounds, failed = model.emoe.loader.rounds, []

        def once(layer, experts, *rest):
            if not failed:
                failed.append(layer)
                raise emoe.errors.ReadError("the disk is gone for a moment")
            return rounds(layer, experts, *rest)

        monkeypatch.setattr(model.emoe.loader, "rounds", once)
        answers.run()
        assert failed and engine.stats()["restarts"] == 2
        assert [answers.tokens(id) for id in ids] == [alone(full, prompt, 6) for prompt in PROMPTS[:2]]
    model.emoe.close(restore=False)


def test_a_closed_runtime_ends_requests_with_an_error(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.4)
    engine = Engine(model)
    id = engine.submit(PROMPTS[0], max_new_tokens=6, sampling=GREEDY)
    model.emoe.close(restore=False)
    (event,) = engine.step()
    assert event.id == id and event.finish_reason == "error" and isinstance(event.error, emoe.errors.ClosedError)
    engine.close()


def test_an_engine_needs_a_decoder():
    config = tf.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, num_experts=2, decoder_start_token_id=0
    )
    with pytest.raises(emoe.errors.UnsupportedModelError, match="encoder"):
        Engine(tf.SwitchTransformersForConditionalGeneration(config).eval())


def test_an_engine_begins_with_the_costs_that_were_calibrated(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.4)
    costs = Costs(forward=0.5, row=0.25, byte=1e-6, expert=0.125)
    calibrate.keep(calibrate.key_of(model, str(checkpoint("qwen3_moe"))), calibrate.Calibration(costs, 0.1, 1))
    with Engine(model) as engine:
        assert engine.scheduler.costs == costs
        engine.submit(PROMPTS[0], max_new_tokens=3, sampling=GREEDY)
        list(engine.run())
        assert engine.scheduler.costs != costs  # what steps took corrects them
    model.emoe.close(restore=False)


def test_requests_of_an_engine_are_probed_each_with_its_own_text(checkpoint, monkeypatch):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.6, context=64, batch=4)
    model.emoe.probe(share=1.0)
    probed = []
    prober = model.emoe._probes._prober
    monkeypatch.setattr(
        model.emoe._probes,
        "_prober",
        lambda ids, task, **how: (probed.append(ids.tolist()), prober(ids, task, **how))[1],
    )
    with Engine(model, chunk_rows=11) as engine:
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=4, sampling=GREEDY, task="chat") for prompt in PROMPTS[:3]]
        answers.run()
        expected = [[*prompt, *answers.tokens(id)[:-1]] for id, prompt in zip(ids, PROMPTS, strict=False)]
    assert sorted(probed) == sorted(expected)
    assert model.emoe.stats()["sensitivity"]["probes"] == 3
    model.emoe.close(restore=False)
