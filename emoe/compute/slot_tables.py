"""Slot tables in a device's memory: with them, `resident` routing and its kernels need nothing from the host.

docs/cuda.md ("Routing and the host") tells the story.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from emoe.errors import ConfigError, EmoeError
from emoe.slots.loader import Loader


class DeviceTable(Protocol):
    """[E] int32 at an address that stays: the slot of each expert, -1 where it has none."""

    @property
    def slot_of(self) -> torch.Tensor:
        """The table where torch computes; changed in place by `write`."""
        ...

    @property
    def address(self) -> int:
        """The table where kernels read it."""
        ...

    def write(self, values: npt.NDArray[np.int32]) -> None:
        """New contents for what the current stream gets from now on; the host does not wait."""
        ...

    def close(self) -> None: ...


class TableDevice(Protocol):
    """What the tables ask of a device."""

    def table(self, experts: int) -> DeviceTable:
        """A table of so many experts; all -1."""
        ...

    def capturing(self) -> bool:
        """Whether the current stream captures a graph."""
        ...

    def follow(self) -> None:
        """What the current stream gets from now on runs after what the streams before it got."""
        ...

    def reading(self, slab: Any, slots: npt.NDArray[np.int64]) -> AbstractContextManager[None]:
        """In the block, work on the current stream reads these slots."""
        ...


class Settled(NamedTuple):
    """A layer whose picks the device can choose and compute by itself.

    Attributes:
        table: its slot table.
        slots: the slots that the table names, ascending.
        version: of the layer's residents, as the cache counts it.
    """

    table: DeviceTable
    slots: npt.NDArray[np.int64]
    version: int


class SlotTables:
    """The table of each layer, kept equal to the cache.

    A layer is settled while a step cannot need the host: no slot is free or loading, and residents are at least as
    many as a token's picks, so that every absent pick has a substitute (docs/routing.md). One that has all its experts
    in memory is settled for any picks.

    Args:
        device: makes the tables, and says whether a graph is being captured.
        loader: whose cache holds the experts.
        experts_per_layer: experts of each layer.
        lock: held while cache and loader are looked at.
    """

    def __init__(
        self,
        device: TableDevice,
        loader: Loader,
        experts_per_layer: Sequence[int],
        lock: AbstractContextManager[Any],
    ) -> None:
        self._device, self._loader, self._cache, self._lock = device, loader, loader.cache, lock
        self._tables = [device.table(count) for count in experts_per_layer]
        self._settled: list[Settled | None] = [None] * len(self._tables)
        # Of each layer, the picks that were made last and the version they were made from.
        self._routed: list[tuple[torch.Tensor, int] | None] = [None] * len(self._tables)

    def settled(self, layer: int, top_k: int) -> Settled | None:
        """The layer as it is now, None where a step may need the host.

        Tables are read and written in one order: the current stream goes on after the one that was here before it.

        Raises:
            EmoeError: its residents changed and a graph is being captured, which a table cannot be written in.
        """
        with self._lock:
            self._device.follow()
            return self._look(layer, top_k)

    def _look(self, layer: int, top_k: int) -> Settled | None:
        version = self._cache.version(layer)
        known = self._settled[layer]
        if known is not None and known.version == version:
            return known if len(known.slots) >= top_k and self._may_settle(layer) else None
        self._settled[layer] = None
        residents = self._cache.resident(layer)
        slots = [slot for expert in residents if (slot := self._cache.lookup(layer, expert)) is not None]
        if len(slots) < top_k or not self._may_settle(layer) or not self._tables:  # no tables: closed
            return None
        if self._device.capturing():
            raise EmoeError(
                f"layer {layer} has other experts in memory than its slot table says; run one step before a capture"
            )
        values = np.full(len(self._tables[layer].slot_of), -1, dtype=np.int32)
        values[residents] = slots
        self._tables[layer].write(values)
        known = Settled(self._tables[layer], np.array(sorted(slots), dtype=np.int64), version)
        self._settled[layer] = known
        return known

    def _may_settle(self, layer: int) -> bool:
        return not self._cache.free(layer) and not self._loader.prefetching(layer)

    def routed(self, layer: int, settled: Settled, picks: torch.Tensor) -> None:
        """These picks of this layer name only experts of this table, until `take`."""
        self._routed[layer] = picks, settled.version

    def take(self, layer: int, picks: torch.Tensor) -> Settled | None:
        """The table that these picks were made from, or any are; None where the host has to look at them.

        Picks are known by their object: those of another thread, of a router without its hook or of a hook after it
        may name any expert. Callers hold the lock until the kernels that read the slots are enqueued.
        """
        known, routed = self._settled[layer], self._routed[layer]
        if routed is None or routed[0] is not picks:
            return self._whole(layer)
        self._routed[layer] = None
        return known if known is not None and routed[1] == self._cache.version(layer) else None

    def _whole(self, layer: int) -> Settled | None:
        """The layer where all its experts are in memory."""
        experts = len(self._tables[layer].slot_of) if self._tables else 0
        if len(self._cache.slots(layer)) < experts or not experts:
            return None
        self._device.follow()
        return self._look(layer, experts)

    def settle(self, top_k: int) -> None:
        """Fills free slots with the experts of the lowest ids and writes the tables.

        Raises:
            ConfigError: a layer has fewer slots than a token has experts.
            ReadError: the bytes of an expert could not be read; the others are loaded.
            ClosedError: the loader was closed.
        """
        for layer, table in enumerate(self._tables):
            with self._lock:
                self._loader.begin()
                try:
                    self._fill(layer, len(table.slot_of))
                finally:
                    self._loader.over()
                slots = len(self._cache.slots(layer))
                if self.settled(layer, top_k) is None and slots < top_k:
                    raise ConfigError(
                        f"layer {layer} has {slots} slots, fewer than the {top_k} experts of a token: each step needs "
                        "the host"
                    )

    def _fill(self, layer: int, experts: int) -> None:
        """Free slots get the experts of the lowest ids, and no prefetch is under way."""
        absent = [expert for expert in range(experts) if self._cache.lookup(layer, expert) is None]
        with closing(self._loader.rounds(layer, absent[: self._cache.free(layer)])) as rounds:
            for _ in rounds:
                pass
        self._loader.finish_prefetch(layer)

    @contextmanager
    def replaying(self, slab: Any, top_k: int) -> Iterator[None]:
        """In the block, captured graphs are replayed; EmoeError where a layer is not settled."""
        # Held throughout: a load that another thread began between the two calls would not wait for the replays.
        with self._lock:
            for layer in range(len(self._settled)):
                if self.settled(layer, top_k) is None:
                    raise EmoeError(f"layer {layer} is not settled; call settle() before replays")
            with self._device.reading(slab, self.slots()):
                yield

    def capturing(self) -> bool:
        """Whether the current stream captures a graph."""
        return self._device.capturing()

    def slots(self) -> npt.NDArray[np.int64]:
        """Slots that the tables of settled layers name."""
        return np.concatenate([np.empty(0, np.int64), *(each.slots for each in self._settled if each is not None)])

    def close(self) -> None:
        """Gives the tables' memory back."""
        self._settled = [None] * len(self._tables)
        for table in self._tables:
            table.close()
        self._tables = []
