"""The result of profiling: similarity by task and layers routed at random, and what follows from it. Numbers only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe import files
from emoe.errors import CheckpointError, ConfigError
from emoe.files import jsontext

FORMAT = "emoe-sensitivity"
VERSION = 1
LEAST = 0.01  # of sensitivity, where a bias is suggested: nothing is divided by less
LIGHTEST, HEAVIEST = 0.25, 4.0  # weights of layers: few prompts do not tell a layer that bears everything

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SensitivityProfile:
    """How similar each task's outputs stay when its first layers are routed at random (arXiv 2503.06823).

    Attributes:
        tasks: [N] names.
        layers: L, experts modules of the model.
        similarity: [N, L + 1] to the untouched model's output, 0 to 1, with the first 0, 1, ... L layers at random.
        threshold: least similarity at which a layer counts as insensitive.
        error: [N, L + 1] standard error over prompts.
        prompts: [N] prompts of each task.
        meta: everything else that was recorded (model, seed, depths measured).
    """

    tasks: tuple[str, ...]
    layers: int
    similarity: Floats
    threshold: float = 0.85
    error: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    prompts: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.tasks), self.layers + 1)
        if self.similarity.shape != shape:
            raise ConfigError(f"similarity of shape {list(self.similarity.shape)}, expected {list(shape)}")
        if not np.isfinite(self.similarity).all():
            raise ConfigError("similarity is not a number everywhere")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} is not between 0 and 1")
        if self.error.size == 0:
            object.__setattr__(self, "error", np.zeros(shape))
        if self.error.shape != shape:
            raise ConfigError(f"error of shape {list(self.error.shape)}, expected {list(shape)}")

    def insensitive(self, task: str | None) -> NDArray[np.bool_]:
        """[L] the layers up to which all similarities stay at the threshold or above; none for an unknown task."""
        if task not in self.tasks:
            return np.zeros(self.layers, dtype=bool)
        below = np.flatnonzero(self.similarity[self.tasks.index(task)] < self.threshold)
        depth = int(below[0]) - 1 if len(below) else self.layers
        return np.arange(self.layers) < depth

    def sensitivity(self, task: str) -> float:
        """Mean loss of similarity over 1, 2, ... L layers at random: 0 where nothing matters, at most 1.

        Raises:
            ConfigError: the task was not profiled; names those that were.
        """
        return float((1 - self.similarity[self._row(task), 1:]).mean())

    def layer_weights(self, task: str | None) -> Floats:
        """[L] how bad wrong experts are in each layer, as `emoe.routing.contract.Contract` takes it.

        What similarity loses with the layer over the mean loss, between LIGHTEST and HEAVIEST, scaled. An unknown task
        has the mean of all; all layers are alike where nothing is lost.
        """
        rows = self.similarity if task not in self.tasks else self.similarity[[self.tasks.index(task)]]
        loss = -np.diff(np.minimum.accumulate(rows, axis=1), axis=1).mean(0) if len(rows) else np.zeros(self.layers)
        if not loss.sum() > 0:
            return np.ones(self.layers)
        weights = np.clip(loss / loss.mean(), LIGHTEST, HEAVIEST)
        return np.asarray(weights * (1 / weights).mean(), dtype=np.float64)

    def rank(self) -> list[str]:
        """The tasks, most sensitive first."""
        return sorted(self.tasks, key=lambda task: (-self.sensitivity(task), task))

    def bias(self, task: str | None, most: float) -> float:
        """A bias for routing mode `biased` (`suggest_bias`); unknown tasks get that of the most sensitive one."""
        return suggest_bias({name: self.sensitivity(name) for name in self.tasks}, task, most)

    def at(self, threshold: float) -> SensitivityProfile:
        """The same measurements under another threshold."""
        return SensitivityProfile(
            self.tasks, self.layers, self.similarity, threshold, self.error, self.prompts, self.meta
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; with what follows from the measurements, for readers that are not emoe."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "layers": self.layers,
            "threshold": self.threshold,
            "tasks": {
                task: {
                    "prompts": self.prompts[row] if self.prompts else None,
                    "sensitivity": round(self.sensitivity(task), 5),
                    "insensitive_layers": int(self.insensitive(task).sum()),
                    "similarity": self.similarity[row].round(5).tolist(),
                    "error": self.error[row].round(5).tolist(),
                }
                for row, task in enumerate(self.tasks)
            },
            "meta": self.meta,
        }

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file.

        Raises:
            WriteError: the folder cannot be written.
        """
        path = Path(path).expanduser()
        with files.whole(path) as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> SensitivityProfile:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is something else.
            MissingFileError: there is no such file.
        """
        fail = partial(CheckpointError, file=str(path))
        values = jsontext.read(path, "sensitivity profile", fail)
        try:
            if not isinstance(values, dict) or values["format"] != FORMAT:
                raise ValueError(f"not of format {FORMAT!r}")
            jsontext.whole_number(values["version"], "version", 1, VERSION)
            rows, meta = values["tasks"], values["meta"]
            layers = jsontext.whole_number(values["layers"], "layers", 0, 1 << 20)
            if not isinstance(rows, dict) or not isinstance(meta, dict):
                raise ValueError("'tasks' and 'meta' are not both objects")
            counts = tuple(
                0 if row["prompts"] is None else jsontext.whole_number(row["prompts"], "prompts", 0, 1 << 53)
                for row in rows.values()
            )
            return cls(
                tuple(rows),
                layers,
                _numbers(rows, "similarity", layers),
                jsontext.number(values["threshold"], "threshold", 0, 1),
                _numbers(rows, "error", layers),
                counts if all(counts) else (),
                meta,
            )
        except (ValueError, KeyError, TypeError) as error:  # ConfigError is a ValueError
            raise fail(f"{path}: not a sensitivity profile: {error}") from error

    def _row(self, task: str) -> int:
        if task not in self.tasks:
            raise ConfigError(f"task {task!r} was not profiled; profiled were: {', '.join(self.tasks)}")
        return self.tasks.index(task)


def _numbers(rows: Mapping[str, Any], name: str, layers: int) -> Floats:
    """[N, L + 1] of a list in each task's row."""
    for row in rows.values():
        if not isinstance(row[name], list) or len(row[name]) != layers + 1:
            raise ValueError(f"{name!r} is {jsontext.shown(row[name])}, expected {layers + 1} numbers")
    values = [[jsontext.number(each, name, -1e30, 1e30) for each in row[name]] for row in rows.values()]
    return np.array(values, dtype=np.float64).reshape(len(rows), layers + 1)


def suggest_bias(sensitivity: Mapping[str, float], task: str | None, most: float) -> float:
    """A bias that lets every task lose about as much as the least sensitive one does at `most`.

    What a task loses is taken to be its sensitivity times the router mass that is substituted, and that mass to grow
    with the bias: so the bias falls as one over the sensitivity.

    Args:
        sensitivity: of each task, on one scale.
        task: one of them; an unknown one is treated as the most sensitive.
        most: the bias of the least sensitive task, at least 0 and finite.

    Raises:
        ConfigError: `most` is negative or not finite, or there is no task.
    """
    if not (math.isfinite(most) and most >= 0):
        raise ConfigError(f"most={most} is not a finite bias of at least 0")
    if not sensitivity:
        raise ConfigError("no task's sensitivity is known yet")
    values = {name: max(LEAST, value) for name, value in sensitivity.items()}
    mine = values[task] if task in values else max(values.values())
    return most * min(values.values()) / mine
