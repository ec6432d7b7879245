"""Slots that are out of use for a while, so that their memory serves something else. Ids only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from emoe.slots.loader import Loader


class Lending:
    """Takes slots out of use and puts them back, the same share in every layer. Results in mode `exact` do not change.

    Args:
        loader: whose cache they are.
        least: slots that each layer keeps.
        lock: held while it is used.
        give_back: told of each slot whose memory is free from now on.
        resized: called when slots of layers have changed.
    """

    def __init__(
        self,
        loader: Loader,
        least: Sequence[int],
        *,
        lock: AbstractContextManager[Any],
        give_back: Callable[[int], object],
        resized: Callable[[], object],
    ) -> None:
        self._loader, self._least, self._lock = loader, list(least), lock
        self._give_back, self._resized = give_back, resized
        self._slots = [len(loader.cache.slots(layer)) for layer in range(loader.cache.layers)]

    @property
    def closed(self) -> bool:
        """Whether the runtime was."""
        return self._loader.closed

    @property
    def lent(self) -> int:
        """Slots out of use."""
        return sum(self._slots) - sum(map(self._loader.capacity, range(len(self._slots))))

    @property
    def most(self) -> int:
        """Slots that can be out of use at once."""
        return sum(max(0, slots - least) for slots, least in zip(self._slots, self._least, strict=True))

    def lend(self, count: int) -> int:
        """Takes slots out of use, free ones first, then those that the policy would evict next.

        Returns:
            How many; fewer where no more can be spared, or a forward holds those left.

        Raises:
            ClosedError: the runtime was closed.
        """
        with self._lock:
            self._loader.begin()
            try:
                return self._lend(count)
            finally:
                self._loader.over()

    def _lend(self, count: int) -> int:
        taken, stuck = 0, set[int]()
        while taken < count:
            layers = [
                layer for layer, least in enumerate(self._least)
                if layer not in stuck and self._loader.capacity(layer) > least
            ]  # fmt: skip
            if not layers:
                break
            layer = max(layers, key=self._share)
            slot = self._loader.close_slot(layer)
            if slot is None:
                stuck.add(layer)
            else:
                self._give_back(slot)
                taken += 1
        if taken:
            self._resized()
        return taken

    def take_back(self, count: int) -> int:
        """Puts slots into use again, empty; returns how many."""
        with self._lock:
            self._loader.begin()
            try:
                back = min(count, self.lent)
                for _ in range(back):
                    layers = [each for each, slots in enumerate(self._slots) if self._loader.capacity(each) < slots]
                    self._loader.cache.open(min(layers, key=self._share))
                if back:
                    self._resized()
                return back
            finally:
                self._loader.over()

    def _share(self, layer: int) -> float:
        """Of the layer's slots that are in use."""
        return self._loader.capacity(layer) / self._slots[layer]
