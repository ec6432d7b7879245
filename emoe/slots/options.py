"""Predictors and profiles that options name, opened and compared with the model. Decides nothing while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.options import LOOK_AHEAD, Options
from emoe.predictor import KINDS, ExpertPredictor, class_of, files, load, make


class Sensitivity(Protocol):
    """What the load score asks of a sensitivity profile (docs/tasks.md)."""

    def insensitive(self, task: str) -> NDArray[np.bool_]:
        """[L] True where wrong experts do not hurt the task."""


def opened(options: Options, layers: int, experts: int, model: Any = None) -> Options:
    """Options in which files and names of predictors have become objects; opened ones stay what they are.

    Args:
        layers, experts: experts modules, and routed experts of the largest.
        model: the Transformers model, for "look-ahead", which reads its routers; without it that stays a name.

    Raises:
        ConfigError: a predictor or profile is of another model, or of a kind that does something else.
        CheckpointError: a file is something else.
        UnsupportedModelError: "look-ahead" with a router that follows no rule that emoe knows.
    """
    predictor, prefetch, sensitivity = options.predictor, options.prefetch, options.sensitivity
    if isinstance(predictor, str):
        predictor = make(predictor, layers=layers, experts=experts)
    elif isinstance(predictor, Path):
        predictor = load(predictor)
    if predictor is not None:
        require_shape(predictor, layers, experts)
    if isinstance(prefetch, Path):
        prefetch = _load_next_layer(prefetch, layers, experts)
    elif prefetch == LOOK_AHEAD and model is not None:
        from emoe.routing.look_ahead import LookAhead

        prefetch = LookAhead.of(model)
    if isinstance(sensitivity, Path):
        from emoe.sensitivity import SensitivityProfile

        sensitivity = SensitivityProfile.load(sensitivity)
    if sensitivity is not None:
        insensitive_layers(predictor, sensitivity, layers)
    return options.but(predictor=predictor, prefetch=prefetch, sensitivity=sensitivity)


def require_shape(predictor: ExpertPredictor, layers: int, experts: int) -> None:
    """ConfigError where a predictor is of another model."""
    shape = list(np.shape(predictor.rank()))
    if shape != [layers, experts]:
        raise ConfigError(f"the predictor scores {shape} (layers, experts); this model has {[layers, experts]}")


def insensitive_layers(
    predictor: ExpertPredictor | None, sensitivity: Sensitivity, layers: int
) -> dict[int, NDArray[np.bool_]]:
    """[L] layers that do not count, of each task that predictor and profile know, by the predictor's number.

    Raises:
        ConfigError: the profile is of another model.
    """
    known = {}
    for number, name in enumerate(predictor.names if predictor is not None else ()):
        try:
            found = np.asarray(sensitivity.insensitive(name), dtype=bool)
        except KeyError:  # a task that the profile does not have is taken to be sensitive
            continue
        if found.shape != (layers,):
            raise ConfigError(f"the sensitivity profile is of {len(found)} layers; this model has {layers}")
        known[number] = found
    return known


def _load_next_layer(path: str | Path, layers: int, experts: int) -> ExpertPredictor:
    """A predictor of the next layer of this model, from its file."""
    predictor = load(path)
    if not hasattr(predictor, "next_layer"):
        able = [kind for kind in KINDS if hasattr(class_of(kind), "next_layer")]
        raise ConfigError(
            f"prefetch={str(path)!r} holds a predictor of kind {files.kind(path)!r}, which does not predict the next "
            f"layer; kinds that do: {', '.join(able)}; '{LOOK_AHEAD}' needs no file"
        )
    shape = list(np.shape(predictor.rank()))
    if shape != [layers, experts]:
        raise ConfigError(
            f"prefetch={str(path)!r} scores {shape} (layers, experts); this model has {[layers, experts]}"
        )
    return predictor
