"""Converts a checkpoint: reads its experts one by one, encodes them, and writes a checkpoint folder of the same model.

Memory holds one expert. What lies outside experts is copied byte by byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import emoe
from emoe.convert import state
from emoe.convert.config import quantization
from emoe.convert.gguf import conversion as gguf_conversion
from emoe.convert.keep import layers_to_keep
from emoe.convert.perplexity import perplexity_of
from emoe.convert.plan import SHARD_BYTES, Conversion, Fallback, Shard, Tensor, conversion, flipped
from emoe.errors import BudgetError, CheckpointError, ConfigError, EmoeError, UnsupportedModelError, WriteError
from emoe.files import jsontext
from emoe.memory import format_bytes, process_memory
from emoe.model.config import take_quantization
from emoe.model.encode import WORKSPACE, Encoded, encode
from emoe.model.encoding import encoding
from emoe.model.gguf_files import gguf_files
from emoe.model.structure import find_experts
from emoe.options import CONVERTED, CONVERTED_REST
from emoe.planning.meta import meta_model
from emoe.store import ExpertStore, read_expert
from emoe.store.checkpoint import read_checkpoint
from emoe.store.companions import grouped, is_encoded
from emoe.store.declared import QUANTIZER_FILES, said_of_encodings
from emoe.store.gguf import GgufCheckpoint
from emoe.store.headers import INDEX_NAME, TensorEntry, checkpoint_files, read_headers

_COPY = 8 << 20  # bytes of what is copied at once
_MEMORY = 2 << 30  # bytes, where none is named
_SPARE = 64 << 20  # bytes of memory for what is not counted, and of the disk for what is beside the shards
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_NOT_COPIED = ("config.json", *QUANTIZER_FILES, state.RECORD)
_MOST_THREADS = 16
_LARGEST_EXTRA = 64 << 20  # bytes of a file beside the weights; a tokenizer has up to 30 MB

logger = logging.getLogger(__name__)


@dataclass
class Loss:
    """What encoding lost of some matrices, as sums of squares."""

    squared_error: float = 0.0
    squared: float = 0.0
    matrices: int = 0
    worst: float = 0.0
    worst_expert: int = -1

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the numbers."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0

    def add(self, encoded: Encoded, expert: int) -> None:
        """One matrix more."""
        self.join(Loss(encoded.squared_error, encoded.squared, 1, _relative(encoded), expert))

    def join(self, other: Loss) -> None:
        """All that another has seen."""
        self.squared_error += other.squared_error
        self.squared += other.squared
        self.matrices += other.matrices
        if other.worst > self.worst:
            self.worst, self.worst_expert = other.worst, other.worst_expert


def _relative(encoded: Encoded) -> float:
    return math.sqrt(encoded.squared_error / encoded.squared) if encoded.squared else 0.0


@dataclass
class Report:
    """What a conversion did.

    Attributes:
        experts: what was asked for; `encodings`: what the matrices became, with their number.
        rest: what was asked for outside experts, and `rest_encoded` how many matrices became it.
        bytes_before, bytes_after: of experts, the rest, and all files of weights.
        kept: layers that have more bits for tasks, as `keep.layers_to_keep` found them.
        losses: layer by path -> matrix -> what encoding lost of it, over all experts.
    """

    model: str
    out: str
    experts: str
    bytes_before: dict[str, int] = field(default_factory=dict)
    bytes_after: dict[str, int] = field(default_factory=dict)
    encodings: dict[str, int] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    losses: dict[str, dict[str, Loss]] = field(default_factory=dict)
    resumed: int = 0
    peak_memory: int = 0
    perplexity: dict[str, float] | None = None
    kept: dict[str, Any] | None = None
    rest: str = "keep"
    rest_encoded: int = 0

    def layer(self, path: str) -> Loss:
        """Of all matrices of a layer."""
        total = Loss()
        for loss in self.losses[path].values():
            total.join(loss)
        return total

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "out": self.out,
            "experts": self.experts,
            "rest": self.rest,
            "rest_encoded": self.rest_encoded,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "encodings": self.encodings,
            "fallbacks": [vars(each) for each in self.fallbacks],
            "layers": [
                {
                    "path": path,
                    "relative_rms_error": self.layer(path).relative,
                    "matrices": {
                        name: {
                            "relative_rms_error": loss.relative,
                            "worst": loss.worst,
                            "worst_expert": loss.worst_expert,
                        }
                        for name, loss in matrices.items()
                    },
                }
                for path, matrices in self.losses.items()
            ],
            "files_of_an_earlier_run": self.resumed,
            "peak_memory_bytes": self.peak_memory,
            "perplexity": self.perplexity,
            "kept_for_tasks": self.kept,
        }


def convert(
    model: str | Path,
    out: str | Path,
    experts: str,
    *,
    rest: str = "keep",
    memory: int | None = None,
    text: str | Path | None = None,
    keep_tasks: str | Path | None = None,
    gguf: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> Report:
    """Writes a checkpoint of the same model with its experts encoded.

    Args:
        model: a checkpoint folder, or a hub id, which is fetched whole.
        out: a folder that is not there yet, or empty; it appears when all is written.
        experts: what they become: one of `emoe.options.CONVERTED`.
        rest: what becomes of the linear layers outside experts that are plain: "keep" copies them, "q8_0" encodes them.
        memory: bytes that this process may take, Python and torch included; None: 2 GiB more than it holds now.
        text: a file on which perplexity is measured before and after, by models that run in `memory`.
        keep_tasks: a file of labelled prompts; the layers that their tasks need most keep more bits (keep.py).
        gguf: write GGUF files in the place of safetensors, for families that llama.cpp knows.
        shard_bytes: most bytes of a file, where no single expert or tensor has more.
        progress: whether to show a bar; None: where a terminal shows it.

    Raises:
        ConfigError: an option is not one of its choices, or `out` holds something.
        CheckpointError: a file is damaged, or a weight is not finite; names file and tensor.
        UnsupportedModelError: the model has no experts that emoe can manage.
        BudgetError: an expert does not fit into `memory`; names the smallest that works.
        WriteError: the folder cannot be written, or the disk is full; what is finished stays, the same call goes on.
    """
    if experts not in CONVERTED:
        raise ConfigError(f"experts={experts!r} is not one of {', '.join(CONVERTED)}")
    if rest not in CONVERTED_REST:
        raise ConfigError(f"rest={rest!r} is not one of {', '.join(CONVERTED_REST)}")
    if memory is None:
        memory = process_memory()["resident"] + _MEMORY
    out = Path(out).expanduser().absolute()
    state.require_free(out)
    folder = _folder(model)
    before = perplexity_of(folder, text, memory) if text is not None else None  # what cannot be measured is known first
    kept = _measured(folder, keep_tasks, memory, progress) if keep_tasks is not None else None
    keep = kept["layers"] if kept else ()
    with ExitStack() as stack:
        source = stack.enter_context(_open(folder))
        what = (source.entries, source.store, source.meta, CONVERTED[experts], source.dtype)
        anew = None if rest == "keep" else rest
        if gguf:
            plan = gguf_conversion(*what, folder, rest=anew, keep=keep, shard_bytes=shard_bytes)
        else:
            plan = conversion(*what, rest=anew, keep=keep, shard_bytes=shard_bytes)
        report = _report(str(model), out, experts, source, plan)
        report.rest, report.rest_encoded = rest, plan.rest_encoded
        report.kept = kept
        if all(encoding(name).plain for name in report.encodings):
            widths = sorted({each.cols for each in plan.fallbacks})
            raise ConfigError(f"nothing of {model} can be {experts}: rows of {widths} numbers are no whole blocks")
        source.threads = _threads(source.store, memory)
        key = _key(folder, source, {"experts": experts, "rest": rest, "gguf": gguf}, plan)
        names = {shard.name: shard.nbytes for shard in plan.shards}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"{out.parent} cannot be made: {error.strerror or error}") from error
        own = stack.enter_context(state.claim(out, key, names))
        report.resumed = len(own.shards)
        _require_disk(own, plan)
        _require_readable(own.path, source, plan, experts)
        with _threads_of_encoding(source):
            _write_all(own, plan, source, progress)
        for shard in plan.shards:
            _add_losses(report, own.shards[shard.name]["losses"])
        if not gguf:
            _write_rest(own.path, folder, source, plan, experts)
        report.peak_memory = process_memory()["peak"]
        if text is not None and before is not None:
            report.perplexity = {"before": before, "after": perplexity_of(own.path, text, memory)}
        own.finish({"report": report.to_dict()})
    return report


def _measured(folder: Path, prompts: str | Path, memory: int, progress: bool | None) -> dict[str, Any]:
    from tqdm import tqdm

    with tqdm(desc="measuring tasks", unit="forward", disable=None if progress is None else not progress) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return layers_to_keep(folder, prompts, memory, on_step)


@dataclass
class _Source:
    """A checkpoint that is open: its tensors, where its experts lie, and the model on the meta device."""

    folder: Path
    entries: dict[str, TensorEntry]
    store: ExpertStore
    meta: Any
    dtype: str
    config: dict[str, Any]  # without quantization_config
    encoded: dict[str, Any] | None
    threads: int = 1
    pool: Executor | None = None

    def quantization(self, plan: Conversion, experts: str) -> dict[str, Any]:
        """Of the config that is written."""
        if not is_encoded(grouped(plan.copied)):
            return quantization(plan, self.meta, experts)
        said = said_of_encodings(self.encoded, self.folder)  # a quantizer's own file is not copied
        return quantization(plan, self.meta, experts, {} if said is None else said[0])

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: Any) -> None:
        self.store.close()


def _folder(model: str | Path) -> Path:
    path = Path(model).expanduser()
    if path.exists() or str(model)[:1] in ("~", "/", "."):
        return path.absolute()
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except Exception as error:  # the library raises errors of the network and its own
        raise CheckpointError(f"{model} is no folder here, and cannot be fetched: {error}", file=str(model)) from error


def _open(folder: Path) -> _Source:
    if gguf_files(folder, {}):
        raise UnsupportedModelError(f"{folder} is GGUF already; emoe convert reads checkpoints in safetensors")
    plain = str(meta_model(folder).dtype).removeprefix("torch.")
    meta = meta_model(folder, dtype=torch.float32)  # so that experts are read without rounding
    files = checkpoint_files(folder)
    fail = partial(CheckpointError, file=str(folder))
    config = jsontext.read(folder / "config.json", "config", fail, constants=True)
    find_experts(meta)
    parts = {"": config, **{name: each for name, each in config.items() if isinstance(each, dict)}}
    encoded = take_quantization({name: each for name, each in parts.items() if name != "quantization_config"})
    for each in parts.values():
        each.pop("expert_dtype", None)  # what DeepSeek-V4 says of experts, which will be others
    store = read_checkpoint(files, meta, encoded).store
    try:
        entries = read_headers([store.opened(file) for file in files])
        return _Source(folder, entries, store, meta, plain, config, encoded)
    except BaseException:
        store.close()
        raise


def _report(model: str, out: Path, experts: str, source: _Source, plan: Conversion) -> Report:
    total = sum(entry.nbytes for entry in source.entries.values())
    encodings: dict[str, int] = {}
    for each in (tensor for shard in plan.shards for tensor in shard.tensors):
        if each.matrix is not None and not each.matrix.vector and each.plane in ("blocks", "codes", "values"):
            count = len(source.store.layers[each.layer].pieces) if each.matrix.expert is None else 1
            encodings[each.as_] = encodings.get(each.as_, 0) + count
    return Report(
        model,
        str(out),
        experts,
        {"experts": total - plan.rest_before, "rest": plan.rest_before, "all": total},
        {"experts": plan.expert_bytes, "rest": plan.rest_bytes, "all": plan.expert_bytes + plan.rest_bytes},
        encodings,
        plan.fallbacks,
        {layer.path: {} for layer in source.store.layers},
    )


def _threads(store: ExpertStore, memory: int) -> int:
    """That encode at once within `memory`: an expert is there as float32, as in its file, and as it is written."""
    largest = max(sum(param.nbytes for param in layer.params) for layer in store.layers)
    resident = process_memory()["resident"]
    taken = resident + 3 * largest + _SPARE
    if taken + WORKSPACE > memory:
        raise BudgetError(
            f"converting takes up to {format_bytes(taken + WORKSPACE)} of memory, of which one expert "
            f"{format_bytes(3 * largest)} and what this process holds already {format_bytes(resident)}; "
            f"{format_bytes(memory)} were given",
            needed=taken + WORKSPACE,
            budget=memory,
        )
    return min((memory - taken) // WORKSPACE, len(os.sched_getaffinity(0)), _MOST_THREADS)


def _require_disk(own: state.Unfinished, plan: Conversion) -> None:
    needed = sum(shard.nbytes for shard in plan.shards if shard.name not in own.shards) + _SPARE
    free = shutil.disk_usage(own.path).free
    if needed > free:
        raise WriteError(f"{own.path.parent} has {format_bytes(free)} free; {format_bytes(needed)} are needed")


def _require_readable(folder: Path, source: _Source, plan: Conversion, experts: str) -> None:
    """Reads what will be written as a model's loading would, from files that have headers and no weights."""
    sketch = folder / "headers"
    sketch.mkdir()
    try:
        for shard in plan.shards:
            with (sketch / shard.name).open("wb") as file:
                file.write(shard.header())
                file.truncate(shard.nbytes)
                file.flush()
                for tensor, at in zip(shard.tensors, shard.places, strict=False):  # shapes, orders, zeros are looked at
                    if tensor.entry is not None and tensor.code in ("I32", "I64") and tensor.nbytes <= _COPY:
                        _copy(file.fileno(), at, source, tensor, lambda _: None)
        files = [sketch / shard.name for shard in plan.shards]
        if plan.shards[0].start:
            meta = meta_model(files[0])
            GgufCheckpoint(files).index(meta).close()
            return
        read_checkpoint(files, source.meta, source.quantization(plan, experts)).store.close()
    finally:
        shutil.rmtree(sketch, ignore_errors=True)


def _key(folder: Path, source: _Source, options: dict[str, Any], plan: Conversion) -> dict[str, Any]:
    """What the result depends on."""
    files = {}
    for file in sorted({entry.file for entry in source.entries.values()}):
        info = source.store.opened(file).identity
        files[Path(file).name] = [info.size, info.mtime_ns]
    return {
        "source": {
            "folder": str(folder.resolve()),
            "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            "files": files,
        },
        "options": options,
        "layout": plan.digest(),
        "emoe": emoe.__version__,
    }


@contextmanager
def _threads_of_encoding(source: _Source) -> Iterator[None]:
    """Threads that share the rows of a matrix; torch's own would wait for one another after every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(source.threads) as source.pool:
            yield
    finally:
        torch.set_num_threads(before)


def _write_all(own: state.Unfinished, plan: Conversion, source: _Source, progress: bool | None) -> None:
    from tqdm import tqdm

    done = sum(facts["bytes"] for facts in own.shards.values())
    hidden = None if progress is None else not progress
    with tqdm(
        total=plan.nbytes, initial=done, desc="converting", unit="B", unit_scale=True, unit_divisor=1024, disable=hidden
    ) as bar:
        for number, shard in enumerate(plan.shards, start=1):
            if shard.name in own.shards:
                continue
            bar.set_postfix_str(f"file {number} of {len(plan.shards)}")
            losses = _write(own.path, shard, source, bar.update)
            own.record(shard.name, {"losses": losses})


def _write(
    folder: Path, shard: Shard, source: _Source, on_bytes: Callable[[int], Any]
) -> dict[str, dict[str, list[Any]]]:
    """One file, whole or not at all; says what was lost, layer by layer."""
    partial_path = folder / f"{shard.name}.part"
    losses: dict[str, dict[str, Loss]] = {}
    try:
        with partial_path.open("wb") as file:
            handle = file.fileno()
            _reserve(handle, shard.nbytes)
            header = shard.header()
            _put(handle, header, 0)
            on_bytes(len(header))
            for tensors, at in _together(shard):
                if tensors[0].entry is not None:
                    _copy(handle, at[0], source, tensors[0], on_bytes)
                else:
                    _encode(handle, at, tensors, source, losses, on_bytes)
            os.fsync(handle)
        partial_path.rename(folder / shard.name)
    except BaseException as error:
        partial_path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, EmoeError):
            raise WriteError(f"{folder / shard.name} cannot be written: {error.strerror or error}") from error
        raise
    return {
        path: {name: [loss.squared_error, loss.squared, loss.matrices, loss.worst, loss.worst_expert]
               for name, loss in each.items()}
        for path, each in losses.items()
    }  # fmt: skip


def _reserve(handle: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot reserve
            raise
        os.ftruncate(handle, nbytes)


def _together(shard: Shard) -> Iterator[tuple[list[Tensor], list[int]]]:
    """Tensors that are made of the same expert, or of the same layer's experts, with their places in the file."""
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
    for tensor, place in zip(shard.tensors, shard.places, strict=False):
        tensors, at = groups.setdefault(_made_of(tensor), ([], []))
        tensors.append(tensor)
        at.append(place)
    yield from groups.values()


def _made_of(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.name,) if tensor.matrix is None else (tensor.layer, tensor.matrix.expert)


def _copy(handle: int, at: int, source: _Source, tensor: Tensor, on_bytes: Callable[[int], Any]) -> None:
    entry = tensor.entry
    assert entry is not None
    file = source.store.opened(entry.file)
    data = memoryview(bytearray(min(_COPY, entry.nbytes)))
    done = 0
    while done < entry.nbytes:
        part = data[: min(len(data), entry.nbytes - done)]
        if file.read(part, entry.offset + done) < len(part) or file.change():
            raise entry.error(file.change() or "cannot be read to its end")
        done += len(part)
        written = _converted(part, entry, tensor.as_ or entry.dtype)
        _put(handle, written, at)
        at += len(written)
        on_bytes(len(written))


def _converted(data: memoryview, entry: TensorEntry, after: str) -> memoryview:
    """Part of a tensor, of whole blocks where it is encoded."""
    if entry.dtype == after:
        return data
    numbers = torch.frombuffer(data, dtype=getattr(torch, entry.dtype))
    how = encoding(after)
    if how.plain:
        return numbers.to(getattr(torch, after)).view(torch.uint8).numpy().data
    try:
        return encode(after, numbers.view(-1, how.planes[0].block[1])).planes["blocks"].numpy().data.cast("B")
    except ConfigError as error:
        raise entry.error(f"cannot be encoded: {error}") from error


def _encode(
    handle: int, at: list[int], tensors: list[Tensor], source: _Source, losses: dict[str, dict[str, Loss]],
    on_bytes: Callable[[int], Any],
) -> None:  # fmt: skip
    layer = source.store.layers[tensors[0].layer]
    whose = tensors[0].matrix.expert  # type: ignore[union-attr]
    of_layer = losses.setdefault(layer.path, {})
    experts = range(len(layer.pieces)) if whose is None else (whose,)
    for expert in experts:
        values = read_expert(source.store, tensors[0].layer, expert)
        done: dict[str, Encoded] = {}
        for tensor, place in zip(tensors, at, strict=True):
            matrix = tensor.matrix
            assert matrix is not None
            if matrix.name not in done:
                done[matrix.name] = _encoded(tensor, values, source.pool)
                if tensor.plane != "values":
                    of_layer.setdefault(_label(matrix.name), Loss()).add(done[matrix.name], expert)
            data = done[matrix.name].planes[tensor.plane].contiguous().view(torch.uint8).numpy().data
            _put(handle, data.cast("B"), place + (expert * data.nbytes if whose is None else 0))
            on_bytes(data.nbytes)


def _encoded(tensor: Tensor, values: dict[str, torch.Tensor], pool: Executor | None) -> Encoded:
    matrix = tensor.matrix
    assert matrix is not None
    numbers = matrix.of(values[matrix.param])
    try:
        return encode(tensor.as_, numbers.T if flipped(matrix, tensor.as_) else numbers, pool)
    except ConfigError as error:
        raise CheckpointError(f"tensor {matrix.name} cannot be encoded: {error}", tensor=matrix.name) from error


def _label(name: str) -> str:
    """ "gate_proj" of "model.layers.0.mlp.experts.7.gate_proj.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _put(handle: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def _add_losses(report: Report, losses: dict[str, dict[str, list[Any]]]) -> None:
    for path, of_layer in losses.items():
        for name, values in of_layer.items():
            report.losses[path].setdefault(name, Loss()).join(Loss(*values))


def _write_rest(out: Path, folder: Path, source: _Source, plan: Conversion, experts: str) -> None:
    """The config, what lies beside the weights, and last the index."""
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or name.endswith(_WEIGHTS) or name in _NOT_COPIED or not path.is_file():
            continue
        if path.stat().st_size > _LARGEST_EXTRA:
            logger.warning("%s is left out: it has %s", path, format_bytes(path.stat().st_size))
            continue
        shutil.copyfile(path, out / name)
    config = {**source.config, "quantization_config": source.quantization(plan, experts)}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = {
        "metadata": {"total_size": plan.expert_bytes + plan.rest_bytes},
        "weight_map": {each.name: shard.name for shard in plan.shards for each in shard.tensors},
    }
    (out / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
