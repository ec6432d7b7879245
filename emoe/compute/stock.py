"""Transformers' own loop over experts with the weights taken from slots: slower, and bit-equal to Transformers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import torch
from torch import nn

from emoe.compute import ops
from emoe.compute.experts import Part
from emoe.errors import ConfigError
from emoe.model.decode import parameter
from emoe.model.layout import SlotLayout
from emoe.model.spec import ExpertForm
from emoe.slots.loader import Loader


class Stock:
    """Computes one layer with the loop of its family."""

    name = "stock"

    def __init__(self, part: Part) -> None:
        self._layer, self._experts, self._loader = part.number, len(part.records), part.loader
        self._module = part.module
        self._dtypes = {getattr(torch, param.dtype) for param in part.form.params}
        self._pool = _SlotPool(part.slab, part.layout, part.form)
        self._eager: Callable[..., torch.Tensor] = type(part.module).forward.__wrapped__  # type: ignore[attr-defined]

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        wanted = ops.routed(index, self._experts)
        if not wanted:
            return torch.zeros_like(hidden)
        outside = (index < 0) | (index >= self._experts)
        if outside.any():  # the loops of families refuse them
            index, weights = index.masked_fill(outside, wanted[0]), weights.masked_fill(outside, 0)
        try:
            return self._loop(wanted, hidden, index, weights)
        except RuntimeError as error:
            dtypes = {hidden.dtype, weights.dtype} - self._dtypes
            if dtypes and not torch.is_autocast_enabled(hidden.device.type):
                given, own = (", ".join(sorted(map(str, each))) for each in (dtypes, self._dtypes))
                raise ConfigError(
                    f"Transformers' own loop of {type(self._module).__name__} takes no {given} beside experts of "
                    f"{own}: {error}"
                ) from error
            raise

    def _loop(
        self, wanted: list[int], hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if len(wanted) <= self._loader.capacity(self._layer):
            with closing(self._loader.rounds(self._layer, wanted, together=True)) as rounds:
                slot_of = dict(next(rounds, []))  # held until the generator is closed
                return self._eager(self._view(slot_of.__getitem__), hidden, index, weights)
        # The family's own loop goes through the experts one by one, in ascending order, whatever the slots.
        with closing(_OneAtATime(self._loader, self._layer)) as held:
            return self._eager(self._view(held.slot_of), hidden, index, weights)

    def _view(self, slot_of: Callable[[int], int]) -> _ModuleView:
        return _ModuleView(self._module, self._pool, slot_of)


class _SlotPool:
    """The slab seen as torch tensors: `tensor(slot, name)` is the parameter of the expert in that slot.

    What is encoded is decoded at each access, into memory of its own.
    """

    def __init__(self, slab: Any, layout: SlotLayout, form: ExpertForm) -> None:
        buffer = (ctypes.c_char * (slab.slots * slab.slot_bytes)).from_address(slab.address)
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)
        self._slab = slab  # keeps the memory alive
        self._form = form
        self._arrays = {
            each.name: (layout.offsets[each.name], each.nbytes, each.shape, getattr(torch, each.dtype))
            for each in form.stored
        }

    def tensor(self, slot: int, name: str) -> torch.Tensor:
        if name in self._arrays:
            return self._array(slot, name)
        return parameter(self._form, name, lambda stored: self._array(slot, stored))

    def _array(self, slot: int, name: str) -> torch.Tensor:
        offset, nbytes, shape, dtype = self._arrays[name]
        start = slot * self._slab.slot_bytes + offset
        return self._bytes[start : start + nbytes].view(dtype).view(shape)

    def names(self) -> list[str]:
        return [param.name for param in self._form.params]


class _SlotParameter:
    """Stands where the [E, ...] weight stands in Transformers' eager loop; indexing gives one expert's slot."""

    def __init__(self, pool: _SlotPool, name: str, slot_of: Callable[[int], int], dtype: torch.dtype | None) -> None:
        self._pool, self._name, self._slot_of, self._dtype = pool, name, slot_of, dtype

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._pool.tensor(self._slot_of(int(expert)), self._name).to(self._dtype)


class _ModuleView:
    """The experts module with its weights taken from slots; everything else is the module's own."""

    def __init__(self, module: nn.Module, pool: _SlotPool, slot_of: Callable[[int], int]) -> None:
        for name in pool.names():  # what stands for the parameter has followed `model.to(dtype)`, the slots have not
            placed = module._parameters.get(name)
            self.__dict__[name] = _SlotParameter(pool, name, slot_of, None if placed is None else placed.dtype)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _OneAtATime:
    """Slots for an eager loop over more experts than there are slots: holds the expert that the loop is at."""

    def __init__(self, loader: Loader, layer: int) -> None:
        self._loader, self._layer = loader, layer
        self._expert, self._slot = -1, -1
        self._held: Generator[Any, None, None] | None = None

    def slot_of(self, expert: int) -> int:
        if expert != self._expert:
            self.close()
            self._held = self._loader.rounds(self._layer, [expert])
            ((_, self._slot),) = next(self._held)
            self._expert = expert
        return self._slot

    def close(self) -> None:
        self._expert = -1
        if self._held is not None:
            self._held.close()
