"""The seam to Transformers: find the experts of a model, load a model without them, take them out and put them back.

What saves a model whole while its experts are elsewhere is in saving.py; how Transformers is told to skip them, in
quantizer.py.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from emoe.errors import CheckpointError, EmoeError, one_line
from emoe.model import auto
from emoe.model.config import PLACES, read_config, without_quantization
from emoe.model.gguf_files import gguf_files
from emoe.model.structure import experts_modules, find_experts
from emoe.seam import elsewhere
from emoe.seam.guard import ModelGuard
from emoe.seam.linear import Dense
from emoe.seam.saving import SavingGuard
from emoe.store import ExpertStore, StoreLayer, read_layer
from emoe.store.checkpoint import first_dtype, read_checkpoint
from emoe.store.gguf import GgufCheckpoint
from emoe.store.headers import checkpoint_files
from emoe.store.unread import Unread

__all__ = [
    "attach_experts",
    "decoded_bytes",
    "detach_experts",
    "experts_modules",
    "find_experts",
    "guard_model",
    "guard_saving",
    "load_without_experts",
    "pack_last_rows",
    "put_experts",
    "read_experts",
]

ExpertValues = list[tuple[nn.Module, dict[str, torch.Tensor]]]


def load_without_experts(
    path_or_id: str | Path, *, dtype: Any = "auto", dense: Dense | None = None, **kwargs: Any
) -> tuple[Any, ExpertStore]:
    """Loads a model whose experts stay where they are.

    Args:
        path_or_id: a checkpoint folder, a GGUF file, or a hub id that Transformers resolves.
        dtype: as in Transformers.
        dense: which weights outside experts stay encoded, and what computes with them; None decodes all.
        kwargs: as `emoe.model.config.read_config` takes them; the rest is handed to Transformers' `from_pretrained`.

    Returns:
        (the model on the CPU in evaluation mode, placeholders for its experts' parameters; where the experts lie).

    Raises:
        CheckpointError: a file is missing, truncated, damaged or of another shape or dtype; names file, tensor, bytes.
        UnsupportedModelError: the model has no experts that emoe can manage.
        ConfigError: an option contradicts keeping experts elsewhere.
    """
    config, kwargs = read_config(path_or_id, kwargs)
    if files := gguf_files(path_or_id, kwargs):
        return _finished(*_load_gguf(files, path_or_id, config, dtype, dense, kwargs), str(path_or_id))
    plain = not any(kwargs.get(name) for name in ("subfolder", "variant")) and not getattr(
        config, "transformers_weights", None
    )
    if plain and Path(path_or_id).is_dir():
        checkpoint_files(Path(path_or_id))  # before Transformers meets what is wrong with them
        if dtype == "auto" and getattr(config, "dtype", None) is None:
            dtype = first_dtype(Path(path_or_id))  # Transformers would take that of codes or scales
    cls = auto.model_class(config, kwargs.pop("auto_class", None))
    config, quantization = without_quantization(config)
    try:
        model, info = _load(
            cls, path_or_id, partial(_plain_store, quantization, dense), auto.part_of(config, cls), dtype, **kwargs
        )
        _own_memory(model, model._emoe_store.opened_files())
    except _EncodedError as found:
        model, info = _load_decoded(path_or_id, found, dense, **kwargs)
    return _finished(model, info, str(path_or_id))


def _finished(model: Any, info: dict[str, Any], name: str) -> tuple[Any, ExpertStore]:
    store = cast(ExpertStore, model.__dict__.pop("_emoe_store"))
    store.require_in_place()  # what Transformers read by name is of the same files
    _require_complete(info, name)
    detach_experts(model, store.layers)
    return model, store


def _load_gguf(
    files: list[Path], path_or_id: str | Path, config: Any, dtype: Any, dense: Dense | None, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    from transformers import GenerationConfig

    given = {name: value for name, value in kwargs.items() if name not in ("gguf_file", "auto_class")}
    cls = auto.model_class(config, kwargs.get("auto_class"))
    config, _ = without_quantization(auto.part_of(config, cls))
    if dtype != "auto":
        config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    checkpoint = GgufCheckpoint(files)
    try:
        with torch.device("meta"):
            shapes = auto.from_config(cls, copy.deepcopy(config), dtype=config.dtype, trust_remote_code=False)
        if not Path(path_or_id).is_dir():  # nothing beside a file is known to be its own
            given.setdefault("generation_config", GenerationConfig.from_model_config(config))
        state = checkpoint.state(shapes)
        return load_from_state(
            type(shapes), config, lambda model, _: checkpoint.index(model), state, path_or_id, dense=dense, **given
        )
    except BaseException:
        checkpoint.close()
        raise


class _EncodedError(Exception):
    """What Transformers was asked to load has encoded weights."""

    def __init__(self, model: Any, store: ExpertStore, rest: dict[str, Unread]) -> None:
        super().__init__(store.description)
        self.cls, self.config, self.store, self.rest = type(model), model.config, store, rest


def _plain_store(quantization: dict[str, Any] | None, dense: Dense | None, model: Any, files: list[str]) -> ExpertStore:
    found = read_checkpoint(files, model, quantization, one_by_one=dense is not None and dense.plain is not None)
    if found.rest is not None:
        raise _EncodedError(model, found.store, found.rest)
    return found.store


def _load(
    cls: Any, path: Any, make: Any, config: Any, dtype: Any, dense: Dense | None = None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    from emoe.seam.quantizer import WithoutExperts

    try:
        model, info = cls.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            quantization_config=WithoutExperts(make, dense),
            output_loading_info=True,
            **kwargs,
        )
    except EmoeError:  # some are OSErrors too
        raise
    except OSError as error:  # how Transformers says that there are no files by such names (variant=, subfolder=)
        raise CheckpointError(f"{path}: {one_line(error)[:400]}", file=str(path)) from error
    return model, info


def _load_decoded(
    path_or_id: str | Path, found: _EncodedError, dense: Dense | None, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """What is outside experts comes as a state dict whose tensors are decoded when Transformers takes them."""
    try:
        return load_from_state(
            found.cls, found.config, lambda *_: found.store, found.rest, path_or_id, dense=dense, **kwargs
        )
    except BaseException:
        found.store.close()
        raise


def load_from_state(
    cls: Any,
    config: Any,
    make: Callable[[Any, list[str]], ExpertStore],
    state: Mapping[str, Any],
    path_or_id: str | Path,
    *,
    dense: Dense | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Loads a model without its experts from tensors that are at hand, or given when they are asked for (`Unread`).

    Args:
        cls: the model's own class, not an Auto one.
        config: with the dtype to run in, and without quantization_config.
        make: as `WithoutExperts` takes it.
        state: tensors outside experts, by the names of the checkpoint.
        path_or_id: what the model is called, and where its generation config is, if it has one.
        dense: as `load_without_experts` takes it.
        kwargs: as `emoe.model.config.read_config` gives them.

    Returns:
        (the model, whose store is still its attribute `_emoe_store`; what Transformers says of the loading).
    """
    places = {name: kwargs.pop(name) for name in PLACES if name in kwargs}
    for name in ("use_safetensors", "variant", "weights_only"):
        kwargs.pop(name, None)
    given = kwargs.pop("generation_config", None) or _generation_config(path_or_id, places)
    model, info = _load(
        cls, None, make, config, config.dtype, dense, state_dict=state, generation_config=given, **kwargs
    )
    model.config.name_or_path = model.name_or_path = str(path_or_id)
    return model, info


def _generation_config(path_or_id: str | Path, places: dict[str, Any]) -> Any:
    """That of a checkpoint, None where it has none and Transformers makes one."""
    from transformers import GenerationConfig

    where = {name: value for name, value in places.items() if name not in ("code_revision", "trust_remote_code")}
    try:
        return GenerationConfig.from_pretrained(path_or_id, **where)
    except OSError:
        return None


def _require_complete(info: dict[str, Any], name: str) -> None:
    """Transformers gives random values to what a checkpoint lacks, and says so in a log; here it is an error."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {missing[0]}" + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""),
            file=name,
            tensor=missing[0],
        )
    for kind in ("mismatched_keys", "error_msgs", "conversion_errors"):
        if info.get(kind):
            raise CheckpointError(f"{name} does not fit the model: {info[kind]}", file=name)


def _own_memory(model: nn.Module, files: Iterable[str]) -> None:
    """Copies weights out of the mapping of the checkpoint that Transformers leaves them in.

    In a mapping they vanish from the budget (the page cache drops and reads them again), they change with the file,
    and touching them after it was truncated kills the process.

    Args:
        files: all of the checkpoint; a shard may hold no expert.
    """
    mapped = _mappings({os.path.realpath(file) for file in files})
    if not mapped:
        return
    for tensor in {id(each): each for each in (*model.parameters(), *model.buffers())}.values():
        start = tensor.data_ptr()
        if any(low <= start < high for low, high in mapped):
            nbytes = tensor.untyped_storage().data_ptr() + tensor.untyped_storage().nbytes() - start
            nbytes = min(nbytes, tensor.numel() * tensor.element_size())
            tensor.data = tensor.data.clone()
            _forget(start, nbytes)


def _mappings(files: set[str]) -> list[tuple[int, int]]:
    """Address ranges at which this process has the files mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in files:
            low, high = fields[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges


def _forget(start: int, nbytes: int) -> None:
    """Drops whole pages of a range of a private mapping; they would be read again if touched."""
    page = os.sysconf("SC_PAGESIZE")
    first = -(-start // page) * page
    length = (start + nbytes) // page * page - first
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), 4)  # MADV_DONTNEED


def detach_experts(model: nn.Module, layers: Iterable[StoreLayer]) -> None:
    """Takes the experts' parameters out of a model and frees them; placeholders without values stay (elsewhere.py)."""
    for layer in layers:
        elsewhere.take_out(model.get_submodule(layer.path), layer)


def attach_experts(model: nn.Module, store: ExpertStore) -> None:
    """Loads every expert back into ordinary parameters on the CPU, in the dtypes that the model has by now.

    Modules without placeholders have their experts and keep them.

    Raises:
        ReadError: an expert cannot be read; the model is unchanged.
    """
    put_experts([(module, values) for module, values in read_experts(model, store) if elsewhere.placeholders(module)])


def read_experts(model: nn.Module, store: ExpertStore) -> ExpertValues:
    """Every expert on the CPU, by the module and the name it belongs to, in the dtypes that the model has by now."""
    modules = [model.get_submodule(layer.path) for layer in store.layers]
    return [(module, elsewhere.as_placed(module, read_layer(store, number))) for number, module in enumerate(modules)]


def decoded_bytes(model: nn.Module, store: ExpertStore) -> int:
    """Bytes of what `read_experts` gives."""
    modules = [model.get_submodule(layer.path) for layer in store.layers]
    return sum(
        each.numel() * each.dtype.itemsize for module in modules for each in elsewhere.placeholders(module).values()
    )


def put_experts(read: ExpertValues) -> None:
    """Puts what `read_experts` gave where it belongs."""
    for module, values in read:
        elsewhere.put_back(module, values)


def pack_last_rows(model: Any) -> Any:
    """Hands the output projection dense rows; returns a removable handle, or None where there is no projection.

    Generation cuts the last row out of a prefill. torch (2.13, oneDNN on CPUs with bfloat16 instructions) answers such
    a strided view by copying the whole weight into another layout first: a second copy in memory, and time lost.
    """
    projection = model.get_output_embeddings()
    return None if projection is None else projection.register_forward_pre_hook(_dense_rows)


def _dense_rows(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = args[0]
    if rows.dim() != 3 or rows.dtype != torch.bfloat16 or rows.stride(0) == rows.shape[1] * rows.stride(1):
        return None
    return (rows.clone(memory_format=torch.contiguous_format), *args[1:])


def guard_model(model: Any, store: ExpertStore, implementation: str) -> ModelGuard:
    """Makes a model run its experts by `implementation`, and answer for what it does not hold (guard.py).

    Returns:
        A guard; its `remove()` undoes everything.
    """
    return ModelGuard(model, store, implementation)


def guard_saving(model: Any, store: ExpertStore) -> SavingGuard:
    """Makes `state_dict` and `save_pretrained` give the whole model while its experts are in a store.

    Returns:
        A guard; its `remove()` undoes everything.
    """
    return SavingGuard(model, store)
