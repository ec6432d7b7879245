"""What a step costs, in seconds, from what is in it. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a step.

    Attributes:
        forward: a forward, whatever is in it.
        row: a row (one token of one request).
        byte: a byte of experts that had to be loaded.
        expert: an expert of a layer that any row uses, loaded or not: its weights are read once a step.
    """

    forward: float = 0.02
    row: float = 0.005
    byte: float = 1e-9
    expert: float = 0.0

    def step(self, rows: float, loaded_bytes: float = 0.0, experts: float = 0.0) -> float:
        """Seconds of one step."""
        return self.forward + self.row * rows + self.byte * loaded_bytes + self.expert * experts


@dataclass(frozen=True)
class Step:
    """What a step did, for `Scheduler.ran`.

    Attributes:
        seconds: what it took.
        rows: by request, rows that ran.
        tokens: by request, tokens that came out; a request that is left out got none.
        loaded_bytes: bytes of experts that were loaded for it.
        experts: (layer, expert) pairs that any row used; None where nobody counted them.
    """

    seconds: float
    rows: Mapping[Any, int]
    tokens: Mapping[Any, int] = field(default_factory=dict)
    loaded_bytes: int = 0
    experts: int | None = None
