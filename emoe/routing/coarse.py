"""Mode `coarse`: which experts of a layer's picks are computed in full; the others are computed with their copies.

Needs no router: a pick's share is its weight over the sum of its row's. Which slots and copies there are is for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.requests import Requests, Span
from emoe.routing.options import RoutingOptions
from emoe.routing.phases import Phases
from emoe.routing.resident import Residency

NEVER = 1.0  # from this exact_mass on no pick is read


class Take(Protocol):
    """Counts one call of a layer for one request (`Tally.add`)."""

    def __call__(
        self, request: Any, layer: int, rows: int, picks: int, absent: int, substituted: int, mass: float, misses: int,
        coarse: int, coarse_mass: float,
    ) -> None: ...  # fmt: skip


class CoarseRouting:
    """Args:
    residency: which experts are in slots.
    options: with `exact_mass`.
    requests: whose rows are.
    phases: which of them are decode.
    take: counts.
    """

    def __init__(
        self, residency: Residency, options: RoutingOptions, requests: Requests, phases: Phases, take: Take
    ) -> None:
        self._residency, self._options, self._requests, self._take = residency, options, requests, take
        self._phases = phases

    def full(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> list[int] | None:
        """Experts to compute in full, ascending: those in slots and those to be read first. None: all, as in `exact`.

        Args:
            index: [T, K] the router's picks; ids that are no expert's are none.
            weights: [T, K] their weights.
        """
        if not self._requests.routed:
            return None
        spans = self._requests.spans(len(index))
        resident = self._residency.mask(layer).numpy()
        ids = index.numpy()
        known = (ids >= 0) & (ids < len(resident))
        absent = known & ~resident[np.where(known, ids, 0)]
        found = set(ids[known & ~absent].tolist())
        if not absent.any():
            self._count(layer, spans, absent)
            return sorted(found)
        shares = _shares(weights)
        limits = self._limits(spans, len(ids))
        wanted = ids[absent & (shares >= limits)]
        read = set(wanted.tolist())
        room = self._residency.room(layer) - len(read)
        if room > 0:  # a slot that is free costs nobody its place
            mass = np.bincount(ids[absent], shares[absent], minlength=len(resident))
            others = sorted(set(ids[absent].tolist()) - read, key=lambda expert: (-mass[expert], expert))
            read.update(others[:room])
        coarse = absent & ~np.isin(ids, list(read)) if read else absent
        self._count(layer, spans, absent, coarse, shares)
        return sorted(found | read)

    def _limits(self, spans: Sequence[Span], rows: int) -> NDArray[np.float64]:
        """[T, 1] the share from which an absent pick of a row is read: a prompt's are only where all are."""
        found = np.full((rows, 1), np.inf)
        for (request, span), decode in zip(spans, self._phases.decode(spans), strict=True):
            mass = self._options.exact_mass_of(request.task)
            if mass == 0 or (decode and mass < NEVER):
                found[span] = mass
        return found

    def _count(
        self,
        layer: int,
        spans: Sequence[Span],
        absent: NDArray[np.bool_],
        coarse: NDArray[np.bool_] | None = None,
        shares: NDArray[np.float64] | None = None,
    ) -> None:
        for request, span in spans:
            rows = span.stop - span.start
            lacking = stand_in = 0
            mass = 0.0
            if coarse is not None and shares is not None:
                lacking, stand_in = int(absent[span].sum()), int(coarse[span].sum())
                mass = float(shares[span][coarse[span]].sum())
            self._take(
                request, layer, rows, rows * absent.shape[1], lacking, 0, 0.0, lacking - stand_in, stand_in, mass
            )


def _shares(weights: torch.Tensor) -> NDArray[np.float64]:
    """[T, K] each weight over its row's sum; 0 where these are no numbers."""
    sizes = weights.double().abs().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(sizes / sizes.sum(-1, keepdims=True), nan=0.0, posinf=0.0)
