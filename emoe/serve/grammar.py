"""`response_format`: tokens that keep to JSON, or to a JSON schema, by llguidance where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
        except ImportError:
            raise Refusal(
                400, "response_format needs llguidance, which this server does not have (pip install llguidance)",
                "unsupported", param="response_format",
            ) from None  # fmt: skip
        if not self._ends:
            raise Refusal(
                400, "response_format needs a model with an end token, which this one's generation config lacks",
                "unsupported", param="response_format",
            )  # fmt: skip
        schema: Any = form.json_schema.schema_ if form.json_schema is not None else {"type": "object"}
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
            made = JsonTokens(grammar, prompt)
            self.bind([made])
        except ValueError as error:
            raise Refusal(400, one_line(error), "invalid_schema", param="response_format") from error
        return made

    def bind(self, processors: Iterable[Any]) -> None:
        """Gives those of these logits processors that keep to a grammar their matchers.

        Raises:
            ValueError: llguidance does not take a grammar.
        """
        for each in processors:
            if not isinstance(each, JsonTokens):
                continue
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer

            if self._made is None:
                self._made = from_tokenizer(self._tokenizer, self._vocabulary, self._ends or None)
            each.matcher = LLMatcher(self._made, each.grammar)
            if each.matcher.is_error():
                raise ValueError(each.matcher.get_error())


class JsonTokens:
    """A logits processor: tokens that cannot follow have a score of -inf.

    A pickle has the grammar without its state, and `Grammars.bind` begins anew: nothing of the answer may have come.

    Raises:
        ConfigError: the grammar was left, or grew beyond llguidance's limits.
    """

    def __init__(self, grammar: str, prompt: int) -> None:
        self.grammar, self._prompt = grammar, prompt
        self.matcher: Any = None
        self._seen = prompt

    def __reduce__(self) -> tuple[type[JsonTokens], tuple[str, int]]:
        return JsonTokens, (self.grammar, self._prompt)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids [1, T], scores [1, V] -> scores [1, V]."""
        new = ids[0, self._seen :].tolist()
        self._seen += len(new)
        if (new and not self.matcher.consume_tokens(new)) or self.matcher.is_error():
            # What follows the first sentence is the library's state.
            why = (self.matcher.get_error() or "no token follows").split("\n", 1)[0].split(" <", 1)[0]
            raise ConfigError(f"response_format cannot go on: {why}")
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()  # [at least V]
        mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
        mask[: len(allowed)] = allowed[: len(mask)]
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))
