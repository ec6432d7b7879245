"""A GGUF checkpoint, of one file or several: where its experts lie, and the values of all that is outside them.

Every expert is one slab of each 3-D tensor, or in old files (Mixtral of early 2024) a tensor of its own, so it is read
in place, whatever blocks it is in; of its tensors only headers are read here. A tensor outside experts is read and
decoded alone, its rows a few MiB at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.files.gguf import GgufHeader, read_header, require_parts
from emoe.model.encoding import COMPUTED, ENCODINGS, EncodedMatrix, encoding
from emoe.model.gguf_tensors import Made, TensorNames, architecture
from emoe.model.held import Held
from emoe.model.spec import ExpertForm, ParamSpec
from emoe.model.structure import experts_modules, num_experts, param_specs
from emoe.store import ExpertStore, Piece, StoreLayer
from emoe.store.checkpoint import Forms, Sizes
from emoe.store.headers import TensorEntry
from emoe.store.opened import OpenFile
from emoe.store.unread import Unread, read_into

_PLAIN = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64",
}  # fmt: skip
# Multiplied by a scale in a tensor of its own, whose place in a file no release of llama.cpp has settled.
_SCALED_ELSEWHERE = ("gguf_nvfp4",)
_CHUNK = 16 << 20  # bytes of decoded values


def encoding_name(kind: str) -> str:
    """What the table of encodings calls a type of ggml, whether or not it is there."""
    name = kind.lower()
    same = name not in ENCODINGS or ENCODINGS[name].plane("blocks") is not None  # else another format of that name
    return _PLAIN.get(kind) or (name if same else f"gguf_{name}")


def _kind(name: str) -> str:
    """The type of ggml that `encoding_name` calls so."""
    return name.removeprefix("gguf_").upper()


class GgufCheckpoint:
    """The open files of a checkpoint.

    Args:
        paths: its files, all parts in order.

    Raises:
        CheckpointError: one is missing, truncated or damaged, or they do not belong together.
        UnsupportedModelError: emoe does not know the architecture.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.opened: list[OpenFile] = []
        self._orders: dict[Any, torch.Tensor | None] = {}  # layers are alike
        self._decodable: set[str] = set()
        try:
            headers = [self._open(str(Path(path).absolute())) for path in paths]
            require_parts(headers)
            self._read(headers)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str) -> GgufHeader:
        file = OpenFile(path)
        self.opened.append(file)
        try:
            return read_header(file.fd, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", file=path) from error

    def _read(self, headers: list[GgufHeader]) -> None:
        self.name = self.opened[0].path
        self.kind = str(headers[0].metadata.get("general.architecture"))
        architecture(self.kind, self.name)
        self._files = {file.path: file for file in self.opened}
        self.tensors: dict[str, TensorEntry] = {}
        for header in headers:
            for each in header.tensors.values():
                entry = TensorEntry(
                    header.path, each.name, encoding_name(each.kind), each.shape, each.offset, each.nbytes
                )
                if each.name in self.tensors:
                    raise entry.error(f"is in {self.tensors[each.name].file} as well")
                self.tensors[each.name] = entry

    def close(self) -> None:
        """Closes its files, where no store has taken them over."""
        for file in self.opened:
            file.close()

    def names(self, model: Any) -> TensorNames:
        """Which tensors make a model's parameters."""
        return TensorNames(self.kind, model.config.get_text_config(decoder=True).num_hidden_layers, self.tensors)

    def index(self, meta_model: Any) -> ExpertStore:
        """Finds every expert; the store closes the files.

        Args:
            meta_model: the model on the meta device, experts' parameters included; its dtypes are the ones to run in.

        Raises:
            CheckpointError: a tensor is missing or of another shape than the config says, or not in bytes that emoe
                reads experts from; names file, tensor and bytes.
            UnsupportedModelError: an experts module is unlike those that GGUF files hold.
        """
        return ExpertStore(self._layers(meta_model), f"GGUF {self.name}", opened=self.opened)

    def _layers(self, meta_model: Any) -> list[StoreLayer]:
        names = self.names(meta_model)
        return [self._layer(path, module, names) for path, module in experts_modules(meta_model)]

    def _layer(self, path: str, module: Any, names: TensorNames) -> StoreLayer:
        params = {param.name: param for param in param_specs(module)}
        parts = [part for param in params.values() for part in self._parts(path, param, module, names)]
        weights = [part for part in parts if not part.is_bias]
        if all(part.dtype in COMPUTED for part in weights):
            form = ExpertForm.plain(tuple(params.values()))
            encoded: list[_Part] = []
        else:
            form, encoded = _encoded_form(params, weights), weights
        plain = [part for part in parts if part not in encoded]
        pieces = [
            sorted(
                [
                    *(part.stored_piece(expert) for part in encoded),
                    *(part.param_piece(expert, params[part.param.name]) for part in plain),
                ],
                key=lambda piece: (piece.file, piece.offset),
            )
            for expert in range(num_experts(module))
        ]
        return StoreLayer(path, form, tuple(map(tuple, pieces)))

    def _parts(self, path: str, param: ParamSpec, module: Any, names: TensorNames) -> Iterator[_Part]:
        """Where the rows of a parameter lie."""
        is_bias = param.name.endswith("_bias")
        transposed = bool(module.is_transposed) and not is_bias
        shape = (*param.shape, 1) if is_bias else tuple(reversed(param.shape)) if transposed else param.shape
        base = param.name.removesuffix("_bias")
        if len(shape) != 2 or base not in ("gate_up_proj", "up_proj", "down_proj"):
            raise UnsupportedModelError(
                f"{path} keeps a parameter {param.name} of shape {list(param.shape)}, which GGUF files do not hold"
            )
        rows, cols = shape
        named = names.experts(path, is_bias)
        if base != "gate_up_proj":
            kind = base.removesuffix("_proj")
            yield _Part(kind, self._expert(named, kind, module, rows, cols, is_bias), param, 0, rows, 0, 1, transposed)
            return
        half = rows // 2
        places = ((0, 1), (half, 1)) if module.is_concatenated else ((0, 2), (1, 2))
        fused = named["gate_up"] in self.tensors
        for number, kind in enumerate(("gate", "up")):
            which = "gate_up" if fused else kind
            entries = self._expert(named, which, module, rows if fused else half, cols, is_bias)
            yield _Part(kind, entries, param, half * number if fused else 0, half, *places[number], transposed)

    def _expert(
        self, named: Mapping[str, str], kind: str, module: Any, rows: int, cols: int, is_bias: bool
    ) -> tuple[TensorEntry, ...]:
        """The tensor of all experts, or one of each."""
        count, name = num_experts(module), named[kind]
        wanted = (rows,) if is_bias else (rows, cols)
        apart: list[str] = []
        if name not in self.tensors and count > 1:
            apart = [name.replace(f"{kind}_exps.", f"{kind}.{expert}.") for expert in range(count)]
        if not any(each in self.tensors for each in apart):
            return (self._of_experts(name, (count, *wanted)),)
        entries = tuple(self._of_experts(each, wanted) for each in apart)
        for entry in entries:
            if entry.dtype != entries[0].dtype:
                raise entry.error(
                    f"differs from {entries[0].name}, {entries[0].dtype}: experts of a layer have to be encoded alike"
                )
        return entries

    def _of_experts(self, name: str, wanted: tuple[int, ...]) -> TensorEntry:
        entry = self._entry(name)
        if entry.shape != wanted:
            raise entry.error(f"has not the shape {list(wanted)} that the config gives it")
        if entry.dtype not in ENCODINGS or (ENCODINGS[entry.dtype].plain and entry.dtype not in COMPUTED):
            known = (name for name, each in ENCODINGS.items() if each.plane("blocks"))
            raise entry.error(f"is of a type that emoe reads no experts in; it reads {', '.join((*known, *COMPUTED))}")
        return entry

    def _entry(self, name: str, of: str = "") -> TensorEntry:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.name} lacks tensor {name}" + (f", which makes {of}" if of else ""), file=self.name, tensor=name
            )
        return self.tensors[name]

    def state(self, meta_model: Any) -> dict[str, _Value]:
        """All parameters outside experts by their names in the model; each is read and decoded when it is indexed.

        Raises:
            CheckpointError: a tensor is missing, or of another shape.
            UnsupportedModelError: the file holds tensors that the model has no place for, or does not hold parameters
                that emoe knows a tensor for.
        """
        names = self.names(meta_model)
        experts = [
            (path, module, param) for path, module in experts_modules(meta_model) for param in param_specs(module)
        ]
        ours = {f"{path}.{param.name}" for path, _, param in experts}
        used = {
            entry.name
            for path, module, param in experts
            for part in self._parts(path, param, module, names)
            for entry in part.entries
        }
        tied = set(meta_model.all_tied_weights_keys)  # by the config; Transformers ties them
        state: dict[str, _Value] = {}
        for key, parameter in meta_model.state_dict().items():
            made = names.of(key)
            if key in ours:
                continue
            if key in tied:
                used |= set(made.sources if made else ())
                continue
            if made is None:
                raise UnsupportedModelError(
                    f"{self.name}: emoe does not know which tensor makes {key} of {type(meta_model).__name__}"
                )
            used |= set(made.sources)
            state[key] = self._unread(key, made, parameter, meta_model.config)
        unknown = [name for name in self.tensors if name not in used and not names.unused(name)]
        if unknown:
            raise UnsupportedModelError(
                f"{self.name}: {type(meta_model).__name__} has no place for tensor {unknown[0]}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            )
        return state

    def forms(self, meta_model: Any) -> Forms:
        """What its experts are, and bytes. Raises as `index` and `state`."""
        forms = [layer.form for layer in self._layers(meta_model)]
        rest = self.state(meta_model)
        kept = {
            id(each): each for value in rest.values() for each in value.entries if each.dtype not in _PLAIN.values()
        }
        made = [key for key, value in rest.items() if any(id(each) in kept for each in value.entries)]
        parameters = meta_model.state_dict()
        whole = {key: value.encoding for key, value in rest.items()}
        return Forms(
            forms if any(form.matrices for form in forms) else None,
            Sizes(
                nbytes=sum(each.nbytes for each in self.tensors.values()),
                not_loaded=0,
                encoded=sum(each.nbytes for each in kept.values()),
                decoded=sum(parameters[key].nbytes for key in made),
            ),
            {key: how for key, how in whole.items() if how and not encoding(how).plain},
        )

    def _unread(self, key: str, made: Made, parameter: torch.Tensor, config: Any) -> _Value:
        entries = [self._entry(name, key) for name in made.sources]
        value = _Value(entries, self._files, made.undo, config, self._orders)
        for entry in entries:
            if entry.dtype.startswith("int") and parameter.is_floating_point():
                raise entry.error(f"is whole numbers, and makes {key}, which is {str(parameter.dtype)[6:]}")
            if entry.dtype in _SCALED_ELSEWHERE:
                raise entry.error("is of a type that emoe does not read: its scale is not among its bytes")
            if entry.dtype not in (*_PLAIN.values(), *self._decodable):
                _numbers(entry, bytearray(entry.nbytes // math.prod(entry.shape[:-1])), 1)
                self._decodable.add(entry.dtype)
        if value.shape() != tuple(parameter.shape):
            raise value.entries[0].error(f"has not the shape {list(parameter.shape)} that the config gives {key}")
        return value


class _Value(Unread):
    """A parameter made of tensors of a file."""

    def __init__(
        self,
        entries: list[TensorEntry],
        files: dict[str, OpenFile],
        undo: Callable[..., torch.Tensor] | None,
        config: Any,
        orders: dict[Any, torch.Tensor | None],
    ) -> None:
        super().__init__(entries[0], files)
        self.entries, self._undo, self._config, self._orders = entries, undo, config, orders

    @property
    def is_float(self) -> bool:
        return not self.entries[0].dtype.startswith("int")

    def shape(self) -> tuple[int, ...]:
        """Of the parameter; () where its tensors cannot be put together."""
        if self._undo is None:
            return self.entries[0].shape
        try:
            made = self._undo(self._config, *(torch.empty(each.shape, device="meta") for each in self.entries))
        except RuntimeError:
            return ()
        return tuple(made.shape)

    @property
    def encoding(self) -> str:
        names = {entry.dtype for entry in self.entries}
        name = next(iter(names))
        known = name in COMPUTED or (name in ENCODINGS and not ENCODINGS[name].plain)
        matrices = all(len(entry.shape) == 2 for entry in self.entries) and len(self.shape()) == 2
        return name if known and matrices and len(names) == 1 and self._order() is not None else ""

    def _order(self) -> torch.Tensor | None:
        """Which row of its tensors, one below the other, each of its rows is; None where it is more than rows."""
        shapes = tuple(entry.shape for entry in self.entries)
        if self._undo is None:
            return torch.arange(shapes[0][0])
        if (self._undo, shapes) not in self._orders:
            self._orders[self._undo, shapes] = _rows_taken(self._undo, self._config, shapes)
        return self._orders[self._undo, shapes]

    def hold(self) -> Held:
        order, rows = self._order(), sum(entry.shape[0] for entry in self.entries)
        held = Held(encoding(self.entries[0].dtype), *self.shape())
        [plane] = held.how.planes
        raw = held.raw(plane.name)
        in_order = order is None or torch.equal(order, torch.arange(rows))
        below = raw if in_order else torch.empty(sum(entry.nbytes for entry in self.entries), dtype=torch.uint8)
        at = 0
        for entry in self.entries:
            read_into(self._files[entry.file], entry, below[at : at + entry.nbytes].numpy().data, 0)
            at += entry.nbytes
        if not in_order:
            torch.index_select(below.view(rows, -1), 0, order, out=raw.view(held.rows, -1))  # type: ignore[arg-type]
        return held

    def _numbers(self) -> torch.Tensor:
        """Raises CheckpointError where the gguf library does not decode it."""
        if self._undo is None:
            return self._decoded_entry(self.entries[0], self.dtype)
        values = self._undo(self._config, *(self._decoded_entry(each, torch.float32) for each in self.entries))
        return values.to(self.dtype or values.dtype).contiguous()

    def _decoded_entry(self, entry: TensorEntry, dtype: torch.dtype | None) -> torch.Tensor:
        """Read and decoded a few rows at a time, so that only what is asked for is whole in memory."""
        plain = getattr(torch, entry.dtype) if entry.dtype in _PLAIN.values() else torch.float32
        out = torch.empty(entry.shape, dtype=dtype or plain)
        rows = out.view(-1, entry.shape[-1])
        size = entry.nbytes // len(rows)
        step = max(1, _CHUNK // (4 * entry.shape[-1]))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            raw = bytearray(len(part) * size)
            read_into(self._files[entry.file], entry, memoryview(raw), first * size)
            part.copy_(_numbers(entry, raw, len(part)))
        return out


def _rows_taken(
    undo: Callable[..., torch.Tensor], config: Any, shapes: tuple[tuple[int, ...], ...]
) -> torch.Tensor | None:
    """As `_Value._order`: every number is told apart, so that nothing but a choice of rows looks like one."""
    rows, cols = sum(shape[0] for shape in shapes), shapes[0][-1]
    if any(shape[-1] != cols for shape in shapes) or rows * cols >= 1 << 31:
        return None
    numbers = torch.arange(rows * cols, dtype=torch.int32).view(rows, cols)
    try:
        made = undo(config, *numbers.split([shape[0] for shape in shapes]))
    except RuntimeError:
        return None
    order = made[:, 0].long() // cols if made.dim() == 2 and made.shape[1] == cols else None
    same = order is not None and made.dtype == numbers.dtype and torch.equal(made, numbers[order])
    return order if same else None


def _numbers(entry: TensorEntry, raw: bytearray, rows: int) -> torch.Tensor:
    """[rows, columns] of bytes of a tensor."""
    import gguf

    if entry.dtype in _PLAIN.values():
        return torch.frombuffer(raw, dtype=getattr(torch, entry.dtype)).view(rows, -1)
    kind = gguf.GGMLQuantizationType[_kind(entry.dtype)]
    try:
        return torch.from_numpy(gguf.quants.dequantize(np.frombuffer(raw, np.uint8).reshape(rows, -1), kind))
    except NotImplementedError as error:
        raise entry.error("is of a type that the gguf library does not decode") from error


@dataclass(frozen=True)
class _Part:
    """Rows of one tensor, for each expert, that are rows of one parameter.

    Attributes:
        kind: what they are stored as where they are encoded.
        entries: the tensor of all experts, each one slab of it; or one of each expert.
        first, rows: of the slab.
        start, step: row r is row `start + r * step` of the parameter, its column where that is `transposed`.
    """

    kind: str
    entries: tuple[TensorEntry, ...]
    param: ParamSpec
    first: int
    rows: int
    start: int
    step: int
    transposed: bool

    @property
    def dtype(self) -> str:
        return self.entries[0].dtype

    @property
    def slab(self) -> tuple[int, ...]:
        """Shape of one expert's."""
        shape = self.entries[0].shape
        return shape if len(self.entries) > 1 else shape[1:]

    @property
    def is_bias(self) -> bool:
        return len(self.slab) == 1

    @property
    def cols(self) -> int:
        return 1 if self.is_bias else self.slab[-1]

    def matrix(self) -> EncodedMatrix:
        plane = encoding(self.dtype).planes[0].name
        return EncodedMatrix(
            self.dtype, self.rows, self.cols, {plane: self.kind}, self.param.name, self.start, self.step,
            self.transposed,
        )  # fmt: skip

    def stored(self) -> ParamSpec:
        """The one plane of it."""
        plane = encoding(self.dtype).planes[0]
        return ParamSpec(self.kind, plane.shape(self.rows, self.cols), plane.dtype)

    def _range(self, expert: int) -> tuple[TensorEntry, int, int]:
        """The tensor that one expert's rows are in, their first byte, and how many."""
        if len(self.entries) > 1:
            entry, before, slab = self.entries[expert], 0, self.entries[expert].nbytes
        else:
            entry = self.entries[0]
            slab = entry.nbytes // entry.shape[0]
            before = expert * slab
        row = slab // self.slab[0]
        return entry, entry.offset + before + self.first * row, self.rows * row

    def stored_piece(self, expert: int) -> Piece:
        """Bytes as they lie."""
        entry, offset, nbytes = self._range(expert)
        stored = self.stored()
        count = math.prod(stored.shape)
        return Piece(
            file=entry.file, offset=offset, nbytes=nbytes, tensor=entry.name, src_dtype=stored.dtype,
            stored=self.kind, rows=1, cols=count, dst_offset=0, dst_row_stride=count, dst_col_stride=1,
        )  # fmt: skip

    def param_piece(self, expert: int, param: ParamSpec) -> Piece:
        """Numbers that go into the parameter itself."""
        entry, offset, nbytes = self._range(expert)
        width = param.shape[-1]
        row, col = (1, width) if self.transposed else (1, 1) if self.is_bias else (width, 1)
        return Piece(
            file=entry.file, offset=offset, nbytes=nbytes, tensor=entry.name, src_dtype=entry.dtype,
            stored=param.name, rows=self.rows, cols=self.cols, dst_offset=self.start * row,
            dst_row_stride=self.step * row, dst_col_stride=col,
        )  # fmt: skip


def _encoded_form(params: dict[str, ParamSpec], weights: list[_Part]) -> ExpertForm:
    """Planes first, then the parameters that stay as they are."""
    encoded = {part.param.name for part in weights}
    rest = tuple(param for name, param in params.items() if name not in encoded)
    return ExpertForm(
        tuple(params.values()), (*(part.stored() for part in weights), *rest), tuple(part.matrix() for part in weights)
    )
