"""An encoded matrix in memory, outside experts: its planes in one buffer, byte for byte as they lie in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from emoe.model.decode import decode_into, decoded
from emoe.model.encoding import Encoding
from emoe.model.spec import ParamSpec, slot_offsets


class Held:
    """One matrix [rows, cols].

    Args:
        how: its encoding.
        rows, cols: outputs and inputs.

    Attributes:
        buffer: uint8, every plane at a multiple of 64 bytes; its maker fills it, and nobody writes to it again.
        offsets: byte at which each plane starts.
        prepared: what the kernels keep of it, made at the first use.

    Raises:
        UnsupportedModelError: the matrix is no whole number of blocks.
    """

    def __init__(self, how: Encoding, rows: int, cols: int) -> None:
        self.how, self.rows, self.cols = how, rows, cols
        self._arrays = {each.name: each for each in _arrays(how, rows, cols)}
        self.offsets, size = slot_offsets(self._arrays.values())
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.prepared: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.buffer.numel()

    def raw(self, plane: str) -> torch.Tensor:
        """Bytes of a plane, a view."""
        return self.buffer[self.offsets[plane] :][: self._arrays[plane].nbytes]

    def plane(self, plane: str) -> torch.Tensor:
        """The array of a plane, a view."""
        array = self._arrays[plane]
        return self.raw(plane).view(getattr(torch, array.dtype)).view(array.shape)

    def native(self) -> dict[str, Any]:
        """The arguments of `_C.Weights`; planes are where `buffer` starts and `offsets` say."""
        return native_arguments(self.how, self.rows, self.cols, self.offsets)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, cols] of what it stands for, decoded a few rows at a time."""
        out = torch.empty((self.rows, self.cols), dtype=dtype, device="cpu")
        decode_into(self.how, {plane.name: self.plane(plane.name) for plane in self.how.planes}, out)
        return out

    def some_rows(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[len(index), cols] of the rows that it names, in their order; only where `apart(how)`."""
        if not len(index):
            return torch.empty((0, self.cols), dtype=dtype)
        planes = {
            plane.name: self.plane(plane.name)[index] if plane.block[0] else self.plane(plane.name)
            for plane in self.how.planes
        }
        return decoded(self.how, len(index), self.cols, planes).to(dtype)

    def same(self, other: Held) -> bool:
        """Whether it is the same, bit for bit."""
        return (self.how, self.rows, self.cols) == (other.how, other.rows, other.cols) and all(
            torch.equal(self.raw(plane.name), other.raw(plane.name)) for plane in self.how.planes
        )


def nbytes(how: Encoding, rows: int, cols: int) -> int:
    """What a matrix takes in memory."""
    return slot_offsets(_arrays(how, rows, cols))[1]


def _arrays(how: Encoding, rows: int, cols: int) -> list[ParamSpec]:
    shapes = how.shapes(rows, cols)
    return [ParamSpec(plane.name, shapes[plane.name], plane.dtype) for plane in how.planes]


def apart(how: Encoding) -> bool:
    """Whether each row is decoded by itself: none shares a block with its neighbours."""
    return all(plane.block[0] in (0, 1) and not plane.transposed for plane in how.planes)


def native_arguments(how: Encoding, rows: int, cols: int, offsets: Mapping[str, int]) -> dict[str, Any]:
    """The arguments of `_C.Weights` of a matrix whose planes are at these bytes."""
    scales = how.plane("scales")
    return {
        "codes": how.codes,
        "rows": rows,
        "depth": cols,
        "first": 0,
        "step": 1,
        "count": rows,
        "planes": dict(offsets),
        "scale": how.scale,
        "scale_block": (0, 0) if scales is None else scales.block,
    }
