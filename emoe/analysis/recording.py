"""Runs a model over prompts: their routing as a trace, how likely it found their texts, and a timeline of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emoe import timeline
from emoe.analysis.workload import text_loss
from emoe.errors import ConfigError
from emoe.runtime import runtime_of
from emoe.sensitivity import Sample, SensitivityProfile, measure
from emoe.trace import Trace

SENSITIVITY_TOKENS = 16
PROMPTS = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Chat:
    """A prompt of a task, and the answer that follows it in the texts that are scored; "" for none."""

    task: str
    prompt: str
    reference: str


def load_prompts(path: str | Path = PROMPTS) -> list[Chat]:
    """Reads JSON lines with `task`, `prompt` and, if wanted, `reference`; other keys are not looked at.

    Raises:
        ConfigError: a line is no such object, or there is none; names file and line.
    """
    chats = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
        value = value if isinstance(value, dict) else {}
        task, prompt, reference = (value.get(name, "") for name in ("task", "prompt", "reference"))
        if not all(isinstance(each, str) for each in (task, prompt, reference)) or not task or not prompt.strip():
            raise ConfigError(
                f'{path}, line {number}: expected {{"task": ..., "prompt": ..., "reference": ...}} of text'
            )
        chats.append(Chat(task, prompt, reference))
    if not chats:
        raise ConfigError(f"{path} has no prompts")
    return chats


def encode(tokenizer: Any, chat: Chat) -> torch.Tensor:
    """Token ids [1, S] of prompt and reference, through the chat template where there is one; ready to be answered
    where there is no reference."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": chat.prompt}]
        turns += [{"role": "assistant", "content": chat.reference}] if chat.reference else []
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not chat.reference)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(f"{chat.prompt} {chat.reference}".strip(), return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise ConfigError(f"the text {chat.prompt[:40]!r} has fewer than two tokens")
    return torch.as_tensor(ids)


@dataclass(frozen=True)
class Recording:
    """What `record` found; prompt n of the trace is chats[n].

    Attributes:
        texts: token ids [1, S] of each chat.
        losses: of each chat, the sum of the negative log likelihoods of all tokens but the first.
    """

    trace: Trace
    texts: list[torch.Tensor]
    losses: list[float]


def record(
    model: Any, tokenizer: Any, chats: Sequence[Chat], path: Path, on_step: Callable[[], None] = lambda: None
) -> Recording:
    """One forward of each chat's text by a model under emoe in mode `exact`; the trace is written to `path` too."""
    texts = [encode(tokenizer, chat) for chat in chats]
    losses = []
    with runtime_of(model).record(path) as recorder:
        for number, (chat, ids) in enumerate(zip(chats, texts, strict=True)):
            recorder.mark(task=chat.task, prompt=number)
            losses.append(text_loss(model, ids))
            on_step()
        trace = recorder.trace()
    return Recording(trace, texts, losses)


def profile_sensitivity(model: Any, tokenizer: Any, chats: Sequence[Chat], stride: int) -> SensitivityProfile:
    """Experiment 3: `emoe.sensitivity.measure` of some prompts of each task, every `stride` layers."""
    samples = [
        Sample(chat.task, tuple(encode(tokenizer, Chat(chat.task, chat.prompt, ""))[0].tolist())) for chat in chats
    ]
    return measure(model, samples, stride=stride, new_tokens=SENSITIVITY_TOKENS)


def answer(
    model: Any, tokenizer: Any, chats: Sequence[Chat], new_tokens: int, on_step: Callable[[], None] = lambda: None
) -> timeline.Timeline:
    """A timeline of greedy answers to each chat's prompt."""
    with timeline.watch(model) as found:
        for chat in chats:
            ids = encode(tokenizer, Chat(chat.task, chat.prompt, ""))
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            )
            on_step()
    return found
