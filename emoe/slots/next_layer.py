"""Prefetch for the next layer while one computes, as long as it is used. Ids only; the loader moves bytes.

What is named before a layer computes is read behind what the layer itself has to wait for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from emoe.slots.loader import Loader

logger = logging.getLogger(__name__)

WINDOW = 256  # prefetches by which their use is judged
USED = 0.5  # of these at least


class NextLayer:
    """Prefetches the experts that a predictor expects in the next layer.

    Args:
        loader: moves them.
        experts: routed experts of each layer.
        top_k: how many are named for a forward.
        predictor: `next_layer(layer, picks [T, K]) -> scores [E]` of the layer after it; one with `reads_hidden` gets
            the hidden states [T, H] in the place of the picks.
    """

    def __init__(self, loader: Loader, experts: Sequence[int], top_k: int, predictor: Any) -> None:
        self._loader, self._experts, self._top_k, self._predictor = loader, experts, top_k, predictor
        self._started: list[list[int]] = [[] for _ in experts]
        self._judged: deque[bool] = deque(maxlen=WINDOW)
        self.state = "on"

    def before(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> None:
        started, self._started[layer] = self._started[layer], []
        if started:
            wanted = set(index.flatten().tolist())
            self._judged += [expert in wanted for expert in started]
            stale = [expert for expert in started if expert not in wanted]
            if stale:
                self._loader.cancel_prefetch(layer, stale)
            used = sum(self._judged)
            if len(self._judged) == WINDOW and used < USED * WINDOW and self.state == "on":
                self.state = "off"
                logger.warning(
                    "emoe: prefetch for the next layer is switched off: of the last %d prefetches %d were used",
                    WINDOW,
                    used,
                )
        following = layer + 1
        if self.state == "off" or following >= len(self._experts):
            return
        given = hidden if getattr(self._predictor, "reads_hidden", False) else index.cpu().numpy()
        scores = np.asarray(self._predictor.next_layer(layer, given))
        # As many as a token picks: with more rows the likeliest of all rows.
        likely = [int(expert) for expert in np.argsort(-scores, kind="stable")[: self._top_k]]
        if any(self._loader.cache.lookup(following, expert) is None for expert in likely):
            self._started[following] = self._loader.prefetch_behind(following, likely)

    def after(self) -> None:
        """The layer has computed."""
        self._loader.begin_behind()
