"""Runs a model over prompts: their routing as a trace, how likely it found their texts, and a timeline of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emoe.analysis import timeline
from emoe.analysis.workload import text_loss
from emoe.errors import ConfigError
from emoe.runtime import runtime_of
from emoe.sensitivity import Sample, SensitivityProfile, measure
from emoe.tasks import Prompt
from emoe.trace.trace import Trace

SENSITIVITY_TOKENS = 16
PROMPTS = Path(__file__).with_name("prompts.jsonl")


def encode(tokenizer: Any, prompt: Prompt, *, answered: bool = True) -> torch.Tensor:
    """Token ids [1, S] of a prompt and its reference, through the chat template where there is one.

    Args:
        answered: False leaves the reference away: ready to be answered, as is a prompt that has none.

    Raises:
        ConfigError: fewer than two tokens.
    """
    reference = prompt.reference if answered else ""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt.prompt}]
        turns += [{"role": "assistant", "content": reference}] if reference else []
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not reference)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(f"{prompt.prompt} {reference}".strip(), return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise ConfigError(f"the text {prompt.prompt[:40]!r} has fewer than two tokens")
    return torch.as_tensor(ids)


@dataclass(frozen=True)
class Recording:
    """What `record` found; prompt n of the trace is prompts[n].

    Attributes:
        texts: token ids [1, S] of each prompt.
        losses: of each prompt, the sum of the negative log likelihoods of all tokens but the first.
    """

    trace: Trace
    texts: list[torch.Tensor]
    losses: list[float]


def record(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], path: Path, on_step: Callable[[], None] = lambda: None
) -> Recording:
    """One forward of each prompt's text by a model under emoe in mode `exact`; the trace is written to `path` too."""
    texts = [encode(tokenizer, prompt) for prompt in prompts]
    losses = []
    with runtime_of(model).record(path) as recorder:
        for number, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
            recorder.mark(task=prompt.task, prompt=number)
            losses.append(text_loss(model, ids))
            on_step()
        trace = recorder.trace()
    return Recording(trace, texts, losses)


def profile_sensitivity(model: Any, tokenizer: Any, prompts: Sequence[Prompt], stride: int) -> SensitivityProfile:
    """Experiment 3: `emoe.sensitivity.measure` of some prompts of each task, every `stride` layers."""
    samples = [Sample(prompt.task, tuple(encode(tokenizer, prompt, answered=False)[0].tolist())) for prompt in prompts]
    return measure(model, samples, stride=stride, new_tokens=SENSITIVITY_TOKENS)


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], new_tokens: int, on_step: Callable[[], None] = lambda: None
) -> timeline.Timeline:
    """A timeline of greedy answers to each prompt."""
    with timeline.watch(model) as found:
        for prompt in prompts:
            ids = encode(tokenizer, prompt, answered=False)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            )
            on_step()
    return found
