"""What a caller gives as a prompt: tokens, text, messages of a chat, or a processor's output with images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from emoe.errors import ConfigError


class Prompt(NamedTuple):
    """Attributes:
    tokens: ids, at least one.
    text: for a task classifier; None where it is not known.
    inputs: further arguments of the model: images and what belongs to them.
    """

    tokens: list[int]
    text: str | None
    inputs: dict[str, Any]


def read(prompt: Any, tokenizer: Any, vocabulary: int, template: Mapping[str, Any] | None = None) -> Prompt:
    """Args:
        prompt: text; messages [{"role": ..., "content": ...}]; token ids [S] or [1, S], as a list or tensor; or what a
            processor of Transformers gives: a mapping with input_ids [1, S].
        tokenizer: for text and messages.
        vocabulary: ids are below it.
        template: further arguments of `apply_chat_template` (tools, chat_template, ...).

    Raises:
        ConfigError: it is none of these, is empty, has an id that the model does not have, or needs a tokenizer.
    """
    if isinstance(prompt, str):
        text: str | None = prompt
        tokens = _with(tokenizer, "text")(prompt)["input_ids"]
    elif isinstance(prompt, Mapping):
        given = {name: value for name, value in prompt.items() if name != "attention_mask"}
        mask = prompt.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
            raise ConfigError("the prompt's attention_mask leaves tokens out; give input_ids without padding")
        if "input_ids" not in given:
            raise ConfigError(f"a prompt with {', '.join(sorted(given)) or 'nothing'} has no input_ids")
        found = read(given.pop("input_ids"), tokenizer, vocabulary)
        return Prompt(found.tokens, found.text, given)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        text = _last_of_user(prompt)
        tokens = _chat(_with(tokenizer, "messages"), list(prompt), dict(template or {}))
    else:
        tokens = _ids(prompt)
        text = None if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""
    if not tokens:
        raise ConfigError("the prompt has no tokens")
    wrong = next((each for each in tokens if not isinstance(each, int) or not 0 <= each < vocabulary), None)
    if wrong is not None:
        raise ConfigError(f"the prompt has {wrong!r}; tokens are ids from 0 to {vocabulary - 1}, of one sequence")
    return Prompt(tokens, text, {})


def _ids(prompt: Any) -> list[Any]:
    """What lies in a list, tuple, tensor or array, of one dimension or of one row."""
    found = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(found, (list, tuple)):
        if len(found) == 1 and (isinstance(found[0], (list, tuple)) or getattr(found[0], "ndim", 0) > 0):
            return _ids(found[0])
        return [each.item() if hasattr(each, "item") else each for each in found]
    raise ConfigError(f"the prompt is {type(prompt).__name__}: give text, messages, or token ids as a list or tensor")


def positions(model: Any, prompt: Prompt) -> tuple[dict[str, Any], int]:
    """Arguments of the model for a prompt with images, and what is added to the positions of tokens after it.

    Families that count an image's tokens by its grid say so themselves; what they keep of it on the model is of the
    last request alone, so positions are always given to them.
    """
    if not prompt.inputs:
        return {}, 0
    index = getattr(getattr(model, "model", None), "get_rope_index", None)
    if index is None:
        return prompt.inputs, 0
    names = inspect.signature(index).parameters
    given = {name: value for name, value in prompt.inputs.items() if name in names}
    tokens = torch.tensor([prompt.tokens], device=model.device)
    found, delta = index(tokens, **given)
    return {**prompt.inputs, "position_ids": found}, int(delta.reshape(-1)[0])


def _with(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise ConfigError(f"the prompt is {what}, which needs Engine(tokenizer=...); without one give token ids")
    return tokenizer


def _chat(tokenizer: Any, messages: list[Any], template: dict[str, Any]) -> Any:
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in template:
        raise ConfigError("this tokenizer has no chat template; give text, or template={'chat_template': ...}")
    template = {"add_generation_prompt": True, **template}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template)["input_ids"]
    except Exception as error:  # whatever a template raises about messages that it does not take
        raise ConfigError(f"the chat template does not take these messages: {error}") from error


def _last_of_user(messages: Sequence[Mapping[str, Any]]) -> str | None:
    contents = [each.get("content") for each in messages if each.get("role") == "user"]
    return contents[-1] if contents and isinstance(contents[-1], str) else None
