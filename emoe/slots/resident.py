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
        self._masks = [torch.zeros(count, dtype=torch.bool) for count in experts_per_layer]
        self._versions = [-1] * len(self._masks)

    def mask(self, layer: int) -> torch.Tensor:
        version = self._cache.version(layer)
        if version != self._versions[layer]:
            with self._lock:
                self._versions[layer] = self._cache.version(layer)
                resident = self._cache.resident(layer)
            # A new tensor, so that a mask handed out before stays what it was.
            mask = torch.zeros_like(self._masks[layer])
            mask[resident] = True
            self._masks[layer] = mask
        return self._masks[layer]

    def room(self, layer: int) -> int:
        return self._cache.free(layer)
