"""Where a checkpoint's experts lie: safetensors headers read through Transformers' own conversion mapping.

Transformers keeps, for every family, how names and tensors of a checkpoint become parameters. Its operations run here
on `StridedTensor`s, so that no family's layout is written down a second time. No tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.model.encoding import encoding
from emoe.model.spec import ExpertForm, ParamSpec
from emoe.model.structure import experts_modules, num_experts, param_specs
from emoe.store import ExpertStore, Piece, StoreLayer
from emoe.store.headers import TensorEntry, read_headers
from emoe.store.opened import OpenFile
from emoe.store.strided import InexpressibleError, ShapeError, StridedTensor, blocks_of_experts

READABLE = ("float32", "float16", "bfloat16")  # the transfer converts between these


@dataclass
class _Sources:
    """What the checkpoint holds for one converter and target: tensors in natural order, by source pattern."""

    converter: Any  # transformers' WeightConverter; None: the tensor is the parameter
    by_pattern: dict[str, list[TensorEntry]] = field(default_factory=dict)


def index_checkpoint(files: Iterable[str | Path], meta_model: Any) -> ExpertStore:
    """Finds every expert of a checkpoint.

    Args:
        files: its safetensors files.
        meta_model: the model on the meta device, experts' parameters included; its dtypes are the ones to run in.

    Raises:
        CheckpointError: a file is damaged, or a tensor is missing or of another shape or dtype than the model's; names
            file, tensor and bytes. Tensors outside experts are checked for shape and dtype as well.
        UnsupportedModelError: the model has no experts, or its conversion does more than move elements.
    """
    opened: list[OpenFile] = []
    try:
        for file in files:
            opened.append(OpenFile(str(Path(file).absolute())))  # the working folder may be another one later
        return _index(opened, meta_model)
    except BaseException:
        for each in opened:
            each.close()
        raise


def _index(opened: list[OpenFile], meta_model: Any) -> ExpertStore:
    names = [file.path for file in opened]
    sources = _sources(read_headers(opened), meta_model)
    layers = []
    for path, module in experts_modules(meta_model):
        params = param_specs(module)
        count = num_experts(module)
        tensors: dict[str, StridedTensor] = {}
        for target in (f"{path}.{param.name}" for param in params):
            for first in _first_targets(target, sources):
                _require_all_experts(sources[first], count, target)
                tensors.update(_converted(first, sources[first], meta_model))
        pieces: list[list[Piece]] = [[] for _ in range(count)]
        for param in params:
            target = f"{path}.{param.name}"
            if target not in tensors:
                raise CheckpointError(
                    f"{_folder(names)} holds no tensor for the experts' parameter {target}",
                    file=_folder(names),
                    tensor=target,
                )
            _add_pieces(pieces, param, target, tensors[target], count, meta_model)
        layers.append(
            StoreLayer(path, ExpertForm.plain(params), tuple(tuple(sorted(each, key=_place)) for each in pieces))
        )
    return ExpertStore(layers, f"checkpoint {_folder(names)}", opened=opened)


def _place(piece: Piece) -> tuple[str, int]:
    """In file order, so that ranges that touch follow one another and are read together."""
    return piece.file, piece.offset


def _folder(files: Sequence[str]) -> str:
    return str(Path(files[0]).parent) if files else ""


def _sources(entries: dict[str, TensorEntry], model: Any) -> dict[str, _Sources]:
    """Model key -> tensors of the checkpoint, exactly as Transformers assigns them when it loads.

    The order matters: some renamings wait for a key that sorts before those they act on.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, _Sources] = {}
    for name in sorted(entries, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if key not in state:
            continue  # of a part that this model does not have
        if pattern is None:
            _check_plain(entries[name], key, state[key])
        converter = None if pattern is None else by_pattern[pattern]
        target = found.setdefault(key, _Sources(converter))
        target.by_pattern.setdefault(pattern or name, []).append(entries[name])
    return found


def _check_plain(entry: TensorEntry, key: str, parameter: torch.Tensor) -> None:
    if entry.shape != tuple(parameter.shape):
        raise entry.error(f"has not the shape {list(parameter.shape)} that the config gives {key}")
    if entry.is_float != parameter.is_floating_point():
        raise entry.error(f"cannot become {key}, which is {str(parameter.dtype).removeprefix('torch.')}")


def _first_targets(target: str, sources: dict[str, _Sources]) -> list[str]:
    """Keys of `sources` whose conversion gives `target`: itself, or the first target of one that gives several."""
    if target in sources:
        return [target]
    return [
        key
        for key, source in sources.items()
        if source.converter is not None
        and any(
            key.replace(source.converter.target_patterns[0], other) == target
            for other in source.converter.target_patterns[1:]
        )
    ]


def _require_all_experts(source: _Sources, count: int, target: str) -> None:
    """Where experts are tensors of their own: one for each id, none twice."""
    for pattern, entries in source.by_pattern.items():
        if "*" not in pattern:
            continue
        names = [entry.name.split(".") for entry in entries]
        ids = _expert_ids(names)
        missing = sorted(set(range(count)) - set(ids))
        if len(ids) == count and not missing:
            continue
        if missing:
            name = _with_id(names[0], names, missing[0])
            raise CheckpointError(
                f"{_folder([entries[0].file])} lacks tensor {name}, one of {count} that make {target}"
                + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""),
                file=_folder([entries[0].file]),
                tensor=name,
            )
        raise entries[-1].error(f"is one of {len(entries)} experts of {target}; the config says {count}")


def _varying(names: list[list[str]]) -> int:
    """The part of the dotted names that counts experts: the last that is a number and differs everywhere."""
    for part in reversed(range(min(len(name) for name in names))):
        values = {name[part] for name in names}
        if len(values) == len(names) and all(value.isdecimal() for value in values):
            return part
    return -1


def _expert_ids(names: list[list[str]]) -> list[int]:
    part = _varying(names)
    return [int(name[part]) for name in names] if part >= 0 else list(range(len(names)))


def _with_id(name: list[str], names: list[list[str]], expert: int) -> str:
    part = _varying(names)
    return ".".join([*name[:part], str(expert), *name[part + 1 :]]) if part >= 0 else f"{'.'.join(name)} ({expert})"


def _converted(first: str, source: _Sources, model: Any) -> dict[str, StridedTensor]:
    """Model key -> tensor after the family's own operations, as WeightConverter.convert gives it."""
    converter = source.converter
    if converter is None:
        return {first: StridedTensor.of(next(iter(source.by_pattern.values()))[0])}
    tensors: dict[str, Any] = {
        pattern: [StridedTensor.of(entry) for entry in entries] for pattern, entries in source.by_pattern.items()
    }
    for operation in converter.operations:
        try:
            tensors = operation.convert(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=first,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        except ShapeError as error:
            if error.source is None:
                raise
            raise error.source.error(str(error)) from error
        except (InexpressibleError, AttributeError, TypeError, NotImplementedError) as error:
            raise _inexpressible(operation, first, model, error) from error
    prefix, suffix = next(
        ((before, after) for before, match, after in (first.partition(key) for key in tensors) if match), ("", "")
    )
    return {prefix + key + suffix: value[0] if isinstance(value, list) else value for key, value in tensors.items()}


def _inexpressible(operation: Any, target: str, model: Any, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"emoe cannot read the experts of {type(model).__name__} (family {model.config.model_type}) one by one: "
        f"operation {operation!r} that makes {target} is no copy of byte ranges: {error}"
    )


def _add_pieces(
    pieces: list[list[Piece]], param: ParamSpec, target: str, tensor: StridedTensor, count: int, model: Any
) -> None:
    if tuple(tensor.shape) != (count, *param.shape):
        source = tensor.regions[0].source
        raise source.error(
            f"and its like give {target} the shape {list(tensor.shape)}; the config says {[count, *param.shape]}"
        )
    try:
        blocks = blocks_of_experts(tensor)
    except InexpressibleError as error:
        raise _inexpressible("rearrangement", target, model, error) from error
    for source in {region.source.name: region.source for region in tensor.regions}.values():
        readable = source.dtype in READABLE and param.dtype in READABLE
        if not (readable or source.dtype == param.dtype):
            raise source.error(f"cannot become {target} in {param.dtype}: emoe reads experts of {', '.join(READABLE)}")
    for expert, its_blocks in enumerate(blocks):
        for block in its_blocks:
            source = block.source
            encoded = encoding(source.dtype)
            pieces[expert].append(
                Piece(
                    file=source.file,
                    offset=source.offset + encoded.nbytes((block.start,)),
                    nbytes=encoded.nbytes((block.rows, block.cols)),
                    tensor=source.name,
                    src_dtype=source.dtype,
                    stored=param.name,
                    rows=block.rows,
                    cols=block.cols,
                    dst_offset=block.dst_offset,
                    dst_row_stride=block.dst_row_stride,
                    dst_col_stride=block.dst_col_stride,
                )
            )
