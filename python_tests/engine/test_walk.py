"""Requests join, leave and are cancelled at random, while bytes move between slots and states: no token changes."""

from __future__ import annotations

import families
import pytest
from engines import GREEDY, PROMPTS, Answers, alone
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import emoe
from emoe.engine.engine import Engine

COUNT = 12
ALL = [*PROMPTS, [*PROMPTS[2], 9, 9], PROMPTS[0][:7]]  # two that share prefixes with others


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "jamba"])
def test_a_random_walk_changes_no_token(family, checkpoint):
    full = families.build(family)
    expected = [alone(full, prompt, COUNT) for prompt in ALL]
    model = emoe.from_pretrained(checkpoint(family), memory_budget=0.7, context=64, batch=1)

    class Walk(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.engine = Engine(model, chunk_rows=11, most_running=4, scheduler="fcfs")
            self.answers = Answers(self.engine)
            self.asked = {}  # id -> (number of the prompt, tokens asked for)
            self.cancelled = set()

        @rule(number=st.integers(0, len(ALL) - 1), count=st.integers(1, COUNT))
        def submit(self, number, count):
            id = self.engine.submit(ALL[number], max_new_tokens=count, sampling=GREEDY)
            self.asked[id] = number, count

        @rule(steps=st.integers(1, 6))
        def step(self, steps):
            for _ in range(steps):
                self.answers.step()

        @precondition(lambda self: self.asked)
        @rule(data=st.data())
        def cancel(self, data):
            id = data.draw(st.sampled_from(sorted(self.asked)))
            self.engine.cancel(id)
            self.cancelled.add(id)

        @rule(slots=st.integers(1, 5))
        def lend(self, slots):
            kv = self.engine._kv
            kv.grow(min(kv.most, kv.nbytes + slots * model.emoe.plan.slot_bytes))
            self.engine.scheduler.kv_bytes = kv.nbytes

        @rule()
        def take_back(self):
            self.engine._kv.shrink(max(self.engine.scheduler.least_kv_bytes, self.engine.scheduler.kv_used))
            self.engine._kept.clear()
            self.engine.scheduler.kv_bytes = self.engine._kv.nbytes

        @rule()
        def generate(self):
            assert alone(model, ALL[1], 3) == expected[1][:3]

        @invariant()
        def whole(self):
            self.engine.check_integrity()
            for id, (number, _) in self.asked.items():
                had = self.answers.tokens(id)
                assert had == expected[number][: len(had)]

        def teardown(self):
            self.answers.run()
            for id, (number, count) in self.asked.items():
                had, reason = self.answers.tokens(id), self.answers.reason(id)
                assert had == expected[number][: len(had)]
                assert (reason == "length" and len(had) == count) or (reason == "cancelled" and id in self.cancelled)
            assert self.engine.scheduler.kv_used == 0
            self.engine.close()
            assert model.emoe.lending.lent == 0
            model.emoe.check_integrity()

    Walk.TestCase.settings = settings(max_examples=8, stateful_step_count=20)
    Walk.TestCase().runTest()
    model.emoe.close(restore=False)
