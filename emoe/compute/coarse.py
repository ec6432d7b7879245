"""Copies of all experts in few bits in memory of their own, and a layer computed with full experts and copies."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from emoe.compute import ops
from emoe.compute.cpu import Native
from emoe.compute.experts import Part
from emoe.model import copies
from emoe.store import ExpertStore
from emoe.store.copies import bring

# Experts of a layer's picks [T, K] with their weights to compute in full, ascending; None: all of them.
Choose = Callable[[int, torch.Tensor, torch.Tensor], "list[int] | None"]


@dataclass(frozen=True)
class LayerCopies:
    """The copies of one layer; what `ops.gather_mlp` takes for a slab, expert e in slot e.

    Attributes:
        layout: `_C.MlpLayout` of one copy.
        address, slots, slot_bytes: of the memory.
        memory: what keeps it.
    """

    layout: Any
    address: int
    slots: int
    slot_bytes: int
    memory: Any


class Copies:
    """The copies of all experts of a model, in one allocation.

    Args:
        module: the native module.
        modules: of the model, by path.
        store: where the experts are.
        name: encoding, one of `emoe.options.COPIES`.

    Attributes:
        name: as given.
        nbytes: of all copies.
        layers: in order.
        source: where they came from, for logs.

    Raises:
        UnsupportedModelError: experts of a layer have no such copy.
        ReadError, CheckpointError: an expert cannot be read, or holds a number that is not finite.
    """

    def __init__(self, module: Any, modules: Mapping[str, nn.Module], store: ExpertStore, name: str) -> None:
        layouts = [copies.describe(each.path, modules[each.path], each.params, name) for each in store.layers]
        counts = [len(layer.pieces) for layer in store.layers]
        sizes = [count * where.nbytes for count, where in zip(counts, layouts, strict=True)]
        self.name, self.nbytes = name, sum(sizes)
        memory = module.Slab(1, self.nbytes)
        self.source = bring(store, layouts, _bytes_of(memory, self.nbytes), name)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self.layers = [
            LayerCopies(ops.make_layout(where.native), memory.address + start, count, where.nbytes, memory)
            for where, start, count in zip(layouts, starts, counts, strict=True)
        ]
        self.encodings: Sequence[str] = tuple(dict.fromkeys(each for where in layouts for each in where.form.encodings))

    def stats(self) -> dict[str, Any]:
        """name, bytes, encodings."""
        return {"coarse": self.name, "bytes": self.nbytes, "encodings": list(self.encodings)}


def _bytes_of(memory: Any, nbytes: int) -> torch.Tensor:
    """Its bytes as a tensor, which does not keep it."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(memory.address), dtype=torch.uint8)


class Coarse(Native):
    """Computes one layer with the native kernels, what is chosen in full and the rest with copies.

    Args:
        part: the layer.
        copies: of it.
        choose: what is computed in full.
    """

    def __init__(self, part: Part, copies: LayerCopies, choose: Choose) -> None:
        super().__init__(part)
        self._copies, self._choose = copies, choose

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        full = self._choose(self._layer, index, weights)
        routed = ops.routed(index, self._experts)
        if full is None or len(full) == len(routed):
            return self._compute(hidden, index, weights, routed)
        slots = np.full(self._experts, -1, dtype=np.int32)
        rest = sorted(set(routed).difference(full))
        slots[rest] = rest

        def beside(*call: Any) -> None:
            ops.gather_mlp(self._copies.layout, self._copies, slots, *call)

        return self._compute(hidden, index, weights, full, beside)
