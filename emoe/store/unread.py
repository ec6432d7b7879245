"""Tensors outside experts of a checkpoint with encoded weights: read and decoded one by one, when Transformers asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from emoe.errors import ReadError
from emoe.model.decode import decode_into
from emoe.model.encoding import COMPUTED, encoding
from emoe.model.held import Held
from emoe.store.companions import EncodedWeight
from emoe.store.headers import TensorEntry
from emoe.store.opened import OpenFile, read_error


class Unread:
    """Stands in a state dict for a tensor that lies in a file; indexing it as Transformers does reads it.

    Attributes:
        dtype: what its numbers become; None leaves plain ones as they are and makes encoded ones float32.
        keep: gives the tensor for a matrix that stays encoded, with `dtype`; None decodes it.

    Args:
        source: what lies there.
        files: open ones, by path.
    """

    def __init__(self, source: TensorEntry | EncodedWeight, files: Mapping[str, OpenFile]) -> None:
        self._source, self._files = source, files
        self.dtype: torch.dtype | None = None
        self.keep: Callable[[Held, torch.dtype], torch.Tensor] | None = None

    @property
    def name(self) -> str:
        """Of the tensor, the first where there are several."""
        return self._source.name

    @property
    def is_float(self) -> bool:
        """Whether it is one of floating-point numbers once it is read."""
        return isinstance(self._source, EncodedWeight) or self._source.is_float

    @property
    def encoding(self) -> str:
        """Of the one matrix that it is, plain or not; "" where it is none that could be kept."""
        weight = self._matrix()
        return "" if weight is None else weight.encoding

    def _matrix(self) -> EncodedWeight | None:
        source = self._source
        if len(source.shape) != 2 or not (isinstance(source, EncodedWeight) or source.dtype in COMPUTED):
            return None
        if isinstance(source, EncodedWeight):
            return source
        return EncodedWeight(source.name, source.dtype, source.shape, {"values": source})

    def hold(self) -> Held:
        """That matrix as it lies in its file. Raises ReadError."""
        weight = self._matrix()
        if weight is None:
            raise TypeError("it is no matrix that could be kept")
        held = Held(encoding(weight.encoding), *weight.shape)
        for plane, entry in weight.planes.items():
            start, _ = weight.place(plane, 0)
            read_into(self._files[entry.file], entry, held.raw(plane).numpy().data, start - entry.offset)
        return held

    def __getitem__(self, _: Any) -> torch.Tensor:
        """The whole tensor, whatever the index.

        Raises:
            ReadError: its bytes cannot be read, or have changed; names file, tensor and bytes.
        """
        return self._numbers() if self.keep is None else self.keep(self.hold(), self.dtype or torch.float32)

    def _numbers(self) -> torch.Tensor:
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
            decode_into(how, planes, matrix)
        return out

    def _read(self, entry: TensorEntry, dtype: torch.dtype, start: int, nbytes: int) -> torch.Tensor:
        raw = torch.empty(nbytes, dtype=torch.uint8)
        read_into(self._files[entry.file], entry, raw.numpy().data, start)
        return raw.view(dtype)


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
