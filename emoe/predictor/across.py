"""From layer to layer (eMoE-L) and from request to request (eMoE-A), the two predictors of arXiv 2503.06823.

Both are fitted in closed form from a trace, and know no tasks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError, TraceError
from emoe.predictor import files
from emoe.predictor.prompts import prompts
from emoe.predictor.table import count
from emoe.trace.trace import Trace

Floats = NDArray[np.float32]

RANK = 32  # directions in which requests differ
_MOST = 1000  # requests, the last ones, that the directions are taken from
RIDGE = 10.0  # of the mean square of a request in those directions
_SMOOTHING = 20.0  # uses of an expert before its own transitions count as much as everyone's
_PRIOR_TOKENS = 4.0  # the mean of all prompts counts like so many tokens of the running one
# Picks of a token are not independent evidence: 1 would be their mean, their number would be independence.
# On the public traces 2 and 4 find 59 % of a token's picks in as many guesses, 1 finds 54 %.
_EVIDENCE = 2.0
_TINY = 1e-4


class AcrossLayers:
    """A layer's experts from those of the layer before: eMoE-L.

    Args:
        transitions: [L - 1, E, E] uses per token of an expert of the next layer by tokens that use one of this layer.
        rates: [L, E] uses per token over all prompts; all that layer 0 goes by, beside its own uses.
    """

    names: tuple[str, ...] = ()

    def __init__(self, transitions: Floats, rates: Floats) -> None:
        L, E = rates.shape
        if transitions.shape != (L - 1, E, E):
            have, want = list(transitions.shape), [L - 1, E, E]
            raise TraceError(f"transitions of shape {have} do not fit rates of shape {[L, E]}, expected {want}")
        self._transitions, self._rates = transitions, rates
        self._usual = np.log(rates + _TINY)
        self._lift = np.log(transitions + _TINY) - self._usual[1:, None]  # above 0: likelier than usual
        self._plain = np.matmul(_shares(rates[:-1])[:, None], self._lift)[:, 0]  # [L - 1, E] of the usual picks
        self._uses = np.zeros((L, E), dtype=np.float32)
        self._tokens = 0

    def begin(self, task: int) -> None:
        self._uses[:] = 0
        self._tokens = 0

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._uses += count(picks, self._uses.shape[1])
        self._tokens += picks.shape[1]

    def rank(self) -> Floats:
        """Layer 0 by its own uses so far, every other by what those of the layer before make likely."""
        present = (self._uses + _PRIOR_TOKENS * self._rates) / (self._tokens + _PRIOR_TOKENS)
        scores = present.astype(np.float32)
        evidence = np.matmul(_shares(scores[:-1])[:, None], self._lift)[:, 0] - self._plain
        scores[1:] = np.exp(self._usual[1:] + _EVIDENCE * evidence)
        return scores

    def next_layer(self, layer: int, picks: NDArray[np.integer]) -> Floats:
        """[E] scores of layer + 1 from the picks [T, K] of this one; -1 is none.

        Raises:
            ConfigError: there is no layer after this one.
        """
        if not 0 <= layer < len(self._transitions):
            raise ConfigError(f"layer={layer} has no next layer; the model has layers 0 to {len(self._transitions)}")
        uses = count(picks[None], self._rates.shape[1])[0]
        known = np.flatnonzero(uses)
        if not known.size:
            return self._rates[layer + 1].astype(np.float32)
        shares = (uses[known] / uses.sum()).astype(np.float32)
        scores: Floats = np.exp(self._usual[layer + 1] + _EVIDENCE * (shares @ self._lift[layer][known]))
        return scores

    def anew(self) -> AcrossLayers:
        return AcrossLayers(self._transitions, self._rates)

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        files.write(path, "across-layers", {"transitions": self._transitions, "rates": self._rates}, {})

    @classmethod
    def load(cls, path: str | Path) -> AcrossLayers:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        tensors, _ = files.read(path, "across-layers", {"transitions": 3, "rates": 2})
        try:
            return cls(tensors["transitions"], tensors["rates"])
        except TraceError as error:
            raise files.fail(path, error) from error

    @classmethod
    def fit(cls, trace: Trace) -> AcrossLayers:
        """Counts pairs of picks of one token in neighbouring layers.

        Raises:
            TraceError: the trace has no tokens, or one layer.
        """
        L, E, T = trace.layers, trace.num_experts, trace.tokens
        if L < 2 or not T:
            raise TraceError(f"transitions between layers need tokens and two layers; the trace has {T} and {L}")
        rates: Floats = (count(trace.experts, E) / T).astype(np.float32)
        transitions = np.empty((L - 1, E, E), dtype=np.float32)
        picks = np.where(trace.experts < 0, E, trace.experts).astype(np.int64)  # E: no pick
        for layer in range(L - 1):
            pairs = (picks[layer][:, :, None] * (E + 1) + picks[layer + 1][:, None, :]).reshape(-1)
            together = np.bincount(pairs, minlength=(E + 1) ** 2).reshape(E + 1, E + 1)[:E, :E]
            uses = np.bincount(picks[layer].reshape(-1), minlength=E + 1)[:E, None]
            transitions[layer] = (together + _SMOOTHING * rates[layer + 1]) / (uses + _SMOOTHING)
        return cls(transitions, rates)


def _shares(rates: Floats) -> Floats:
    """[..., E] that add up to 1."""
    shares: Floats = rates / np.maximum(rates.sum(axis=-1, keepdims=True), _TINY)
    return shares


class AcrossRequests:
    """A request's experts in all layers at once from those of the request before: eMoE-A.

    Args:
        mean: [L, E] uses per token of a request.
        share: factor on what the last request differed from the mean by.
        basis: [r, L * E] directions in which requests differ.
        mixing: [r, r] from the last request's place in those directions to a correction in them.
    """

    names: tuple[str, ...] = ()

    def __init__(self, mean: Floats, share: float, basis: Floats, mixing: Floats) -> None:
        r = len(basis)
        if basis.shape != (r, mean.size) or mixing.shape != (r, r):
            shapes = f"mean {list(mean.shape)}, basis {list(basis.shape)}, mixing {list(mixing.shape)}"
            raise TraceError(f"{shapes} do not fit together")
        self._mean, self._basis, self._mixing = mean, basis, mixing
        self._share = np.float32(share)
        self._uses: NDArray[np.int64] = np.zeros(mean.shape, dtype=np.int64)
        self._tokens = 0
        self._scores = mean

    def begin(self, task: int) -> None:
        if not self._tokens:  # no request was before, or it was only begun
            return
        apart = np.asarray(self._uses / self._tokens - self._mean, dtype=np.float32).reshape(-1)
        expected = self._share * apart + (self._mixing @ (self._basis @ apart)) @ self._basis
        self._scores = np.maximum(self._mean + expected.reshape(self._mean.shape), 0).astype(np.float32)
        self._uses[:] = 0
        self._tokens = 0

    def observe(self, picks: NDArray[np.integer]) -> None:
        self._uses += count(picks, self._uses.shape[1])
        self._tokens += picks.shape[1]

    def rank(self) -> Floats:
        """What the request before makes likely; the running one changes nothing."""
        return self._scores

    def anew(self) -> AcrossRequests:
        return AcrossRequests(self._mean, float(self._share), self._basis, self._mixing)

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file."""
        tensors = {"mean": self._mean, "basis": self._basis, "mixing": self._mixing}
        files.write(path, "across-requests", tensors, {"share": float(self._share)})

    @classmethod
    def load(cls, path: str | Path) -> AcrossRequests:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
        """
        tensors, settings = files.read(path, "across-requests", {"mean": 2, "basis": 2, "mixing": 2})
        share = settings.get("share")
        try:
            if not isinstance(share, float) or not abs(share) < 1e30:
                raise ValueError(f"'share' is {share!r}, expected a number that float32 holds")
            return cls(tensors["mean"], share, tensors["basis"], tensors["mixing"])
        except (TraceError, ValueError) as error:
            raise files.fail(path, error) from error

    @classmethod
    def fit(cls, trace: Trace, *, rank: int = RANK) -> AcrossRequests:
        """Learns from each prompt and the one after it, in the order of the trace: it has to be that of the traffic.

        Raises:
            TraceError: fewer than three prompts.
        """
        every = [each.picks for each in prompts(trace, ())][-_MOST:]
        if len(every) < 3:
            raise TraceError(f"fitting from request to request needs three prompts, the profile has {len(every)}")
        E = trace.num_experts
        rates = np.array([count(picks, E).reshape(-1) / picks.shape[1] for picks in every], dtype=np.float32)
        mean = rates.mean(axis=0)
        apart = rates - mean
        basis = np.linalg.svd(apart, full_matrices=False)[2][: min(rank, len(every) - 1)]
        before, after = apart[:-1], apart[1:]
        share = float((before * after).sum() / max(float((before * before).sum()), _TINY))
        inputs, targets = before @ basis.T, (after - share * before) @ basis.T  # [P - 1, r]
        gram = inputs.T @ inputs
        gram += RIDGE * np.trace(gram) * np.eye(len(gram), dtype=np.float32) / len(gram)
        mixing = np.linalg.solve(gram, inputs.T @ targets).T
        return cls(mean.reshape(trace.layers, E), share, np.ascontiguousarray(basis), np.ascontiguousarray(mixing))
