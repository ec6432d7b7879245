"""The slots as routing modes see them: which experts are resident, and how many more a layer can take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from emoe.slots.cache import CacheManager


class CacheResidency:
    """The slots of a `CacheManager`; an expert that is still loading is not resident.

    Args:
        cache: the runtime's cache.
        experts_per_layer: experts of each layer.
        lock: held while the cache is read.
    """

    def __init__(
        self, cache: CacheManager, experts_per_layer: Sequence[int], lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self._cache = cache
        self._lock = lock if lock is not None else nullcontext()
        # Of each layer, the version and its mask: one object, so that neither is ever without the other.
        self._masks = [(-1, torch.zeros(count, dtype=torch.bool)) for count in experts_per_layer]

    def mask(self, layer: int) -> torch.Tensor:
        known, mask = self._masks[layer]
        if known != self._cache.version(layer):
            with self._lock:
                version, resident = self._cache.version(layer), self._cache.resident(layer)
            # A new tensor, so that a mask handed out before stays what it was.
            mask = torch.zeros_like(mask)
            mask[resident] = True
            self._masks[layer] = version, mask
        return mask

    def room(self, layer: int) -> int:
        return self._cache.free(layer)
