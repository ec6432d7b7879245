"""From evidence to probabilities: a temperature for "which task", a logistic regression for "one of them at all"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RIDGE = 1.0  # on standardised signals: a few dozen prompts decide little
UNKNOWN_SHARE = 0.3  # of the text to come that fits no known task: the weight of unknown prompts in calibration


def softmax(values: Floats) -> Floats:
    """Along the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    total: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return total


def fit_temperature(evidence: Floats, truth: NDArray[np.int64]) -> float:
    """The divisor of [n, N] evidence that makes the true tasks likeliest."""
    tried = np.geomspace(0.25, 256, 61)
    rows = np.arange(len(truth))
    losses = [-np.log(softmax(evidence / each)[rows, truth] + 1e-12).mean() for each in tried]
    return float(tried[int(np.argmin(losses))])


def signals(evidence: Floats, familiarity: Floats) -> Floats:
    """[n, 2]: lead in evidence of the best of N tasks over the next (0 where N is 1), and its familiarity."""
    rows = np.arange(len(evidence))
    best = evidence.argmax(axis=1)
    ranked = np.sort(evidence, axis=1)
    lead = ranked[:, -1] - ranked[:, -2] if evidence.shape[1] > 1 else np.zeros(len(evidence))
    # Evidence grows with the length of a text; its root does not run away.
    return np.stack([np.sqrt(lead), familiarity[rows, best]], axis=1)


@dataclass(frozen=True)
class Confidence:
    """A logistic regression on signals.

    Attributes:
        mean, scale, weights: [S]; weights are at least 0, so more of a signal never lowers confidence.
        offset: the logit at the mean.
    """

    mean: Floats
    scale: Floats
    weights: Floats
    offset: float

    @classmethod
    def never(cls) -> Confidence:
        """Before anything was fitted."""
        return cls(np.zeros(2), np.ones(2), np.zeros(2), -50.0)

    @classmethod
    def fit(cls, inputs: Floats, right: NDArray[np.bool_]) -> Confidence:
        """Right answers, and others in all with the weight UNKNOWN_SHARE."""
        mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-9
        x = (inputs - mean) / scale
        n = len(right)
        wrong = max(1, int((~right).sum()))
        weight = np.where(right, (1 - UNKNOWN_SHARE) / max(1, int(right.sum())), UNKNOWN_SHARE / wrong) * n
        used = np.ones(x.shape[1], dtype=bool)
        while True:
            weights, offset = _newton(x * used, right, weight)
            if (weights >= 0).all():
                return cls(mean, scale, weights, offset)
            used &= weights >= 0

    def __call__(self, inputs: Floats) -> Floats:
        """[n] confidence."""
        logits = (inputs - self.mean) / self.scale @ self.weights + self.offset
        confidence: Floats = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
        return confidence

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "weights": self.weights.tolist(),
            "offset": self.offset,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Confidence:
        """The inverse of `to_dict`; KeyError, TypeError or ValueError where the values are something else."""
        mean, scale, weights = (np.array(values[name], dtype=np.float64) for name in ("mean", "scale", "weights"))
        if not mean.shape == scale.shape == weights.shape == (2,):
            raise ValueError(f"confidence of shapes {mean.shape}, {scale.shape} and {weights.shape}, expected (2,)")
        offset = float(values["offset"])
        if not np.isfinite([*mean, *scale, *weights, offset]).all() or not (scale > 0).all():
            raise ValueError(f"confidence of {values}, expected numbers, and scales over 0")
        return cls(mean, scale, weights, offset)


def _newton(x: Floats, right: NDArray[np.bool_], weight: Floats) -> tuple[Floats, float]:
    """Ridge-penalised weighted logistic regression; the offset is not penalised."""
    inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = np.diag([RIDGE] * x.shape[1] + [1e-6])
    beta = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ beta, -30, 30)))
        slope = inputs.T @ (weight * (chance - right)) + penalty @ beta
        curve = (inputs * (weight * chance * (1 - chance))[:, None]).T @ inputs + penalty
        step = np.linalg.solve(curve, slope)
        beta -= np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            break
    return beta[:-1], float(beta[-1])
