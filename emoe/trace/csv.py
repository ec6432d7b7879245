"""Routing traces as text: one row per pick, columns by name, facts in comments. docs/traces.md is the reference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError
from emoe.files import table

UNKNOWN_PHASE = 255
_INT16, _INT32, _INT64 = (int(np.iinfo(dtype).max) for dtype in (np.int16, np.int32, np.int64))
# Places [layers, tokens, picks] for each row. A layer that most tokens skip takes some; a file in which every row names
# a layer and a token of its own would take the square of its size.
_PLACES_PER_ROW = 32
_LOWEST, _HIGHEST = {"expert": -1}, {"turn": _INT32, "phase": UNKNOWN_PHASE, "layer": _INT32, "expert": _INT16}


def read(path: Path) -> dict[str, Any]:
    """The fields of `emoe.trace.trace.Trace`.

    Raises:
        TraceError: a column is missing, a row is not numbers that fit, or rows are missing by far.
        MissingFileError: there is no such file.
    """
    wanted = ("turn", "phase", "step", "layer", "expert", "weight", "expert_bytes")
    comments, given = table.read(path, "trace", TraceError, wanted, ("step", "layer", "expert"))
    facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in comments]
    meta = {key: value for words in facts if "layer" not in words for key, value in words.items()}
    columns: dict[str, Any] = {name: np.zeros(len(given["step"]), dtype=np.int64) for name in wanted}
    for name, column in given.items():
        try:
            columns[name] = (
                _single(column)
                if name == "weight"
                else table.whole_numbers(column, _LOWEST.get(name, 0), _HIGHEST.get(name, _INT64))
            )
        except ValueError as error:
            raise TraceError(f"{path}: {name} {error}") from error
    _, token = np.unique(
        np.stack([columns["turn"], columns["phase"], columns["step"]], axis=1), axis=0, return_inverse=True
    )
    token = token.reshape(-1)
    layer_ids, layer = np.unique(columns["layer"], return_inverse=True)
    pick = _position_in_group(layer * (token.max(initial=0) + 1) + token)
    L, T, K = len(layer_ids), int(token.max(initial=-1)) + 1, int(pick.max(initial=-1)) + 1
    if _PLACES_PER_ROW * (len(token) + 2048) < L * T * K:
        raise TraceError(f"{path}: {len(token)} rows of {L} layers, {T} tokens and up to {K} picks: most are missing")
    experts = np.full((L, T, K), -1, dtype=np.int16)
    experts[layer, token, pick] = columns["expert"]
    weights = None
    if "weight" in given:
        weights = np.zeros((L, T, K), dtype=np.float32)
        weights[layer, token, pick] = columns["weight"]
    per_token = {name: np.zeros(T, dtype=np.int64) for name in ("turn", "phase")}
    for name, array in per_token.items():
        array[token] = columns[name]
    return {
        "experts": experts,
        "num_experts": _count(path, meta, int(experts.max(initial=-1)) + 1),
        "task": np.zeros(T, dtype=np.int32),
        "prompt": per_token["turn"].astype(np.int32),
        "phase": per_token["phase"].astype(np.uint8) if "phase" in given else np.full(T, UNKNOWN_PHASE, dtype=np.uint8),
        "weights": weights,
        "expert_bytes": _expert_bytes(path, facts, layer_ids, columns["expert_bytes"], layer),
        "task_names": (path.name.split(".")[0],),
        "meta": meta,
    }


def _single(column: NDArray[np.float64]) -> NDArray[np.float64]:
    if (np.abs(column) > np.finfo(np.float32).max).any():
        raise ValueError(f"{column[np.abs(column).argmax()]:g}, which does not fit into float32")
    return column


def _position_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row its number among the rows of the same group, in file order."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(group) else np.zeros(0, dtype=np.int64)
    position = np.empty(len(group), dtype=np.int64)
    position[order] = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    return position


def _expert_bytes(
    path: Path,
    facts: Iterable[dict[str, str]],
    layer_ids: NDArray[np.int64],
    column: NDArray[np.int64],
    layer: NDArray[np.int64],
) -> NDArray[np.int64] | None:
    """From comments "layer=3 expert_bytes=3059712", else the largest read that each layer shows."""
    stated = {}
    for words in facts:
        if "layer" in words and "expert_bytes" in words:
            stated[_fact(path, words, "layer", _INT32)] = _fact(path, words, "expert_bytes", _INT64)
    found = np.zeros(len(layer_ids), dtype=np.int64)
    np.maximum.at(found, layer, column)
    for place, number in enumerate(layer_ids):
        found[place] = stated.get(int(number), found[place])
    return found if found.all() else None


def _count(path: Path, meta: dict[str, str], default: int) -> int:
    return _fact(path, meta, "n_expert", _INT16 + 1) if "n_expert" in meta else default


def _fact(path: Path, words: dict[str, str], name: str, high: int) -> int:
    text = words[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= high):
        raise TraceError(f"{path}: {name}={text[:40]!r} is no number from 0 to {high}")
    return int(text)
