"""How soon each expert will be used again: a linear model over what is cheap to know, fitted on a profile in seconds.

The score estimates exp(-tokens until the next use / horizon). What it knows of an expert: uses in windows of several
lengths (recency and frequency in one), uses in this prompt, the task's table, and what followed the present picks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError
from emoe.files import texts
from emoe.predictor import files
from emoe.predictor.table import TaskTable
from emoe.trace.trace import Trace

Floats = NDArray[np.float32]

WINDOWS = (2.0, 6.0, 20.0, 60.0, 200.0)  # tokens after which a use has faded to 1/e
HORIZON = 20.0  # tokens; 10 to 30 differ by a tenth of a point of hit rate
_PRIOR_TOKENS = 4.0  # the task's table counts like this many tokens of the prompt
_SMOOTHING = 20.0  # uses of an expert before its own followers count as much as everyone's
_FLOOR = 1e-3  # keeps logarithms finite
_FEATURES = 2 * (len(WINDOWS) + 3) + 1
_SAMPLES = 400  # tokens of the profile that the fit looks at


class NextUse:
    """The predictor; `fit` makes one.

    Args:
        table: uses by task.
        follow: [L, E, E] probability that a token uses the second expert after one that used the first.
        weights: [17] of the features.
    """

    def __init__(self, table: TaskTable, follow: Floats, weights: Floats) -> None:
        self.table, self._follow, self._weights = table, follow, weights
        L, E = follow.shape[:2]
        self._rows = np.arange(L)[:, None]
        self._fade = np.exp(-1.0 / np.asarray(WINDOWS, dtype=np.float32))[:, None, None].astype(np.float32)
        self._recent = np.zeros((len(WINDOWS), L, E), dtype=np.float32)
        self._uses = np.zeros((L, E), dtype=np.float32)
        self._tokens = 0
        self._prior = table.of(-1)
        self._next = self._prior
        self._features = np.ones((_FEATURES, L, E), dtype=np.float32)

    @property
    def names(self) -> tuple[str, ...]:
        return self.table.names

    def anew(self) -> NextUse:
        return NextUse(self.table, self._follow, self._weights)

    def begin(self, task: int) -> None:
        self._prior = self.table.of(task)
        self._uses[:] = 0
        self._tokens = 0

    def observe(self, picks: NDArray[np.integer]) -> None:
        L, T = picks.shape[:2]
        if not T:
            return
        valid = picks >= 0
        rows = np.broadcast_to(self._rows[:, :, None], picks.shape)[valid]
        experts = picks[valid]
        age = np.broadcast_to(np.arange(T - 1, -1, -1)[None, :, None], picks.shape)[valid]  # 0: the last token
        if T == 1:
            self._recent *= self._fade
            self._recent[:, rows, experts] += 1 - self._fade[:, :, 0]
            self._uses[rows, experts] += 1
        else:
            E = self._uses.shape[1]
            places = rows * E + experts
            self._uses += np.bincount(places, minlength=L * E).reshape(L, E)
            for recent, fade in zip(self._recent, self._fade[:, 0, 0], strict=True):
                recent *= fade**T
                recent += np.bincount(places, (1 - fade) * fade**age, minlength=L * E).reshape(L, E)
        self._tokens += T
        last, known = picks[:, -1], valid[:, -1]
        count = np.maximum(known.sum(axis=1), 1).astype(np.float32)
        followers = self._follow[self._rows, np.where(known, last, 0)]  # [L, K, E]
        self._next = (followers * known[:, :, None]).sum(axis=1) / count[:, None]

    def rank(self) -> Floats:
        # Not tensordot: for so little work the threads of a BLAS cost more than they save.
        return np.einsum("f,fle->le", self._weights, self.features())

    def features(self) -> Floats:
        """[17, L, E]; the last is 1. Valid until the next call."""
        known = self._features[: len(WINDOWS) + 3]
        known[: len(WINDOWS)] = self._recent
        known[-3] = (self._uses + _PRIOR_TOKENS * self._prior) / (self._tokens + _PRIOR_TOKENS)
        known[-2] = self._prior
        known[-1] = self._next
        np.log(known + np.float32(_FLOOR), out=self._features[len(known) : 2 * len(known)])
        return self._features

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        tensors = {"frequency": self.table.frequency, "follow": self._follow, "weights": self._weights}
        files.write(path, "next-use", tensors, {"names": self.names})

    @classmethod
    def load(cls, path: str | Path) -> NextUse:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        tensors, settings = files.read(path, "next-use", {"frequency": 3, "follow": 3, "weights": 1})
        frequency, follow, weights = tensors["frequency"], tensors["follow"], tensors["weights"]
        _, L, E = frequency.shape
        try:
            if follow.shape != (L, E, E) or weights.shape != (_FEATURES,):
                shapes = [list(each.shape) for each in (frequency, follow, weights)]
                raise ValueError("frequency {}, follow {} and weights {} do not fit together".format(*shapes))
            return cls(TaskTable(frequency, texts(settings, "names")), follow, weights)
        except (ValueError, TraceError) as error:
            raise files.fail(path, error) from error

    @classmethod
    def fit(cls, trace: Trace, *, horizon: float = HORIZON, seed: int = 0) -> NextUse:
        """Learns from a profile: prompts of every task, in the order of the trace.

        A table fits its own prompts too well. So the weights are fitted on the later half of each task's prompts (by
        number) with tables of the earlier half; the tables are then those of all.

        Raises:
            TraceError: no task has two prompts.
        """
        later = np.zeros(trace.tokens, dtype=bool)
        for task in np.unique(trace.task):
            mine = trace.task == task
            prompts = np.unique(trace.prompt[mine])
            later |= mine & (trace.prompt >= prompts[(len(prompts) + 1) // 2 :].min(initial=1 << 30))
        if not later.any():
            raise TraceError("fitting next uses needs a task with at least two prompts in the profile")
        rest, shown = trace.take(~later), trace.take(later)
        weights = _fit_weights(cls(TaskTable.profile(rest), followers(rest), _no_weights()), shown, horizon, seed)
        return cls(TaskTable.profile(trace), followers(trace), weights)


def followers(trace: Trace) -> Floats:
    """[L, E, E]: share of the tokens after a use of the first expert, within its prompt, that used the second."""
    L, E = trace.layers, trace.num_experts
    result = np.empty((L, E, E), dtype=np.float32)
    same = trace.prompt[1:] == trace.prompt[:-1]
    for layer in range(L):
        # Counted, not multiplied as matrices: picks are few, and no BLAS threads compete with a running model.
        picks = np.where(trace.experts[layer] < 0, E, trace.experts[layer]).astype(np.int64)  # E: no pick
        before, after = picks[:-1][same], picks[1:][same]
        pairs = (before[:, :, None] * (E + 1) + after[:, None, :]).reshape(-1)
        together = np.bincount(pairs, minlength=(E + 1) ** 2).reshape(E + 1, E + 1)[:E, :E]
        uses = np.bincount(before.reshape(-1), minlength=E + 1)[:E]
        everyone = np.bincount(picks.reshape(-1), minlength=E + 1)[:E] / trace.tokens
        result[layer] = (together + _SMOOTHING * everyone) / (uses + _SMOOTHING)[:, None]
    return result


def walk(trace: Trace, predictor: NextUse) -> Iterator[int]:
    """Tells a predictor of each token in turn, and yields the token's number afterwards."""
    ids = np.ascontiguousarray(trace.experts.transpose(1, 0, 2)).astype(np.int64)
    for token in range(trace.tokens):
        if token == 0 or trace.prompt[token] != trace.prompt[token - 1]:
            predictor.begin(int(trace.task[token]))
        predictor.observe(ids[token][:, None])
        yield token


def _no_weights() -> Floats:
    return np.zeros(_FEATURES, dtype=np.float32)


def _fit_weights(predictor: NextUse, trace: Trace, horizon: float, seed: int) -> Floats:
    """Least squares of exp(-delay / horizon) on the features, over all experts of some tokens."""
    T = trace.tokens
    rng = np.random.default_rng(seed)
    chosen = set(rng.choice(T, size=min(_SAMPLES, T), replace=False).tolist())
    delays = _delays(trace, chosen)
    gram = np.zeros((_FEATURES, _FEATURES))
    moment = np.zeros(_FEATURES)
    for token in walk(trace, predictor):
        if token in chosen:
            features = predictor.features().reshape(_FEATURES, -1).astype(np.float64)
            target = np.exp(-delays[token].reshape(-1) / horizon)
            gram += features @ features.T
            moment += features @ target
    gram += 1e-6 * np.trace(gram) / _FEATURES * np.eye(_FEATURES)
    return np.linalg.solve(gram, moment).astype(np.float32)


def _delays(trace: Trace, tokens: set[int]) -> dict[int, NDArray[np.float64]]:
    """[L, E] tokens until the next use, after each of these tokens; infinity for never."""
    upcoming = np.full((trace.layers, trace.num_experts + 1), np.inf)
    rows = np.arange(trace.layers)[:, None]
    delays = {}
    for token in range(trace.tokens - 1, -1, -1):
        if token in tokens:
            delays[token] = upcoming[:, :-1] - token
        upcoming[rows, trace.experts[:, token]] = token
    return delays
