"""The load score of arXiv 2503.06823: how much each expert is worth over several requests. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoe.predictor import ExpertPredictor


class Expected(NamedTuple):
    """A request that runs or is to come: number of its task, and input plus expected output tokens."""

    task: int
    tokens: float


def load_score(
    predictor: ExpertPredictor,
    requests: Sequence[Expected],
    insensitive: Mapping[int, NDArray[np.bool_]] | None = None,
) -> NDArray[np.float64]:
    """Sum over requests of predicted frequency times tokens; zero in the layers where a request's task is insensitive.

    Afterwards the predictor stands at the beginning of the last request.

    Args:
        predictor: begun once for each task among the requests; one that knows no tasks once in all.
        requests: at least one; the last is the one that begins now.
        insensitive: [L] of each task that has insensitive layers.

    Returns:
        [L, E]. A layer in which no request counts is zero: nothing needs to be moved there.
    """
    known = bool(predictor.names)
    tokens: dict[int, float] = {}
    for task, count in requests:
        tokens[task] = tokens.get(task, 0.0) + count
    now = requests[-1].task
    total = None
    for task in [task for task in tokens if task != now] + [now]:
        if known or task == now:
            predictor.begin(task)
            scores = np.array(predictor.rank(), dtype=np.float64)
        else:
            continue
        scores *= tokens[task] if known else sum(tokens.values())
        if insensitive is not None and task in insensitive:
            scores[insensitive[task]] = 0.0
        total = scores if total is None else total + scores
    assert total is not None
    return total
