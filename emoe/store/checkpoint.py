"""Where a checkpoint's weights lie: safetensors headers read through Transformers' own conversion mapping.

Transformers keeps, for every family, how names and tensors of a checkpoint become parameters. Its operations run here
on `StridedTensor`s, so that no family's layout is written down a second time. Of encoded weights (companions.py) they
move the numbers that these stand for; experts come out as whole matrices. No tensor of an expert is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.model.encoding import COMPUTED, EncodedMatrix, Encoding, encoding
from emoe.model.spec import ExpertForm, ParamSpec
from emoe.model.structure import experts_modules, num_experts, param_specs
from emoe.store import ExpertStore, Piece, StoreLayer, apart
from emoe.store.companions import (
    EncodedWeight,
    Group,
    Read,
    encoded,
    grouped,
    in_one_order,
    is_encoded,
    is_of_activations,
    require_nothing_beside,
    zeros_said,
)
from emoe.store.declared import NOTHING, Declared, declared
from emoe.store.headers import INDEX_NAME, SINGLE_NAME, TensorEntry, checkpoint_files, read_header, read_headers
from emoe.store.opened import OpenFile
from emoe.store.strided import (
    InexpressibleError,
    Rows,
    ShapeError,
    Source,
    StridedTensor,
    blocks_of_experts,
    matrices_of_experts,
)
from emoe.store.unread import Unread, read_bytes, read_from_path


class Indexed(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        store: its experts.
        rest: every tensor by name, read when indexed, for Transformers to load what is outside experts; None where
            nothing is encoded, and Transformers reads the files itself.
    """

    store: ExpertStore
    rest: dict[str, Unread] | None


class Sizes(NamedTuple):
    """How much a checkpoint holds.

    Attributes:
        nbytes: of all its tensors.
        not_loaded: bytes of those that are of no part of the model.
        encoded: bytes of the encoded weights outside experts, as stored.
        decoded: bytes of these in the model's dtype.
    """

    nbytes: int
    not_loaded: int
    encoded: int = 0
    decoded: int = 0


class Forms(NamedTuple):
    """What the weights of a checkpoint are.

    Attributes:
        experts: what an expert of each layer is; None where nothing is encoded.
        sizes: in bytes.
        whole: encodings of the parameters outside experts that are one encoded matrix each, by name in the model.
    """

    experts: list[ExpertForm] | None
    sizes: Sizes
    whole: Mapping[str, str]


_CODES = ("uint8", "int8", "int16", "int32", "float8_e4m3fn", "float8_e5m2")  # what weights in few bits are stored as


@dataclass
class _Sources:
    """What the checkpoint holds for one converter and target: tensors in natural order, by source pattern."""

    converter: Any  # transformers' WeightConverter; None: the tensor is the parameter
    by_pattern: dict[str, list[Source]] = field(default_factory=dict)


def index_checkpoint(files: Iterable[str | Path], meta_model: Any) -> ExpertStore:
    """The store of `read_checkpoint`, without what is outside experts."""
    return read_checkpoint(files, meta_model).store


def read_checkpoint(
    files: Iterable[str | Path],
    meta_model: Any,
    quantization: Mapping[str, Any] | None = None,
    *,
    one_by_one: bool = False,
) -> Indexed:
    """Finds every expert of a checkpoint, and how to read the rest.

    Args:
        files: its safetensors files.
        meta_model: the model on the meta device, experts' parameters included; its dtypes are the ones to run in.
        quantization: what its config says of encodings.
        one_by_one: gives `rest` where nothing is encoded, too.

    Raises:
        CheckpointError: a file is damaged, or a tensor is missing or of another shape or dtype than the model's; names
            file, tensor and bytes. Tensors outside experts are checked for shape and dtype as well.
        UnsupportedModelError: the model has no experts, or its conversion does more than move elements; `quantization`
            speaks of encodings and nothing is encoded; a tensor is in a format that emoe does not compute with.
    """
    opened: list[OpenFile] = []
    try:
        for file in files:
            opened.append(OpenFile(str(Path(file).absolute())))  # the working folder may be another one later
        return _index(opened, meta_model, quantization, one_by_one)
    except BaseException:
        for each in opened:
            each.close()
        raise


def encoded_forms(
    entries: Mapping[str, TensorEntry], meta_model: Any, quantization: Mapping[str, Any] | None, folder: str
) -> Forms:
    """What the weights are by their headers alone, wherever the files are.

    Args:
        entries: of the headers.
        meta_model, quantization: as of `read_checkpoint`.
        folder: of the files, for messages and what a quantizer may have left beside them.

    Raises:
        CheckpointError, UnsupportedModelError: as `read_checkpoint`.
    """
    names = grouped(entries)
    if quantization is None and not is_encoded(names):
        return Forms(None, _sizes(names, {name for name, *_ in model_keys(names, meta_model)}), {})
    read = read_from_path if Path(folder).is_dir() else None
    found = _find(entries, meta_model, quantization, folder, read)
    return Forms([layer.form for layer in found.layers], found.sizes, found.whole)


def forms_of_one(weights: Mapping[str, Source], meta_model: Any) -> list[ExpertForm]:
    """What an expert of each layer is, were these the weights of a checkpoint.

    Args:
        weights: of experts, by name; where experts have weights of their own, those of expert 0.
        meta_model: as `read_checkpoint` takes it.

    Raises:
        UnsupportedModelError: as `read_checkpoint`.
    """
    sources, _ = _sources(weights, meta_model, NOTHING, None)
    forms = []
    for path, module in experts_modules(meta_model):
        tensors = _tensors(path, module, sources, meta_model, count=None)
        count = max((tensor.shape[0] for tensor in tensors.values()), default=0)
        forms.append(_layer(path, param_specs(module), tensors, count, meta_model).form)
    return forms


def first_dtype(folder: Path, otherwise: str = "float32") -> str:
    """The dtype of a checkpoint whose config names none: of the first plain weight, as in Transformers."""
    here = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))  # else a config alone is planned
    for file in checkpoint_files(folder) if here else []:
        for each in grouped(read_header(file)).values():
            if isinstance(each, TensorEntry) and each.is_float and not is_of_activations(each.name):
                return each.dtype
    return otherwise


class _Found(NamedTuple):
    layers: list[StoreLayer]
    names: Mapping[str, TensorEntry | Group]
    weights: Mapping[str, EncodedWeight]
    sizes: Sizes
    whole: Mapping[str, str]


def _index(
    opened: list[OpenFile], meta_model: Any, quantization: Mapping[str, Any] | None, one_by_one: bool
) -> Indexed:
    files = {file.path: file for file in opened}
    folder = str(Path(opened[0].path).parent) if opened else ""

    def read(entry: TensorEntry) -> bytes:
        return read_bytes(files[entry.file], entry)

    found = _find(read_headers(opened), meta_model, quantization, folder, read)
    rest = None
    if one_by_one or is_encoded(found.names):
        rest = {
            name: Unread(found.weights.get(name, each.first if isinstance(each, Group) else each), files)
            for name, each in found.names.items()
            if not is_of_activations(name)
        }
    return Indexed(ExpertStore(found.layers, f"checkpoint {folder}", opened=opened), rest)


def _find(
    entries: Mapping[str, TensorEntry],
    meta_model: Any,
    quantization: Mapping[str, Any] | None,
    folder: str,
    read: Read | None,
) -> _Found:
    names = grouped(entries)
    said = zeros_said(names, declared(quantization, folder or None))
    if quantization is not None and not is_encoded(names):
        codes = next((each for each in entries.values() if each.dtype in _CODES and len(each.shape) > 1), None)
        raise UnsupportedModelError(
            f"config.json says that the weights of {folder} are quantized ({said.method}), and none is in a format "
            "that emoe reads"
            + (
                "; they are plain: take quantization_config out of the config"
                if codes is None
                else f": {codes.name} is {codes.dtype} {list(codes.shape)}. Take the model's checkpoint in bfloat16; "
                "emoe convert makes it as small"
            )
        )
    sources, weights = _sources(names, meta_model, said, read)
    layers = []
    for path, module in experts_modules(meta_model):
        params = param_specs(module)
        count = num_experts(module)
        tensors = _tensors(path, module, sources, meta_model, count)
        for param in params:
            target = f"{path}.{param.name}"
            if target not in tensors:
                raise CheckpointError(
                    f"{folder} holds no tensor for the experts' parameter {target}", file=folder, tensor=target
                )
            _require_shape(param, target, tensors[target], count)
        layers.append(_layer(path, params, tensors, count, meta_model))
        _confirm_experts(tensors, said)
    used = {source.name: key for key, its in sources.items() for each in its.by_pattern.values() for source in each}
    if weights:
        ignored = map(str, type(meta_model)._keys_to_ignore_on_load_unexpected or ())
        require_nothing_beside(names, used, ignored, read)
    inside = tuple(f"{layer.path}." for layer in layers)
    outside = {name: weight for name, weight in weights.items() if not used[name].startswith(inside)}
    state = meta_model.state_dict()
    sizes = _sizes(names, set(used))._replace(
        encoded=sum(plane.nbytes for weight in outside.values() for plane in weight.planes.values()),
        decoded=sum(math.prod(each.shape) * state[used[name]].dtype.itemsize for name, each in outside.items()),
    )
    return _Found(layers, names, weights, sizes, _whole(sources, inside))


def _whole(sources: Mapping[str, _Sources], experts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for key, source in sources.items():
        each = next(iter(source.by_pattern.values()))[0]
        if isinstance(each, EncodedWeight) and source.converter is None and len(each.shape) == 2:
            found[key] = each.encoding
    return {key: how for key, how in found.items() if not key.startswith(experts)}


def _sizes(names: Mapping[str, TensorEntry | Group], used: set[str]) -> Sizes:
    nbytes = {
        name: sum(part.nbytes for part in (each.parts.values() if isinstance(each, Group) else (each,)))
        for name, each in names.items()
    }
    return Sizes(sum(nbytes.values()), sum(size for name, size in nbytes.items() if name not in used))


def _tensors(
    path: str, module: Any, sources: dict[str, _Sources], model: Any, count: int | None
) -> dict[str, StridedTensor]:
    """Parameters of an experts module, by their paths; `count` of experts, None where there need not be all."""
    tensors: dict[str, StridedTensor] = {}
    for target in (f"{path}.{param.name}" for param in param_specs(module)):
        for first in _first_targets(target, sources):
            if count is not None:
                _require_all_experts(sources[first], count, target)
            tensors.update(_converted(first, sources[first], module, model))
    return tensors


def _confirm_experts(tensors: Mapping[str, StridedTensor], said: Declared) -> None:
    """Where a config says apart how many bits experts have."""
    for tensor in tensors.values() if said.experts else ():
        for region in tensor.regions:
            source = region.source
            if isinstance(source, EncodedWeight) and (source.bits <= 4) != (said.experts <= 4):
                raise source.error(f"is not of the {said.experts} bits that {said.where} says of experts")


def _place(piece: Piece) -> tuple[str, int]:
    """In file order, so that ranges that touch follow one another and are read together."""
    return piece.file, piece.offset


def model_keys(names: Iterable[str], model: Any) -> Iterator[tuple[str, str, str | None, Any]]:
    """(tensor, model key, source pattern, converter), exactly as Transformers assigns them when it loads.

    Experts may also lie apart where the family has them in one tensor (apart.py). Tensors of a part that this model
    does not have are left out. The order matters: some renamings wait for a key that sorts before those they act on.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    others = apart.converters(model)
    by_pattern = {pattern: each for each in (*others, *converters) for pattern in each.source_patterns}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if key not in state:
            key, pattern = rename_source_key(name, renamings, others, model.base_model_prefix, state)
        if key in state:
            yield name, key, pattern, None if pattern is None else by_pattern[pattern]


def _sources(
    entries: Mapping[str, Source | Group], model: Any, said: Declared, read: Read | None
) -> tuple[dict[str, _Sources], dict[str, EncodedWeight]]:
    """Model key -> weights of the checkpoint; and those encoded."""
    state = model.state_dict()
    rows_first = _rows_first(model)
    found: dict[str, _Sources] = {}
    keys = list(model_keys(entries, model))
    groups = {name: each for name, *_ in keys if isinstance(each := entries[name], Group)}
    weights = in_one_order(groups, {name: encoded(each, said, read) for name, each in groups.items()})
    for name, key, pattern, converter in keys:
        source = weights[name] if name in weights else cast(Source, entries[name])
        _check_dtype(source, key, state[key])
        if pattern is None:
            _check_shape(source, key, state[key], key in rows_first)
        target = found.setdefault(key, _Sources(converter))
        if target.converter is not converter:
            other = next(iter(target.by_pattern.values()))[0]
            raise source.error(f"lies there beside {other.name}: either would be {key}, or part of it")
        target.by_pattern.setdefault(pattern or name, []).append(source)
    return found, weights


def _rows_first(model: Any) -> set[str]:
    """Keys of experts' weights that a model keeps [inputs, outputs]: those that are stored by rows are turned."""
    return {
        f"{path}.{param.name}"
        for path, module in experts_modules(model)
        if module.is_transposed
        for param in param_specs(module)
        if len(param.shape) == 2
    }


def _check_dtype(source: Source, key: str, parameter: torch.Tensor) -> None:
    if isinstance(source, EncodedWeight):
        if not parameter.is_floating_point():
            raise source.error(f"cannot become {key}, which is {str(parameter.dtype).removeprefix('torch.')}")
    elif source.is_float != parameter.is_floating_point():
        dtype = str(parameter.dtype).removeprefix("torch.")
        codes = ""
        if parameter.is_floating_point():
            codes = "; where it holds codes, their scale is missing, or of a format that emoe does not read"
        raise source.error(f"cannot become {key}, which is {dtype}{codes}")


def _check_shape(source: Source, key: str, parameter: torch.Tensor, turned: bool) -> None:
    shape = _turned(source.shape) if _is_turned(source, turned) else source.shape
    if tuple(shape) != tuple(parameter.shape):
        raise source.error(f"has not the shape {list(parameter.shape)} that the config gives {key}")


def _is_turned(source: Source, by_module: bool) -> bool:
    return by_module and isinstance(source, EncodedWeight) and source.by_rows


def _turned(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


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
        if not apart.is_of_one_expert(pattern):
            continue
        names = [entry.name.split(".") for entry in entries]
        ids = _expert_ids(names)
        missing = sorted(set(range(count)) - set(ids))
        if len(ids) == count and not missing:
            continue
        if missing:
            name = _with_id(names[0], names, missing[0])
            folder = str(Path(entries[0].file).parent)
            raise CheckpointError(
                f"{folder} lacks tensor {name}, one of {count} that make {target}"
                + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""),
                file=folder,
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


def _converted(first: str, source: _Sources, module: Any, model: Any) -> dict[str, StridedTensor]:
    """Model key -> tensor after the family's own operations, as WeightConverter.convert gives it."""
    converter = source.converter
    if converter is None:
        only = next(iter(source.by_pattern.values()))[0]
        whole = StridedTensor.of(only)
        return {first: whole.transpose(-1, -2) if _is_turned(only, module.is_transposed) else whole}
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
        except ValueError as error:
            absent = [each for each in converter.source_patterns if each not in source.by_pattern]
            if not absent:
                raise _inexpressible(operation, first, model, error) from error
            others = next(iter(source.by_pattern.values()))[0]
            names = " or ".join(map(apart.shown, absent))
            raise others.error(f"lies there without its like, {names}, for {first}") from error
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


def _require_shape(param: ParamSpec, target: str, tensor: StridedTensor, count: int) -> None:
    if tuple(tensor.shape) != (count, *param.shape):
        raise tensor.regions[0].source.error(
            f"and its like give {target} the shape {list(tensor.shape)}; the config says {[count, *param.shape]}"
        )


def _layer(
    path: str, params: tuple[ParamSpec, ...], tensors: Mapping[str, StridedTensor], count: int, model: Any
) -> StoreLayer:
    """Parameters as they are, or where any weight is encoded, matrices and what they lie beside."""
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    weights = [param for param in params if len(param.shape) == 2]
    if not any(
        isinstance(region.source, EncodedWeight)
        for param in params
        for region in tensors[f"{path}.{param.name}"].regions
    ):
        weights = []
    stored: list[ParamSpec] = []
    planes = _Planes(count)
    for param in params:
        target = f"{path}.{param.name}"
        try:
            if param in weights:
                planes.add(param, target, matrices_of_experts(tensors[target]))
            else:
                stored.append(param)
                _add_pieces(pieces, param, target, tensors[target])
        except InexpressibleError as error:
            raise _inexpressible("rearrangement", target, model, error) from error
    stored += planes.arrays()
    for its, more in zip(pieces, planes.pieces, strict=True):
        its += more
    form = ExpertForm(params, tuple(stored), tuple(planes.matrices))
    return StoreLayer(path, form, tuple(tuple(sorted(each, key=_place)) for each in pieces))


class _Planes:
    """The planes of a layer's matrices, the same for every expert, and the copies that put them into a slot.

    A matrix that several parameters take rows of lies there once.
    """

    def __init__(self, experts: int) -> None:
        self.matrices: list[EncodedMatrix] = []
        self.pieces: list[list[Piece]] = [[] for _ in range(experts)]
        self._known: list[dict[tuple[str, int], str]] = [{} for _ in range(experts)]

    def add(self, param: ParamSpec, target: str, rows_of: list[list[Rows]]) -> None:
        """Takes the rows that make up a parameter of each expert."""
        made: list[EncodedMatrix] = []
        for expert, its_rows in enumerate(rows_of):
            matrices = [
                self._matrix(expert, rows, f"{param.name}.{n}", param, target) for n, rows in enumerate(its_rows)
            ]
            made = made or matrices
            for matrix, first, rows in zip(matrices, made, its_rows, strict=False):
                if matrix != first or matrix.planes != first.planes or len(matrices) != len(made):
                    raise rows.source.error(
                        f"differs from expert 0's {rows_of[0][0].source.name}, {first.encoding}: experts of a layer "
                        "have to be encoded alike"
                    )
        self.matrices += made

    def _matrix(self, expert: int, rows: Rows, name: str, param: ParamSpec, target: str) -> EncodedMatrix:
        source, key = rows.source, (rows.source.name, rows.matrix)
        if isinstance(source, TensorEntry):
            _require_readable(source, param, target)
        high, wide = source.shape[-2:]
        how = encoding(source.encoding if isinstance(source, EncodedWeight) else param.dtype)
        base = self._known[expert].setdefault(key, name)
        names = {plane.name: f"{base}.{plane.name}" for plane in how.planes}
        if base == name:
            self.pieces[expert] += _plane_pieces(rows, how, names)
        part = (0, 1, 0) if rows.length == high else (rows.first, rows.every, rows.length)
        return EncodedMatrix(how.name, high, wide, names, param.name, rows.start, rows.step, rows.transposed, *part)

    def arrays(self) -> list[ParamSpec]:
        """What the planes are in a slot, each once."""
        found = {}
        for matrix in self.matrices:
            how = encoding(matrix.encoding)
            shapes = how.shapes(matrix.rows, matrix.cols)
            for plane in how.planes:
                found[matrix.planes[plane.name]] = ParamSpec(matrix.planes[plane.name], shapes[plane.name], plane.dtype)
        return list(found.values())


def _plane_pieces(rows: Rows, how: Encoding, names: Mapping[str, str]) -> list[Piece]:
    source = rows.source
    if isinstance(source, TensorEntry):
        count = math.prod(source.shape[-2:])
        nbytes = encoding(source.dtype).nbytes((count,))
        return [_copy(source, rows.matrix * nbytes, nbytes, source.dtype, names["values"], count)]
    copies = []
    for plane in how.planes:
        start, nbytes = source.place(plane.name, rows.matrix)
        entry = source.planes[plane.name]
        count = nbytes // encoding(plane.dtype).nbytes((1,))
        copies.append(_copy(entry, start - entry.offset, nbytes, plane.dtype, names[plane.name], count))
    return copies


def _copy(entry: TensorEntry, start: int, nbytes: int, dtype: str, stored: str, count: int) -> Piece:
    return Piece(entry.file, entry.offset + start, nbytes, entry.name, dtype, stored, 1, count, 0, count, 1)


def _require_readable(source: TensorEntry, param: ParamSpec, target: str) -> None:
    if not ((source.dtype in COMPUTED and param.dtype in COMPUTED) or source.dtype == param.dtype):
        raise source.error(f"cannot become {target} in {param.dtype}: emoe reads experts of {', '.join(COMPUTED)}")


def _add_pieces(pieces: list[list[Piece]], param: ParamSpec, target: str, tensor: StridedTensor) -> None:
    blocks = blocks_of_experts(tensor)
    for source in {region.source.name: region.source for region in tensor.regions}.values():
        if isinstance(source, TensorEntry):
            _require_readable(source, param, target)
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
