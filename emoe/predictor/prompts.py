"""The prompts of a trace as predictors are told of them: one after the other, tasks by the predictor's own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emoe.predictor import UNKNOWN_TASK
from emoe.trace.trace import Trace


@dataclass(frozen=True)
class Prompt:
    """Consecutive tokens of one prompt.

    Attributes:
        task: its number in the names that were asked for, or UNKNOWN_TASK.
        start: number of its first token in the trace.
        picks: [L, T, K] expert ids, -1 for no pick.
    """

    task: int
    start: int
    picks: NDArray[np.integer]


def tasks_by_name(trace: Trace, names: tuple[str, ...]) -> NDArray[np.int32]:
    """[T] the tokens' tasks as numbers in `names`; UNKNOWN_TASK where they are not among them."""
    numbers = [names.index(name) if name in names else UNKNOWN_TASK for name in trace.task_names]
    return np.asarray(numbers, dtype=np.int32)[trace.task]


def prompts(trace: Trace, names: tuple[str, ...]) -> Iterator[Prompt]:
    """In the order of the trace; a prompt that was interrupted by another comes in pieces."""
    tasks = tasks_by_name(trace, names)
    starts = [0, *(np.flatnonzero(np.diff(trace.prompt)) + 1).tolist()] if trace.tokens else []
    for start, end in zip(starts, [*starts[1:], trace.tokens], strict=True):
        yield Prompt(int(tasks[start]), start, trace.experts[:, start:end])
