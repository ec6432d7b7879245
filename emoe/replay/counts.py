"""What a replay counts, per layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emoe.trace.trace import Trace


@dataclass
class Counts:
    """[L] int64 arrays; `evictions` is over all layers.

    Attributes:
        decode_picks, decode_loads: of the tokens that the trace calls decode, over all layers; None: not counted apart.
    """

    picks: NDArray[np.int64]
    hits: NDArray[np.int64]
    loads: NDArray[np.int64]
    evictions: int = 0
    decode_picks: int | None = None
    decode_loads: int | None = None

    @classmethod
    def of(cls, trace: Trace) -> Counts:
        """Picks of a trace, nothing else counted yet."""
        zeros = np.zeros(trace.layers, dtype=np.int64)
        return cls((trace.experts >= 0).sum(axis=(1, 2)), zeros.copy(), zeros.copy())
