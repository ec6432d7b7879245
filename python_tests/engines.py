"""What tests of the engine share: prompts, `generate` alone as the reference, and a run in which requests join."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from emoe.engine.engine import Engine
from emoe.engine.generation import Event
from emoe.engine.sampling import Sampling

_GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(3, 128, (size,), generator=_GENERATOR).tolist() for size in (19, 5, 26, 1)]
GREEDY = Sampling(eos=())


def alone(model: Any, prompt: list[int], count: int = 8, seed: int | None = None, **kwargs: Any) -> list[int]:
    """Tokens of `generate` for one request, with the model's own attention."""
    return logits_alone(model, prompt, count, seed, **kwargs)[0]


def logits_alone(
    model: Any, prompt: list[int], count: int = 8, seed: int | None = None, **kwargs: Any
) -> tuple[list[int], list[torch.Tensor]]:
    """As `alone`, and the raw logits of each token."""
    if seed is not None:
        torch.manual_seed(seed)
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count,
            output_logits=True, return_dict_in_generate=True, **kwargs,
        )  # fmt: skip
    finally:
        model.generation_config.eos_token_id = ends
    return out.sequences[0, len(prompt) :].tolist(), [step[0] for step in out.logits]


class Answers:
    """The events of an engine, put together by request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[Hashable, list[Event]] = {}

    def step(self) -> None:
        for event in self.engine.step():
            mine = self.events.setdefault(event.id, [])
            assert not mine or mine[-1].finish_reason is None, "an event after the last"
            mine.append(event)
        self.engine.check_integrity()

    def run(self) -> Answers:
        while self.engine.busy:
            self.step()
        return self

    def tokens(self, id: Hashable) -> list[int]:
        return [token for event in self.events.get(id, []) for token in event.tokens]

    def text(self, id: Hashable) -> str:
        return "".join(event.text for event in self.events[id])

    def reason(self, id: Hashable) -> str | None:
        return self.events[id][-1].finish_reason

    def error(self, id: Hashable) -> BaseException | None:
        return self.events[id][-1].error


def together(engine: Engine, prompts: Sequence[list[int]], *, count: int = 8, every: int = 2) -> list[list[int]]:
    """Tokens of each prompt; one joins every few steps."""
    answers, waiting, ids, steps = Answers(engine), list(prompts), [], 0
    while waiting or engine.busy:
        if waiting and steps % every == 0:
            ids.append(engine.submit(waiting.pop(0), max_new_tokens=count, sampling=GREEDY))
        answers.step()
        steps += 1
    for id in ids:
        if answers.error(id) is not None:
            raise AssertionError(f"{id}: {answers.error(id)!r}") from answers.error(id)
    return [answers.tokens(id) for id in ids]
