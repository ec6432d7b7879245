"""Routing traces: which experts each token was sent to, recorded, written, read. Knows no model and no torch.

docs/traces.md is the format's reference, also for engines that want to write it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import ConfigError, TraceError
from emoe.files import jsontext, npz, whole
from emoe.trace import csv as trace_csv

logger = logging.getLogger(__name__)

FORMAT = "emoe-trace"
VERSION = 1
PREFILL, DECODE, UNKNOWN = 0, 1, trace_csv.UNKNOWN_PHASE
_PHASES = {"prefill": PREFILL, "decode": DECODE, "unknown": UNKNOWN}
_MOST_EXPERTS = int(np.iinfo(np.int16).max) + 1
_MOST_TASKS = 1 << 16  # that a file may number without naming them
_RESERVED = 1 << 20  # bytes taken on the disk when a recording begins
_BLOCK = 1 << 20  # ids looked at in one go


@dataclass(frozen=True)
class Trace:
    """Routing of T tokens through L layers of experts modules, K picks each.

    Attributes:
        experts: [L, T, K] int16 expert ids; -1 where a token has fewer picks, or skipped the layer.
        num_experts: routed experts of each layer.
        task: [T] int32 index into `task_names`.
        prompt: [T] int32 number of the prompt (a sequence of one request); numbers never repeat for another prompt.
        phase: [T] uint8 PREFILL, DECODE or UNKNOWN.
        weights: [L, T, K] float32 router weights, or None.
        expert_bytes: [L] int64 bytes of one expert, or None.
        task_names: names of the tasks.
        meta: everything else the file says.
    """

    experts: NDArray[np.int16]
    num_experts: int
    task: NDArray[np.int32]
    prompt: NDArray[np.int32]
    phase: NDArray[np.uint8]
    weights: NDArray[np.float32] | None = None
    expert_bytes: NDArray[np.int64] | None = None
    task_names: tuple[str, ...] = ("",)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.experts.shape[0]

    @property
    def tokens(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    def take(self, tokens: Any) -> Trace:
        """The trace of some tokens, in the order given (a slice, indices, or a mask)."""
        return replace(
            self,
            experts=self.experts[:, tokens],
            task=self.task[tokens],
            prompt=self.prompt[tokens],
            phase=self.phase[tokens],
            weights=None if self.weights is None else self.weights[:, tokens],
        )


class TraceRecorder:
    """Collects routing while a model runs, in any number of threads; `emoe.Runtime.record` drives it.

    Args:
        layers: number of experts modules.
        top_k: the most picks of a token in a layer.
        num_experts: routed experts of a layer.
        path: where `save` writes.
        model: a name for the file's meta data.
        expert_bytes: bytes of one expert of each layer, where known.
    """

    def __init__(
        self,
        layers: int,
        top_k: int,
        num_experts: int,
        *,
        path: str | Path,
        model: str = "",
        expert_bytes: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(path, (str, Path)) or "\0" in str(path):
            raise ConfigError(f"path={path!r} of a trace is no path of a file")
        self.path = Path(path)
        self._layers, self._top_k, self._num_experts = layers, top_k, num_experts
        self._meta: dict[str, Any] = {"model": model}
        if expert_bytes is not None:
            self._meta["expert_bytes"] = [int(count) for count in expert_bytes]
        self._lock = threading.RLock()  # a signal handler may begin a request in the middle of a record
        self._steps: list[_Step] = []
        self._thread = _Thread()
        self._running: set[_Step] = set()
        self._dropped = 0
        self._tasks: dict[str, int] = {}
        self._prompts: dict[Any, int] = {}
        self._mark = _Mark(self._task_id(""), (self._prompt_id(0),), None)

    def mark(self, *, task: str | None = None, prompt: Any = None, phase: str | None = None) -> None:
        """Names the tokens of the forwards that follow in this thread, and in threads that never marked any.

        Args:
            task: name of the task; None leaves it as it is.
            prompt: number or text of the prompt, or one for each sequence of the batch; None leaves it.
            phase: "prefill", "decode" or "unknown". None: one token per sequence is decode, more is prefill.

        Raises:
            TraceError: an unknown phase.
        """
        if phase is not None and (not isinstance(phase, str) or phase not in _PHASES):
            raise TraceError(f"phase={phase!r} is not one of: {', '.join(_PHASES)}")
        if task is not None and not isinstance(task, str):
            raise TraceError(f"task={task!r} is no name of a task")
        if not all(isinstance(each, Hashable) for each in (prompt if isinstance(prompt, (list, tuple)) else [prompt])):
            raise TraceError(f"prompt={prompt!r} is no number or text, nor one for each sequence")
        with self._lock:
            before = self._thread.mark or self._mark
            prompts = before.prompts
            if prompt is not None:
                each = prompt if isinstance(prompt, (list, tuple)) else (prompt,)
                if not each:
                    raise TraceError("prompt=[] names no sequence")
                prompts = tuple(self._prompt_id(name) for name in each)
            self._thread.mark = self._mark = _Mark(
                before.task if task is None else self._task_id(task),
                prompts,
                None if phase is None else _PHASES[phase],
            )

    def record(self, layer: int, index: NDArray[Any], weights: NDArray[Any]) -> None:
        """One layer of one forward of the calling thread.

        A thread's layers come in ascending order: the next forward begins with a layer that is not after the last one.
        A forward of which a layer is missing (an error in it, or it ran already when the recording began) is dropped.

        Args:
            layer: number of the experts module.
            index: [T, K] expert ids; ids outside [0, num_experts) are written as -1.
            weights: [T, K] router weights.

        Raises:
            TraceError: no such layer, more picks than `top_k`, or shapes that differ.
        """
        T, K = index.shape
        if not 0 <= layer < self._layers or self._top_k < K or weights.shape != index.shape:
            raise TraceError(
                f"layer {layer} recorded ids {index.shape} and weights {weights.shape}; "
                f"expected [T, K] of layers 0 to {self._layers - 1} with K up to {self._top_k}"
            )
        valid = (index >= 0) & (index < self._num_experts)
        with self._lock:
            step = self._thread.step
            if step is None or layer <= step.last or step.tokens != T:
                self._finish(step)
                step = _Step(T, self._thread.mark or self._mark, self._layers, self._top_k)
                self._thread.step = step
                self._running.add(step)
            step.experts[layer, :, :K] = np.where(valid, index, -1)
            step.weights[layer, :, :K] = np.where(valid, weights, 0)
            step.last, step.seen = layer, step.seen + 1
            if layer == self._layers - 1:
                self._finish(step)
                self._thread.step = None

    def trace(self) -> Trace:
        """What was recorded so far: whole forwards, in the order they ended."""
        with self._lock:
            steps = self._steps or [_Step(0, self._mark, self._layers, self._top_k)]
            return Trace(
                experts=np.concatenate([step.experts for step in steps], axis=1),
                num_experts=self._num_experts,
                task=np.concatenate([step.task() for step in steps]),
                prompt=np.concatenate([step.prompt() for step in steps]),
                phase=np.concatenate([step.phase() for step in steps]),
                weights=np.concatenate([step.weights for step in steps], axis=1).astype(np.float32),
                expert_bytes=_as_bytes(self.path, self._meta.get("expert_bytes"), self._layers),
                task_names=tuple(_as_text(name) for name in self._tasks),
                meta={**self._meta, "prompt_names": [_as_text(name) for name in self._prompts]},
            )

    def save(self) -> Path:
        """Writes everything recorded to `path`, whole or not at all.

        Raises:
            WriteError: the folder cannot be written.
        """
        with whole(self.path) as file:
            self._write(file)
        return self.path

    @contextmanager
    def saving(self) -> Iterator[TraceRecorder]:
        """Writes everything recorded when the block ends well; one that ends in an exception leaves `path` as it was.

        Raises:
            WriteError: the folder is not there or cannot be written, or the disk is full: before the block runs.
        """
        with whole(self.path, reserve=_RESERVED) as file:
            yield self
            self._write(file)

    def _write(self, file: IO[bytes]) -> None:
        with self._lock:
            dropped = self._dropped + len(self._running)
        if dropped:
            logger.warning("emoe: %d forwards that did not pass every layer are not in the trace", dropped)
        _write(self.trace(), file)

    def _finish(self, step: _Step | None) -> None:
        if step is None:
            return
        self._running.discard(step)
        if step.seen == self._layers:
            self._steps.append(step)
        else:
            self._dropped += 1

    def _task_id(self, name: str) -> int:
        return self._tasks.setdefault(name, len(self._tasks))

    def _prompt_id(self, name: Any) -> int:
        return self._prompts.setdefault(name, len(self._prompts))


class _Thread(threading.local):
    """What a recorder keeps for each thread."""

    mark: _Mark | None = None
    step: _Step | None = None


def _as_text(name: Any) -> str:
    """A name as a file can hold it: arguments of a command line may be no text."""
    return str(name).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class _Mark:
    task: int
    prompts: tuple[int, ...]
    forced_phase: int | None


class _Step:
    """One forward while it passes the layers."""

    def __init__(self, tokens: int, mark: _Mark, layers: int, top_k: int) -> None:
        self.tokens, self.mark = tokens, mark
        self.experts = np.full((layers, tokens, top_k), -1, dtype=np.int16)
        self.weights = np.zeros((layers, tokens, top_k), dtype=np.float16)
        self.last, self.seen = -1, 0

    def task(self) -> NDArray[np.int32]:
        return np.full(self.tokens, self.mark.task, dtype=np.int32)

    def prompt(self) -> NDArray[np.int32]:
        # Transformers flattens [B, S] row by row; tokens that no sequence can claim go to the last one.
        prompts = np.asarray(self.mark.prompts, dtype=np.int32)
        each = max(1, self.tokens // len(prompts))
        return prompts[np.minimum(np.arange(self.tokens) // each, len(prompts) - 1)]

    def phase(self) -> NDArray[np.uint8]:
        phase = self.mark.forced_phase
        if phase is None:
            phase = DECODE if self.tokens <= len(self.mark.prompts) else PREFILL
        return np.full(self.tokens, phase, dtype=np.uint8)


def save_trace(trace: Trace, path: str | Path) -> Path:
    """Writes a trace as .npz (docs/traces.md), whole or not at all; an existing file is replaced.

    Raises:
        WriteError: the folder cannot be written.
    """
    path = Path(path)
    with whole(path) as file:
        _write(trace, file)
    return path


def _write(trace: Trace, file: IO[bytes]) -> None:
    meta = {
        **trace.meta,
        "format": FORMAT,
        "version": VERSION,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "n_moe_layers": trace.layers,
        "task_names": list(trace.task_names),
    }
    if trace.expert_bytes is not None:
        meta["expert_bytes"] = trace.expert_bytes.tolist()
    arrays: dict[str, Any] = {
        "experts": trace.experts,
        "task": trace.task,
        "prompt": trace.prompt,
        "phase": trace.phase,
        "meta": np.array(json.dumps(meta)),
    }
    if trace.weights is not None:
        arrays["weights"] = trace.weights.astype(np.float16)
    np.savez_compressed(file, **arrays)


def load_trace(path: str | Path) -> Trace:
    """Reads a trace: emoe's .npz, any .npz with an array `experts` [L, T, K], or a .csv of one row per pick.

    Raises:
        TraceError: a field is missing or has the wrong shape, type or values; names file and field.
        MissingFileError: there is no such file.
    """
    path = Path(path)
    trace = Trace(**trace_csv.read(path)) if path.suffix == ".csv" else _load_npz(path)
    check(trace, str(path))
    return trace


def join(traces: Sequence[Trace]) -> Trace:
    """Traces one after the other; tasks of one name become one, prompts stay apart.

    Raises:
        TraceError: there are none, or their layers or numbers of experts differ.
    """
    if not traces:
        raise TraceError("no trace to replay")
    first = traces[0]
    for other in traces[1:]:
        if (other.layers, other.num_experts) != (first.layers, first.num_experts):
            raise TraceError(
                f"traces of {first.layers} layers with {first.num_experts} experts and of {other.layers} layers with "
                f"{other.num_experts} experts cannot be joined"
            )
    names = tuple(dict.fromkeys(name for trace in traces for name in trace.task_names))
    tasks, prompts, after = [], [], 0
    for trace in traces:
        renumber = np.array([names.index(name) for name in trace.task_names], dtype=np.int32)
        tasks.append(renumber[trace.task])
        high = int(trace.prompt.max(initial=-1))
        if after + high > np.iinfo(np.int32).max:
            raise TraceError(f"a trace's prompts are numbered up to {high}; together with those before it is too many")
        prompts.append(trace.prompt + np.int32(after))
        after += high + 1
    top_k = max(trace.top_k for trace in traces)
    weights = None
    if all(trace.weights is not None for trace in traces):
        weights = np.concatenate([_widen(trace.weights, top_k, 0) for trace in traces], axis=1)
    return Trace(
        experts=np.concatenate([_widen(trace.experts, top_k, -1) for trace in traces], axis=1),
        num_experts=first.num_experts,
        task=np.concatenate(tasks),
        prompt=np.concatenate(prompts),
        phase=np.concatenate([trace.phase for trace in traces]),
        weights=weights,
        expert_bytes=first.expert_bytes,
        task_names=names,
        meta={"model": first.meta.get("model", "")},
    )


def check(trace: Trace, source: str) -> None:
    """Raises TraceError, naming `source`, unless shapes agree and ids are in range and distinct within a token."""
    T = trace.tokens
    for name, array, shape in (
        ("task", trace.task, (T,)),
        ("prompt", trace.prompt, (T,)),
        ("phase", trace.phase, (T,)),
        ("weights", trace.weights, trace.experts.shape),
        ("expert_bytes", trace.expert_bytes, (trace.layers,)),
    ):
        if array is not None and array.shape != shape:
            raise TraceError(f"{source}: '{name}' has shape {array.shape}, expected {shape}")
    low, high = int(trace.experts.min(initial=0)), int(trace.experts.max(initial=0))
    if low < -1 or high >= trace.num_experts:
        raise TraceError(f"{source}: expert ids go from {low} to {high}, of {trace.num_experts} experts (-1: no pick)")
    rows = trace.experts.reshape(trace.layers * T, trace.top_k)
    step = max(1, _BLOCK // max(1, trace.top_k))
    for start in range(0, len(rows), step):  # in blocks: a sorted copy of all would double what a trace takes
        ordered = np.sort(rows[start : start + step], axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
        if twice.any():
            layer, token = divmod(start + int(twice.argmax()), T)
            raise TraceError(
                f"{source}: token {token} names one expert of layer {layer} twice: "
                f"{np.array2string(trace.experts[layer, token], threshold=64)}"
            )
    if T and not 0 <= int(trace.task.min()) <= int(trace.task.max()) < len(trace.task_names):
        raise TraceError(f"{source}: 'task' goes up to {int(trace.task.max())}, of {len(trace.task_names)} task names")


def _widen(array: Any, top_k: int, filler: int) -> Any:
    missing = top_k - array.shape[2]
    return np.pad(array, ((0, 0), (0, 0), (0, missing)), constant_values=filler) if missing else array


def _load_npz(path: Path) -> Trace:
    fields = ("experts", "weights", "task", "prompt", "phase", "meta")
    arrays, there = npz.read(path, "trace", TraceError, fields)
    if "experts" not in arrays:
        raise TraceError(f"{path}: no array 'experts'; it has {', '.join(there)[:200] or 'none'}")
    experts = arrays.pop("experts")
    if experts.ndim != 3 or not np.issubdtype(experts.dtype, np.integer):
        raise TraceError(
            f"{path}: 'experts' is {experts.dtype} {list(experts.shape)}, expected integers [layers, tokens, k]"
        )
    meta = _parse_meta(path, arrays.get("meta"))
    # Not max(initial=-1): an unsigned type has no -1.
    low, high = (int(experts.min()), int(experts.max())) if experts.size else (-1, -1)
    bound = _MOST_EXPERTS - 1
    if low < -1 or high > bound:
        raise TraceError(f"{path}: expert ids go from {low} to {high}, expected -1 (no pick) to {bound}")
    T = experts.shape[1]
    task = _per_token(path, arrays, "task", T, 0, np.int32)
    return Trace(
        experts=np.ascontiguousarray(experts, dtype=np.int16),
        num_experts=_meta_int(path, meta, "num_experts", high + 1, _MOST_EXPERTS),
        task=task,
        prompt=_per_token(path, arrays, "prompt", T, 0, np.int32),
        phase=_per_token(path, arrays, "phase", T, UNKNOWN, np.uint8),
        weights=_weights(path, arrays.pop("weights", None)),
        expert_bytes=_as_bytes(path, meta.get("expert_bytes"), experts.shape[0]),
        task_names=_task_names(path, meta.get("task_names"), task if "task" in arrays else None),
        meta=meta,
    )


def _parse_meta(path: Path, array: Any) -> dict[str, Any]:
    if array is None:
        return {}
    if array.ndim or array.dtype.kind != "U":
        raise TraceError(f"{path}: 'meta' is {array.dtype.name} {list(array.shape)}, expected one text")
    try:
        text = str(array)
    except ValueError as error:  # numbers that are no characters
        raise TraceError(f"{path}: 'meta' is no text: {error}") from error
    meta = jsontext.parse(text, lambda why: TraceError(f"{path}: 'meta' is not JSON: {why}"))
    if not isinstance(meta, dict):
        raise TraceError(f"{path}: 'meta' is {type(meta).__name__}, expected a JSON object")
    if meta.get("format") == FORMAT and _meta_int(path, meta, "version", VERSION, 1 << 31) > VERSION:
        raise TraceError(f"{path}: format version {meta['version']}; this emoe reads up to {VERSION}")
    return meta


def _meta_int(path: Path, meta: dict[str, Any], name: str, default: int, high: int) -> int:
    try:
        return jsontext.whole_number(meta.get(name, default), f"'{name}' in meta", 0, high)
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from error


def _task_names(path: Path, names: Any, task: NDArray[np.int32] | None) -> tuple[str, ...]:
    """Names in meta data; where there are none the file's, or numbers up to the highest."""
    if names is None:
        if task is None:
            return (path.stem,)
        high = int(task.max(initial=0))
        if high >= _MOST_TASKS:
            raise TraceError(f"{path}: 'task' goes up to {high}; over {_MOST_TASKS} tasks need 'task_names' in meta")
        return tuple(str(number) for number in range(high + 1))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TraceError(f"{path}: 'task_names' in meta is {jsontext.shown(names)}, expected a list of texts")
    return tuple(names)


def _per_token(path: Path, arrays: dict[str, Any], name: str, tokens: int, default: int, dtype: Any) -> Any:
    array = arrays.get(name)
    if array is None:
        return np.full(tokens, default, dtype=dtype)
    if not np.issubdtype(array.dtype, np.integer):
        raise TraceError(f"{path}: '{name}' is {array.dtype}, expected integers")
    low, high, bounds = int(array.min(initial=0)), int(array.max(initial=0)), np.iinfo(dtype)
    if low < 0 or high > bounds.max:
        raise TraceError(f"{path}: '{name}' goes from {low} to {high}, expected 0 to {bounds.max}")
    return array.astype(dtype, copy=False)


def _weights(path: Path, array: Any) -> NDArray[np.float32] | None:
    if array is None:
        return None
    if not np.issubdtype(array.dtype, np.floating):
        raise TraceError(f"{path}: 'weights' is {array.dtype}, expected floating-point numbers")
    with np.errstate(over="ignore"):
        weights: NDArray[np.float32] = array.astype(np.float32, copy=False)
    if array.dtype.itemsize > 4 and np.isinf(weights).sum() > np.isinf(array).sum():
        raise TraceError(f"{path}: 'weights' has values that do not fit into float32")
    return weights


def _as_bytes(path: Path, value: Any, layers: int) -> NDArray[np.int64] | None:
    """Bytes of one expert of each layer; meta data may give one number for all."""
    if value is None:
        return None
    most = int(np.iinfo(np.int64).max)
    try:
        if isinstance(value, list):
            counts = [jsontext.whole_number(each, "'expert_bytes' in meta", 0, most) for each in value]
            return np.array(counts, dtype=np.int64)
        return np.full(layers, jsontext.whole_number(value, "'expert_bytes' in meta", 0, most), dtype=np.int64)
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from error
