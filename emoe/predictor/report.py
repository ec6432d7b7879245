"""How good a predictor is on a trace it was not fitted on: recall, calibration, time. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError, TraceError
from emoe.predictor import ExpertPredictor, top
from emoe.predictor.prompts import prompts
from emoe.predictor.table import count
from emoe.trace.trace import Trace

BUDGETS = (0.2, 0.3, 0.4)
SEEN = 0.25  # of a prompt's tokens; what remains is predicted from them
_BINS = 15


@dataclass(frozen=True)
class Report:
    """One predictor on one trace.

    Attributes:
        budgets: shares of each layer's experts that may be chosen.
        recall: for each budget, the share of the prompts' picks inside the choice made before the prompt ran.
        recall_seen: the same for the later tokens, chosen when the first quarter had been observed.
        calibration: expected calibration error of the predicted uses per token, as a share of all uses: 0.1 says that
            the predicted rates are off by a tenth of a mean rate. Scores are scaled to the picks of a token.
        rank_ms, observe_ms: median milliseconds of ranking, and of observing one token.
        prompts: prompts evaluated.
    """

    budgets: tuple[float, ...]
    recall: tuple[float, ...]
    recall_seen: tuple[float, ...]
    calibration: float
    rank_ms: float
    observe_ms: float
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class NextLayer(Protocol):
    """What `evaluate_next_layer` asks of a predictor."""

    def next_layer(self, layer: int, picks: NDArray[np.integer], /) -> NDArray[np.floating]:
        """[E] scores of layer + 1 from the picks [T, K] of this one."""


def evaluate(
    predictor: ExpertPredictor, trace: Trace, budgets: Sequence[float] = BUDGETS, *, seen: float = SEEN
) -> Report:
    """Runs a copy that has seen nothing over the prompts, in the order of the trace.

    Args:
        budgets: shares of the experts of a layer, each over 0 and up to 1.
        seen: share of a prompt's tokens after which `recall_seen` chooses.

    Raises:
        ConfigError: a budget out of range, or scores of another shape than the trace.
        TraceError: the trace has no picks.
    """
    chosen = _counts(budgets, trace.num_experts)
    predictor = predictor.anew()
    before = np.zeros((len(chosen), 2))
    after = np.zeros((len(chosen), 2))
    predicted, observed = [], []
    rank_s: list[float] = []
    observe_s: list[float] = []
    number = 0
    for prompt in prompts(trace, predictor.names):
        predictor.begin(prompt.task)
        scores = _timed(predictor.rank, rank_s)
        if scores.shape != (trace.layers, trace.num_experts):
            have, want = list(scores.shape), [trace.layers, trace.num_experts]
            raise ConfigError(f"the predictor ranks [layers, experts] = {have}, the trace has {want}")
        uses = count(prompt.picks, trace.num_experts)
        before += _hits(scores, uses, chosen)
        predicted.append(_rates(scores, uses, prompt.picks.shape[1]))
        observed.append(uses / prompt.picks.shape[1])
        number += 1
        head = max(1, int(seen * prompt.picks.shape[1]))
        predictor.observe(prompt.picks[:, :head])
        rest = prompt.picks[:, head:]
        after += _hits(_timed(predictor.rank, rank_s), count(rest, trace.num_experts), chosen)
        for token in range(rest.shape[1]):
            _timed(lambda token=token, rest=rest: predictor.observe(rest[:, token : token + 1]), observe_s)  # type: ignore[misc]
    if not before[0, 1]:
        raise TraceError("the trace has no picks to evaluate a predictor on")
    return Report(
        budgets=tuple(budgets),
        recall=tuple((before[:, 0] / before[:, 1]).tolist()),
        recall_seen=tuple((after[:, 0] / after[:, 1].clip(1)).tolist()),
        calibration=_calibration(np.concatenate(predicted, axis=None), np.concatenate(observed, axis=None)),
        rank_ms=1e3 * float(np.median(rank_s)),
        observe_ms=1e3 * float(np.median(observe_s)) if observe_s else 0.0,
        prompts=number,
    )


def evaluate_next_layer(
    predictor: NextLayer, trace: Trace, budgets: Sequence[float] = BUDGETS, *, tokens: int | None = None
) -> NDArray[np.float64]:
    """[budgets, L - 1] recall in layers 1 and on, each predicted from the picks of the layer before.

    Args:
        tokens: of one prompt that are predicted together, 1 for decoding; None: the whole prompt.
    """
    chosen = _counts(budgets, trace.num_experts)
    result = np.zeros((len(chosen), trace.layers - 1, 2))
    for prompt in prompts(trace, ()):
        T = prompt.picks.shape[1]
        step = tokens or T
        for start in range(0, T, step):
            picks = prompt.picks[:, start : start + step]
            uses = count(picks, trace.num_experts)
            scores = np.stack([predictor.next_layer(layer, picks[layer]) for layer in range(trace.layers - 1)])
            for number, size in enumerate(chosen):
                result[number, :, 0] += (uses[1:] * top(scores, size)).sum(axis=1)
                result[number, :, 1] += uses[1:].sum(axis=1)
    return result[:, :, 0] / result[:, :, 1].clip(1)


def _counts(budgets: Sequence[float], experts: int) -> list[int]:
    for share in budgets:
        if not 0 < share <= 1:
            raise ConfigError(f"budget={share} is not a share over 0 and up to 1")
    return [max(1, int(share * experts + 0.5)) for share in budgets]


def _timed(call: Callable[[], Any], seconds: list[float]) -> Any:
    started = time.perf_counter()
    result = call()
    seconds.append(time.perf_counter() - started)
    return result


def _hits(scores: NDArray[np.floating], uses: NDArray[np.integer], chosen: list[int]) -> NDArray[np.float64]:
    """[budgets, 2]: uses inside the choice, and all."""
    return np.array([[(uses * top(scores, size)).sum(), uses.sum()] for size in chosen], dtype=np.float64)


def _rates(scores: NDArray[np.floating], uses: NDArray[np.integer], tokens: int) -> NDArray[np.float64]:
    """[L, E] the scores as uses per token: scaled so that a layer's sum is that of its picks."""
    positive = np.maximum(scores, 0).astype(np.float64)
    total = positive.sum(axis=1, keepdims=True)
    even = np.full_like(positive, 1 / positive.shape[1])
    shares = np.divide(positive, total, out=even, where=total > 0)
    rates: NDArray[np.float64] = shares * (uses.sum(axis=1, keepdims=True) / tokens)
    return rates


def _calibration(predicted: NDArray[np.float64], observed: NDArray[np.float64]) -> float:
    """In bins of equally many predictions, lowest to highest: |predicted - observed| uses, summed, over all uses."""
    order = np.argsort(predicted, kind="stable")
    gaps = [abs(float(predicted[part].sum() - observed[part].sum())) for part in np.array_split(order, _BINS)]
    return sum(gaps) / max(float(observed.sum()), 1e-12)
