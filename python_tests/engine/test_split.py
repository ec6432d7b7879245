"""Whether bytes serve better as slots or as the state of one more request; and the bytes of requests that follow."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from engines import GREEDY, PROMPTS, Answers, alone

import emoe
from emoe.engine.engine import Engine
from emoe.engine.split import PATIENCE, Observed, Split
from emoe.errors import BudgetError, ConfigError


def split(miss=0.01, row=0.01, experts=100):
    """Half of the picks hit at half of the experts, in a line."""
    return Split(experts, lambda share: share, lambda: miss, lambda: row)


def saw(made, *, seconds=1.0, tokens=4, routed=100, missed=50):
    made.saw(Observed(seconds, tokens, routed, missed))
    return made


def test_a_slot_is_worth_the_misses_that_it_saves():
    made = saw(split())
    assert made.more_misses(50, 10) == pytest.approx(10)
    assert made.more_misses(50, 0) == 0
    assert made.more_misses(50, 100) == pytest.approx(50)


def test_the_level_of_misses_is_what_was_observed():
    assert saw(split(), missed=10).more_misses(50, 10) == pytest.approx(2)


def test_where_nothing_missed_the_curve_alone_says_what_will():
    assert saw(split(), missed=0).more_misses(100, 10) == pytest.approx(10)


def test_one_more_request_is_worth_it_while_its_misses_cost_less_than_its_token():
    # 4 tokens a second now; with one more 5 tokens in 1.01 s and 10 misses.
    assert saw(split(miss=0.001)).worth(50, 10)
    assert not saw(split(miss=0.1)).worth(50, 10)
    # The more run already, the less one more gives.
    assert saw(split(miss=0.01), tokens=4).worth(50, 10)
    assert not saw(split(miss=0.01), tokens=40).worth(50, 10)


def test_with_nobody_running_one_more_is_always_worth_it():
    assert split(miss=100).worth(50, 50)
    assert saw(split(miss=100), tokens=0).worth(50, 50)


def test_bytes_go_back_after_some_steps_in_which_nobody_waits():
    made = split()
    assert [made.idle(False) for _ in range(PATIENCE)] == [False] * (PATIENCE - 1) + [True]
    assert not made.idle(True) and not made.idle(False)


# In an engine


@pytest.fixture(scope="module")
def full():
    return families.build("qwen3_moe")


@pytest.fixture
def model(checkpoint):
    """Six slots in each of two layers, and a KV cache of one request of 64 tokens: a slot is 48 tokens."""
    made = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.8, context=64, batch=1)
    yield made
    made.emoe.close(restore=False)


def test_slots_are_lent_to_requests_that_wait_and_come_back(model, full):
    with Engine(model) as engine:
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=20, sampling=GREEDY) for prompt in PROMPTS[:3]]
        answers.step()
        assert engine.stats()["kv"]["slots_lent"] == 0 and len(engine.scheduler.running) == 2
        answers.step()
        assert engine.stats()["kv"]["slots_lent"] > 0 and len(engine.scheduler.running) == 3
        answers.run()
        last = engine.submit(PROMPTS[3], max_new_tokens=PATIENCE + 4, sampling=GREEDY)
        answers.run()
        assert engine.stats()["kv"]["slots_lent"] == 0
        assert [answers.tokens(id) for id in ids] == [alone(full, prompt, 20) for prompt in PROMPTS[:3]]
        assert answers.tokens(last) == alone(full, PROMPTS[3], PATIENCE + 4)


def test_slots_stay_where_a_request_would_cost_more_than_it_gives(model):
    with Engine(model) as engine:
        engine._split.worth = lambda *_: False
        for prompt in PROMPTS[:3]:
            engine.submit(prompt, max_new_tokens=20, sampling=GREEDY)
        for _ in range(3):
            engine.step()
        assert engine.stats()["kv"]["slots_lent"] == 0 and len(engine.scheduler.waiting) == 1


def test_a_request_larger_than_what_the_plan_reserved_borrows(checkpoint, full):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=0.8, context=100, batch=1)
    with Engine(model, kv_budget="auto") as engine:
        engine._kv.nbytes = engine._kv.least = 1000
        engine.scheduler.kv_bytes = 1000
        answers = Answers(engine)
        id = engine.submit(PROMPTS[2], max_new_tokens=20, sampling=GREEDY)
        answers.run()
        assert answers.tokens(id) == alone(full, PROMPTS[2], 20)
    assert model.emoe.lending.lent == 0
    model.emoe.close(restore=False)


def test_a_budget_of_bytes_stays_what_it_is(model):
    kv = model.emoe.plan.kv_bytes
    with Engine(model, kv_budget=kv + 1) as engine:
        assert engine.stats()["kv"] | {"used": 0} == {
            "bytes": kv + 1, "least": kv + 1, "most": kv + 1, "slots_lent": 1, "used": 0, "kept": 0,
        }  # fmt: skip
    assert model.emoe.lending.lent == 0
    with pytest.raises(BudgetError, match="kv_budget"):
        Engine(model, kv_budget="1GiB")
    with pytest.raises(ConfigError, match="kv_budget"):
        Engine(model, kv_budget="much")
    Engine(model).close()


def test_memory_of_lent_slots_is_free(checkpoint):
    model = emoe.from_pretrained(checkpoint("qwen3_moe"), memory_budget=1.0)
    model.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    runtime = model.emoe
    slab = runtime._bank.slab

    def touched():
        """Pages of the slab that are in memory."""
        with Path("/proc/self/pagemap").open("rb") as pages:
            pages.seek(slab.address // 4096 * 8)
            entries = pages.read(slab.slots * slab.slot_bytes // 4096 * 8)
        return sum(entry >> 7 for entry in entries[7::8])

    before = touched()
    lent = runtime.lending.lend(6)
    assert lent == 6 and before - touched() == 6 * slab.slot_bytes // 4096
    runtime.close(restore=False)
