"""Records: what the native transfer queue knows of an expert, the pieces of files that fill its slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emoe.errors import CheckpointError
from emoe.model.encoding import encoding
from emoe.model.layout import SlotLayout
from emoe.model.spec import slot_offsets
from emoe.store import ExpertStore, Piece

# Prefetches that may be queued or running: so many bytes, or so many experts where these are larger (DeepSeek-V3 has
# 84 MiB). No memory depends on it, they go into slots; it bounds how much is read in vain where a guess was wrong.
PREFETCH_BYTES = 64 << 20
PREFETCH_EXPERTS = 8


def prefetch_bytes(slot_bytes: int) -> int:
    """The bound of a queue whose slots have so many bytes."""
    return max(PREFETCH_BYTES, PREFETCH_EXPERTS * slot_bytes)


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
        if slot_offsets(layer.form.stored) != (where.offsets, where.nbytes):
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
