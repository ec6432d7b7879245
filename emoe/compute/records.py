"""Records: what the native transfer queue knows of an expert, the pieces of files that fill its slot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from emoe.errors import CheckpointError
from emoe.model import layout
from emoe.model.encoding import encoding
from emoe.model.layout import SlotLayout
from emoe.model.spec import PAGE, ParamSpec, slot_bytes, slot_offsets
from emoe.store import ExpertStore, Piece, StoreLayer

# Prefetches that may be queued or running: so many bytes, or so many experts where these are larger (DeepSeek-V3 has
# 84 MiB). No memory depends on it, they go into slots; it bounds how much is read in vain where a guess was wrong.
PREFETCH_BYTES = 64 << 20
PREFETCH_EXPERTS = 8


def prefetch_bytes(slot_bytes: int) -> int:
    """The bound of a queue whose slots have so many bytes."""
    return max(PREFETCH_BYTES, PREFETCH_EXPERTS * slot_bytes)


def as_in_files(
    modules: Mapping[str, nn.Module], layers: Sequence[StoreLayer], layouts: Sequence[SlotLayout], alignment: int
) -> list[SlotLayout]:
    """Layouts whose large arrays start where in a page they start in their files, so that reads go straight into slots.

    Args:
        modules: the model's, by path.
        layers: of the store.
        layouts: as planned, with room for this.
        alignment: what kernels ask of an array's place in a slot, in bytes.

    Returns:
        Those of `layouts` that this makes no different are the same objects.
    """
    placed = []
    for layer, where in zip(layers, layouts, strict=True):
        stored = layer.form.stored
        places = {each.name: place for each in stored if each.large and (place := _place(layer, each)) is not None}
        moves = any(place != where.offsets.get(name, 0) % PAGE for name, place in places.items())
        possible = not any(place % alignment for place in places.values())
        # Experts that are not what was planned stay as they are, for `register_records` to refuse.
        as_planned = (slot_offsets(stored)[0], slot_bytes(stored)) == (where.offsets, where.nbytes)
        if moves and possible and as_planned:
            placed.append(layout.describe(modules[layer.path], layer.form, places))
        else:
            placed.append(where)
    return placed


def _place(layer: StoreLayer, array: ParamSpec) -> int | None:
    """Where in a page most bytes of an array would start if it were whole where they are; None: all are converted."""
    how = encoding(array.dtype)
    places: Counter[int] = Counter()
    for pieces in layer.pieces:
        for piece in pieces:
            if piece.stored == array.name and piece.src_dtype == array.dtype:
                places[(piece.offset - how.nbytes((piece.dst_offset,))) % PAGE] += piece.nbytes
    return max(places, key=places.__getitem__, default=None)


def register_records(module: Any, store: ExpertStore, layouts: Sequence[SlotLayout]) -> tuple[Any, list[list[int]]]:
    """Tells a native table where every expert lies.

    Args:
        module: the native module.
        store: where the experts are.
        layouts: of each layer's slots.

    Returns:
        The `RecordTable`, and the record of each expert, [layer][expert].

    Raises:
        CheckpointError: a layer's experts are of other shapes or dtypes than its layout.
    """
    table = module.RecordTable()
    files: dict[str, int] = {}

    def native_piece(piece: Piece, where: SlotLayout, dtypes: dict[str, str]) -> tuple[Any, ...]:
        if piece.file not in files:
            file = store.opened(piece.file)
            files[piece.file] = table.add_file(file.path, file.fd, file.identity)
        dtype = dtypes[piece.stored]
        start = where.offsets[piece.stored] + encoding(dtype).nbytes((piece.dst_offset,))
        return (
            files[piece.file], piece.offset, piece.nbytes, piece.tensor, piece.src_dtype,
            start, dtype, piece.rows, piece.cols, piece.dst_row_stride, piece.dst_col_stride,
        )  # fmt: skip

    records = []
    for layer, where in zip(store.layers, layouts, strict=True):
        places = {name: offset % PAGE for name, offset in where.offsets.items()}
        expected = slot_offsets(layer.form.stored, places)[0], slot_bytes(layer.form.stored)
        if expected != (where.offsets, where.nbytes):
            found = ", ".join(f"{each.name} {each.dtype} {list(each.shape)}" for each in layer.form.stored)
            raise CheckpointError(
                f"the experts of {layer.path} are {found}, not what the budget was planned for; dtype= says which "
                "dtype to load",
                tensor=layer.path,
            )
        dtypes = {each.name: each.dtype for each in layer.form.stored}
        records.append(
            [table.add_record([native_piece(piece, where, dtypes) for piece in pieces]) for pieces in layer.pieces]
        )
    return table, records
