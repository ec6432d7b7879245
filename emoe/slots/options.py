"""How a predictor runs, as a user says it: names and paths become objects. Decides nothing while a model runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError
from emoe.predictor import KINDS, MADE, ExpertPredictor, class_of, files, load, make

PERIOD = 40  # requests; arXiv 2503.06823
SLACK = 0.5  # of a layer's slots; docs/tasks.md: what misnamed tasks cost
LOOK_AHEAD = "look-ahead"


class Sensitivity(Protocol):
    """What the load score asks of a sensitivity profile (docs/sensitivity.md)."""

    def insensitive(self, task: str) -> NDArray[np.bool_]:
        """[L] True where wrong experts do not hurt the task."""


@dataclass(frozen=True)
class PredictionOptions:
    """How a predictor runs.

    Attributes:
        predictor: scores the experts.
        period: requests between two choices of the base set, or "adaptive".
        slack: share of a layer's slots left to LRU; at least `top_k` slots are. Not used in mode `resident`.
        prefetch: names experts of the next layer; None: nothing does.
        sensitivity: layers in which a task does not count.
    """

    predictor: ExpertPredictor | None
    period: int | str = PERIOD
    slack: float = SLACK
    prefetch: Any = None
    sensitivity: Sensitivity | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.period, int) and not isinstance(self.period, bool) and self.period >= 1
        if self.period != "adaptive" and not whole:
            raise ConfigError(f"period={self.period!r} is not a number of requests of at least 1, nor 'adaptive'")
        if not isinstance(self.slack, (int, float)) or not 0 < self.slack <= 1:
            raise ConfigError(f"slack={self.slack!r} is not a share over 0 and up to 1")
        for name, value, method in (
            ("predictor", self.predictor, "rank"),
            ("prefetch", self.prefetch, "next_layer"),
            ("sensitivity", self.sensitivity, "insensitive"),
        ):
            if value is not None and not hasattr(value, method):
                raise ConfigError(
                    f"{name}: {type(value).__name__} has no method {method}(); docs/predictors.md and "
                    "docs/sensitivity.md say what has"
                )


def parse_prediction(
    model: Any,
    layers: int,
    experts: int,
    *,
    predictor: Any = None,
    period: int | str = PERIOD,
    slack: float = SLACK,
    prefetch: Any = None,
    sensitivity: Any = None,
) -> PredictionOptions:
    """Options as a user gives them: names and paths become objects.

    Args:
        model: the Transformers model, for predictors that read its routers.
        layers, experts: experts modules, and routed experts of the largest.
        predictor: None, a name in `emoe.predictor.MADE`, a file of `emoe train-predictor`, or an `ExpertPredictor`.
        period, slack: as in `PredictionOptions`.
        prefetch: None, "look-ahead" (the next layer's router on the present hidden state), or a predictor or file of
            one that has `next_layer`.
        sensitivity: None, a file of `emoe profile sensitivity`, or a `SensitivityProfile`.

    Raises:
        ConfigError: an option is not one of its choices.
        CheckpointError: a file is something else.
    """
    if isinstance(predictor, (str, Path)):
        if str(predictor) in MADE:
            predictor = make(str(predictor), layers=layers, experts=experts)
        elif Path(predictor).is_file():
            predictor = load(predictor)
        else:
            raise ConfigError(
                f"predictor={str(predictor)!r} is neither a file nor one of: {', '.join(MADE)}; "
                "'emoe train-predictor' makes files"
            )
    if isinstance(prefetch, (str, Path)):
        if str(prefetch) == LOOK_AHEAD:
            from emoe.routing.look_ahead import LookAhead

            prefetch = LookAhead.of(model)
        elif Path(prefetch).is_file():
            prefetch = _load_next_layer(prefetch, layers, experts)
        else:
            raise ConfigError(f"prefetch={str(prefetch)!r} is neither a file nor '{LOOK_AHEAD}'")
    if isinstance(sensitivity, (str, Path)):
        from emoe.sensitivity import SensitivityProfile

        if not Path(sensitivity).is_file():
            raise ConfigError(f"sensitivity={str(sensitivity)!r} is not a file; 'emoe profile sensitivity' makes one")
        sensitivity = SensitivityProfile.load(sensitivity)
    return PredictionOptions(predictor, period, slack, prefetch, sensitivity)


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
