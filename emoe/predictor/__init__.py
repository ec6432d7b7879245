"""Which experts a request will be routed to. Numbers over [layers, experts]; no slots, no bytes, no torch.

A predictor is told what happens (`begin` a prompt, `observe` a token) and gives scores (`rank`); higher is likelier.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

UNKNOWN_TASK = -1


class ExpertPredictor(Protocol):
    """What residency asks of a predictor."""

    def begin(self, task: int) -> None:
        """A prompt of this task begins; UNKNOWN_TASK is allowed."""

    def observe(self, picks: NDArray[np.integer]) -> None:
        """One token was routed: [L, K] expert ids, -1 for no pick."""

    def rank(self) -> NDArray[np.floating]:
        """[L, E] scores of the experts' coming use; valid until the next call of any method."""


def top(scores: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """[L, E] mask of the `count` highest scores of each layer; of equals the lowest ids."""
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask
