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
    weights: dict[int, float] = {}
    for task, tokens in requests:
        weights[task] = weights.get(task, 0.0) + tokens
    now = requests[-1].task
    if not predictor.names:
        weights = {now: sum(weights.values())}
    total = np.zeros(())
    for task in sorted(weights, key=now.__eq__):  # the present one last
        predictor.begin(task)
        scores = np.array(predictor.rank(), dtype=np.float64) * weights[task]
        if insensitive is not None and task in insensitive:
            scores[insensitive[task]] = 0.0
        total = total + scores
    return total
