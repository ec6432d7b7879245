"""A routing mode and what belongs to it, from the options that name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from emoe.options import DEFAULT_TASK, EXACT_MASS, Bias, Options


@dataclass(frozen=True)
class RoutingOptions:
    """A routing mode and what belongs to it.

    Attributes:
        mode: "exact", "resident", "biased" or "coarse".
        bias: bonus of resident experts by task, with an entry for "default"; in ranges of a row's selection key.
        bound: largest mean share of router mass that may be substituted, None for no contract.
        keep_top: a row's pick with the most mass is never substituted, in prompts and in decode.
        exact_mass: in mode "coarse", the share of a row's mass from which an absent expert is read, by task as `bias`.
    """

    mode: str
    bias: Mapping[str, float]
    bound: float | None
    keep_top: tuple[bool, bool] = (False, False)
    exact_mass: Mapping[str, float] = field(default_factory=lambda: {DEFAULT_TASK: EXACT_MASS})

    def bias_of(self, task: str | None) -> float:
        """The bonus asked for a task."""
        return _of(self.bias, task)

    def exact_mass_of(self, task: str | None) -> float:
        """The share from which the experts of a task are read."""
        return _of(self.exact_mass, task)

    @property
    def loads_misses(self) -> bool:
        """Whether a request may read experts that are not in memory, once slots are full."""
        if self.mode == "coarse":
            return any(mass < 1 for mass in self.exact_mass.values())
        return self.mode != "resident" or self.bound is not None or any(self.keep_top)

    def hostless(self, resident_share: float) -> bool:
        """Whether a step needs no host once slots are full: nothing is read, and routing can do with slot tables.

        Args:
            resident_share: slots over experts.
        """
        return (self.mode == "resident" and not self.loads_misses) or (self.mode == "exact" and resident_share >= 1)


def _of(by_task: Mapping[str, float], task: str | None) -> float:
    return by_task[DEFAULT_TASK] if task is None else by_task.get(task, by_task[DEFAULT_TASK])


def parse_options(
    routing: str, bias: Bias | None = None, max_substituted_mass: float | None = None, top_pick: str = "auto"
) -> RoutingOptions:
    """A mode by its options alone, for a model without a budget.

    Raises:
        ConfigError: a value is not one of its choices, or an option does not go with the mode.
    """
    return routing_of(Options(routing=routing, bias=bias, max_substituted_mass=max_substituted_mass, top_pick=top_pick))


def routing_of(options: Options) -> RoutingOptions:
    """The mode that options name."""
    bias = options.bias
    if bias is None:
        bias = 0.0 if options.routing == "exact" else math.inf
    by_task = bias if isinstance(bias, Mapping) else {DEFAULT_TASK: bias}
    return RoutingOptions(
        options.routing, {DEFAULT_TASK: 0.0, **by_task}, options.max_substituted_mass,
        options.keeps_top, options.exact_masses,
    )  # fmt: skip
