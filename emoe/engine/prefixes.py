"""Tokens that requests have in common are computed once: keys and values are copied, where every layer keeps all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import DynamicCache

from emoe.engine.generation import Generation
from emoe.engine.state import copy_prefix

WORTH_WAITING = 16  # tokens of a prefix for which a request waits a step


def common(generation: Generation, tokens: Sequence[int]) -> int:
    """How many tokens its prompt begins with that `tokens` begins with too. A prompt's last always runs."""
    pairs = zip(generation.prompt[:-1], tokens, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def comes(generation: Generation, running: Sequence[Generation]) -> bool:
    """Whether another one of this step is about to run tokens of its prefix."""
    return any(
        not other.inputs and other.done < common(generation, other.prompt) >= WORTH_WAITING
        for other in running if other.done < len(other.prompt)
    )  # fmt: skip


def share(generation: Generation, others: Sequence[Generation]) -> int:
    """Copies the longest prefix that another request has run, and returns its tokens."""
    best, source = 0, None
    for other in others:
        if other is generation or other.inputs or not isinstance(other.state, DynamicCache) or other.done <= best:
            continue
        if other.prompt[:best] != generation.prompt[:best]:
            continue
        length = common(generation, other.tokens[: other.done])
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
