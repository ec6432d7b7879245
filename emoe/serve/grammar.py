"""`response_format`: tokens that keep to JSON, or to a JSON schema, by llguidance where it is installed."""

from __future__ import annotations

import json
from typing import Any

import torch

from emoe.errors import ConfigError, one_line
from emoe.serve.protocol import ResponseFormat
from emoe.serve.refusals import Refusal

_COMPACT: Any = {"whitespace_flexible": False}  # small models fill an answer with blanks where they may


class Grammars:
    """Args:
    tokenizer: of the model.
    vocabulary: token ids are below it.
    ends: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._made: Any = None

    def processor(self, form: ResponseFormat, prompt: int) -> JsonTokens:
        """Of one answer. The first call takes a second or so for a large vocabulary.

        Args:
            prompt: tokens before the answer.

        Raises:
            Refusal: llguidance is not here, or does not take the schema.
        """
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise Refusal(
                400, "response_format needs llguidance, which this server does not have (pip install llguidance)",
                "unsupported", param="response_format",
            ) from None  # fmt: skip
        schema: Any = form.json_schema.schema_ if form.json_schema is not None else {"type": "object"}
        try:
            if self._made is None:
                self._made = from_tokenizer(self._tokenizer, self._vocabulary, self._ends or None)
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
            matcher = LLMatcher(self._made, grammar)
        except ValueError as error:
            raise Refusal(400, one_line(error), "invalid_schema", param="response_format") from error
        if matcher.is_error():
            raise Refusal(400, one_line(ValueError(matcher.get_error())), "invalid_schema", param="response_format")
        return JsonTokens(matcher, prompt)


class JsonTokens:
    """A logits processor: tokens that cannot follow have a score of -inf.

    Raises:
        ConfigError: the grammar was left, or grew beyond llguidance's limits.
    """

    def __init__(self, matcher: Any, prompt: int) -> None:
        self._matcher, self._seen = matcher, prompt

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids [1, T], scores [1, V] -> scores [1, V]."""
        new = ids[0, self._seen :].tolist()
        self._seen += len(new)
        if (new and not self._matcher.consume_tokens(new)) or self._matcher.is_error():
            raise ConfigError(f"response_format cannot go on: {self._matcher.get_error() or 'no token follows'}")
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()  # [at least V]
        mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
        mask[: len(allowed)] = allowed[: len(mask)]
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))
