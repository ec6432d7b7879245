"""What users write, turned into values: byte budgets, sizes for reading, and the folder that emoe keeps files in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from emoe.errors import ConfigError

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_BY_LOWER = {unit.lower(): size for unit, size in _UNITS.items()}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_CHOICES = (
    'bytes as an int or text ("8GiB", "500MB"; units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB), '
    'a float in (0, 1] or "25%" as a share of the routed experts, or "auto"'
)


@dataclass(frozen=True)
class Budget:
    """A memory budget as the user meant it.

    Attributes:
        kind: "bytes": `nbytes` counts; "fraction": `share` of the routed experts counts; "auto": neither.
        nbytes: bytes, 0 unless kind is "bytes".
        share: in (0, 1], 0.0 unless kind is "fraction".
    """

    kind: Literal["bytes", "fraction", "auto"]
    nbytes: int = 0
    share: float = 0.0


def parse_budget(value: Any) -> Budget:
    """Reads a budget.

    Args:
        value: "8GiB", "500MB", "1048576", an int of bytes, a float in (0, 1] or "25%", or "auto".

    Raises:
        ConfigError: anything else; names the value and the choices.
    """
    if isinstance(value, bool):
        raise _refusal(value)
    if isinstance(value, int):
        return Budget("bytes", nbytes=_positive(value, value))
    if isinstance(value, float):
        if math.isfinite(value) and 0 < value <= 1:
            return Budget("fraction", share=value)
        raise _refusal(value)
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return Budget("auto")
        percent = _PERCENT.fullmatch(value)
        if percent and 0 < float(percent[1]) <= 100:
            return Budget("fraction", share=float(percent[1]) / 100)
        found = _AMOUNT.fullmatch(value)
        unit = _BY_LOWER.get(found[2].lower()) if found else None
        if found and unit and (found[2] or "." not in found[1]):  # "0.5" alone is no number of bytes
            return Budget("bytes", nbytes=_positive(_scale(found[1], unit), value))
    raise _refusal(value)


def _scale(number: str, unit: int) -> int:
    whole, _, part = number.partition(".")
    return int(whole) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


def _positive(nbytes: int, value: Any) -> int:
    if nbytes < 1:
        raise _refusal(value)
    return nbytes


def _refusal(value: Any) -> ConfigError:
    return ConfigError(f"memory_budget={value!r} is not one of: {_CHOICES}")
