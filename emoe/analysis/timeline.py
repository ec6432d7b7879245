"""Where the time of a run goes: expert transfers against computation, as a trace for Perfetto or chrome://tracing.

Times are taken in Python. A transfer lasts from its submission to the moment its end was *seen*, which is later than
its last byte where nobody looked. Transfers are what `Loader.watch` tells, layers what hooks on the modules see.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from emoe.errors import ConfigError
from emoe.runtime import runtime_of

COMPUTE, TRANSFERS = 1, 2  # process numbers in the file
_TIMES = "transfers: from submission to the end as seen by Python, later than the last byte where nobody looked"


class Timeline:
    """Events of one run; `watch` makes one.

    Times are seconds on one clock from the start of the recording.
    """

    def __init__(self) -> None:
        self._zero = time.perf_counter()
        self._spans: list[tuple[str, str, float, float, dict[str, Any]]] = []  # row, name, begin, end, arguments
        self._transfers: list[tuple[str, float, float, dict[str, Any]]] = []  # lane, begin, end, arguments

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def span(self, row: str, name: str, begin: float, end: float, **arguments: Any) -> None:
        """Something that was computed or waited for; spans of one row nest."""
        self._spans.append((row, name, begin, end, arguments))

    def transfer(self, lane: str, begin: float, end: float, **arguments: Any) -> None:
        """An expert that was read; those of one lane may overlap."""
        self._transfers.append((lane, begin, end, arguments))

    def summary(self) -> dict[str, Any]:
        """Seconds recorded, computed in layers, waited; transfers, their bytes, and the share of their time hidden.

        `hidden_share` is the part of the time with a transfer under way in which nothing waited for one; None without
        transfers.
        """
        waits = [(begin, end) for row, _, begin, end, _ in self._spans if row == "waiting"]
        busy = _union([(begin, end) for _, begin, end, _ in self._transfers])
        waited = sum(end - begin for begin, end in _union(waits))
        transferring = sum(end - begin for begin, end in busy)
        exposed = _overlap(busy, _union(waits))
        layers = [(begin, end) for row, name, begin, end, _ in self._spans if name.startswith("layer")]
        return {
            "seconds": max((end for *_, end, _ in self._spans), default=0.0),
            "layer_seconds": sum(end - begin for begin, end in _union(layers)),
            "waited_seconds": waited,
            "transfers": len(self._transfers),
            "transferred_bytes": sum(each[3].get("bytes", 0) for each in self._transfers),
            "transfer_seconds": transferring,
            "hidden_share": 1 - exposed / transferring if transferring else None,
        }

    def to_chrome(self) -> dict[str, Any]:
        """The trace event format: complete events (`ph: X`) with times in microseconds."""
        rows: dict[tuple[int, str], int] = {}
        events: list[dict[str, Any]] = []

        def add(process: int, row: str, name: str, begin: float, end: float, arguments: dict[str, Any]) -> None:
            thread = rows.setdefault((process, row), len(rows) + 1)
            events.append(
                {
                    "ph": "X", "pid": process, "tid": thread, "name": name, "cat": row.split(" ")[0],
                    "ts": round(1e6 * begin, 1), "dur": round(1e6 * (end - begin), 1), "args": arguments,
                }
            )  # fmt: skip

        for row, name, begin, end, arguments in sorted(self._spans, key=lambda each: (each[2], -each[3])):
            add(COMPUTE, row, name, begin, end, arguments)
        for number, (lane, begin, end, arguments) in self._placed():
            add(TRANSFERS, f"{lane} {number}", _expert(arguments), begin, end, arguments)
        names = [_name("process_name", COMPUTE, 0, "computation"), _name("process_name", TRANSFERS, 0, "transfers")]
        names += [_name("thread_name", process, thread, row) for (process, row), thread in rows.items()]
        return {
            "displayTimeUnit": "ms",
            "otherData": {"producer": "emoe", "times": _TIMES, **self.summary()},
            "traceEvents": names + events,
        }

    def step(self) -> list[tuple[str, list[tuple[float, float, str]]]]:
        """The last forward as rows of (begin, end, name) in milliseconds from its start: one row each for the experts
        modules and for waiting, and as many for each lane as transfers ran at once. Empty without a forward."""
        forwards = [span for span in self._spans if span[1] == "forward"]
        if not forwards:
            return []
        _, _, start, stop, _ = forwards[-1]
        rows: dict[tuple[str, int], list[tuple[float, float, str]]] = {("experts", 0): [], ("waiting", 0): []}

        def add(row: tuple[str, int], begin: float, end: float, name: str) -> None:
            if start <= begin <= stop:
                rows.setdefault(row, []).append((1e3 * (begin - start), 1e3 * (end - start), name))

        for row, name, begin, end, _ in self._spans:
            if (row, 0) in rows:
                add((row, 0), begin, end, name)
        for number, (lane, begin, end, arguments) in self._placed():
            add((lane, number), begin, end, _expert(arguments))
        order = {"experts": 0, "waiting": 1, "demand": 2, "prefetch": 3}
        return [
            (row, bars) for (row, _), bars in sorted(rows.items(), key=lambda each: (order[each[0][0]], each[0][1]))
        ]

    def _placed(self) -> list[tuple[int, tuple[str, float, float, dict[str, Any]]]]:
        """Transfers in order of their begin, each with the first number of its lane that is free then."""
        free: dict[str, list[float]] = {}  # of each lane's numbers, when it is free again
        placed = []
        for transfer in sorted(self._transfers, key=lambda each: each[1]):
            ends = free.setdefault(transfer[0], [])
            place = next((number for number, until in enumerate(ends) if until <= transfer[1]), len(ends))
            ends[place : place + 1] = [transfer[2]]
            placed.append((place, transfer))
        return placed

    def save(self, path: str | Path) -> Path:
        """Writes `to_chrome` as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.to_chrome()), encoding="utf-8")
        return path


@contextlib.contextmanager
def watch(model: Any) -> Iterator[Timeline]:
    """Records transfers and layers of a model that runs under emoe, while the block runs.

    Rows: `model` (each forward, and each decoder layer in it), `experts` (each experts module), `waiting` (for bytes),
    and per lane, demand and prefetch, as many rows as transfers ran at once. Bytes are those of a slot. On a GPU a wait
    only orders streams, so its end is not that of the bytes; that is refused.

    Raises:
        ConfigError: the model does not run under emoe, or runs on a device.
    """
    runtime = runtime_of(model)
    device = runtime.stats()["device"]
    if device != "cpu":
        raise ConfigError(f"a timeline is recorded of a model on the CPU; this one runs on {device}")
    timeline = Timeline()
    handles = [*_watch_module(timeline, "model", "forward", model)]
    modules = dict(model.named_modules())
    blocks = {}
    for number, layer in enumerate(runtime.store.layers):
        handles += _watch_module(timeline, "experts", f"experts {number}", modules[layer.path], layer=number)
        block = re.match(r".*?\.\d+(?=\.)", layer.path)
        if block:
            blocks[block[0]] = number
    for path, number in blocks.items():
        handles += _watch_module(timeline, "model", f"layer {number}", modules[path], layer=number)
    try:
        with runtime.loader.watch(_Transfers(timeline, runtime.stats()["slot_bytes"])):
            yield timeline
    finally:
        for handle in handles:
            handle.remove()


class _Transfers:
    """Writes what a loader tells of its transfers into a timeline."""

    def __init__(self, timeline: Timeline, nbytes: int) -> None:
        self._timeline, self._bytes = timeline, nbytes
        self._running: dict[int, tuple[str, float, dict[str, int]]] = {}  # ticket -> lane, begin, arguments
        self._waiting: dict[int, float] = {}  # ticket -> begin

    def submitted(self, ticket: int, layer: int, expert: int, prefetch: bool) -> None:
        arguments = {"layer": layer, "expert": expert, "bytes": self._bytes}
        self._running[ticket] = ("prefetch" if prefetch else "demand", self._timeline.now(), arguments)

    def waiting(self, ticket: int) -> None:
        self._waiting[ticket] = self._timeline.now()

    def ended(self, ticket: int) -> None:
        now = self._timeline.now()
        # Of one that was submitted before the recording began nothing is known.
        lane, begin, arguments = self._running.pop(ticket, ("", 0.0, {}))
        waited = self._waiting.pop(ticket, None)
        if waited is not None:
            self._timeline.span("waiting", "wait", waited, now, **arguments)
        if lane:
            self._timeline.transfer(lane, begin, now, **arguments)

    def cancelled(self, ticket: int) -> None:
        self._running.pop(ticket, None)


def _watch_module(timeline: Timeline, row: str, name: str, module: nn.Module, **arguments: Any) -> list[Any]:
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(timeline.now())

    def after(*_: Any) -> None:
        if began:
            timeline.span(row, name, began.pop(), timeline.now(), **arguments)

    # after a forward that raised, too: else its beginning would be taken for the next one's
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def _expert(arguments: dict[str, Any]) -> str:
    return f"expert {arguments['layer']}.{arguments['expert']}"


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _overlap(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> float:
    total, place = 0.0, 0
    for begin, end in first:
        while place < len(second) and second[place][1] <= begin:
            place += 1
        for other in second[place:]:
            if other[0] >= end:
                break
            total += min(end, other[1]) - max(begin, other[0])
    return total
