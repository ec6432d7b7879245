"""How numbers lie as bytes: every encoding once, by name. csrc/core/encoding.hpp is the same table for the native side.

An encoding cuts a matrix [rows, cols] into blocks and stores each block in planes, such as codes and scales.
A plain dtype has blocks of one element and one plane. Whoever needs bytes asks here; nobody multiplies by an item size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emoe.errors import UnsupportedModelError


@dataclass(frozen=True)
class Encoding:
    """One row of the table.

    Attributes:
        name: torch's name for a plain dtype, else the format's.
        block: rows and columns of a block.
        planes: name of each plane and the bytes that a block takes of it.
    """

    name: str
    block: tuple[int, int]
    planes: tuple[tuple[str, int], ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all planes."""
        return sum(nbytes for _, nbytes in self.planes)

    @property
    def plain(self) -> bool:
        """Whether every element is a number of its own, as in a torch tensor."""
        return self.block == (1, 1) and len(self.planes) == 1

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of an array; its last axis are the columns, those before it together the rows.

        Raises:
            UnsupportedModelError: rows or columns are no multiple of the block's.
        """
        cols = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        high, wide = self.block
        if rows % high or cols % wide:
            raise UnsupportedModelError(
                f"{list(shape)} cannot be {self.name}: its blocks have {high} rows and {wide} columns"
            )
        return rows // high * (cols // wide) * self.block_bytes


def _plain(name: str, nbytes: int) -> Encoding:
    return Encoding(name, (1, 1), (("values", nbytes),))


# The kernels compute with the first three; the others are what files hold besides.
ENCODINGS = {
    each.name: each
    for each in (
        _plain("float32", 4),
        _plain("float16", 2),
        _plain("bfloat16", 2),
        _plain("float64", 8),
        _plain("float8_e4m3fn", 1),
        _plain("float8_e5m2", 1),
        _plain("int64", 8),
        _plain("int32", 4),
        _plain("int16", 2),
        _plain("int8", 1),
        _plain("uint64", 8),
        _plain("uint32", 4),
        _plain("uint16", 2),
        _plain("uint8", 1),
        _plain("bool", 1),
    )
}
COMPUTED = ("float32", "float16", "bfloat16")


def encoding(name: str) -> Encoding:
    """The encoding of that name.

    Raises:
        UnsupportedModelError: there is none; names the choices.
    """
    try:
        return ENCODINGS[name]
    except KeyError:
        raise UnsupportedModelError(f"encoding {name!r} is not one of: {', '.join(ENCODINGS)}") from None
