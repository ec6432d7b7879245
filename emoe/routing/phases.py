"""Whether rows of a layer belong to a prompt or to decode, told by the forward that they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import local
from typing import Any

import torch

from emoe.requests import Requests, Span, cached_tokens


class _Forward(local):
    """Of a thread: sequences that its forward has one more token of each of; 0 where it has more, 1 without forward."""

    sequences = 1

    def __reduce__(self) -> tuple[type[_Forward], tuple[()]]:
        return _Forward, ()  # modes are copied with their routers


class Phases:
    """Args:
    requests: whose rows are, and whether a forward is a batch of several of them.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._forward = _Forward()

    def forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A forward of the model is about to run in this thread: with a token more of each sequence it is decode."""
        if torch.compiler.is_compiling():
            return
        text = kwargs.get("input_ids", args[0] if args else None)
        if text is None:
            text = kwargs.get("inputs_embeds")
        cache = kwargs.get("past_key_values")
        one = isinstance(text, torch.Tensor) and text.dim() > 1 and text.shape[1] == 1
        self._forward.sequences = text.shape[0] if one and cache is not None and cached_tokens(cache) else 0

    def decode(self, spans: Sequence[Span]) -> list[bool]:
        """Of each span whether its rows are decode.

        In a batch of requests a span of one row is; without a forward of the model before it, one row alone.
        """
        rows = [span.stop - span.start for _, span in spans]
        if self._requests.batched:
            return [count == 1 for count in rows]
        return [count == self._forward.sequences for count in rows]
