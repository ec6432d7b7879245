"""What a step costs, in seconds, from what is in it; and the fit that follows what steps do cost. Numbers only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from math import isfinite, sqrt

from emoe.errors import ConfigError


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a step. The default is a guess, for a machine that nobody calibrated.

    Attributes:
        forward: a forward, whatever is in it.
        row: a row (one token of one request).
        byte: a byte of experts that had to be loaded.
        expert: an expert of a layer that any row uses, loaded or not: its weights are read once a step.

    Raises:
        ConfigError: one of them is negative, or none is over 0.
    """

    forward: float = 0.02
    row: float = 0.005
    byte: float = 1e-9
    expert: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"cost {name}={value} is not a number of seconds, 0 or more")
        if not any(astuple(self)):
            raise ConfigError("costs are all 0: a step takes time")

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
    rows: Mapping[Hashable, int]
    tokens: Mapping[Hashable, int] = field(default_factory=dict)
    loaded_bytes: int = 0
    experts: int | None = None


class CostFit:
    """Corrects costs by recursive least squares, one step after the other; a step that stands out counts less.

    What is fitted are factors of the first costs, so parts of any size are alike; a part that was 0 stays 0.

    Args:
        costs: what steps are believed to cost at first.
    """

    FADE = 0.995  # of what is known, a step: about the last 200 count
    UNSURE = 1.0  # variance of a factor before anything was seen, and at most
    NOISE = 0.05  # relative, of a step's seconds; it does not follow the error, or a changed machine would seem noise
    OUTLIER = 2.0  # times the usual error; what is further off counts in proportion less
    BOUNDS = (0.01, 100.0)  # of the factors

    def __init__(self, costs: Costs) -> None:
        self._first = astuple(costs)
        self._factors = [1.0] * len(self._first)
        self._unsure = [[self.UNSURE * (i == j) for j in range(len(self._first))] for i in range(len(self._first))]
        self._usual: float | None = None  # faded mean of the relative error, present steps included
        self.costs = costs
        self.steps = 0

    @property
    def error(self) -> float | None:
        """Faded mean of |forecast - seconds| / seconds, each forecast made before its step; None before the first."""
        return self._usual

    def saw(self, rows: int, loaded_bytes: int, experts: int | None, seconds: float) -> None:
        """A step is over. One that took no time at all, or no finite one, says nothing."""
        if not (seconds > 0 and isfinite(seconds)):
            return
        forecast = self.costs.step(rows, loaded_bytes, experts or 0)
        error = abs(forecast - seconds) / seconds
        usual = 0.1 if self._usual is None else self._usual
        # Relative, so that a long prompt does not outweigh a hundred tokens.
        weight = min(1.0, self.OUTLIER * max(usual, 0.01) / error) if error else 1.0
        self._usual = error if self._usual is None else 0.95 * self._usual + 0.05 * min(error, 1.0)
        self.steps += 1
        amounts = (1, rows, loaded_bytes, experts or 0)
        parts = [each * amount / seconds for each, amount in zip(self._first, amounts, strict=True)]
        self._update(parts, 1.0 - forecast / seconds, weight)

    def _update(self, parts: list[float], residual: float, weight: float) -> None:
        n = range(len(parts))
        spread = [sum(self._unsure[i][j] * parts[j] for j in n) for i in n]
        noise = self.NOISE**2 / weight
        total = noise + sum(parts[i] * spread[i] for i in n)
        low, high = self.BOUNDS
        for i in n:
            self._factors[i] = min(max(self._factors[i] + spread[i] * residual / total, low), high)
        for i in n:
            for j in n:
                self._unsure[i][j] = (self._unsure[i][j] - spread[i] * spread[j] / total) / self.FADE
        # What no step shows must not grow without end: a factor is never less known than at first.
        scale = [min(1.0, sqrt(self.UNSURE / self._unsure[i][i])) if self._unsure[i][i] > 0 else 1.0 for i in n]
        self._unsure = [[self._unsure[i][j] * scale[i] * scale[j] for j in n] for i in n]
        self.costs = Costs(*(factor * each for factor, each in zip(self._factors, self._first, strict=True)))
