"""What clients get: OpenAI's objects of whole answers and of the pieces of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from emoe.engine.generation import Event

_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop"}


class Choice:
    """One answer as its events come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[dict[int, float]] = []
        self.finish_reason: str | None = None
        self.prompt_tokens = self.shared_tokens = self.output_tokens = 0

    def add(self, event: Event) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs or ()
        self.prompt_tokens, self.shared_tokens = event.prompt_tokens, event.shared_tokens
        self.output_tokens = event.output_tokens
        if event.finish_reason is not None:
            self.finish_reason = _REASONS.get(event.finish_reason, "stop")

    def clear(self) -> None:
        """What it has so far was sent."""
        self.text, self.tokens, self.logprobs = "", [], []


class Shape:
    """How answers of an endpoint look.

    Args:
        id: of the answer.
        model: its name.
        tokenizer: names tokens.
        alternatives: asked for with each token's log-probability; None where that was not asked for.
    """

    whole_object = piece_object = ""

    def __init__(self, id: str, model: str, tokenizer: Any, alternatives: int | None) -> None:
        self.id, self._model, self._tokenizer, self._alternatives = id, model, tokenizer, alternatives
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
        """Args:
        choices: all answers, ended.
        per_prompt: how many of them each prompt has.
        """
        return {
            **self._head(self.whole_object),
            "choices": [self._choice(each) for each in choices],
            "usage": usage(choices, per_prompt),
        }

    def piece(self, choice: Choice, first: bool, counted: bool) -> dict[str, Any]:
        """What a choice has to send.

        Args:
            first: nothing was sent of it yet.
            counted: the stream's last piece has a usage, so the others say that they have none.
        """
        return {
            **self._head(self.piece_object),
            "choices": [self._delta(choice, first)],
            **({"usage": None} if counted else {}),
        }

    def last_piece(self, choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
        return {**self._head(self.piece_object), "choices": [], "usage": usage(choices, per_prompt)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, choice: Choice, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _token(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class ChatShape(Shape):
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": choice.index, "message": message, **self._end(choice)}

    def _delta(self, choice: Choice, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": choice.text} if first else {"content": choice.text}
        if not first and not choice.text and not choice.tokens:
            delta = {}
        return {"index": choice.index, "delta": delta, **self._end(choice)}

    def _end(self, choice: Choice) -> dict[str, Any]:
        logged = None
        if self._alternatives is not None:
            pairs = zip(choice.tokens, choice.logprobs, strict=True)
            logged = {"content": [self._logged(token, found) for token, found in pairs], "refusal": None}
        return {"logprobs": logged, "finish_reason": choice.finish_reason}

    def _logged(self, token: int, found: dict[int, float]) -> dict[str, Any]:
        best = _likeliest(found)[: self._alternatives]
        return {**self._one(token, found[token]), "top_logprobs": [self._one(*each) for each in best]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        # Half a character has no text of its own, and a tokenizer does not say which bytes it is.
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


class CompletionShape(Shape):
    whole_object = piece_object = "text_completion"

    def __init__(self, id: str, model: str, tokenizer: Any, alternatives: int | None) -> None:
        super().__init__(id, model, tokenizer, alternatives)
        self._offsets: dict[int, int] = {}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logged = None
        if self._alternatives is not None:
            names = [self._token(token) for token in choice.tokens]
            offsets, offset = [], self._offsets.get(choice.index, 0)
            for name in names:
                offsets.append(offset)
                offset += len(name)
            self._offsets[choice.index] = offset
            logged = {
                "tokens": names,
                "token_logprobs": [found[token] for token, found in zip(choice.tokens, choice.logprobs, strict=True)],
                "top_logprobs": [
                    {self._token(token): value for token, value in _likeliest(found)} for found in choice.logprobs
                ],
                "text_offset": offsets,
            }
        return {
            "index": choice.index, "text": choice.text, "logprobs": logged, "finish_reason": choice.finish_reason,
        }  # fmt: skip

    def _delta(self, choice: Choice, first: bool) -> dict[str, Any]:
        return self._choice(choice)


def usage(choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
    """Each prompt counts once, however many answers it has."""
    prompts = choices[::per_prompt]
    asked, given = sum(each.prompt_tokens for each in prompts), sum(each.output_tokens for each in choices)
    return {
        "prompt_tokens": asked,
        "completion_tokens": given,
        "total_tokens": asked + given,
        "prompt_tokens_details": {"cached_tokens": sum(each.shared_tokens for each in prompts)},
    }


def _likeliest(found: dict[int, float]) -> list[tuple[int, float]]:
    return sorted(found.items(), key=lambda each: -each[1])
