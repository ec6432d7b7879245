"""JSON of any origin, within bounds: what `parse` returns can be walked, written again and named in an error."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from emoe.files.content import Fail, content

DEEPEST = 64  # objects and lists inside one another
LONGEST_NUMBER = 64  # digits; 64-bit integers have 20, what floats need 17
LARGEST = 32 << 20  # bytes of a file; an index of 100,000 tensors has 10 MB

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?')
_LONE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, perhaps without the other


def read(path: str | Path, what: str, fail: Fail, *, constants: bool = False) -> Any:
    """The value in a file.

    Args:
        constants: NaN and Infinity are numbers, as configs of Transformers have them.

    Raises: as `emoe.files.content`, and as `parse`.
    """
    data = content(path, what, fail, most=LARGEST)
    return parse(
        data.removeprefix(b"\xef\xbb\xbf"), lambda why: fail(f"{path}: not a {what}: {why}"), constants=constants
    )


def parse(data: str | bytes | bytearray, fail: Fail, *, constants: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        EmoeError: that of `fail`, where it is no JSON or no UTF-8, nests over 64 deep, or has a number of over 64
            digits or beyond float64, NaN or Infinity unless they are asked for, or half of a surrogate pair.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=float if constants else _constant)
        if isinstance(data, str) or _LONE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise fail(_why(error)) from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST:
        raise fail(f"lists and objects are nested over {DEEPEST} deep")
    return value


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"lists and objects are nested over {DEEPEST} deep"
    if isinstance(error, UnicodeError):
        return f"not UTF-8: {error.reason} at {error.start}"  # type: ignore[attr-defined]
    return str(error)


def _depth(text: str) -> int:
    """Of a text that is JSON."""
    deepest = depth = 0
    for bracket in re.sub(r"[^\[\]{}]+", "", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if math.isinf(value):
        raise ValueError(f"the number {text[:LONGEST_NUMBER]} does not fit into 64 bits")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def whole_number(value: Any, what: str, low: int, high: int) -> int:
    """A value that is a whole number from `low` to `high`.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}, expected a whole number from {low} to {high}")
    return value


def number(value: Any, what: str, low: float, high: float) -> float:
    """A value that is a number from `low` to `high`.

    Raises:
        ValueError: it is something else.
    """
    if type(value) not in (int, float):
        raise ValueError(f"{what} is {shown(value)}, expected a number from {low:g} to {high:g}")
    result = float(value)  # has no more than 64 digits
    if not low <= result <= high:
        raise ValueError(f"{what} is {result}, expected a number from {low:g} to {high:g}")
    return result


def shown(value: Any) -> str:
    """A value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
