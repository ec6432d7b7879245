"""A routing mode and what belongs to it, from the options that name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from emoe.options import DEFAULT_TASK, Bias, Options


@dataclass(frozen=True)
class RoutingOptions:
    """A routing mode and what belongs to it.

    Attributes:
        mode: "exact", "resident" or "biased".
        bias: bonus of resident experts by task, with an entry for "default"; in ranges of a row's selection key.
        bound: largest mean share of router mass that may be substituted, None for no contract.
    """

    mode: str
    bias: Mapping[str, float]
    bound: float | None

    def bias_of(self, task: str | None) -> float:
        """The bonus asked for a task."""
        return self.bias[DEFAULT_TASK] if task is None else self.bias.get(task, self.bias[DEFAULT_TASK])


def parse_options(routing: str, bias: Bias | None = None, max_substituted_mass: float | None = None) -> RoutingOptions:
    """A mode by its options alone, for a model without a budget.

    Raises:
        ConfigError: a value is not one of its choices, or an option does not go with the mode.
    """
    return routing_of(Options(routing=routing, bias=bias, max_substituted_mass=max_substituted_mass))


def routing_of(options: Options) -> RoutingOptions:
    """The mode that options name."""
    bias = options.bias
    if bias is None:
        bias = 0.0 if options.routing == "exact" else math.inf
    by_task = bias if isinstance(bias, Mapping) else {DEFAULT_TASK: bias}
    return RoutingOptions(options.routing, {DEFAULT_TASK: 0.0, **by_task}, options.max_substituted_mass)
