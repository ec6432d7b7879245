"""Columns of numbers from a .csv file: a header with names, one row a line, comments with #."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.files.content import Fail, lines

_MOST_COLUMNS = 1000
_EXACT = 1 << 53  # whole numbers beyond are not what was written


def read(
    path: str | Path, what: str, fail: Fail, wanted: Sequence[str], required: Sequence[str]
) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """Comments without their mark, and those columns of `wanted` that are there; others are not looked at.

    Raises: as `emoe.files.lines`; also where a required column is missing, there are no rows, or a value is no finite
        number.
    """
    comments: list[str] = []

    def rows() -> Iterator[str]:
        for _, line in lines(path, what, fail):
            if line.startswith("#"):
                comments.append(line[1:])
            else:
                yield line

    found = rows()
    header = [name.strip() for name in next(found, "").split(",", _MOST_COLUMNS)]
    missing = [name for name in required if name not in header]
    if missing:
        raise fail(f"{path}: no column {', '.join(missing)}; it has {', '.join(header)[:200]}")
    first = next(found, None)
    if first is None:
        raise fail(f"{path}: no rows")
    names = [name for name in wanted if name in header]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = np.loadtxt(
                itertools.chain([first], found),
                delimiter=",",
                ndmin=2,
                dtype=np.float64,
                comments=None,
                usecols=[header.index(name) for name in names],
            )
    except (ValueError, IndexError, UserWarning) as error:
        raise fail(f"{path}: {error}") from error
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0].tolist()
        raise fail(f"{path}: row {row + 1}: {names[column]} is {values[row, column]}, no finite number")
    return comments, {name: values[:, place] for place, name in enumerate(names)}


def whole_numbers(column: NDArray[np.float64], low: int, high: int) -> NDArray[np.int64]:
    """The column as whole numbers.

    Raises:
        ValueError: a value is none, or is not from `low` to `high`; names it.
    """
    low, high = max(low, -_EXACT), min(high, _EXACT)
    wrong = (column != np.floor(column)) | (column < low) | (column > high)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        value: Any = column[row]
        raise ValueError(f"{value:g} in row {row + 1}, expected a whole number from {low} to {high}")
    return column.astype(np.int64)
