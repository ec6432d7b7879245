"""What a classifier takes each task for: counts, as text and for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNKNOWN = "unknown"


@dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of prompts by true and by predicted task.

    Attributes:
        rows: [R] true tasks, which may be some that the classifier does not know.
        columns: [C] the classifier's tasks, then UNKNOWN.
        counts: [R, C].
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, known: Sequence[str], pairs: Iterable[tuple[str, str | None]]) -> ConfusionMatrix:
        """Counts pairs (true task, predicted task or None)."""
        seen = list(pairs)
        rows = [*known, *sorted({true for true, _ in seen} - set(known))]
        rows = [row for row in rows if any(true == row for true, _ in seen)]
        columns = [*known, UNKNOWN]
        counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
        for true, predicted in seen:
            counts[rows.index(true), columns.index(UNKNOWN if predicted is None else predicted)] += 1
        return cls(tuple(rows), tuple(columns), counts)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def correct(self) -> float:
        """Share answered rightly; "unknown" is right for a task that the classifier does not know."""
        right = sum(
            self.counts[row, self.columns.index(name if name in self.columns else UNKNOWN)]
            for row, name in enumerate(self.rows)
        )
        return float(right) / max(1, self.total)

    @property
    def unknown(self) -> float:
        """Share answered with "unknown"."""
        return float(self.counts[:, -1].sum()) / max(1, self.total)

    @property
    def wrong(self) -> float:
        """Share taken for another task that is known: what costs, as unknown prompts only lose the gain."""
        named = sum(
            self.counts[row, :-1].sum() - (self.counts[row, self.columns.index(name)] if name in self.columns else 0)
            for row, name in enumerate(self.rows)
        )
        return float(named) / max(1, self.total)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": list(self.rows),
            "columns": list(self.columns),
            "counts": self.counts.tolist(),
            "prompts": self.total,
            "correct": round(self.correct, 4),
            "wrong": round(self.wrong, 4),
            "unknown": round(self.unknown, 4),
        }

    def __str__(self) -> str:
        """A table of counts: true tasks down, predicted ones across."""
        width = max(len(name) for name in ("true", *self.rows))
        cells = [
            ["true", *self.columns],
            *([name, *map(str, row)] for name, row in zip(self.rows, self.counts, strict=True)),
        ]
        widths = [width, *(max(len(name), 4) for name in self.columns)]
        lines = [
            "  ".join(cell.ljust(size) if column == 0 else cell.rjust(size) for column, (cell, size) in enumerate(pair))
            for pair in (list(zip(row, widths, strict=True)) for row in cells)
        ]
        lines.append(
            f"{self.total} prompts: {self.correct:.1%} right, {self.wrong:.1%} another task, {self.unknown:.1%} unknown"
        )
        return "\n".join(lines)
