"""Which tokens a replay sees: a profile and a rest of each trace, cut into prompts; as filed, mixed or in bursts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.trace.trace import Trace, join

PROMPT_TOKENS = 100


def into_prompts(trace: Trace, tokens: int = PROMPT_TOKENS) -> Trace:
    """A trace that names no prompts (one number throughout), cut into prompts of so many tokens.

    In one that does, prompts that ran as a batch are put one after the other, by their first tokens.
    """
    if trace.tokens == 0:
        return trace
    if (trace.prompt != trace.prompt[0]).any():
        _, first, place = np.unique(trace.prompt, return_index=True, return_inverse=True)
        order = np.argsort(first[place], kind="stable")
        return trace if (np.diff(order) == 1).all() else trace.take(order)
    return replace(trace, prompt=(np.arange(trace.tokens) // tokens).astype(np.int32))


def split(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """The first `share` of a trace's prompts, and the rest.

    Raises:
        ConfigError: one of the two would be empty.
    """
    prompts = np.unique(trace.prompt)
    first = round(share * len(prompts))
    if not 0 < first < len(prompts):
        raise ConfigError(f"a profile of {share:.0%} of {len(prompts)} prompts leaves nothing to profile or to replay")
    mine = trace.prompt < prompts[first]
    return trace.take(mine), trace.take(~mine)


def mixed(trace: Trace, seed: int) -> Trace:
    """The prompts of a trace in a random order; their numbers stay."""
    return _ordered(trace, np.random.default_rng(seed).permutation(np.unique(trace.prompt)))


def bursts(trace: Trace, size: int) -> Trace:
    """So many prompts of one task, then as many of the next, round and round; each task's in the order they had."""
    prompts, first = np.unique(trace.prompt, return_index=True)
    prompts, first = prompts[np.argsort(first)], np.sort(first)
    task = trace.task[first]
    place = np.zeros(len(prompts), dtype=np.int64)  # among those of its task
    for each in np.unique(task):
        place[task == each] = np.arange(np.count_nonzero(task == each))
    return _ordered(trace, prompts[np.lexsort((place, task, place // size))])


def _ordered(trace: Trace, prompts: NDArray[np.integer]) -> Trace:
    """Its prompts in this order."""
    order = np.argsort(prompts)[np.searchsorted(np.sort(prompts), trace.prompt)]  # place of each token's prompt
    return trace.take(np.argsort(order, kind="stable"))


def prepare(
    traces: Sequence[Trace], *,
    profile: float = 0.0, mix: int | None = None, prompt_tokens: int = PROMPT_TOKENS,
    held_out: str | None = None, burst: int | None = None,
) -> tuple[Trace | None, Trace]:  # fmt: skip
    """Profile and tokens to replay of several traces.

    Args:
        traces: of one model.
        profile: share of each trace's prompts, from its start, that is the profile and not replayed; 0 for none.
        mix: seed of a random order of the prompts of all traces; None keeps the order of the files.
        prompt_tokens: length of a prompt where a trace names none.
        held_out: name of a task that is replayed alone, while the others are the profile, or `profile` of them.
        burst: so many prompts of one task are replayed, then as many of the next; in the place of `mix`.

    Raises:
        ConfigError, TraceError: nothing left, no such task, or traces of different models.
    """
    cut = [into_prompts(trace, prompt_tokens) for trace in traces]
    first: Trace | None = None
    if held_out is not None:
        first, rest = _apart(join(cut), held_out)
        first = split(first, profile)[0] if 0 < profile < 1 else first
    elif profile:
        halves = [split(trace, profile) for trace in cut]
        first, rest = join([half[0] for half in halves]), join([half[1] for half in halves])
    else:
        rest = join(cut)
    if burst is not None:
        return first, bursts(rest, burst)
    if mix is not None:
        return first if first is None else mixed(first, mix + 1), mixed(rest, mix)
    return first, rest


def _apart(trace: Trace, task: str) -> tuple[Trace, Trace]:
    """All but one task, and that task."""
    if task not in trace.task_names:
        raise ConfigError(f"held_out={task!r} is not one of the traces' tasks: {', '.join(trace.task_names)}")
    mine = trace.task == trace.task_names.index(task)
    if mine.all() or not mine.any():
        raise ConfigError(f"held_out={task!r} leaves nothing to learn from, or nothing to replay")
    return trace.take(~mine), trace.take(mine)
