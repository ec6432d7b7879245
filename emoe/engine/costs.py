"""What a step costs, in seconds, from what is in it; and the fit that follows what steps do cost. Numbers only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from math import isfinite

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
    """Corrects costs by least squares over steps that fade, after each of them; a step that stands out counts less.

    What is fitted are factors of the first costs, so parts of any size are alike; a part that was 0 stays 0. Parts that
    come and go together cannot be told apart by any number of steps: a little weight on the first costs decides between
    them, and bounds are a part of the fit. (Bounds put on afterwards make a fit with forgetting run away.)

    Args:
        costs: what steps are believed to cost at first.
    """

    FADE = 0.995  # of what is known, a step: about the last 200 count
    BELIEF = 0.001  # of what steps say of a part, that the first costs count for beside it
    OUTLIER = 2.0  # times the usual error; what is further off counts in proportion less
    LEAST, MOST = 0.01, 100.0  # of the factors

    def __init__(self, costs: Costs) -> None:
        self._first = astuple(costs)
        self._factors = [1.0] * len(self._first)
        self._products = [[0.0] * len(self._first) for _ in self._first]  # faded sums over steps of part times part
        self._sums = [0.0] * len(self._first)  # and of each part
        self._usual: float | None = None
        self.costs = costs
        self.steps = 0

    @property
    def error(self) -> float | None:
        """Faded mean of |forecast - seconds| / seconds, at most 1 each, forecast before the step; None before any."""
        return self._usual

    def saw(self, rows: int, loaded_bytes: int, experts: int | None, seconds: float) -> None:
        """A step is over. One that took no time at all, or no finite one, says nothing."""
        if not (seconds > 0 and isfinite(seconds)):
            return
        error = abs(self.costs.step(rows, loaded_bytes, experts or 0) - seconds) / seconds
        usual = 0.1 if self._usual is None else max(self._usual, 0.01)
        weight = min(1.0, self.OUTLIER * usual / error) if error else 1.0
        self._usual = min(error, 1.0) if self._usual is None else 0.95 * self._usual + 0.05 * min(error, 1.0)
        self.steps += 1
        # Shares of the step's seconds, so that a long prompt does not outweigh a hundred tokens.
        amounts = (1, rows, loaded_bytes, experts or 0)
        parts = [each * amount / seconds for each, amount in zip(self._first, amounts, strict=True)]
        for i, part in enumerate(parts):
            self._sums[i] = self.FADE * self._sums[i] + weight * part
            products = self._products[i]
            for j, other in enumerate(parts):
                products[j] = self.FADE * products[j] + weight * part * other
        self._solve()

    def _solve(self) -> None:
        """Least squares within bounds: what comes out beyond one is put there, and the others are solved again."""
        factors = self._factors
        free = [i for i, products in enumerate(self._products) if products[i] > 0]  # others were never seen
        fixed = [i for i in range(len(factors)) if i not in free]
        while free:
            rows = []
            for i in free:
                # In proportion to what is known of the part, or one believed too small could not grow.
                belief = self.BELIEF * self._products[i][i]
                rows.append([self._products[i][j] + (belief if i == j else 0.0) for j in free])
                rows[-1].append(self._sums[i] + belief - sum(self._products[i][j] * factors[j] for j in fixed))
            found = dict(zip(free, _solved(rows), strict=True))
            beyond = [i for i in free if not self.LEAST <= found[i] <= self.MOST]
            for i in beyond or free:
                factors[i] = min(max(found[i], self.LEAST), self.MOST)
            if not beyond:
                break
            free = [i for i in free if i not in beyond]
            fixed += beyond
        self.costs = Costs(*(factor * each for factor, each in zip(factors, self._first, strict=True)))


def _solved(rows: list[list[float]]) -> list[float]:
    """Solves a small positive definite system, given as rows with the right side as their last place."""
    n = len(rows)
    for i in range(n):
        for k in range(i + 1, n):
            share = rows[k][i] / rows[i][i]
            rows[k] = [there - share * here for there, here in zip(rows[k], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        found[i] = (rows[i][n] - sum(rows[i][j] * found[j] for j in range(i + 1, n))) / rows[i][i]
    return found
