"""Fits any kind of predictor that has a file to a trace, and takes tasks out of traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from emoe.errors import ConfigError
from emoe.predictor import KINDS, ExpertPredictor, class_of
from emoe.trace.trace import Trace

TRAINED = "xlnet"  # in epochs; all others are fitted in closed form, in seconds


def fit(kind: str, trace: Trace, **options: Any) -> ExpertPredictor:
    """A predictor of this kind.

    Args:
        kind: one of KINDS.
        trace: prompts in the order of the traffic.
        options: of `training.train_sequence`, for "xlnet" alone.

    Raises:
        ConfigError: an unknown kind, or options for one that has none.
        TraceError: too few prompts.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not one of: {', '.join(KINDS)}")
    if kind == TRAINED:
        from emoe.predictor.training import train_sequence

        return train_sequence(trace, **options).predictor
    if options:
        raise ConfigError(f"kind={kind!r} has no options; {', '.join(options)} are for {TRAINED!r}")
    made = class_of(kind)
    make: Callable[[Trace], ExpertPredictor] = getattr(made, "fit", None) or made.profile
    return make(trace)


def without_tasks(trace: Trace, names: Sequence[str]) -> Trace:
    """The tokens of all other tasks, without these tasks' names.

    Raises:
        ConfigError: the trace has no such task, or no other.
    """
    for name in names:
        if name not in trace.task_names:
            raise ConfigError(f"task {name!r} is not one of: {', '.join(trace.task_names)}")
    kept = [number for number, name in enumerate(trace.task_names) if name not in names]
    if not kept:
        raise ConfigError("all tasks are held out, so none is left to learn from")
    rest = trace.take(np.isin(trace.task, kept))
    renumber = np.zeros(len(trace.task_names), dtype=np.int32)
    renumber[kept] = np.arange(len(kept))
    return replace(rest, task=renumber[rest.task], task_names=tuple(trace.task_names[number] for number in kept))


def of_tasks(trace: Trace, names: Sequence[str]) -> Trace:
    """The tokens of these tasks; all names stay."""
    numbers = [number for number, name in enumerate(trace.task_names) if name in names]
    return trace.take(np.isin(trace.task, numbers))
