"""A low-rank linear map from what is known of a prompt to the experts it will use: fitted in closed form, under 1 ms.

Answers the third open question of arXiv 2503.06823, something cheaper than a sequence model. It knows four vectors over
all layers and experts: the task's table, the present prompt so far, past prompts of this task, past prompts of any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError
from emoe.files import texts
from emoe.predictor import UNKNOWN_TASK, files
from emoe.predictor.prompts import prompts
from emoe.predictor.table import TaskTable, count
from emoe.trace.trace import Trace

Floats = NDArray[np.float32]

STAGES = (
    0,
    2,
    5,
    12,
    30,
    75,
    200,
)  # tokens of a prompt seen; each has weights of its own, between them is interpolated
RANK = 32
RIDGES = (0.03, 0.3, 3.0)  # of a projection's mean square; the fit takes the best on prompts it has not seen
_FOLDS = 4
_PRIOR_TOKENS = 16.0  # the task's table counts like this many tokens of the prompt
_PRIOR_PROMPTS = 1.0  # and like so many past prompts
_KEEP_TASK, _KEEP_ANY = 0.95, 0.8  # of a past prompt's weight, from one prompt to the next
_VECTORS = 4
_FEWEST = 8  # prompts that a stage is fitted on
_MOST = 1000  # the last prompts of a profile, for the weights: seven vectors of each are in memory at once


@dataclass(frozen=True)
class Weights:
    """What the fit finds.

    Attributes:
        stages: [S] tokens seen, ascending from 0.
        shares: [2, S, 4] factors of the vectors themselves, for prompts of a known [0] and an unknown [1] task.
        mean, basis: [D] and [r, D], the directions in which prompts differ; D is layers times experts.
        mixing: [S, r, 4 r + 1] from the projected vectors, and 1, to a correction in those directions. Known tasks
            alone: what holds between the directions of some tasks is wrong for another (4 to 9 points of recall).
    """

    stages: Floats
    shares: Floats
    mean: Floats
    basis: Floats
    mixing: Floats


class LowRankLinear:
    """The predictor; `fit` makes one.

    Args:
        table: uses by task.
        weights: of the map.
    """

    def __init__(self, table: TaskTable, weights: Weights) -> None:
        self.table, self._weights = table, weights
        L, E = table.frequency.shape[1:]
        self._past = _Past(L * E)
        self._uses = np.zeros((L, E), dtype=np.int64)
        self._task = UNKNOWN_TASK
        self._tokens = 0
        self._vectors = np.zeros((_VECTORS, L * E), dtype=np.float32)
        self._projected = np.ones(_VECTORS * len(weights.basis) + 1, dtype=np.float32)
        self._prepare()

    @property
    def names(self) -> tuple[str, ...]:
        return self.table.names

    def anew(self) -> LowRankLinear:
        return LowRankLinear(self.table, self._weights)

    def begin(self, task: int) -> None:
        if self._tokens:
            self._past.add(self._task, (self._uses.reshape(-1) / self._tokens).astype(np.float32))
        self._task, self._tokens = task, 0
        self._uses[:] = 0
        self._prepare()

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._uses += count(picks, self._uses.shape[1])
        self._tokens += picks.shape[1]

    def rank(self) -> Floats:
        weights, r = self._weights, len(self._weights.basis)
        present = self._vectors[1]
        np.add(self._uses.reshape(-1), _PRIOR_TOKENS * self._vectors[0], out=present)
        present /= self._tokens + _PRIOR_TOKENS
        low, high, t = _between(weights.stages, self._tokens)
        shares, mixing = weights.shares[int(self._task == UNKNOWN_TASK)], weights.mixing
        scores: Floats = ((1 - t) * shares[low] + t * shares[high]) @ self._vectors
        if self._task != UNKNOWN_TASK:
            self._projected[r : 2 * r] = weights.basis @ (present - weights.mean)
            correction = (1 - t) * (mixing[low] @ self._projected) + t * (mixing[high] @ self._projected)
            scores += correction @ weights.basis
        return np.maximum(scores, 0, out=scores).reshape(self._uses.shape)

    def _prepare(self) -> None:
        """What stays the same while a prompt runs."""
        r = len(self._weights.basis)
        prior = self.table.of(self._task).reshape(-1)
        self._vectors[0] = prior
        self._vectors[2], self._vectors[3] = self._past.of(self._task, prior)
        if self._task != UNKNOWN_TASK:
            for vector in (0, 2, 3):
                part = self._weights.basis @ (self._vectors[vector] - self._weights.mean)
                self._projected[vector * r : (vector + 1) * r] = part

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        weights = self._weights
        tensors = {"frequency": self.table.frequency, **{name: getattr(weights, name) for name in _SHAPES}}
        files.write(path, "linear", tensors, {"names": self.names})

    @classmethod
    def load(cls, path: str | Path) -> LowRankLinear:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        tensors, settings = files.read(path, "linear", {"frequency": 3, **_SHAPES})
        frequency, stages = tensors["frequency"], tensors["stages"]
        S, r, D = len(stages), len(tensors["basis"]), frequency[0].size
        shapes = {"shares": (2, S, _VECTORS), "mean": (D,), "basis": (r, D), "mixing": (S, r, _VECTORS * r + 1)}
        try:
            for name, shape in shapes.items():
                if tensors[name].shape != shape:
                    raise ValueError(f"{name!r} has shape {list(tensors[name].shape)}, expected {list(shape)}")
            if stages[0] != 0 or (np.diff(stages) <= 0).any():
                raise ValueError(f"'stages' are {stages.tolist()}, expected numbers that rise from 0")
            table = TaskTable(frequency, texts(settings, "names"))
        except (ValueError, TraceError) as error:
            raise files.fail(path, error) from error
        return cls(table, Weights(**{name: tensors[name] for name in _SHAPES}))

    @classmethod
    def fit(cls, trace: Trace, *, rank: int = RANK) -> LowRankLinear:
        """Learns from prompts, in the order of the trace: past prompts are those before.

        A prompt's own uses are taken out of the table it is shown. For an unknown task each task in turn is shown as if
        it were new: with the mean table of the others.

        Raises:
            TraceError: fewer than 8 prompts.
        """
        table = TaskTable.profile(trace)
        samples = _Samples.gather(trace, table)
        if len(samples.rates) < _FEWEST:
            raise TraceError(
                f"fitting a linear predictor needs {_FEWEST} prompts, the profile has {len(samples.rates)}"
            )
        mean = samples.rates.mean(axis=0)
        directions = np.linalg.svd(samples.rates - mean, full_matrices=False)[2]
        basis = np.ascontiguousarray(directions[: min(rank, len(samples.rates) - 1)], dtype=np.float32)
        stages, shares, mixing = [], [], []
        for stage in STAGES:
            if stage and samples.longer_than(stage).sum() < _FEWEST:
                break
            known, unknown = samples.at(stage, False), samples.at(stage, True)
            stages.append(stage)
            shares.append((_fit_shares(*known), _fit_shares(*unknown)))
            mixing.append(_fit_mixing(*known, shares[-1][0], mean, basis))
        return cls(
            table,
            Weights(
                stages=np.array(stages, dtype=np.float32),
                shares=np.array(shares, dtype=np.float32).transpose(1, 0, 2).copy(),
                mean=mean.astype(np.float32),
                basis=basis,
                mixing=np.array(mixing, dtype=np.float32),
            ),
        )


_SHAPES = {"stages": 1, "shares": 3, "mean": 1, "basis": 2, "mixing": 3}


class _Past:
    """Uses per token of past prompts, by task and of all; older prompts fade."""

    def __init__(self, size: int) -> None:
        self._of_task: dict[int, tuple[Floats, float]] = {}
        self._of_any: tuple[Floats, float] = (np.zeros(size, dtype=np.float32), 0.0)

    def add(self, task: int, rates: Floats) -> None:
        total, weight = self._of_task.get(task, (np.float32(0), 0.0))
        self._of_task[task] = (_KEEP_TASK * total + rates, _KEEP_TASK * weight + 1)
        total, weight = self._of_any
        self._of_any = (_KEEP_ANY * total + rates, _KEEP_ANY * weight + 1)

    def of(self, task: int, prior: Floats) -> tuple[Floats, Floats]:
        """[D] each, of the task and of all; the prior stands in for prompts that were not."""
        total, weight = self._of_task.get(task, (np.float32(0), 0.0))
        mine: Floats = np.asarray((total + _PRIOR_PROMPTS * prior) / (weight + _PRIOR_PROMPTS), dtype=np.float32)
        total, weight = self._of_any
        return mine, np.asarray((total + prior) / (weight + 1), dtype=np.float32)


@dataclass(frozen=True)
class _Samples:
    """Prompts with what was known before each."""

    picks: list[NDArray[np.integer]]
    experts: int
    tokens: Floats  # [P]
    rates: Floats  # [P, D] uses per token
    priors: tuple[Floats, Floats]  # [P, D] the tables shown: of the task without this prompt, of the other tasks
    pasts: tuple[tuple[Floats, Floats], tuple[Floats, Floats]]  # [P, D] of the task and of any, with either prior

    @classmethod
    def gather(cls, trace: Trace, table: TaskTable) -> _Samples:
        every = list(prompts(trace, table.names))[-_MOST:]
        tokens = np.array([each.picks.shape[1] for each in every], dtype=np.float32)
        task = np.array([each.task for each in every])
        uses = np.array([count(each.picks, trace.num_experts).reshape(-1) for each in every], dtype=np.float32)
        rates = uses / tokens[:, None]
        priors = (_without_own(uses, tokens, task), _of_others(table, task))
        pasts = tuple(
            tuple(np.array(part) for part in zip(*_walk(rates, task, prior), strict=True)) for prior in priors
        )
        return cls([each.picks for each in every], trace.num_experts, tokens, rates, priors, pasts)  # type: ignore[arg-type]

    def longer_than(self, stage: int) -> NDArray[np.bool_]:
        return self.tokens > stage

    def at(self, stage: int, unknown: bool) -> tuple[Floats, Floats]:
        """Vectors [P', 4, D] after `stage` tokens, and rates [P', D] of the tokens then left; of prompts that long."""
        mine = np.flatnonzero(self.longer_than(stage))
        prior = self.priors[unknown][mine]
        past = [part[mine] for part in self.pasts[unknown]]
        seen = np.array([count(self.picks[i][:, :stage], self.experts).reshape(-1) for i in mine], dtype=np.float32)
        present = (seen + _PRIOR_TOKENS * prior) / (stage + _PRIOR_TOKENS)
        tokens = self.tokens[mine, None]
        left: Floats = ((self.rates[mine] * tokens - seen) / (tokens - stage)).astype(np.float32)
        vectors: Floats = np.stack([prior, present, *past], axis=1).astype(np.float32)
        return vectors, left


def _without_own(uses: Floats, tokens: Floats, task: NDArray[np.integer]) -> Floats:
    """[P, D] the table of each prompt's task, counted without it; of all prompts where it is the only one."""
    result = np.empty_like(uses)
    for each in np.unique(task):
        mine = task == each
        pool = mine if mine.sum() > 1 else np.ones_like(mine)
        total, length = uses[pool].sum(axis=0), tokens[pool].sum()
        result[mine] = (total - uses[mine]) / (length - tokens[mine, None])
    return result


def _of_others(table: TaskTable, task: NDArray[np.integer]) -> Floats:
    """[P, D] the mean table of the tasks that each prompt is not of; where there is one task, all experts alike."""
    N, L, E = table.frequency.shape
    flat = table.frequency.reshape(N, L * E)
    seen = np.unique(task)
    if len(seen) == 1:
        alike = np.repeat(table.frequency[seen[0]].mean(axis=1), E)
        return np.broadcast_to(alike, (len(task), L * E))
    return np.stack([flat[seen[seen != each]].mean(axis=0) for each in range(N)])[task]


def _walk(rates: Floats, task: NDArray[np.integer], priors: Floats) -> Iterator[tuple[Floats, Floats]]:
    past = _Past(rates.shape[1])
    for each, number, prior in zip(rates, task.tolist(), priors, strict=True):
        yield past.of(number, prior)
        past.add(number, each)


def _fit_shares(vectors: Floats, left: Floats) -> Floats:
    """[4] factors of the vectors."""
    gram = np.einsum("pid,pjd->ij", vectors, vectors, optimize=True).astype(np.float64)
    moment = np.einsum("pid,pd->i", vectors, left, optimize=True)
    # Two vectors may be the same (nothing was seen, no prompt was before): the ridge shares between them.
    return np.linalg.solve(gram + 1e-4 * np.trace(gram) * np.eye(_VECTORS), moment).astype(np.float32)


def _fit_mixing(vectors: Floats, left: Floats, shares: Floats, mean: Floats, basis: Floats) -> Floats:
    """[r, 4 r + 1] of the projections; zero where no ridge helps on prompts that were left out."""
    targets: Floats = (left - np.einsum("i,pid->pd", shares, vectors)) @ basis.T  # [P, r]
    inputs = ((vectors - mean) @ basis.T).reshape(len(vectors), -1)
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1), dtype=np.float32)], axis=1)
    scale = float((inputs[:, :-1] ** 2).sum(axis=1).mean())
    fold = np.arange(len(inputs)) % _FOLDS
    errors = {np.inf: float((targets**2).sum())}
    for ridge in RIDGES:
        errors[ridge] = 0.0
        for each in range(_FOLDS):
            weights = _solve(inputs[fold != each], targets[fold != each], ridge * scale)
            errors[ridge] += float(((targets[fold == each] - inputs[fold == each] @ weights.T) ** 2).sum())
    best = min(errors, key=lambda ridge: errors[ridge])
    if best == np.inf:
        return np.zeros((targets.shape[1], inputs.shape[1]), dtype=np.float32)
    return _solve(inputs.astype(np.float32), targets.astype(np.float32), best * scale)


def _solve(inputs: Floats, targets: Floats, ridge: float) -> Floats:
    gram = inputs.T @ inputs + ridge * np.eye(inputs.shape[1])
    return np.linalg.solve(gram, inputs.T @ targets).T.astype(np.float32)


def _between(stages: Floats, tokens: int) -> tuple[int, int, np.float32]:
    """Stages on both sides and the way from the first to the second, 0 to 1, in the logarithm of tokens."""
    high = int(np.searchsorted(stages, tokens, side="right"))
    if high >= len(stages):
        return len(stages) - 1, len(stages) - 1, np.float32(0)
    low, here = high - 1, np.log1p(np.float32(tokens))
    start, end = np.log1p(stages[low]), np.log1p(stages[high])
    return low, high, np.float32((here - start) / (end - start))
