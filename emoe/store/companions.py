"""Which tensors of a checkpoint make one weight: codes with their scales, told by names and dtypes, tensor by tensor.

A config only confirms what shapes say (declared.py). Formats and who writes them, X being the weight's name
(`...gate_proj.weight`, or `experts.gate_up_proj` for all experts at once, [E, rows, columns]) and B that without
`.weight`:

    X of 8 bits, X_scale_inv | X_scale | B.scale | B.qscale_weight      FP8 (blocks, rows, tensor), MXFP8, INT8
    X of two codes a byte, X_scale | B.scale, X_scale_2                 NVFP4 (modelopt), MXFP4 (DeepSeek-V4)
    X_packed, X_scale, X_global_scale | X_zero_point, X_shape           compressed-tensors: NVFP4, MXFP4, INT4, INT8
    X_blocks, X_scales                                                  MXFP4 (gpt-oss)
    B.qweight, B.scales, B.qzeros, B.g_idx                              AWQ, GPTQ
    X_q4_k, X_q8_0, ...                                                 blocks of GGUF, by `emoe convert`

Scales of activations (`input_scale`, `k_scale`, ...) have nothing to do with weights. What lies beside a weight of a
quantized checkpoint, or elsewhere in a layer, and is none of these is refused: it may multiply or rotate what goes in
or comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from emoe.errors import CheckpointError, UnsupportedEncodingError
from emoe.model.encoding import ENCODINGS, ITEMSIZE, Encoding, encoding
from emoe.store.declared import ROW, TENSOR, Block, Declared, shown
from emoe.store.headers import TensorEntry

_BLOCKS = tuple(name for name, each in ENCODINGS.items() if each.plane("blocks"))
# What a tensor is of its weight, by the end of its name; those with a dot stand in the place of ".weight".
_CORES = {
    ".qweight": ("int32",), "_packed": ("int32", "uint8", "int8", "F4"), "_blocks": ("uint8",),
    **{f"_{name}": ("uint8",) for name in _BLOCKS},
}  # fmt: skip
_SCALES = ("_scale_inv", "_scale", ".scale", ".qscale_weight")
_SMOOTHING = (".pre_quant_scale", "_pre_quant_scale")
_OTHERS = (
    *_SCALES, "_scale_2", "_global_scale", "_zero_point", "_shape", "_g_idx", "_scales", ".scales", ".qzeros", ".g_idx",
    *_SMOOTHING,
)  # fmt: skip
# Those that are a companion even where what they belong to is missing.
_ALWAYS = ("_scale_inv", ".qscale_weight", ".qzeros", *_SMOOTHING)
_ENDS = re.compile(rf"(.+?)({'|'.join(map(re.escape, (*_CORES, *_OTHERS)))})", re.DOTALL)
_CODES = ("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "F4")
_SCALE_DTYPES = {
    **{name: name for name in ("float32", "bfloat16", "float16")},
    **dict.fromkeys(("float8_e8m0fnu", "uint8"), "e8m0"),
}
_ACTIVATIONS = re.compile(
    r".*[._]((input|output)_(scale|global_scale|zero_point)|input_scale_ub|activation_scale|qscale_act"
    r"|(q|k|v|kv|prob)_(cache_)?(scale|zero_point)|(input|output|weight|[qkv]_bmm)_quantizer\._amax)"
)
_BUFFERS = re.compile(r"\.rotary_emb\.(inv_freq|(cos|sin)_cached)$")  # older releases saved them; the model has its own

_LARGEST_SQUARE = 128  # rows and columns of a block that a checkpoint has without saying so

Read = Callable[[TensorEntry], bytes]


@dataclass(frozen=True)
class EncodedWeight:
    """A weight whose numbers are encoded.

    Attributes:
        name: what it would be called were it plain.
        encoding: by name.
        shape: [rows, columns], or [E, rows, columns] of the matrices of all experts.
        planes: the tensor that holds each plane, of all experts one after the other.
        by_rows: whether rows are outputs for certain; else they are what the parameter's rows are.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    planes: Mapping[str, TensorEntry] = field(hash=False)
    by_rows: bool = False

    @property
    def codes(self) -> TensorEntry:
        """The tensor that stands for it in messages."""
        return next(iter(self.planes.values()))

    @property
    def file(self) -> str:
        return self.codes.file

    @property
    def offset(self) -> int:
        return self.codes.offset

    @property
    def dtype(self) -> str:
        return self.encoding

    @property
    def bits(self) -> float:
        """Of one number, without what it shares with others."""
        return 8 * self.codes.nbytes / math.prod(self.shape)

    def error(self, why: str) -> CheckpointError:
        """A CheckpointError about it."""
        return self.codes.error(f"is a weight {list(self.shape)} in {self.encoding} that {why}")

    def place(self, plane: str, matrix: int) -> tuple[int, int]:
        """Byte of the file at which a plane of one of its matrices starts, and how many there are."""
        entry, nbytes = self.planes[plane], plane_bytes(self.encoding, self.shape)[plane]
        return entry.offset + (matrix * nbytes if entry.nbytes > nbytes else 0), nbytes


def plane_bytes(name: str, shape: Sequence[int]) -> dict[str, int]:
    """Bytes of each plane of one matrix; its rows and columns are the last of `shape`."""
    how = encoding(name)
    shapes = how.shapes(shape[-2], shape[-1])
    return {plane.name: math.prod(shapes[plane.name]) * ITEMSIZE[plane.dtype] for plane in how.planes}


@dataclass
class Group:
    """The tensors of one weight, by the ends of their names; "" is the one that has the weight's own."""

    name: str
    parts: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def first(self) -> TensorEntry:
        """The one that stands for it in messages."""
        return next(
            (each for end, each in self.parts.items() if end == "" or end in _CORES), next(iter(self.parts.values()))
        )

    def lacks(self, what: str) -> CheckpointError:
        """A CheckpointError about a tensor that is not there."""
        others = [each.name for each in self.parts.values() if each is not self.first]
        beside = f"; beside it: {', '.join(others)}" if others else ""
        return self.first.error(f"lies there without {what}{beside}. A weight is never used without its scale")


def is_of_activations(name: str) -> bool:
    """Whether a tensor scales what goes into a layer, or a cache, and no weight."""
    return _ACTIVATIONS.fullmatch(name) is not None


def grouped(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry | Group]:
    """Tensors of a checkpoint, those that are one weight together under its name; nothing is checked yet."""
    ends = {name: found for name in entries if (found := _ENDS.fullmatch(name)) and not is_of_activations(name)}
    result: dict[str, TensorEntry | Group] = {name: each for name, each in entries.items() if name not in ends}
    groups: dict[str, Group] = {}
    for only_cores in (True, False):
        for name, found in ends.items():
            end, entry = found[2], entries[name]
            weight = found[1] + (".weight" if end[0] == "." else "")
            if (end in _CORES) != only_cores:
                continue
            if end in _CORES:
                belongs = entry.dtype in _CORES[end]
            else:
                own = entries.get(weight)
                belongs = weight in groups or end in _ALWAYS or (own is not None and own.dtype in _CODES)
                belongs = belongs or (end[0] == "_" and weight.endswith(".weight"))
                belongs = belongs or (end == "_scales" and entry.dtype == "uint8") or entry.dtype == "float8_e8m0fnu"
            if belongs:
                groups.setdefault(weight, Group(weight)).parts[end] = entry
            else:
                result[name] = entry
    for weight, group in groups.items():
        if weight in entries:
            group.parts = {"": entries[weight], **group.parts}
        result[weight] = group
    return result


def require_nothing_beside(
    found: Mapping[str, TensorEntry | Group], used: Container[str], ignored: Iterable[str], read: Read | None
) -> None:
    """Refuses what lies in a quantized checkpoint beside a weight, or in a layer, of the model, and is not of it.

    Args:
        found: of `grouped`.
        used: names of `found` that the model has.
        ignored: patterns of names that the model's class does without.
        read: as for `encoded`; None lets a bias pass, which is refused unless it is zero.

    Raises:
        UnsupportedEncodingError: there is such a tensor; names its file, it, and its bytes.
    """
    own = [name for name in found if name in used]
    owners = {name.removesuffix(".weight"): name.endswith(".weight") for name in own}
    layers = {layer for name in own if (layer := _layer_of(name))}
    harmless = [_BUFFERS, *map(re.compile, ignored)]
    for name, each in found.items():
        if name in used or is_of_activations(name) or any(pattern.search(name) for pattern in harmless):
            continue
        bases = (name[: mark.start()] for mark in re.finditer("[._]", name))
        base = next((each for each in bases if each in owners and not (name[len(each)] == "_" and owners[each])), "")
        if not base and _layer_of(name) not in layers:
            continue
        entry = each.first if isinstance(each, Group) else each
        if base and name in (f"{base}.bias", f"{base}_bias") and (read is None or not any(read(entry))):
            continue  # GPTQ's packers write one of zeros for each layer
        place = f"beside the weight {base}" if base else f"in the layer {_layer_of(name)}"
        raise _unsupported(
            entry,
            f"lies {place}, and the model has nothing of that kind: left out, it might change every result. emoe reads "
            "scales, zero points and groups of weights",
        )


def _layer_of(name: str) -> str:
    """ "model.layers.0" of "model.layers.0.mlp.gate.weight"; "" of what is in none."""
    found = re.match(r"[^.\d][^.]*(?:\.[^.\d][^.]*)*\.\d+(?=\.)", name)
    return found[0] if found else ""


def zeros_said(found: Mapping[str, TensorEntry | Group], said: Declared) -> Declared:
    """`said`, and where it does not say whether integers have zero points: all have where one has."""
    if said.symmetric or not any(isinstance(each, Group) and "_zero_point" in each.parts for each in found.values()):
        return said
    return replace(said, symmetric=frozenset([False]), where=said.where or "another weight of the checkpoint")


# Which tensor has the group of each input.
_ORDERED = {**dict.fromkeys(("gptq", "gptq_v2", "gptq8", "gptq8_v2"), ".g_idx"), "int4": "_g_idx"}


def in_one_order(groups: Mapping[str, Group], weights: Mapping[str, EncodedWeight]) -> dict[str, EncodedWeight]:
    """`weights`, and where inputs of one lie in groups in an order of their own, all have such an order.

    That of one expert may happen to be ascending, and experts of a layer are encoded alike.

    Args:
        groups: of `grouped`, by name.
        weights: what `encoded` gives for them.

    Raises:
        CheckpointError: one has several groups and does not say which inputs they are of.
    """
    first = next((each for each in weights.values() if encoding(each.encoding).ordered), None)
    if first is None:
        return dict(weights)
    result = dict(weights)
    for name, each in weights.items():
        how, group = encoding(each.encoding), groups[name]
        if how.ordered or how.codes not in _ORDERED or _groups(how, each.shape) == 1:
            continue
        part = _ORDERED[how.codes]
        if part not in group.parts:
            raise group.lacks(f"the groups of its inputs, {_named(group, part)}, as {first.name} has them")
        planes = {**each.planes, "order": group.parts[part]}
        result[name] = _made(group, f"{each.encoding}-order", each.shape, planes, by_rows=True)
    return result


def _groups(how: Encoding, shape: tuple[int, ...]) -> int:
    """Of a row."""
    scales = how.plane("scales")
    assert scales is not None
    return how.shapes(*shape[-2:])["scales"][0 if scales.transposed else 1]


def is_encoded(found: Mapping[str, TensorEntry | Group]) -> bool:
    """Whether any weight of `grouped` is encoded."""
    return any(isinstance(each, Group) for each in found.values())


def encoded(group: Group, said: Declared, read: Read | None) -> EncodedWeight:
    """What the tensors of a group are.

    Args:
        group: of `grouped`.
        said: what the config says.
        read: gives a tensor's bytes; asked for shapes and orders of groups (8 bytes a dimension, 4 an input). None
            where there are headers alone: what only bytes tell is taken to be as usual.

    Raises:
        CheckpointError: a scale, or what it scales, is missing or of another shape or dtype; the config says another
            block; the format is none that emoe reads. Names file, tensor and bytes.
    """
    for end in _SMOOTHING:
        if end in group.parts:
            raise _unsupported(
                group.parts[end],
                f"multiplies what goes into {group.name} (smoothing, as AWQ has it), which emoe does not; take a "
                "checkpoint that has it folded into the layer before, or none",
            )
    cores = [end for end in group.parts if end == "" or end in _CORES]
    if not cores:
        raise group.lacks(f"the weight {group.name} that it scales")
    if len(cores) > 1:
        other = group.parts[cores[1]]
        raise group.first.error(f"lies there beside {other.name} ({other.dtype}): either would be {group.name}")
    core = cores[0]
    if core == "_blocks":
        return _two_a_byte(group, core, ("_scales",), said)
    if core == ".qweight":
        return _along_inputs(group, said, read)
    if core[1:] in _BLOCKS:
        return _of_blocks(group, core)
    entry = group.parts[core]
    if core == "_packed":
        kinds = {"int32": lambda: _packed_words(group, said, read)}
        return kinds.get(entry.dtype, lambda: _two_a_byte(group, core, ("_scale",), said))()
    if entry.dtype not in _CODES:
        scale = next(each for each in group.parts.values() if each is not entry)
        raise entry.error(f"is plain, yet {scale.name} lies beside it: one of the two is not of this checkpoint")
    scale = _scale(group, _SCALES)
    halved = entry.dtype == "F4" or entry.dtype == "uint8"
    if entry.dtype == "int8" and scale.dtype in ("float8_e8m0fnu", "uint8") and scale.shape[-1:] and entry.shape:
        halved = scale.shape[-1] * 16 == entry.shape[-1]  # DeepSeek-V4 says int8 where there are two codes in a byte
    return _two_a_byte(group, core, _SCALES, said) if halved else _a_byte_each(group, scale, said)


def _scale(group: Group, ends: Sequence[str]) -> TensorEntry:
    found = [group.parts[end] for end in ends if end in group.parts]
    if not found:
        raise group.lacks(f"a scale, {' or '.join(_named(group, end) for end in ends)}")
    if len(found) > 1:
        raise found[0].error(f"lies there beside {found[1].name}: either would scale {group.name}")
    if 0 in found[0].shape:
        raise found[0].error("is no scale: it has no element")
    return found[0]


def _named(group: Group, end: str) -> str:
    return group.name.removesuffix(".weight") + end if end[0] == "." else group.name + end


def _refuse_others(group: Group, known: Sequence[str], why: str) -> None:
    for end, each in group.parts.items():
        if end not in known:
            raise _unsupported(each, f"lies beside {group.first.name}: {why}")


def _unsupported(entry: TensorEntry, why: str) -> UnsupportedEncodingError:
    error = entry.error(why)
    return UnsupportedEncodingError(
        str(error), file=error.file, tensor=error.tensor, offset=error.offset, nbytes=error.nbytes
    )


def _scale_kind(entry: TensorEntry) -> str:
    if entry.dtype not in _SCALE_DTYPES:
        raise _unsupported(entry, f"scales a weight; emoe reads scales of {', '.join(_SCALE_DTYPES)}")
    return _SCALE_DTYPES[entry.dtype]


def _made(
    group: Group, name: str, shape: tuple[int, ...], planes: dict[str, TensorEntry], by_rows: bool = False
) -> EncodedWeight:
    """Checks that every plane has the bytes that the encoding says."""
    if min(shape, default=0) < 1:
        raise group.first.error("has no elements")
    how, nbytes = encoding(name), plane_bytes(name, shape)
    for plane, wanted in nbytes.items():
        entry = planes[plane]
        shared = plane == "order" or wanted == ITEMSIZE[how.plane(plane).dtype]  # type: ignore[union-attr]
        if entry.nbytes not in (math.prod(shape[:-2]) * wanted, wanted if shared else -1):
            raise entry.error(
                f"is the {plane} of {group.name} {list(shape)} in {name}, which take {math.prod(shape[:-2]) * wanted} "
                "bytes"
            )
    return EncodedWeight(group.name, name, shape, planes, by_rows)


def _matrices(entry: TensorEntry, more: int = 0) -> tuple[int, ...]:
    """[E] of a tensor of all experts, () of a matrix; `more` dimensions follow rows and columns."""
    if len(entry.shape) - more not in (2, 3) or 0 in entry.shape:
        raise entry.error("is neither a matrix nor one for each expert")
    return entry.shape[: len(entry.shape) - 2 - more]


def _a_byte_each(group: Group, scale: TensorEntry, said: Declared) -> EncodedWeight:
    """FP8 and INT8; blocks at the edges are cut, not stretched."""
    entry = group.parts[""]
    _confirm_width(entry, 8, said)
    _refuse_others(group, ("", *_SCALES), "emoe reads weights with a byte each that have one scale and no zero point")
    lead = _matrices(entry)
    rows, cols = entry.shape[-2:]
    grid = _grid(scale, lead)
    if grid is None:
        raise scale.error(f"does not fit {entry.name} {list(entry.shape)}: it is no scale, row or grid of scales")
    block = _block(group, scale, (rows, cols), grid, said)
    kind = "float" if entry.dtype.startswith("float") else "int"
    if said.kinds and kind not in said.kinds:
        raise entry.error(
            f"holds {entry.dtype}, but {said.where} says that numbers are {' or '.join(sorted(said.kinds))}"
        )
    codes = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}.get(entry.dtype, entry.dtype)
    size = {TENSOR: "tensor", ROW: "row"}.get(block, f"{block[0]}x{block[1]}")
    name = f"{codes}-{size}-{_scale_kind(scale)}"
    return _made(group, name, entry.shape, {"codes": entry, "scales": scale})


def _grid(scale: TensorEntry, lead: tuple[int, ...]) -> Block | None:
    """Blocks of rows and columns that the scales of one matrix are for."""
    shape = scale.shape
    if len(shape) == len(lead) + 4 and shape[-1] == shape[-3] == 1:
        shape = (*shape[:-4], shape[-4], shape[-2])  # modelopt: [rows / 128, 1, columns / 128, 1]
    if math.prod(shape) == 1:
        return 1, 1
    if shape[: len(lead)] != lead:
        return None
    shape = shape[len(lead) :]
    if len(shape) > 2 or 0 in shape:
        return None
    rows, cols = (*shape, 1, 1)[:2]
    return rows, cols


def _block(group: Group, scale: TensorEntry, shape: Block, grid: Block, said: Declared) -> Block:
    def fits(block: Block) -> bool:
        return grid == tuple(-(-size // (step or size)) for size, step in zip(shape, block, strict=True))

    fitting = sorted(block for block in said.bytes if fits(block))
    cuts = {tuple(min(step or size, size) for size, step in zip(shape, block, strict=True)) for block in fitting}
    if len(cuts) > 1:
        raise scale.error(
            f"is {list(grid)} scales for {group.name} {list(shape)}, which are {' or '.join(map(shown, fitting))}, and "
            f"{said.where} says both"
        )
    if fitting:
        return fitting[0]
    found = _blocks_of(shape, grid)
    if said.bytes:
        looks = shown(found) if found is not None else "no block"
        raise scale.error(
            f"is {list(grid)} scales for {group.name} {list(shape)}, {looks}, but {said.where} says "
            f"{' or '.join(map(shown, sorted(said.bytes)))}"
        )
    if found is None:
        raise scale.error(
            f"is {list(grid)} scales for {group.name} {list(shape)}: no block of a power of two fits for certain; a "
            "config that says weight_block_size would tell"
        )
    return found


def _blocks_of(shape: Block, grid: Block) -> Block | None:
    """The block, powers of two, that divides a matrix into such a grid: a square, or one with a side of one."""
    if grid == (1, 1):
        return TENSOR
    if grid == (shape[0], 1):
        return ROW
    sides = []
    for size, count in zip(shape, grid, strict=True):
        step = next((1 << k for k in range(size.bit_length() + 1) if -(-size // (1 << k)) == count), None)
        if step is None:
            return None
        sides.append(step)
    if 1 in grid or 1 not in sides:
        # One side for both. Where nothing else tells it, it is a square that makers take, or none: two scales of gate
        # and up, or three of query, key and value, are cut where these meet.
        step = max(side for side, count in zip(sides, grid, strict=True) if count > 1)
        if 1 in grid and step > _LARGEST_SQUARE:
            return None
        if any(-(-size // step) != count for size, count in zip(shape, grid, strict=True)):
            return None
        sides = [step, step]
    return sides[0], sides[1]


def _two_a_byte(group: Group, core: str, ends: Sequence[str], said: Declared) -> EncodedWeight:
    """MXFP4 and NVFP4, whoever packed them: the low four bits are the first of two columns."""
    entry, scale = group.parts[core], _scale(group, ends)
    _confirm_width(entry, 4, said)
    if core == "_blocks":
        lead = _matrices(entry, more=1)
        cols = entry.shape[-2] * entry.shape[-1] * 2
        rows = entry.shape[-3]
    else:
        lead = _matrices(entry)
        rows, cols = entry.shape[-2], entry.shape[-1] * (1 if entry.dtype == "F4" else 2)
    shape = (*lead, rows, cols)
    planes = {"codes": entry, "scales": scale}
    if scale.dtype == "float8_e4m3fn":
        factor, name = ("_scale_2", "nvfp4") if core == "" else ("_global_scale", "nvfp4_divided")
        if factor not in group.parts:
            raise group.lacks(f"the scale of the tensor, {_named(group, factor)}")
        planes["factor"] = group.parts[factor]
        if planes["factor"].dtype != "float32":
            raise planes["factor"].error(f"is the scale of {group.name}; emoe reads float32")
    elif scale.dtype in ("float8_e8m0fnu", "uint8"):
        factor, name = "", "mxfp4"
    else:
        raise _unsupported(
            entry,
            f"has scales {scale.name} of {scale.dtype}; two codes in a byte are NVFP4 with float8_e4m3fn, or MXFP4 "
            "with a byte of exponent",
        )
    _refuse_others(group, (core, *ends, factor, "_shape"), f"{name} has nothing of that kind")
    wanted = encoding(name).plane("scales").block[1]  # type: ignore[union-attr]
    scales = (*lead, rows, -(-cols // wanted))
    if scale.shape != scales or cols % wanted:
        raise scale.error(f"is the scales of {entry.name}, {list(shape)} in {name}, which are {list(scales)}")
    _confirm_group(group, scale, name, wanted, cols, said)
    return _made(group, name, shape, planes, by_rows=True)


def _confirm_width(entry: TensorEntry, bits: int, said: Declared) -> None:
    if said.widths and bits not in said.widths:
        raise _unsupported(entry, f"would be {bits} bits a weight, but {said.where} says {sorted(said.widths)}")


def _confirm_group(group: Group, scale: TensorEntry, name: str, found: int, cols: int, said: Declared) -> None:
    longer = found == 0 and any(size >= cols for size in said.bits)  # a group that the row's end cuts off
    if said.bits and found not in said.bits and not longer:
        raise scale.error(
            f"gives {group.name} in {name} groups of {found or 'a whole row'}, but {said.where} says "
            f"{' or '.join(str(each or 'a whole row') for each in sorted(said.bits))}"
        )


def _group_size(scale: TensorEntry, cols: int, groups: int, said: Declared, *, cut: bool) -> int:
    """Columns that share a scale; 0: all of a row. `cut`: the last group may be smaller."""
    if groups == 1:
        return cols if cols in said.bits else 0
    sizes = [size for size in sorted(said.bits - {0}) if -(-cols // size) == groups and (cut or cols % size == 0)]
    if not sizes:
        powers = [1 << k for k in range(cols.bit_length()) if cut and -(-cols // (1 << k)) == groups]
        sizes = [*powers, *([cols // groups] if groups and cols % groups == 0 and cols // groups not in powers else [])]
    if len(sizes) != 1:
        fit = f"groups of {' or '.join(map(str, sizes))}, and no config says which" if sizes else "no size of groups"
        raise scale.error(f"is {groups} scales for {cols} columns, which are {fit}")
    return sizes[0]


def _packed_words(group: Group, said: Declared, read: Read | None) -> EncodedWeight:
    """compressed-tensors: codes of four or eight bits in an int32, along the inputs."""
    entry, scale = group.parts["_packed"], _scale(group, ("_scale",))
    _refuse_others(
        group, ("_packed", "_scale", "_shape", "_zero_point", "_g_idx"), "pack-quantized has nothing of that kind"
    )
    lead = _matrices(entry)
    bits = 8 if said.widths == {8} else 4
    rows, cols = entry.shape[-2], 32 // bits * entry.shape[-1]
    if "_shape" in group.parts and read is not None:
        rows, cols = _written_shape(group.parts["_shape"], read)
        widths = [each for each in (bits, 12 - bits) if -(-cols * each // 32) == entry.shape[-1]]
        if not widths or rows != entry.shape[-2]:
            found = 32 * entry.shape[-1] / max(1, cols)
            raise _unsupported(
                entry, f"holds {found:g} bits for each of the {rows} x {cols} that {group.parts['_shape'].name} says; "
                "emoe reads 4 and 8"
            )  # fmt: skip
        bits = widths[0]
    _confirm_width(entry, bits, said)
    if bits == 8:
        return _bytes_in_words(group, (*lead, rows, cols), said, read)
    if scale.shape[:-1] != (*lead, rows):
        raise scale.error(f"is the scales of {entry.name}, whose rows are {[*lead, rows]}")
    size = _group_size(scale, cols, scale.shape[-1], said, cut=True)
    _confirm_group(group, scale, "int4", size, cols, said)
    kind = _scale_kind(scale)
    planes = {"codes": entry, "scales": scale}
    if said.symmetric == {False} and "_zero_point" not in group.parts:
        raise group.lacks(f"its zero point, {_named(group, '_zero_point')}, which {said.where} speaks of")
    if said.symmetric == {True} and "_zero_point" in group.parts:
        raise group.parts["_zero_point"].error(f"is a zero point, but {said.where} says that there are none")
    if "_zero_point" in group.parts:
        planes["zeros"] = group.parts["_zero_point"]
        if planes["zeros"].dtype != "int32":
            raise _unsupported(planes["zeros"], "is a zero point; emoe reads those that are packed into int32")
    name = f"int4-{size or 'row'}-{kind}{'-zeros' if 'zeros' in planes else ''}"
    if order := _actorder(group, scale, size, cols, said, read):
        planes["order"] = order
        name = f"{name}-order"
    return _made(group, name, (*lead, rows, cols), planes, by_rows=True)


def _bytes_in_words(group: Group, shape: tuple[int, ...], said: Declared, read: Read | None) -> EncodedWeight:
    """compressed-tensors: four codes in an int32 are bytes in their order, each 128 more than its number."""
    entry, scale, cols = group.parts["_packed"], _scale(group, ("_scale",)), shape[-1]
    if "_zero_point" in group.parts or said.symmetric == {False}:
        raise _unsupported(entry, "has 8 bits a weight and zero points; emoe reads 8 bits that have none")
    if cols % 4:
        raise _unsupported(entry, f"has rows of {cols} weights of 8 bits, which fill no whole number of int32")
    if scale.shape[:-1] != shape[:-1]:
        raise scale.error(f"is the scales of {entry.name}, whose rows are {list(shape[:-1])}")
    said = _in_groups_of_bytes(said)
    size = _group_size(scale, cols, scale.shape[-1], said, cut=True)
    _confirm_group(group, scale, "8 bits", size, cols, said)
    if order := _actorder(group, scale, size, cols, said, read):
        raise _unsupported(
            order, "puts inputs of 8 bits into groups in an order of its own (act order); emoe reads that of 4 bits"
        )
    name = f"uint8b128-{f'1x{size}' if size else 'row'}-{_scale_kind(scale)}"
    codes = replace(entry, dtype="uint8", shape=shape)
    return _made(group, name, shape, {"codes": codes, "scales": scale}, by_rows=True)


def _actorder(
    group: Group, scale: TensorEntry, size: int, cols: int, said: Declared, read: Read | None
) -> TensorEntry | None:
    """The groups of inputs in compressed-tensors where they are in an order of their own."""
    order = group.parts.get("_g_idx")
    if said.ordered == {True} and scale.shape[-1] > 1 and order is None:
        raise group.lacks(f"the groups of its inputs, {_named(group, '_g_idx')}, which {said.where} speaks of")
    return order if order is not None and _is_ordered(order, _ACTORDER, scale, size, cols, said, read) else None


def _in_groups_of_bytes(said: Declared) -> Declared:
    """`said`, with the groups of weights of eight bits in the place of those of four."""
    return replace(said, bits=frozenset(block[1] for block in said.bytes if block[0] == 1))


def _written_shape(entry: TensorEntry, read: Read) -> Block:
    if entry.dtype not in ("int64", "int32") or math.prod(entry.shape) != 2:
        raise entry.error("is not the two numbers of a shape")
    rows, cols = np.frombuffer(read(entry), dtype=entry.dtype).tolist()
    if not (0 < rows < 1 << 40 and 0 < cols < 1 << 40):
        raise entry.error(f"says the shape {[rows, cols]}")
    return rows, cols


def _require_in_order(entry: TensorEntry, cols: int, size: int, read: Read | None) -> None:
    """Where columns of a group lie anywhere, a kernel would have to gather them."""
    _require_groups(entry, cols, 1)
    if read is not None and not np.array_equal(
        np.frombuffer(read(entry), np.int32), np.arange(cols, dtype=np.int32) // (size or cols)
    ):
        raise _unsupported(
            entry,
            "puts columns into groups in an order of its own (act order), which AWQ does not have; here groups "
            f"of {size or cols} columns are neighbours",
        )


def _require_groups(entry: TensorEntry, cols: int, matrices: int) -> None:
    if entry.dtype != "int32" or math.prod(entry.shape) not in (cols, matrices * cols):
        raise entry.error(f"is not the group of each of {cols} columns")


@dataclass(frozen=True)
class _Order:
    """How a quantizer speaks of act order.

    Attributes:
        denied: what its config says where there is none.
        unwritten: the group of every input where the tensor was made and never written; None: it always is.
    """

    denied: str
    unwritten: int | None


_DESC_ACT, _ACTORDER = _Order("desc_act=False", None), _Order("actorder is none or static", -1)


def _is_ordered(
    entry: TensorEntry, order: _Order, scale: TensorEntry, size: int, cols: int, said: Declared, read: Read | None
) -> bool:
    """Whether inputs lie in groups in another order than theirs; else groups are of neighbours.

    Args:
        entry: the group of each input.
        scale: has a scale for each group, in rows of an input with `_DESC_ACT`, of an output with `_ACTORDER`.
        size: inputs of a group, 0 where all are in one.
    """
    groups = scale.shape[-2 if order is _DESC_ACT else -1]
    _require_groups(entry, cols, math.prod(scale.shape[:-2]))
    if read is None:
        return groups > 1 and True in said.ordered
    found = np.frombuffer(read(entry), np.int32).reshape(-1, cols)
    neighbours = np.arange(cols, dtype=np.int32) // (size or cols)
    if (found == neighbours).all() or (order.unwritten is not None and (found == order.unwritten).all()):
        return False
    strays = found[(found < 0) | (found >= groups)]
    if strays.size:
        raise entry.error(f"puts an input into group {strays[0]}; there are {groups}, as {scale.name} has them")
    if not (np.sort(found) == neighbours).all():
        raise entry.error(f"does not put {size or cols} inputs into each of the {groups} groups that {scale.name} has")
    if said.ordered == {False}:
        raise _unsupported(
            entry,
            f"puts inputs into groups in an order of its own (act order), but {said.where} says {order.denied}",
        )
    return True


def _along_inputs(group: Group, said: Declared, read: Read | None) -> EncodedWeight:
    """AWQ packs eight outputs into an int32, GPTQ eight inputs, or four of 8 bits; both keep a row for each input."""
    known = (".qweight", ".scales", ".qzeros", ".g_idx")
    _refuse_others(group, known, "AWQ and GPTQ have nothing of that kind")
    entry, scale = group.parts[".qweight"], _scale(group, (".scales",))
    if ".qzeros" not in group.parts:
        raise group.lacks(f"its zeros, {_named(group, '.qzeros')}")
    zeros = group.parts[".qzeros"]
    if zeros.dtype != "int32":
        raise _unsupported(zeros, "is zeros; emoe reads those that are packed into int32")
    lead = _matrices(entry)
    if scale.shape[:-2] != lead or len(scale.shape) != len(entry.shape):
        raise scale.error(f"does not fit {entry.name} {list(entry.shape)}")
    groups, rows = scale.shape[-2:]
    bits = 8 if entry.shape[-1] == rows and 4 * zeros.shape[-1] == rows else 4
    _confirm_width(entry, bits, said)
    each = 32 // bits
    if bits == 8:
        said = _in_groups_of_bytes(said)
    if entry.shape[-1] == rows:
        cols = each * entry.shape[-2]
    elif 8 * entry.shape[-1] == rows:
        cols = entry.shape[-2]
    else:
        raise entry.error(f"does not fit {scale.name} {list(scale.shape)}, with 4 bits a weight by AWQ or by GPTQ")
    if zeros.shape != (*lead, groups, rows // each) or rows % each:
        raise zeros.error(
            f"is not {[*lead, groups, rows / each]}, {bits} bits for each of {scale.name} {list(scale.shape)}"
        )
    size = _group_size(scale, cols, groups, said, cut=False)
    _confirm_group(group, scale, "AWQ or GPTQ", size, cols, said)
    name = "awq" if entry.shape[-1] != rows else _zeros_of_gptq(zeros, bits, said, read)
    order = group.parts.get(".g_idx")
    if True in said.ordered and groups > 1 and order is None:
        raise group.lacks(f"the groups of its inputs, {_named(group, '.g_idx')}, which {said.where} speaks of")
    planes = {"codes": entry, "scales": scale, "zeros": zeros}
    name = f"{name}-{size or 'row'}-{_scale_kind(scale)}"
    if order is not None and name.startswith("awq"):
        _require_in_order(order, cols, size, read)
    elif order is not None and _is_ordered(order, _DESC_ACT, scale, size, cols, said, read):
        planes["order"] = order
        name = f"{name}-order"
    return _made(group, name, (*lead, rows, cols), planes, by_rows=True)


def _zeros_of_gptq(zeros: TensorEntry, bits: int, said: Declared, read: Read | None) -> str:
    named = "gptq" if bits == 4 else "gptq8"
    if said.zeros:
        return said.zeros.replace("gptq", named)
    # Symmetric: all zeros are half of what codes go to.
    stored = {0x77: named, 0x88: f"{named}_v2"} if bits == 4 else {0x7F: named, 0x80: f"{named}_v2"}
    found = set(read(zeros)) if read is not None else set(list(stored)[:1])
    for byte, name in stored.items():
        if found == {byte}:
            return name
    raise zeros.error(
        "is zeros of GPTQ, and no config says whether they are stored less one (checkpoint_format gptq) or as they are "
        "(gptq_v2)"
    )


def _of_blocks(group: Group, core: str) -> EncodedWeight:
    entry, name = group.parts[core], core[1:]
    _refuse_others(group, (core,), f"{name} holds its own scales")
    lead = _matrices(entry)
    blocks = encoding(name).planes[0]
    rows, nbytes = entry.shape[-2:]
    if nbytes % blocks.count:
        raise entry.error(f"has rows of {nbytes} bytes, which are no whole number of blocks of {blocks.count}")
    return _made(group, name, (*lead, rows, nbytes // blocks.count * blocks.block[1]), {"blocks": entry}, by_rows=True)
