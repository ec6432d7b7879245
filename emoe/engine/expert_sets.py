"""Sets of experts as whole numbers, one bit an expert, so that overlap costs a microsecond."""

from __future__ import annotations

from collections.abc import Container

Expert = tuple[int, int]  # (layer, expert)
_MOST_KEPT = 64  # sets whose number is remembered: requests of a task share theirs, and one has thousands of pairs


class ExpertSets:
    """Numbers of sets; bits are given out as experts are met."""

    def __init__(self) -> None:
        self._bit: dict[Expert, int] = {}
        self._kept: dict[frozenset[Expert], int] = {}

    def number(self, experts: frozenset[Expert]) -> int:
        """The set as a number; 0 for the empty one."""
        known = self._kept.get(experts)
        if known is not None:
            return known
        bits = bytearray(len(self._bit) // 8 + len(experts) // 8 + 2)
        for expert in sorted(experts - self._bit.keys()):
            self._bit[expert] = len(self._bit)
        for expert in experts:
            bit = self._bit[expert]
            bits[bit >> 3] |= 1 << (bit & 7)
        if len(self._kept) >= _MOST_KEPT:
            self._kept.pop(next(iter(self._kept)))
        number = self._kept[experts] = int.from_bytes(bits, "little")
        return number

    def within(self, resident: Container[Expert]) -> int:
        """Those of all experts met that are in `resident`, as a number."""
        bits = bytearray(len(self._bit) // 8 + 1)
        for expert, bit in self._bit.items():
            if expert in resident:
                bits[bit >> 3] |= 1 << (bit & 7)
        return int.from_bytes(bits, "little")


def overlap(one: int, other: int) -> float:
    """Share of the smaller set that is in both, 0 to 1; 0 where either is empty."""
    smaller = min(one.bit_count(), other.bit_count())
    return (one & other).bit_count() / smaller if smaller else 0.0
