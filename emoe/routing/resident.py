"""Which experts are resident, as routing modes see it: one bool per expert, and how many more a layer can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from emoe.errors import ConfigError


class Residency(Protocol):
    """What a routing mode asks before it picks; layers and experts are numbers."""

    def mask(self, layer: int) -> torch.Tensor:
        """[E] bool, True for experts in memory; valid until the next call for this layer, and not to be changed."""
        ...

    def room(self, layer: int) -> int:
        """Experts that the layer can take without giving one up."""
        ...


class FixedResidency:
    """Sets that do not change, for experiments on models whose experts are all in memory.

    Args:
        experts_per_layer: experts of each layer.
        resident: expert ids of each layer.

    Raises:
        ConfigError: another number of layers, or an expert that a layer does not have.
    """

    def __init__(self, experts_per_layer: Sequence[int], resident: Sequence[Sequence[int]]) -> None:
        if len(experts_per_layer) != len(resident):
            raise ConfigError(f"{len(resident)} resident sets for {len(experts_per_layer)} layers")
        self._masks = []
        for layer, (count, experts) in enumerate(zip(experts_per_layer, resident, strict=True)):
            wrong = [expert for expert in experts if not 0 <= expert < count]
            if wrong:
                raise ConfigError(f"layer {layer} has experts 0 to {count - 1}, not {wrong[0]}")
            mask = torch.zeros(count, dtype=torch.bool)
            mask[list(experts)] = True
            self._masks.append(mask)

    def mask(self, layer: int) -> torch.Tensor:
        return self._masks[layer]

    def room(self, layer: int) -> int:
        return 0

    @property
    def sizes(self) -> list[int]:
        """Resident experts of each layer."""
        return [int(mask.sum()) for mask in self._masks]


def random_residency(experts_per_layer: Sequence[int], sizes: int | Sequence[int], seed: int = 0) -> FixedResidency:
    """The control of an experiment: as many resident experts as another set has, drawn at random.

    Args:
        experts_per_layer: experts of each layer.
        sizes: resident experts of each layer, or one number for all.
        seed: the same seed gives the same sets.

    Raises:
        ConfigError: more resident experts than a layer has, or a negative number.
    """
    counts = [sizes] * len(experts_per_layer) if isinstance(sizes, int) else list(sizes)
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for layer, (experts, count) in enumerate(zip(experts_per_layer, counts, strict=True)):
        if not 0 <= count <= experts:
            raise ConfigError(f"layer {layer} has {experts} experts, of which {count} cannot be resident")
        sets.append(torch.randperm(experts, generator=generator)[:count].tolist())
    return FixedResidency(experts_per_layer, sets)
