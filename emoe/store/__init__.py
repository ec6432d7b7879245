"""What lies where: the experts of every layer as byte ranges of files, and a slow reference reader.

Knows files and shapes, nothing of slots, caches or kernels. `checkpoint` makes a store of a safetensors checkpoint,
`writer` of a model in memory. docs/checkpoints.md tells the story.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from emoe.errors import ClosedError, ReadError
from emoe.model.spec import ParamSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a file: a row-major [rows, cols] array of `src_dtype`, and where it goes in a parameter.

    Element (r, c) is element `dst_offset + r * dst_row_stride + c * dst_col_stride` of the expert's `param`.
    `offset` and `nbytes` are bytes of the file, the dst_* are elements.
    """

    file: str
    offset: int
    nbytes: int
    tensor: str
    src_dtype: str
    param: str
    rows: int
    cols: int
    dst_offset: int
    dst_row_stride: int
    dst_col_stride: int


@dataclass(frozen=True)
class StoreLayer:
    """One experts module: its path in the model, the parameters of one expert, and `pieces[expert]`."""

    path: str
    params: tuple[ParamSpec, ...]
    pieces: tuple[tuple[Piece, ...], ...]


class ExpertStore:
    """Where the experts of a model lie.

    Args:
        layers: in the order of `model.named_modules()`.
        description: for logs and `stats()`.
        cleanup: removes what the store created; called once, by `close` or at the end of the process.
    """

    def __init__(
        self, layers: Iterable[StoreLayer], description: str, *, cleanup: Callable[[], None] | None = None
    ) -> None:
        self.layers = tuple(layers)
        self.description = description
        self.closed = False
        self._finalizer = weakref.finalize(self, cleanup) if cleanup else None

    def files(self) -> set[str]:
        """Every file that holds a piece."""
        return {piece.file for layer in self.layers for pieces in layer.pieces for piece in pieces}

    def close(self) -> None:
        """Removes what the store created (a checkpoint is never touched); calling it again does nothing."""
        self.closed = True
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<emoe.store.ExpertStore: {len(self.layers)} layers, {self.description}>"


def read_expert(store: ExpertStore, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Reads one expert with plain Python: the slow reference of the native transfer.

    Returns:
        name -> tensor of the parameter's shape and dtype.

    Raises:
        ReadError: a file cannot be read or is too short; names file, tensor and bytes.
        ClosedError: the store was closed.
    """
    import torch

    if store.closed:
        raise ClosedError(f"the store of experts ({store.description}) is closed")
    where = store.layers[layer]
    out = {
        param.name: torch.empty(param.shape, dtype=getattr(torch, param.dtype), device="cpu") for param in where.params
    }
    handles: dict[str, int] = {}
    try:
        for piece in where.pieces[expert]:
            values = torch.frombuffer(_read(piece, handles), dtype=getattr(torch, piece.src_dtype))
            target = out[piece.param].view(-1)
            strides = (piece.dst_row_stride, piece.dst_col_stride)
            torch.as_strided(target, (piece.rows, piece.cols), strides, piece.dst_offset).copy_(
                values.view(piece.rows, piece.cols)
            )
    finally:
        for handle in handles.values():
            os.close(handle)
    return out


def read_layer(store: ExpertStore, layer: int) -> dict[str, torch.Tensor]:
    """Every expert of a layer, as the experts module would hold it: name -> [E, ...]. Raises as `read_expert`."""
    import torch

    where = store.layers[layer]
    out = {
        param.name: torch.empty((len(where.pieces), *param.shape), dtype=getattr(torch, param.dtype), device="cpu")
        for param in where.params
    }
    for expert in range(len(where.pieces)):
        for name, value in read_expert(store, layer, expert).items():
            out[name][expert] = value
    return out


def _read(piece: Piece, handles: dict[str, int]) -> bytearray:
    data = bytearray(piece.nbytes)
    view = memoryview(data)
    done = 0
    try:
        if piece.file not in handles:
            handles[piece.file] = os.open(piece.file, os.O_RDONLY | os.O_CLOEXEC)
        while done < piece.nbytes:
            count = os.preadv(handles[piece.file], [view[done:]], piece.offset + done)
            if count == 0:
                raise _read_error(piece, f"the file ends after {done} of them")
            done += count
    except OSError as error:
        if isinstance(error, ReadError):
            raise
        raise _read_error(piece, error.strerror or str(error)) from error
    return data


def _read_error(piece: Piece, why: str) -> ReadError:
    return ReadError(
        f"{piece.file}: {piece.nbytes} bytes of {piece.tensor} at byte {piece.offset} cannot be read: {why}",
        file=piece.file,
        tensor=piece.tensor,
        offset=piece.offset,
        nbytes=piece.nbytes,
    )
