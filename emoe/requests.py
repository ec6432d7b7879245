"""Tells from what a forward is given whether a request begins with it. Knows no runtime.

With a KV cache: it does where nothing is in the cache. Without one a forward has the whole text: it does unless that
is the text of the forward before and one token more, as `generate(use_cache=False)` gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class RequestStart:
    """Looks at one forward after the other."""

    def __init__(self) -> None:
        self._text: torch.Tensor | None = None  # [B, T] of the last forward without a KV cache

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the forward with these arguments begins a request."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            self._text = None
            return not cached_tokens(cache)
        text = kwargs.get("input_ids", args[0] if args else None)
        before, self._text = self._text, text
        return before is None or text is None or not continues(text, before)


def cached_tokens(cache: Any) -> int:
    """How many tokens a KV cache has seen."""
    # The first layer may be one that keeps no tokens, and says 0 for ever.
    layers = getattr(cache, "layers", None) or [cache]
    counts = (int(getattr(layer, "get_seq_length", int)()) for layer in layers)
    return next((count for count in counts if count), 0)


def continues(text: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether each row of `text` [B, T + 1] is a row of `before` [B, T] and a token more; a beam may change its row."""
    if text.shape != (before.shape[0], before.shape[1] + 1):
        return False
    return bool((text[:, None, :-1] == before).all(-1).any(-1).all())
