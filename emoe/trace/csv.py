"""Routing traces as text: one row per pick, columns by name, facts in comments. docs/traces.md is the reference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import TraceError

UNKNOWN_PHASE = 255


def read(path: Path) -> dict[str, Any]:
    """The fields of `emoe.trace.trace.Trace`.

    Raises:
        TraceError: a column is missing, or a row is not numbers.
    """
    comments, header, rows = _split(path)
    facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in comments]
    meta = {key: value for words in facts if "layer" not in words for key, value in words.items()}
    missing = [name for name in ("step", "layer", "expert") if name not in header]
    if missing:
        raise TraceError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header)}")
    wanted = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "expert_bytes")
    try:
        table = np.loadtxt(rows, delimiter=",", ndmin=2, dtype=np.float64)
        columns = {name: table[:, header.index(name)] if name in header else np.zeros(len(table)) for name in wanted}
    except (ValueError, IndexError) as error:
        raise TraceError(f"{path}: {error}") from error
    _, token = np.unique(
        np.stack([columns["turn"], columns["phase"], columns["step"]], axis=1), axis=0, return_inverse=True
    )
    token = token.reshape(-1)
    layer_ids, layer = np.unique(columns["layer"].astype(np.int64), return_inverse=True)
    pick = _position_in_group(layer * (token.max(initial=0) + 1) + token)
    L, T, K = len(layer_ids), int(token.max(initial=-1)) + 1, int(pick.max(initial=-1)) + 1
    experts = np.full((L, T, K), -1, dtype=np.int16)
    weights = np.zeros((L, T, K), dtype=np.float32)
    if len(table) and not -1 <= columns["expert"].min() <= columns["expert"].max() <= np.iinfo(np.int16).max:
        raise TraceError(f"{path}: expert ids go from {columns['expert'].min():.0f} to {columns['expert'].max():.0f}")
    experts[layer, token, pick] = columns["expert"]
    weights[layer, token, pick] = columns["weight"]
    per_token = {name: np.zeros(T) for name in ("turn", "phase")}
    for name, array in per_token.items():
        array[token] = columns[name]
    return {
        "experts": experts,
        "num_experts": _count(path, meta, int(experts.max(initial=-1)) + 1),
        "task": np.zeros(T, dtype=np.int32),
        "prompt": per_token["turn"].astype(np.int32),
        "phase": per_token["phase"].astype(np.uint8)
        if "phase" in header
        else np.full(T, UNKNOWN_PHASE, dtype=np.uint8),
        "weights": weights if "weight" in header else None,
        "expert_bytes": _expert_bytes(facts, layer_ids, columns, layer),
        "task_names": (path.name.split(".")[0],),
        "meta": meta,
    }


def _split(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Comment lines without their mark, the header's names, the rows."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file: {error}") from error
    comments = [line[1:] for line in lines if line.startswith("#")]
    rows = [line for line in lines if line and not line.startswith("#")]
    if len(rows) < 2:
        raise TraceError(f"{path}: no rows")
    return comments, [name.strip() for name in rows[0].split(",")], rows[1:]


def _position_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row its number among the rows of the same group, in file order."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(group) else np.zeros(0, dtype=np.int64)
    position = np.empty(len(group), dtype=np.int64)
    position[order] = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    return position


def _expert_bytes(
    facts: Iterable[dict[str, str]], layer_ids: NDArray[np.int64], columns: dict[str, Any], layer: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """From comments "layer=3 expert_bytes=3059712", else the largest read that each layer shows."""
    stated = {}
    for words in facts:
        if "layer" in words and "expert_bytes" in words:
            stated[int(words["layer"])] = int(words["expert_bytes"])
    found = np.zeros(len(layer_ids), dtype=np.int64)
    np.maximum.at(found, layer, columns["expert_bytes"].astype(np.int64))
    for place, number in enumerate(layer_ids):
        found[place] = stated.get(int(number), found[place])
    return found if found.all() else None


def _count(path: Path, meta: dict[str, str], default: int) -> int:
    text = meta.get("n_expert", str(default))
    if not text.isdecimal():
        raise TraceError(f"{path}: n_expert={text!r} is no number")
    return int(text)
