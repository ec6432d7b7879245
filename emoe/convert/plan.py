"""What a converted checkpoint will hold, before a byte is written: every tensor, its file and its place there.

All sizes follow from shapes, so that files are written from front to back with one expert in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from emoe.convert.names import Matrix, matrices
from emoe.convert.rest import linear_tensors
from emoe.model.encode import FALLBACKS, INT4, INT8
from emoe.model.encoding import ITEMSIZE, encoding
from emoe.options import FP8
from emoe.store import ExpertStore
from emoe.store.companions import Group, grouped
from emoe.store.headers import DTYPES, TensorEntry

# In GGUF as llama.cpp does; IQ4_NL, which it takes for the two last, is not written.
IN_GGUF = {"q4_k": ("q5_0",), "q5_k": ("q5_1",), "q6_k": ("q8_0",), "q3_k": ("q4_0",), "q2_k": ("q4_0",)}
_GROUPS = {INT4: 32, INT8: 32}  # columns that share a scale
# What has more bits, for layers that tasks need; "" stands for what it was.
MORE = {
    "q2_k": "q4_k",
    "q3_k": "q5_k",
    "q4_k": "q6_k",
    "q4_0": "q8_0",
    "q5_k": "q8_0",
    "q6_k": "q8_0",
    "gguf_mxfp4": "q8_0",
    "mxfp4": FP8,
    "q8_0": "",
    FP8: "",
}
SHARD_BYTES = 4 << 30
_ENTRY = 160  # bytes of a header that a tensor takes at most, beside its name
_CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is written.

    Attributes:
        name, shape: of it.
        code: of its dtype, in safetensors.
        entry: what is copied byte by byte, or as numbers of `as_`, a dtype or an encoding of blocks; None: it is made
            of `matrix`.
        layer, matrix: whose numbers it holds, and in which encoding (`as_`) and plane of that.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    entry: TensorEntry | None = None
    layer: int = -1
    matrix: Matrix | None = None
    as_: str = ""
    plane: str = ""


@dataclass(frozen=True)
class Shard:
    """A file, with its tensors in order.

    Attributes:
        start: what it begins with, where it is a GGUF file, whose tensors start at multiples of `alignment`.
    """

    name: str
    tensors: tuple[Tensor, ...]
    start: bytes = b""
    alignment: int = 1

    def header(self) -> bytes:
        """Of a safetensors file, its length first; padded, so that data starts at a multiple of 64."""
        if self.start:
            return self.start
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for each in self.tensors:
            table[each.name] = {"dtype": each.code, "shape": list(each.shape), "data_offsets": [end, end + each.nbytes]}
            end += each.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Byte at which each tensor starts, and the end of the file."""
        at = [len(self.header())]
        for each in self.tensors:
            at.append(-(-(at[-1] + each.nbytes) // self.alignment) * self.alignment)
        return tuple(at)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.places[-1]


@dataclass(frozen=True)
class Fallback:
    """Matrices that got another encoding than was asked for."""

    matrices: str
    count: int
    cols: int
    asked: str
    got: str


@dataclass
class Conversion:
    """The files, and what there is to say about them.

    Attributes:
        copied: tensors of the checkpoint that are nothing of a routed expert.
        rest_before: bytes of what outside experts takes `rest_bytes` now.
        rest_encoded: how many of its tensors are encoded anew.
    """

    shards: list[Shard] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    expert_bytes: int = 0
    rest_bytes: int = 0
    rest_before: int = 0
    rest_encoded: int = 0
    copied: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def digest(self) -> str:
        """Tells one from any other that has other tensors, or them in other places."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update(f"{shard.name}\n".encode() + shard.header())
        return found.hexdigest()


def chosen(asked: str, matrix: Matrix, plain: str, fallbacks: Mapping[str, Sequence[str]] = FALLBACKS) -> str:
    """The encoding of a matrix: what was asked for where its rows are whole blocks, else the next that fits.

    Args:
        plain: the dtype it keeps where none does.
        fallbacks: what comes after each encoding.
    """
    if matrix.vector:
        return plain
    for name in (asked, *fallbacks.get(asked, ())):
        if name in _GROUPS and (matrix.cols % 8 or (name == INT8 and matrix.flipped)):
            continue  # words of eight codes; and bytes lie as the parameter does, whose rows may be inputs
        if all(plane.holds(matrix.rows, matrix.cols) for plane in encoding(name).planes):
            return _named_by_row(name) if matrix.cols <= _GROUPS.get(name, 0) else name
    return plain


def _named_by_row(name: str) -> str:
    """As whoever reads it tells a group that is the whole row."""
    return name.replace("-1x32-", "-row-").replace("-32-", "-row-")


def conversion(
    entries: dict[str, TensorEntry],
    store: ExpertStore,
    meta_model: Any,
    asked: str,
    plain: str,
    *,
    rest: str | None = None,
    keep: Collection[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Says what is written where.

    Args:
        entries: every tensor of the checkpoint.
        store: its experts.
        meta_model: the model on the meta device.
        asked: an encoding, by name.
        plain: dtype of what fits no encoding, where the checkpoint has that encoded; else it keeps its own.
        rest: an encoding of blocks for the linear layers outside experts; None: they stay as they are.
        keep: layers whose experts have more bits.
        shard_bytes: most bytes of a file, where no single tensor or expert has more.
    """
    result = Conversion()
    result.copied = _outside(entries, store)
    anew = set() if rest is None else linear_tensors(entries, meta_model, rest) & set(result.copied)
    units = [
        [in_blocks(entry, rest, f"{name}_{rest}", "U8") if rest and name in anew else _copied(entry)]
        for name, entry in sorted(result.copied.items())
    ]
    result.rest_encoded = len(anew)
    result.rest_before = sum(entry.nbytes for entry in result.copied.values())
    result.rest_bytes = sum(unit[0].nbytes for unit in units)
    fallbacks: Counter[tuple[str, int, str, str]] = Counter()
    for number, (layer, (_, found)) in enumerate(zip(store.layers, matrices(meta_model), strict=True)):
        experts = len(layer.pieces)
        dtypes = {piece.stored: piece.src_dtype for piece in layer.pieces[0]}
        made = []
        for matrix in found:
            own = dtypes.get(matrix.param, plain)
            wanted = (MORE[asked] or own) if number in keep else asked
            name = chosen(wanted, matrix, own)
            made.append((matrix, name))
            if name != wanted and not matrix.vector:
                count = experts if matrix.expert is None else 1
                fallbacks[_without_numbers(matrix.name), matrix.cols, wanted, name] += count
        for unit in _units(number, made, experts, shard_bytes):
            result.expert_bytes += sum(each.nbytes for each in unit)
            units.append(unit)
    result.fallbacks = [
        Fallback(place, count, cols, wanted, got) for (place, cols, wanted, got), count in sorted(fallbacks.items())
    ]
    result.shards = _shards(units, shard_bytes)
    return result


def _outside(entries: dict[str, TensorEntry], store: ExpertStore) -> dict[str, TensorEntry]:
    """Tensors that are nothing of a routed expert: neither numbers of one, nor beside them."""
    of_experts = {piece.tensor for layer in store.layers for pieces in layer.pieces for piece in pieces}
    for each in grouped(entries).values():
        if isinstance(each, Group) and any(part.name in of_experts for part in each.parts.values()):
            of_experts |= {part.name for part in each.parts.values()}
    return {name: entry for name, entry in entries.items() if name not in of_experts}


def _copied(entry: TensorEntry) -> Tensor:
    return Tensor(entry.name, _CODES.get(entry.dtype, entry.dtype), entry.shape, entry.nbytes, entry)


def in_blocks(entry: TensorEntry, how: str, name: str, code: str) -> Tensor:
    """A plain matrix of the checkpoint in an encoding of blocks."""
    (plane,) = encoding(how).planes
    shape = plane.shape(*entry.shape)
    return Tensor(name, code, shape, math.prod(shape), entry, as_=how, plane=plane.name)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _units(layer: int, made: Iterable[tuple[Matrix, str]], experts: int, shard_bytes: int) -> Iterator[list[Tensor]]:
    """Tensors that are written together, so that an expert is read once: those of an expert, or of all of a layer."""
    by_expert: dict[int | None, list[list[Tensor]]] = {}
    for matrix, name in made:
        by_expert.setdefault(matrix.expert, []).append(_tensors(layer, matrix, name, experts))
    for expert, groups in by_expert.items():
        whole = [tensor for group in groups for tensor in group]
        if expert is None and sum(each.nbytes for each in whole) > shard_bytes:
            yield from groups  # an expert is then read once for each
        else:
            yield whole


def _tensors(layer: int, matrix: Matrix, name: str, experts: int) -> list[Tensor]:
    """One for each plane."""
    how = encoding(name)
    found = []
    for plane, (ending, shape) in _planes(matrix, name).items():
        full = shape if matrix.expert is not None else (experts, *shape)
        dtype = next(each.dtype for each in how.planes if each.name == plane)
        nbytes = math.prod(full) * ITEMSIZE[dtype]
        found.append(Tensor(matrix.name + ending, _CODES[dtype], full, nbytes, None, layer, matrix, name, plane))
    return found


def _planes(matrix: Matrix, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What each plane's tensor is called after the matrix, and its shape for one expert.

    All are called as the field calls them, but for blocks, which are called by their encoding.
    """
    how = encoding(name)
    shape = (matrix.cols, matrix.rows) if flipped(matrix, name) else (matrix.rows, matrix.cols)
    shapes = how.shapes(*shape)
    if how.plain:
        return {"values": ("", shapes["values"][1:] if matrix.vector else shapes["values"])}
    if name == FP8:
        return {"codes": ("", shapes["codes"]), "scales": ("_scale_inv", shapes["scales"])}
    if how.codes == "int8":
        return {"codes": ("", shapes["codes"]), "scales": ("_scale", shapes["scales"])}
    if how.codes == "int4":  # compressed-tensors
        return {"codes": ("_packed", shapes["codes"]), "scales": ("_scale", shapes["scales"])}
    if name != "mxfp4":
        return {"blocks": (f"_{name}", shapes["blocks"])}
    if matrix.name.endswith(".weight"):  # compressed-tensors
        return {"codes": ("_packed", shapes["codes"]), "scales": ("_scale", shapes["scales"])}
    rows, groups = shapes["scales"]  # gpt-oss
    return {"codes": ("_blocks", (rows, groups, 16)), "scales": ("_scales", (rows, groups))}


def flipped(matrix: Matrix, name: str) -> bool:
    """Whether it is written [inputs, outputs]: as it lay, unless numbers are encoded along the inputs."""
    return matrix.flipped and (encoding(name).plain or name == FP8)


def _shards(units: list[list[Tensor]], shard_bytes: int) -> list[Shard]:
    files: list[list[Tensor]] = []
    taken = 0
    for unit in units:
        nbytes = sum(each.nbytes + len(each.name) + _ENTRY for each in unit)
        if not files or taken + nbytes > shard_bytes:
            files.append([])
            taken = 0
        files[-1].extend(unit)
        taken += nbytes
    return [  # the largest elements first, as the library has it, so that each lies at a multiple of its size
        Shard(f"model-{number:05}-of-{len(files):05}.safetensors", tuple(sorted(tensors, key=_element, reverse=True)))
        for number, tensors in enumerate(files, start=1)
    ]


def _element(tensor: Tensor) -> int:
    """Bytes of one."""
    return tensor.nbytes // max(1, math.prod(tensor.shape))
