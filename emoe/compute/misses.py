"""Where a missing expert is computed: moved to the device, or left in host memory and computed by the CPU.

Ids and numbers only; device.py measures the rates, experts.py acts on the answer. docs/cuda.md explains the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emoe.errors import ConfigError
from emoe.options import MISSES


@dataclass(frozen=True)
class MissRates:
    """What one expert costs on this machine, in seconds.

    Attributes:
        copy_seconds: moving its weights from pinned memory to the device.
        cpu_seconds: computing it on the CPU for few rows, where reading the weights is the cost.
        cpu_seconds_per_row: what each row adds.
    """

    copy_seconds: float
    cpu_seconds: float
    cpu_seconds_per_row: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ConfigError(f"{name}={value} is not a time")

    def on_cpu(self, rows: int) -> float:
        """Seconds to compute one expert for `rows` tokens on the CPU."""
        return self.cpu_seconds + rows * self.cpu_seconds_per_row


@dataclass(frozen=True)
class MissPlan:
    """load: experts to move, those with most rows first; cpu: experts to compute where they lie; seconds of both."""

    load: tuple[int, ...]
    cpu: tuple[int, ...]
    seconds: float


def split(
    rows: Mapping[int, int],
    rates: MissRates | None,
    *,
    mode: str = "auto",
    free_slots: int = 0,
    expected_uses: float = 1.0,
) -> MissPlan:
    """Decides for every missing expert of one layer and step.

    Copies go one after another over the bus, the CPU computes one expert after another, and the two go on side by side:
    the step is as long as the longer. Experts are offered to the CPU in order of rising cost (fewest rows first), as
    long as that ends sooner than moving what is left.

    Args:
        rows: tokens routed to each missing expert in this step, at least 1.
        rates: measured costs; only mode "auto" needs them.
        mode: "load": all are moved. "cpu": none is, except into slots that hold nothing. "auto": what is sooner done.
        free_slots: slots of the layer that hold nothing. So many experts are moved in any mode: a slot left empty
            serves nobody.
        expected_uses: how often an expert is used, this time included, before it is evicted again. Moving it pays
            that often, so its cost counts by that share.

    Raises:
        ConfigError: the mode is none of `emoe.options.MISSES`, or "auto" has no rates.
    """
    if mode not in MISSES:
        raise ConfigError(f"miss='{mode}' is not one of: {', '.join(MISSES)}")
    if mode == "auto" and rates is None:
        raise ConfigError("miss='auto' needs measured rates")
    if expected_uses < 1:
        raise ConfigError(f"expected_uses={expected_uses} is below 1")
    dearest = sorted(rows, key=lambda expert: (-rows[expert], expert))
    if mode == "load":
        return MissPlan(tuple(dearest), (), len(dearest) * rates.copy_seconds if rates else 0.0)
    kept, rest = dearest[:free_slots], dearest[free_slots:]
    if rates is None:
        return MissPlan(tuple(kept), tuple(reversed(rest)), 0.0)
    copy = rates.copy_seconds / expected_uses
    load, cpu, cpu_seconds = list(kept + rest), [], 0.0
    for expert in reversed(rest):
        after = cpu_seconds + rates.on_cpu(rows[expert])
        if mode == "auto" and after >= len(load) * copy:
            break
        load.remove(expert)
        cpu.append(expert)
        cpu_seconds = after
    return MissPlan(tuple(load), tuple(cpu), max(len(load) * copy, cpu_seconds))
