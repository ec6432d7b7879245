"""How much of expert use is known from elsewhere: from other layers, from earlier tokens, from other prompts.

Numbers of one trace; no model. docs/traces.md defines each measure. Experiment 1 of arXiv 2503.06823.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError
from emoe.trace.trace import Trace

Floats = NDArray[np.float64]

MOST_TOKENS = 4000  # of a trace that layers and tokens are compared on
MOST_PROMPTS = 60  # in the matrix of prompts
MOST_LAG = 32
_RIDGE = 1.0  # in uses of an expert


@dataclass(frozen=True)
class Correlations:
    """Experiment 1.

    Attributes:
        layers: [L, L]: how well the picks of the row's layer predict those of the column's, for the same token: Pearson
            correlation of predicted and actual use on prompts that were not fitted, expert means taken out. The
            diagonal is 1.
        adjacent: [L - 1] the part of `layers` from each layer to the next.
        tokens: [lags] Pearson correlation of the use vectors of two tokens of one prompt, so many tokens apart.
        tokens_elsewhere: the same for tokens of different prompts.
        prompts: [N, N] Pearson correlation of the use vectors of prompts, grouped by task.
        prompt_tasks: [N] the task of each row of `prompts`.
        consecutive: [prompts - 1] correlation of each prompt with the one before it, in the order of the trace.
    """

    layers: Floats
    adjacent: Floats
    tokens: Floats
    tokens_elsewhere: float
    prompts: Floats
    prompt_tasks: tuple[str, ...]
    consecutive: Floats

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "layers": self.layers.round(4).tolist(),
            "adjacent": self.adjacent.round(4).tolist(),
            "tokens": self.tokens.round(4).tolist(),
            "tokens_elsewhere": round(self.tokens_elsewhere, 4),
            "prompts": self.prompts.round(4).tolist(),
            "prompt_tasks": list(self.prompt_tasks),
            "consecutive": self.consecutive.round(4).tolist(),
        }


def correlate(trace: Trace, seed: int = 0) -> Correlations:
    """All of experiment 1.

    Raises:
        TraceError: the trace has fewer than four prompts.
    """
    prompts = np.unique(trace.prompt)
    if len(prompts) < 4:
        raise TraceError(f"correlations need at least 4 prompts; the trace has {len(prompts)}")
    layers = between_layers(trace, seed)
    tokens, elsewhere = between_tokens(trace, seed)
    uses = prompt_uses(trace)
    flat = uses.reshape(len(uses), -1)
    task = np.array([trace.task[trace.prompt == prompt][0] for prompt in prompts])
    shown = np.argsort(task, kind="stable")
    shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), MOST_PROMPTS)).round().astype(int)]
    # In the order of the trace, which np.unique does not keep.
    order = prompts.searchsorted(trace.prompt[np.r_[True, trace.prompt[1:] != trace.prompt[:-1]]])
    return Correlations(
        layers=layers,
        adjacent=np.diagonal(layers, 1).copy(),
        tokens=tokens,
        tokens_elsewhere=elsewhere,
        prompts=np.corrcoef(flat[shown]),
        prompt_tasks=tuple(trace.task_names[number] for number in task[shown]),
        consecutive=_rowwise(flat[order[:-1]], flat[order[1:]]),
    )


def prompt_uses(trace: Trace) -> Floats:
    """[N, L, E] uses of each expert per token of each prompt, prompts in ascending order of their numbers."""
    prompts, of_token = np.unique(trace.prompt, return_inverse=True)
    N, L, E = len(prompts), trace.layers, trace.num_experts
    tokens = np.bincount(of_token, minlength=N)
    uses = np.empty((N, L, E))
    for layer in range(L):
        picks = trace.experts[layer].astype(np.int64)
        place = of_token[:, None] * (E + 1) + np.where(picks < 0, E, picks)
        counts = np.bincount(place.reshape(-1), minlength=N * (E + 1)).reshape(N, E + 1)[:, :E]
        uses[:, layer] = counts / tokens[:, None]
    return uses


def between_layers(trace: Trace, seed: int = 0) -> Floats:
    """[L, L] as `Correlations.layers`.

    Use of the column's experts is fitted on that of the row's by ridge regression over the tokens of every second
    prompt; the correlation is over all experts and all tokens of the other prompts.
    """
    trace = _some(trace, seed)
    prompts = np.unique(trace.prompt)
    fitted = np.isin(trace.prompt, prompts[::2])
    L, E = trace.layers, trace.num_experts
    use = _indicators(trace)  # [L, T, E]
    use -= use[:, fitted].mean(axis=1, keepdims=True)
    shown = use[:, ~fitted]
    shown_norm = np.sqrt((shown**2).sum(axis=(1, 2)))
    result = np.eye(L)
    for row in range(L):
        mine = use[row, fitted]
        inverse = np.linalg.inv(mine.T @ mine + _RIDGE * np.eye(E, dtype=np.float32))
        for column in range(L):
            if column == row:
                continue
            weights = inverse @ (mine.T @ use[column, fitted])
            predicted = shown[row] @ weights
            norm = float(np.sqrt((predicted**2).sum())) * shown_norm[column]
            result[row, column] = float((predicted * shown[column]).sum()) / norm if norm else 0.0
    return result


def between_tokens(trace: Trace, seed: int = 0) -> tuple[Floats, float]:
    """[lags] and a number as `Correlations.tokens` and `tokens_elsewhere`; each layer's mean, then the mean of all."""
    trace = _some(trace, seed)
    use = _indicators(trace)
    use -= use.mean(axis=2, keepdims=True)  # Pearson over the experts of a layer
    norm = np.sqrt((use**2).sum(axis=2, keepdims=True))
    use /= np.where(norm, norm, 1)
    prompt, T = trace.prompt, trace.tokens
    lags = []
    for lag in range(1, min(MOST_LAG, T - 1) + 1):
        same = prompt[lag:] == prompt[:-lag]
        if same.sum() < 8:
            break
        lags.append(float((use[:, lag:][:, same] * use[:, :-lag][:, same]).sum(axis=2).mean()))
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, T, 4000), rng.integers(0, T, 4000)
    other = prompt[first] != prompt[second]
    elsewhere = float((use[:, first[other]] * use[:, second[other]]).sum(axis=2).mean())
    return np.array(lags), elsewhere


def _some(trace: Trace, seed: int) -> Trace:
    """The trace, or so many of its prompts, drawn at random, as hold MOST_TOKENS."""
    if trace.tokens <= MOST_TOKENS:
        return trace
    prompts, counts = np.unique(trace.prompt, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(prompts))
    enough = max(4, int(np.searchsorted(np.cumsum(counts[order]), MOST_TOKENS)))
    return trace.take(np.isin(trace.prompt, prompts[order[:enough]]))


def _indicators(trace: Trace) -> NDArray[np.float32]:
    """[L, T, E]: 1 where a token was sent to an expert."""
    use = np.zeros((trace.layers, trace.tokens, trace.num_experts + 1), dtype=np.float32)
    picks = np.where(trace.experts < 0, trace.num_experts, trace.experts).astype(np.int64)
    np.put_along_axis(use, picks, 1.0, axis=2)
    return use[:, :, :-1].copy()


def _rowwise(first: Floats, second: Floats) -> Floats:
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean(axis=1, keepdims=True)
    norm = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.asarray((first * second).sum(axis=1) / np.where(norm, norm, 1))
