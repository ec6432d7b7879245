"""Knows the trace that will be run: the upper bound for predictors, in replays and tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError
from emoe.predictor.prompts import Prompt, prompts
from emoe.predictor.table import count
from emoe.trace.trace import Trace


class Oracle:
    """Ranks experts by how often the rest of the running prompt uses them.

    Args:
        trace: what will be run, from its first token, prompt by prompt. Before the first token of a prompt it may be
            begun any number of times.
    """

    names: tuple[str, ...] = ()

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._prompts: Iterator[Prompt] = prompts(trace, ())
        self._left = np.zeros((trace.layers, trace.num_experts), dtype=np.int64)
        self._waits = False  # begun, and no token seen

    def begin(self, task: int) -> None:
        """Raises TraceError after the last prompt of the trace."""
        if self._waits:
            return
        prompt = next(self._prompts, None)
        if prompt is None:
            raise TraceError("the oracle's trace has no further prompt")
        self._left = count(prompt.picks, self._trace.num_experts)
        self._waits = True

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._left -= count(picks, self._trace.num_experts)
        self._waits = False

    def rank(self) -> NDArray[np.float64]:
        return self._left.astype(np.float64)

    def anew(self) -> Oracle:
        return Oracle(self._trace)
