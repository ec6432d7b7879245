"""Tensors outside experts of a checkpoint with encoded weights: read and decoded one by one, when Transformers asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from emoe.errors import ReadError
from emoe.model.decode import decoded
from emoe.model.encoding import Encoding, Plane, encoding
from emoe.store.companions import EncodedWeight
from emoe.store.headers import TensorEntry
from emoe.store.opened import OpenFile, read_error

# Numbers that are decoded at once, into float32 and on to the dtype that is wanted.
_AT_ONCE = 1 << 18


class Unread:
    """Stands in a state dict for a tensor that lies in a file; indexing it as Transformers does reads it.

    Attributes:
        dtype: what its numbers become; None leaves plain ones as they are and makes encoded ones float32.

    Args:
        source: what lies there.
        files: open ones, by path.
    """

    def __init__(self, source: TensorEntry | EncodedWeight, files: Mapping[str, OpenFile]) -> None:
        self._source, self._files = source, files
        self.dtype: torch.dtype | None = None

    @property
    def is_float(self) -> bool:
        """Whether it is one of floating-point numbers once it is read."""
        return isinstance(self._source, EncodedWeight) or self._source.is_float

    def __getitem__(self, _: Any) -> torch.Tensor:
        """The whole tensor, whatever the index.

        Raises:
            ReadError: its bytes cannot be read, or have changed; names file, tensor and bytes.
        """
        if isinstance(self._source, EncodedWeight):
            return self._decoded(self._source)
        entry = self._source
        values = self._read(entry, getattr(torch, entry.dtype), 0, entry.nbytes).view(entry.shape)
        return values if self.dtype is None else values.to(self.dtype)

    def _decoded(self, weight: EncodedWeight) -> torch.Tensor:
        how = encoding(weight.encoding)
        out = torch.empty(weight.shape, dtype=self.dtype or torch.float32)
        rows, cols = weight.shape[-2:]
        shapes = how.shapes(rows, cols)
        for number, matrix in enumerate(out.view(-1, rows, cols)):
            planes = {}
            for plane in how.planes:
                entry = weight.planes[plane.name]
                start, nbytes = weight.place(plane.name, number)
                dtype = getattr(torch, plane.dtype)
                planes[plane.name] = self._read(entry, dtype, start - entry.offset, nbytes).view(shapes[plane.name])
            step = _step(how, rows, cols)
            for row in range(0, rows, step):
                count = min(step, rows - row)
                part = {plane.name: _rows(plane, planes[plane.name], row, count) for plane in how.planes}
                matrix[row : row + count] = decoded(how, count, cols, part)
        return out

    def _read(self, entry: TensorEntry, dtype: torch.dtype, start: int, nbytes: int) -> torch.Tensor:
        raw = torch.empty(nbytes, dtype=torch.uint8)
        read_into(self._files[entry.file], entry, raw.numpy().data, start)
        return raw.view(dtype)


def _step(how: Encoding, rows: int, cols: int) -> int:
    """Rows that are decoded at once: a whole number of blocks of every plane."""
    high = math.lcm(*(plane.block[0] or 1 for plane in how.planes))
    return min(rows, max(1, _AT_ONCE // (cols * high)) * high)


def _rows(plane: Plane, array: torch.Tensor, row: int, count: int) -> torch.Tensor:
    """The part of a plane that is for rows `row` to `row + count`, which start with a block."""
    high = plane.block[0]
    if not high:
        return array
    first, last = row // high, -(-(row + count) // high)
    return array[:, first * plane.count : last * plane.count] if plane.transposed else array[first:last]


def read_bytes(file: OpenFile, entry: TensorEntry) -> bytes:
    """All of a tensor. Raises as `Unread`."""
    data = bytearray(entry.nbytes)
    read_into(file, entry, memoryview(data), 0)
    return bytes(data)


def read_from_path(entry: TensorEntry) -> bytes:
    """As `read_bytes`, of a file that is not open."""
    file = OpenFile(entry.file)
    try:
        return read_bytes(file, entry)
    finally:
        file.close()


def read_into(file: OpenFile, entry: TensorEntry, into: memoryview, start: int) -> None:
    """Bytes of a tensor from `start` on. Raises as `Unread`."""

    def error(why: str) -> ReadError:
        return read_error(entry.file, entry.name, entry.offset + start, len(into), why)

    try:
        done = file.read(into, entry.offset + start)
        change = file.change()
    except OSError as failure:
        raise error(failure.strerror or str(failure)) from failure
    if change:
        raise error(f"the file {change}")
    if done < len(into):
        raise error(f"the file ends after {done} of them")
