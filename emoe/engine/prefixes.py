"""Tokens that requests have in common are computed once: keys and values are copied, where every layer keeps all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import DynamicCache

from emoe.engine.generation import Generation
from emoe.engine.state import copy_prefix


def share(generation: Generation, others: Sequence[Generation]) -> int:
    """Copies the longest prefix that another request has run, and returns its tokens. A prompt's last always runs."""
    best, source = 0, None
    for other in others:
        if other is generation or other.inputs or not isinstance(other.state, DynamicCache) or other.done <= best:
            continue
        if other.prompt[:best] != generation.prompt[:best]:
            continue
        pairs = zip(generation.prompt[:-1], other.tokens[: other.done], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if length > best:
            best, source = length, other.state
    if source is not None and isinstance(generation.state, DynamicCache):
        copy_prefix(source, generation.state, best)
    return best


def trimmed(kept: Sequence[Generation], room: int) -> list[Generation]:
    """The newest of those that ended that fit into so many bytes."""
    fitting: list[Generation] = []
    for generation in reversed(kept):
        room -= generation.kv_bytes
        if room < 0:
            break
        fitting.insert(0, generation)
    return fitting
