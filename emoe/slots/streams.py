"""Requests that run at once, each seen by a predictor of its own; what they will use together. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emoe.predictor import UNKNOWN_TASK, ExpertPredictor
from emoe.requests import Request
from emoe.slots.load_score import Expected

Layers = NDArray[np.bool_]  # [L]


@dataclass
class _Stream:
    """Attributes:
    request: whose it is; held, as others find it by its id.
    task: its number.
    expected: input and output tokens; None where nobody knows.
    predictor: has seen this request alone; None where no layer counts for its task.
    picks: [L, T, K] of its tokens so far.
    tokens: how many they are.
    """

    request: Request
    task: int
    expected: float | None
    predictor: ExpertPredictor | None
    picks: list[NDArray[np.integer]] = field(default_factory=list)
    tokens: int = 0


class Streams:
    """The shared predictor sees requests as they end, one after the other, as it does where one runs at a time.

    Args:
        predictor: the shared one.
        insensitive: [L] of each task that has insensitive layers; where all are, the task is not predicted for.
    """

    def __init__(self, predictor: ExpertPredictor, insensitive: Mapping[int, Layers]) -> None:
        self._predictor, self._insensitive = predictor, insensitive
        self._running: dict[int, _Stream] = {}  # by id(request)

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, request: Request) -> bool:
        return id(request) in self._running

    def clear(self) -> None:
        """Nobody runs: what an interrupt left is dropped."""
        self._running.clear()

    def counts(self, task: int) -> bool:
        """Whether any layer of this task is predicted for."""
        return task not in self._insensitive or not self._insensitive[task].all()

    def join(self, request: Request, task: int) -> None:
        """A request of this task begins."""
        own = self._predictor.anew() if self.counts(task) else None
        if own is not None:
            own.begin(task)
        self._running[id(request)] = _Stream(request, task, request.tokens, own)

    def observe(self, request: Request, picks: NDArray[np.integer]) -> None:
        """Its next tokens were routed: [L, T, K]. Requests that did not join are nobody's."""
        stream = self._running.get(id(request))
        if stream is None:
            return
        stream.tokens += picks.shape[1]
        if stream.predictor is not None:
            stream.predictor.observe(picks)
            stream.picks.append(picks)

    def leave(self, request: Request) -> tuple[int, int]:
        """It is over; the shared predictor learns from it. Returns its task and how many tokens it had."""
        stream = self._running.pop(id(request))
        if stream.picks:
            self._predictor.begin(stream.task)
            self._predictor.observe(np.concatenate(stream.picks, axis=1))
        return stream.task, stream.tokens

    def tasks(self) -> list[int]:
        """Of those that run, the last to join last."""
        return [stream.task for stream in self._running.values() if stream.predictor is not None]

    def scores(self, waiting: Sequence[Expected], typical: float) -> NDArray[np.float64]:
        """[L, E] of the mixture: each request's share of uses times the tokens that it has to come.

        Args:
            waiting: requests that have not begun.
            typical: tokens of a request of which nobody knows.
        """
        unseen = [each for each in waiting if self.counts(each.task)]
        total = np.zeros(np.shape(self._predictor.rank()))
        for stream in self._running.values():
            left = max(1.0, (stream.expected or typical) - stream.tokens)
            if stream.predictor is None:
                continue
            if not stream.tokens:  # what requests before it used says more than nothing
                unseen.append(Expected(stream.task, left))
                continue
            total = total + left * self._counting(stream.task, stream.predictor.rank())
        weights: dict[int, float] = {}
        for task, tokens in unseen:
            task = task if self._predictor.names else UNKNOWN_TASK
            weights[task] = weights.get(task, 0.0) + tokens
        for task, tokens in weights.items():
            self._predictor.begin(task)
            total = total + tokens * self._counting(task, self._predictor.rank())
        return total

    def _counting(self, task: int, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Scores of each layer as parts of 1, but 0 where the layer does not count for the task or says nothing."""
        shares = _shares(scores)
        if task in self._insensitive:
            shares[self._insensitive[task]] = 0.0
        return shares


def _shares(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    positive = np.array(scores, dtype=np.float64)
    positive -= np.minimum(positive.min(axis=1, keepdims=True), 0.0)
    total = positive.sum(axis=1, keepdims=True)
    return np.divide(positive, total, out=np.zeros_like(positive), where=total > 0)
