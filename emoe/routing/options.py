"""What users write for routing, turned into values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emoe.errors import ConfigError

MODES = ("exact", "resident", "biased")
DEFAULT = "default"  # key of the bias for tasks that a mapping does not name

Bias = float | Mapping[str, float]


@dataclass(frozen=True)
class RoutingOptions:
    """A routing mode and what belongs to it.

    Attributes:
        mode: one of MODES.
        bias: bonus of resident experts by task, with an entry for DEFAULT; in ranges of a row's selection key.
        bound: largest mean share of router mass that may be substituted, None for no contract.
    """

    mode: str
    bias: Mapping[str, float]
    bound: float | None

    def bias_of(self, task: str | None) -> float:
        """The bonus asked for a task."""
        return self.bias[DEFAULT] if task is None else self.bias.get(task, self.bias[DEFAULT])


def parse_options(routing: str, bias: Bias | None = None, max_substituted_mass: float | None = None) -> RoutingOptions:
    """Reads `routing=`, `bias=` and `max_substituted_mass=`.

    Raises:
        ConfigError: a value is not one of its choices, or an option does not go with the mode.
    """
    if routing not in MODES:
        raise ConfigError(f"routing={routing!r} is not one of: {', '.join(MODES)}")
    if max_substituted_mass is not None:
        _check_number("max_substituted_mass", max_substituted_mass, 1.0, "a share of router mass from 0 to 1")
        if routing == "exact":
            raise ConfigError(
                "max_substituted_mass goes with routing='resident' or 'biased'; 'exact' substitutes nothing"
            )
    if bias is not None and routing != "biased":
        raise ConfigError(f"bias={bias!r} goes with routing='biased', not {routing!r}")
    if routing == "biased" and bias is None and max_substituted_mass is None:
        raise ConfigError(
            "routing='biased' needs bias= (a number of at least 0, or one per task: {'code': 0.2, 'default': 0.5}) or "
            "max_substituted_mass= (then the bias is found while running)"
        )
    bound = None if max_substituted_mass is None else float(max_substituted_mass)
    return RoutingOptions(routing, _parse_bias(bias, routing), bound)


def _parse_bias(bias: Bias | None, routing: str) -> dict[str, float]:
    if bias is None:
        return {DEFAULT: 0.0 if routing == "exact" else math.inf}
    if not isinstance(bias, Mapping):
        _check_number("bias", bias, math.inf, "a number of at least 0 (inf: resident experts first)")
        return {DEFAULT: float(bias)}
    for task, value in bias.items():
        if not isinstance(task, str):
            raise ConfigError(f"bias has the key {task!r}; keys are names of tasks, and 'default' for all others")
        _check_number(f"bias[{task!r}]", value, math.inf, "a number of at least 0 (inf: resident experts first)")
    return {DEFAULT: 0.0, **{task: float(value) for task, value in bias.items()}}


def _check_number(name: str, value: Any, most: float, choices: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ConfigError(f"{name}={value!r} is not {choices}")
