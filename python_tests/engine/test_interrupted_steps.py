"""Interrupts at any line of a step: every request gets its own tokens, text and end all the same."""

from __future__ import annotations

import linecache

import families
import pytest
from engines import PROMPTS, Answers
from interrupts import ROOT, interrupted

from emoe.engine.engine import Engine
from emoe.engine.sampling import Sampling

ROOMS = ("engine", "requests.py")


class Letters:
    """A tokenizer with a letter for each id."""

    def decode(self, tokens, **_):
        return "".join(chr(97 + token % 26) for token in tokens)


@pytest.fixture(scope="module")
def olmoe():
    return families.build("olmoe")


def _answers(engine):
    answers = Answers(engine)
    for number, prompt in enumerate(PROMPTS[:3]):
        sampling = Sampling(temperature=1.0, seed=number, eos=(), logprobs=1, stop=("qx",), repetition_penalty=1.2)
        engine.submit(prompt, max_new_tokens=4 + number, sampling=sampling, id=number)
    return answers


def _what(answers):
    """Of each request: tokens, text, log-probabilities, end."""
    assert not answers.engine.scheduler.running and not answers.engine.scheduler.kv_used
    return {
        id: (
            answers.tokens(id),
            answers.text(id),
            [
                round(logged[token], 4)
                for event in events
                for token, logged in zip(event.tokens, event.logprobs or (), strict=True)
            ],
            answers.reason(id),
        )
        for id, events in answers.events.items()
    }


@pytest.mark.parametrize("step", [0, 2, 4], ids=["prompts", "tokens", "ends"])
def test_an_interrupt_at_any_line_of_a_step_changes_no_token_and_loses_no_end(olmoe, step):
    def run(at):
        with Engine(olmoe, Letters(), chunk_rows=64, way="packed") as engine:
            answers, where = _answers(engine), ""
            for _ in range(step):
                answers.step()
            if at is not None:
                where = interrupted(answers.step, at, ROOMS)
            left = 60
            while engine.busy and left:
                answers.step()
                left -= 1
            assert left, f"interrupted at {where} the engine never ends"
            return _what(answers), where

    expected, _ = run(None)
    at, seen = step, 0  # other lines in each step
    while True:
        found, where = run(at)
        if not where:
            break
        file, _, line = where.rpartition(":")
        # Python takes no signal between the last statement and this: nothing is called in between.
        if linecache.getline(str(ROOT / file), int(line)).strip() != "return events":
            assert found == expected, f"interrupted at {where}"
        at, seen = at + 1 + at // 10, seen + 1
    assert seen > 40
