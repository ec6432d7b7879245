"""How numbers lie as bytes: every encoding once, by name. csrc/core/encoding.hpp has the same codes for the kernels.

A matrix [rows, cols], outputs by inputs, is stored in planes: arrays beside one another, such as codes and scales. A
plain dtype has one plane with an element for each number. Whoever needs bytes asks here; nobody multiplies by an item
size. How codes become numbers is in decode.py; what files call the planes, in store/companions.py and store/gguf.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from emoe.errors import UnsupportedModelError

# Bytes of an element, by torch's name of the dtype.
ITEMSIZE = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
# The kernels compute with these plain dtypes, and the transfer converts between them.
COMPUTED = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Plane:
    """One array of an encoding.

    Attributes:
        name: "values", "blocks", "codes", "scales", "zeros", "factor" or "order" (the group of each input).
        dtype: of its elements.
        block: rows and columns of the matrix that share `count` elements; 0 stands for all there are.
        count: elements of a block.
        transposed: the array has a row for each (block of) input, not output.
        cut: the last block of a row or column may be cut off by the matrix's edge.
    """

    name: str
    dtype: str
    block: tuple[int, int] = (1, 1)
    count: int = 1
    transposed: bool = False
    cut: bool = False

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Of the array for a matrix [rows, cols]."""
        high, wide = self.block[0] or rows, self.block[1] or cols
        down, across = -(-rows // high), -(-cols // wide)
        return (across, down * self.count) if self.transposed else (down, across * self.count)

    def holds(self, rows: int, cols: int) -> bool:
        """Whether a matrix [rows, cols] is a whole number of blocks, or may be cut."""
        high, wide = self.block
        return self.cut or not ((high and rows % high) or (wide and cols % wide))


@dataclass(frozen=True)
class Encoding:
    """One row of the table.

    Attributes:
        name: torch's name for a plain dtype, else what `encoding` takes.
        codes: how a code becomes a number, a word that the native side knows (`encoding.hpp`).
        planes: in the order in which they lie in a slot.
        scale: what the scales are: "float32", "bfloat16", "float16", "e8m0" (a power of two, 2^(byte - 127)) or "e4m3";
            "" where codes hold their own or there are none.
    """

    name: str
    codes: str
    planes: tuple[Plane, ...]
    scale: str = ""

    @property
    def ordered(self) -> bool:
        """Whether inputs lie in groups in an order of their own."""
        return self.plane("order") is not None

    @property
    def not_native(self) -> str:
        """Why the native kernels do not compute on it, "" where they do."""
        if self.ordered:
            return "inputs lie in groups in an order of their own (act order)"
        return "8 bits in words that have a row for each four inputs" if self.codes.startswith("gptq8") else ""

    @property
    def plain(self) -> bool:
        """Whether every element is a number of its own, as in a torch tensor."""
        return self.planes[0].name == "values"

    def plane(self, name: str) -> Plane | None:
        """The plane of that name, None where there is none."""
        return next((plane for plane in self.planes if plane.name == name), None)

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, int]]:
        """Of the array of each plane.

        Raises:
            UnsupportedModelError: the matrix is no whole number of blocks.
        """
        for plane in self.planes:
            if not plane.holds(rows, cols):
                high, wide = plane.block
                raise UnsupportedModelError(
                    f"[{rows}, {cols}] cannot be {self.name}: its blocks have {high or 'all'} rows and "
                    f"{wide or 'all'} columns"
                )
        return {plane.name: plane.shape(rows, cols) for plane in self.planes}

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of an array, all planes; its last axis are the columns, those before it together the rows.

        Raises:
            UnsupportedModelError: it is no whole number of blocks.
        """
        cols = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        shapes = self.shapes(rows, cols)
        return sum(math.prod(shapes[plane.name]) * ITEMSIZE[plane.dtype] for plane in self.planes)


def _blocks(name: str, values: int, nbytes: int) -> Encoding:
    """A format of GGUF: so many numbers of a row in so many bytes, scales among them."""
    return Encoding(name, name, (Plane("blocks", "uint8", (1, values), nbytes),))


def _nibbles(scales: Plane, *more: Plane) -> tuple[Plane, ...]:
    """Two codes a byte, the low four bits first."""
    return (Plane("codes", "uint8", (1, 2)), scales, *more)


# Encodings without a parameter, plain ones first and among them those of COMPUTED.
ENCODINGS = {
    each.name: each
    for each in (
        *(Encoding(name, name, (Plane("values", name),)) for name in ITEMSIZE),
        _blocks("q8_0", 32, 34),
        _blocks("q4_0", 32, 18),
        _blocks("q4_1", 32, 20),
        _blocks("q5_0", 32, 22),
        _blocks("q5_1", 32, 24),
        _blocks("q2_k", 256, 84),
        _blocks("q3_k", 256, 110),
        _blocks("q4_k", 256, 144),
        _blocks("q5_k", 256, 176),
        _blocks("q6_k", 256, 210),
        _blocks("iq1_s", 256, 50),
        _blocks("iq1_m", 256, 56),
        _blocks("iq2_xxs", 256, 66),
        _blocks("iq2_xs", 256, 74),
        _blocks("iq2_s", 256, 82),
        _blocks("iq3_xxs", 256, 98),
        _blocks("iq3_s", 256, 110),
        _blocks("iq4_nl", 32, 18),
        _blocks("iq4_xs", 256, 136),
        _blocks("gguf_mxfp4", 32, 17),
        Encoding("mxfp4", "e2m1", _nibbles(Plane("scales", "uint8", (1, 32))), "e8m0"),
        # The factor of a tensor multiplies (modelopt) or divides (compressed-tensors).
        *(
            Encoding(
                name, codes,
                _nibbles(Plane("scales", "float8_e4m3fn", (1, 16)), Plane("factor", "float32", (0, 0))), "e4m3",
            )
            for name, codes in (("nvfp4", "e2m1"), ("nvfp4_divided", "e2m1_divided"))
        ),
    )
}  # fmt: skip

_SCALE_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "e8m0": "uint8"}
_SCALE = "|".join(_SCALE_DTYPES)
_BYTES = re.compile(rf"(e4m3|e5m2|int8|uint8b128)-(row|tensor|[1-9]\d{{0,5}}x[1-9]\d{{0,5}})-({_SCALE})")
_WORDS = re.compile(rf"(int4|awq|gptq8?|gptq8?_v2)-(row|[1-9]\d{{0,5}})-({_SCALE})(-zeros)?(-order)?")
_BYTE_DTYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "int8": "int8", "uint8b128": "uint8"}


@functools.cache
def encoding(name: str) -> Encoding:
    """The encoding of that name: one of `ENCODINGS`, or one with parameters.

    A byte each, times a scale: "e4m3-128x128-float32", "e4m3-row-bfloat16", "int8-tensor-float32", "e4m3-1x32-e8m0";
    "uint8b128-1x128-bfloat16" (less 128).
    Four bits each, in groups along the inputs: "int4-32-bfloat16", "int4-32-float16-zeros" (compressed-tensors),
    "awq-128-float16", "gptq-128-float16" (zeros stored less one), "gptq_v2-128-float16"; "gptq-128-float16-order",
    "int4-128-bfloat16-zeros-order" (a group of each input, as act order makes them). "gptq8-128-float16" and
    "gptq8_v2-128-float16" have eight bits each.

    Raises:
        UnsupportedModelError: there is none; names the choices.
    """
    if name in ENCODINGS:
        return ENCODINGS[name]
    if found := _BYTES.fullmatch(name):
        codes, block, scale = found.groups()
        sizes = {"row": (1, 0), "tensor": (0, 0)}.get(block) or tuple(map(int, block.split("x")))
        scales = Plane("scales", _SCALE_DTYPES[scale], (sizes[0], sizes[1]), cut=True)
        return Encoding(name, codes, (Plane("codes", _BYTE_DTYPES[codes]), scales), scale)
    if found := _WORDS.fullmatch(name):
        codes, group, scale, zeros, order = found.groups()
        ordered = codes != "awq" and group != "row"  # one group has no order
        if (not zeros or codes == "int4") and (not order or ordered):
            return _of_words(name, codes, 0 if group == "row" else int(group), scale, bool(zeros), bool(order))
    raise UnsupportedModelError(
        f"encoding {name!r} is not one of: {', '.join(ENCODINGS)}, nor like e4m3-128x128-float32, int8-row-bfloat16, "
        "int4-32-bfloat16, awq-128-float16, gptq-128-float16"
    )


def _of_words(name: str, codes: str, group: int, scale: str, zeros: bool, order: bool) -> Encoding:
    """Codes in an int32, along the inputs (int4, gptq) or outputs (awq); zeros are packed along the outputs."""
    along, each = codes != "int4", codes_a_word(codes)
    planes = [
        Plane("codes", "int32", (each, 1) if codes == "awq" else (1, each), transposed=along, cut=codes == "int4"),
        Plane("scales", _SCALE_DTYPES[scale], (1, group), transposed=along, cut=codes == "int4"),
    ]
    if along or zeros:
        planes.append(Plane("zeros", "int32", (each, group), transposed=along, cut=codes == "int4"))
    if order:
        planes.append(Plane("order", "int32", (0, 1)))
    return Encoding(name, codes, tuple(planes), scale)


def codes_a_word(codes: str) -> int:
    """Of an int32."""
    return 4 if codes.startswith("gptq8") else 8


@dataclass(frozen=True)
class EncodedMatrix:
    """A weight matrix of an expert as it lies in a slot, and which rows of a parameter it makes.

    Attributes:
        encoding: by name.
        rows, cols: outputs and inputs.
        planes: the stored array (`ExpertForm.stored`) of each plane.
        param: the parameter that it is part of.
        start, step: its row k is row `start + k * step` of the parameter, its column where that is `transposed`.
        transposed: the parameter is [inputs, outputs].
        first, every, count: where only some of the rows are meant: `count` of them, `first`, `first + every`, ...; a
            count of 0 is all rows.
    """

    encoding: str
    rows: int
    cols: int
    planes: Mapping[str, str] = field(hash=False)
    param: str
    start: int = 0
    step: int = 1
    transposed: bool = False
    first: int = 0
    every: int = 1
    count: int = 0

    @property
    def taken(self) -> range:
        """The rows that are meant."""
        return range(self.first, self.first + (self.count or self.rows) * self.every, self.every)
