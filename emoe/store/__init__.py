"""What lies where: the experts of every layer as byte ranges of files, and a slow reference reader.

Knows files and shapes, nothing of slots, caches or kernels. `checkpoint` makes a store of a safetensors checkpoint,
`writer` of a model in memory. docs/checkpoints.md tells the story.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from emoe.errors import ClosedError, ReadError
from emoe.model.spec import ExpertForm, ParamSpec
from emoe.store.opened import OpenFile, read_error

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a file: a row-major [rows, cols] array of `src_dtype`, and where it goes in a slot.

    Element (r, c) is element `dst_offset + r * dst_row_stride + c * dst_col_stride` of the expert's array `stored`.
    `offset` and `nbytes` are bytes of the file, the dst_* are elements.
    """

    file: str
    offset: int
    nbytes: int
    tensor: str
    src_dtype: str
    stored: str
    rows: int
    cols: int
    dst_offset: int
    dst_row_stride: int
    dst_col_stride: int


@dataclass(frozen=True)
class StoreLayer:
    """One experts module: its path in the model, what one expert is, and `pieces[expert]`."""

    path: str
    form: ExpertForm
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def params(self) -> tuple[ParamSpec, ...]:
        """Parameters of one expert, as the module has them."""
        return self.form.params


class ExpertStore:
    """Where the experts of a model lie.

    Args:
        layers: in the order of `model.named_modules()`.
        description: for logs and `stats()`.
        opened: its files, which are the store's to close; one that is missing here is opened at its first use.
        cleanup: removes what the store created; called once, by `close` or at the end of the process.
    """

    def __init__(
        self,
        layers: Iterable[StoreLayer],
        description: str,
        *,
        opened: Iterable[OpenFile] = (),
        cleanup: Callable[[], None] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self._opened: dict[str, OpenFile] = {}
        for each in opened:
            self._keep(each)
        self.description = description
        self.closed = False
        self._finalizer = weakref.finalize(self, cleanup) if cleanup else None

    @property
    def owned(self) -> bool:
        """Whether its files are its own, and go with it."""
        return self._finalizer is not None

    def files(self) -> set[str]:
        """Every file that holds a piece."""
        return {piece.file for layer in self.layers for pieces in layer.pieces for piece in pieces}

    def opened_files(self) -> set[str]:
        """Every file that it has open: those of `files`, and others of the checkpoint."""
        return set(self._opened)

    def opened(self, file: str) -> OpenFile:
        """The open file of a piece's `file`.

        Raises:
            ReadError: it was not open yet and cannot be opened.
            ClosedError: the store was closed.
        """
        if self.closed:
            raise ClosedError(f"the store of experts ({self.description}) is closed")
        if file not in self._opened:
            self._keep(OpenFile(file))
        return self._opened[file]

    def _keep(self, file: OpenFile) -> None:
        file.keep_sample()
        self._opened[file.path] = file

    def require_in_place(self) -> None:
        """CheckpointError where a file was replaced or written to; for what was read through the paths meanwhile."""
        for file in self._opened.values():
            file.require_in_place()

    def close(self) -> None:
        """Closes its files and removes those it created (a checkpoint is never touched); again, it does nothing."""
        self.closed = True
        for file in self._opened.values():
            file.close()
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
        name -> tensor of the parameter's shape and dtype; what is encoded is decoded.

    Raises:
        ReadError: a file cannot be read, is too short or has changed; names file, tensor and bytes.
        ClosedError: the store was closed.
    """
    from emoe.model.decode import parameter

    form, stored = store.layers[layer].form, read_stored(store, layer, expert)
    return {
        param.name: stored[param.name] if param.name in stored else parameter(form, param.name, stored.__getitem__)
        for param in form.params
    }


def read_stored(store: ExpertStore, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """The arrays of one expert as a slot holds them, by name. Raises as `read_expert`."""
    import torch

    if store.closed:
        raise ClosedError(f"the store of experts ({store.description}) is closed")
    where = store.layers[layer]
    out = {
        each.name: torch.empty(each.shape, dtype=getattr(torch, each.dtype), device="cpu") for each in where.form.stored
    }
    for piece in where.pieces[expert]:
        values = torch.frombuffer(_read(piece, store.opened(piece.file)), dtype=getattr(torch, piece.src_dtype))
        target = out[piece.stored].view(-1)
        strides = (piece.dst_row_stride, piece.dst_col_stride)
        torch.as_strided(target, (piece.rows, piece.cols), strides, piece.dst_offset).copy_(
            values.view(piece.rows, piece.cols)
        )
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


def _read(piece: Piece, file: OpenFile) -> bytearray:
    data = bytearray(piece.nbytes)
    try:
        if file.change():
            file.renew()
        done = file.read(memoryview(data), piece.offset)
        change = file.change()
    except OSError as error:
        raise _read_error(piece, error.strerror or str(error)) from error
    if change:
        raise _read_error(piece, f"the file {change}")
    if done < piece.nbytes:
        raise _read_error(piece, f"the file ends after {done} of them")
    return data


def _read_error(piece: Piece, why: str) -> ReadError:
    return read_error(piece.file, piece.tensor, piece.offset, piece.nbytes, why)
