"""Copies for `routing="coarse"` made beforehand: `emoe convert MODEL --coarse q4_k`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoe.memory import format_bytes
from emoe.model import copies
from emoe.options import COPIES, OneOf
from emoe.seam.load import load_without_experts
from emoe.store.copies import keep


@dataclass(frozen=True)
class Kept:
    """Where the copies of a model lie.

    Attributes:
        model, coarse: as given.
        file: in the cache folder, where loading with `routing="coarse"` and this encoding finds it.
        made: False: it was there already, whole and of the checkpoint as it is.
        copy_bytes, expert_bytes: of all copies, and of all experts as they are stored.
    """

    model: str
    coarse: str
    file: str
    made: bool
    copy_bytes: int
    expert_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        share = self.copy_bytes / self.expert_bytes
        return (
            f"{'made' if self.made else 'there already'}: {self.file}, copies of all experts in {self.coarse}: "
            f"{format_bytes(self.copy_bytes)}, {share:.1%} of the experts' {format_bytes(self.expert_bytes)}"
        )


def keep_copies(model: str | Path, coarse: str) -> Kept:
    """Makes the copies that `emoe.from_pretrained(model, routing="coarse", coarse=...)` reads, in memory of one layer.

    The weights outside experts are loaded, as the model's own code says how its experts lie.

    Args:
        model: a checkpoint folder, a GGUF file, or a hub id.
        coarse: an encoding, one of `emoe.options.COPIES`.

    Raises:
        ConfigError: an unknown encoding, or there is no cache folder that can be written; WriteError: the disk is full.
        UnsupportedModelError: experts have no such copy.
        CheckpointError, ReadError: as `emoe.from_pretrained`.
    """
    name = OneOf(tuple(COPIES))("coarse", coarse)
    loaded, store = load_without_experts(model)
    try:
        modules = dict(loaded.named_modules())
        layouts = [copies.describe(each.path, modules[each.path], each.params, name) for each in store.layers]
        file, made = keep(store, layouts, name)
        counts = [len(layer.pieces) for layer in store.layers]
        return Kept(
            str(model), name, str(file), made,
            sum(count * where.nbytes for count, where in zip(counts, layouts, strict=True)),
            sum(count * layer.form.nbytes for count, layer in zip(counts, store.layers, strict=True)),
        )  # fmt: skip
    finally:
        store.close()
