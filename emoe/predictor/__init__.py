"""Which experts a request will be routed to. Numbers over [layers, experts]; no slots, no bytes.

A predictor is told what happens (`begin` a prompt, `observe` its tokens) and gives scores (`rank`); higher is likelier.
`load` reads one from a file, `make` gives those that need none. docs/predictors.md compares them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from emoe.errors import CheckpointError, ConfigError

__all__ = ["KINDS", "MADE", "UNKNOWN_TASK", "ExpertPredictor", "load", "make", "top"]

UNKNOWN_TASK = -1

# kind in a file's metadata -> where its class is; modules are imported when asked for.
KINDS = {
    "task-table": ("emoe.predictor.table", "TaskTable"),
    "global-table": ("emoe.predictor.table", "GlobalTable"),
    "across-layers": ("emoe.predictor.across", "AcrossLayers"),
    "across-requests": ("emoe.predictor.across", "AcrossRequests"),
    "next-use": ("emoe.predictor.next_use", "NextUse"),
    "linear": ("emoe.predictor.linear", "LowRankLinear"),
    "xlnet": ("emoe.predictor.sequence", "SequenceModel"),
}
# Without a file.
MADE = {
    "recent": ("emoe.predictor.table", "Recent"),
}


@runtime_checkable
class ExpertPredictor(Protocol):
    """What residency asks of a predictor. One object serves one stream of prompts, one after the other."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks it knows, in the order of their numbers; () where tasks do not matter."""

    def begin(self, task: int) -> None:
        """A prompt of this task begins: a number below `len(names)`, or UNKNOWN_TASK. Without names any will do."""

    def observe(self, picks: NDArray[np.integer]) -> None:
        """Tokens of the running prompt were routed, in their order: [L, T, K] expert ids, -1 for no pick."""

    def rank(self) -> NDArray[np.floating]:
        """[L, E] scores of the experts' coming use; valid until the next call of any method."""

    def anew(self) -> ExpertPredictor:
        """The same model that has seen nothing."""


def load(path: str | Path) -> ExpertPredictor:
    """Reads a predictor that `save` or `emoe train-predictor` wrote.

    Raises:
        CheckpointError: the file is something else, or of a kind that this version does not know; lists the kinds.
        MissingFileError: there is no such file.
    """
    from emoe.predictor import files

    kind = files.kind(path)
    if kind not in KINDS:
        raise CheckpointError(f"{path}: predictor of kind {kind!r}, not one of: {', '.join(KINDS)}", file=str(path))
    predictor: ExpertPredictor = class_of(kind).load(path)
    return predictor


def make(name: str, **arguments: Any) -> ExpertPredictor:
    """A predictor that needs no training: `make("recent", layers=48, experts=128)`.

    Args:
        name: one of MADE.
        arguments: of the class's constructor.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in MADE:
        raise ConfigError(f"predictor={name!r} is not one of: {', '.join(MADE)}")
    predictor: ExpertPredictor = _load(*MADE[name])(**arguments)
    return predictor


def top(scores: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """[L, E] mask of the `count` highest scores of each layer; of equals the lowest ids."""
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask


def class_of(kind: str) -> Any:
    """The class of a kind in KINDS."""
    return _load(*KINDS[kind])


def _load(module: str, name: str) -> Any:
    return getattr(import_module(module), name)
