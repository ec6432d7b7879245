"""Sensitivity while serving: per task, logit change per substituted router mass, from probed requests. Numbers only.

Needs no offline profile. What is observed comes from `probe` or from any engine that can evaluate a request twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.sensitivity.profile import suggest_bias


class Estimate(NamedTuple):
    """Sensitivity of one task: change of the output per substituted mass, its standard error, requests observed."""

    value: float
    error: float
    observed: int


@dataclass
class _Sums:
    """Of one task: n, and sums of mass, change, and their products; enough for the ratio and its error."""

    n: int = 0
    mass: float = 0.0
    change: float = 0.0
    mass2: float = 0.0
    change2: float = 0.0
    both: float = 0.0

    def ratio(self) -> float:
        return self.change / self.mass

    def residual(self, ratio: float) -> float:
        """Sum of (change - ratio * mass)^2."""
        return max(0.0, self.change2 - 2 * ratio * self.both + ratio * ratio * self.mass2)


SHARE = 0.05  # of a task's requests


class OnlineSensitivity:
    """Collects observations and ranks tasks.

    Args:
        share: of each task's requests that are to be probed (`due`), over 0 and up to 1. A probe costs two forwards
            over the request's tokens.

    Raises:
        ConfigError: the share is out of its range.
    """

    def __init__(self, share: float = SHARE) -> None:
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"share={share!r} is not a number over 0 and up to 1")
        self.share = share
        self._requests: dict[str, int] = {}
        self._sums: dict[str, _Sums] = {}

    def due(self, task: str) -> bool:
        """Called once a request: whether this one is to be probed. The first of each task is."""
        before = self._requests.get(task, 0)
        self._requests[task] = before + 1
        return math.ceil(before * self.share) < math.ceil((before + 1) * self.share)

    def observe(self, task: str, substituted_mass: float, logit_change: float) -> None:
        """Takes one request's observation.

        Args:
            substituted_mass: mean share of router mass that was substituted, 0 to 1. One without any says nothing.
            logit_change: how far the output moved, at least 0: mean total variation distance of next-token
                distributions (`probe`), or any other measure, the same for all tasks.

        Raises:
            ConfigError: a value out of its range.
        """
        if not 0 <= substituted_mass <= 1:
            raise ConfigError(f"substituted_mass={substituted_mass} is not between 0 and 1")
        if not (math.isfinite(logit_change) and logit_change >= 0):
            raise ConfigError(f"logit_change={logit_change} is not a finite number of at least 0")
        if substituted_mass == 0:
            return
        sums = self._sums.setdefault(task, _Sums())
        sums.n += 1
        sums.mass += substituted_mass
        sums.change += logit_change
        sums.mass2 += substituted_mass * substituted_mass
        sums.change2 += logit_change * logit_change
        sums.both += substituted_mass * logit_change

    @property
    def tasks(self) -> list[str]:
        """The tasks observed."""
        return sorted(self._sums)

    def sensitivity(self, task: str) -> Estimate:
        """Change per substituted mass, drawn toward the mean of all tasks as far as its own error asks.

        A task that was never observed has that mean, with the spread between tasks as error; without any observation
        the value is NaN and the error infinite.
        """
        known = self._estimates()
        if not known:
            return Estimate(math.nan, math.inf, 0)
        ratios = np.array([ratio for ratio, _ in known.values()])
        variances = np.array([variance for _, variance in known.values()])
        mean, between, mean_variance = _pooled(ratios, variances)
        if task not in known:
            return Estimate(mean, math.sqrt(between + mean_variance), 0)
        ratio, variance = known[task]
        keep = between / (between + variance) if between + variance > 0 else 1.0
        value = keep * ratio + (1 - keep) * mean
        error = math.sqrt(keep * variance + (1 - keep) ** 2 * mean_variance)
        return Estimate(value, error, self._sums[task].n)

    def rank(self) -> list[str]:
        """The tasks observed, most sensitive first."""
        return sorted(self.tasks, key=lambda task: (-self.sensitivity(task).value, task))

    def bias(self, task: str | None, most: float) -> float:
        """A bias for routing mode `biased` (`suggest_bias`); unknown tasks get that of the most sensitive one."""
        return suggest_bias({name: self.sensitivity(name).value for name in self.tasks}, task, most)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: of each task the estimate, and the mean mass and change that it is from."""
        found = {}
        for task, sums in self._sums.items():
            value, error, observed = self.sensitivity(task)
            found[task] = {
                "sensitivity": round(value, 5),
                "error": round(error, 5),
                "observed": observed,
                "substituted_mass": round(sums.mass / sums.n, 5),
                "logit_change": round(sums.change / sums.n, 5),
            }
        return dict(sorted(found.items()))

    def _estimates(self) -> dict[str, tuple[float, float]]:
        """(ratio, variance) of each task, before shrinking.

        The variance is that of a ratio of sums, from residuals of all tasks together: a task's own few would say too
        little.
        """
        ratios = {task: sums.ratio() for task, sums in self._sums.items()}
        residual = sum(sums.residual(ratios[task]) for task, sums in self._sums.items())
        freedom = sum(sums.n - 1 for sums in self._sums.values())
        if freedom <= 0:  # one observation of each: nothing is known of their spread but that between tasks
            spread = float(np.var(list(ratios.values()))) if len(ratios) > 1 else next(iter(ratios.values()), 0.0) ** 2
            return {task: (ratio, spread) for task, ratio in ratios.items()}
        noise = residual / freedom
        return {task: (ratios[task], noise * sums.n / sums.mass**2) for task, sums in self._sums.items()}


def _pooled(ratios: NDArray[np.float64], variances: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean of the tasks, variance between them, and variance of that mean (DerSimonian and Laird, 1986)."""
    weights = 1 / np.maximum(variances, 1e-18)
    fixed = float((weights * ratios).sum() / weights.sum())
    excess = float((weights * (ratios - fixed) ** 2).sum()) - (len(ratios) - 1)
    scale = float(weights.sum() - (weights**2).sum() / weights.sum())
    between = max(0.0, excess / scale) if scale > 0 else 0.0
    weights = 1 / (np.maximum(variances, 1e-18) + between)
    return float((weights * ratios).sum() / weights.sum()), between, float(1 / weights.sum())


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of two lists of equal length, ties sharing their mean rank; NaN where one list is constant."""
    x, y = _ranks(first), _ranks(second)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size else math.nan


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    return np.array([(given < value).sum() + ((given == value).sum() - 1) / 2 for value in given])
