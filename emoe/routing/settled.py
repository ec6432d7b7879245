"""Mode `resident` where slots and tensors are a device's: picks are exchanged and counted without asking the host.

Nothing here depends on a value of a tensor, so a step can be captured in a CUDA graph. docs/cuda.md tells the story.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Protocol

import torch

from emoe.errors import EmoeError
from emoe.requests import Request, Span
from emoe.routing.recognise import Site
from emoe.routing.rules import Rule
from emoe.routing.select import Choice, choose_resident

# Told request, layer, rows, picks, absent, substituted, mass.
Take = Callable[[Request, int, int, int, int, int, float], None]
COUNTS = 5  # rows, picks, absent, substituted, mass


class Tables(Protocol):
    """What is asked of `emoe.compute.slot_tables.SlotTables`."""

    def settled(self, layer: int, top_k: int) -> Any:
        """Its `table.slot_of` is [E] int32, -1 for absent experts; None where the host has to route."""
        ...

    def routed(self, layer: int, settled: Any, picks: torch.Tensor) -> None:
        """These picks of this layer name experts of this table only."""
        ...

    def capturing(self) -> bool:
        """Whether a graph is being captured."""
        ...


class SettledRouting:
    """Routes layers that are settled; of others it says so.

    Args:
        tables: slot tables of the layers.
        layers: how many.
        take: where counts go when the host reads them.
    """

    def __init__(self, tables: Tables, layers: int, take: Take) -> None:
        self._tables = tables
        self._counts = _DeviceCounts(tables, layers, take)

    def route(
        self, site: Site, rule: Rule, logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor
    ) -> tuple[Choice, torch.Tensor, torch.Tensor] | None:
        """What was chosen, the mode's weights and its picks; None where the host has to route.

        Args:
            logits, weights, index: [T, E], [T, K], [T, K] as the router module gave them.
        """
        settled = self._tables.settled(site.layer, index.shape[1])
        if settled is None:
            return None
        resident = settled.table.slot_of >= 0
        logits = rule.logits(logits)
        choice = choose_resident(rule, logits, index, resident)
        changed = choice.replaced.any(-1, keepdim=True)
        final = torch.where(changed, choice.index, index)
        own = rule.weights(logits, final).to(weights.dtype)
        self._tables.routed(site.layer, settled, final)
        return choice, torch.where(changed, own, weights), final

    def count(self, layer: int, choice: Choice, spans: Sequence[Span], *, batch: bool) -> None:
        """Counts what was chosen for each request; `batch`: they are those of `Routing.rows`."""
        for place, (request, span) in enumerate(spans, start=int(batch)):
            self._counts.add(place, request, layer, choice.replaced[span], choice.share[span])

    def current(self, requests: Sequence[Request], *, batch: bool) -> None:
        """From now on what runs belongs to these requests, replays too; `batch`: they are those of `Routing.rows`."""
        for place, request in enumerate(requests, start=int(batch)):
            self._counts.own(place, request)

    def capturing(self) -> bool:
        """Whether a graph is being captured."""
        return self._tables.capturing()

    def read(self, request: Request | None = None) -> None:
        """Hands on what was counted, of this request or of all; waits for the device."""
        self._counts.read(request)


class _DeviceCounts:
    """Sums [L, COUNTS] in the device's memory, for each place of a batch; place 0 is what runs outside batches.

    A graph that was captured adds to them at each replay, so they are kept while the mode is on the model. They only
    grow: what another thread or stream adds while they are read is not lost, but read the next time.
    """

    def __init__(self, tables: Tables, layers: int, take: Take) -> None:
        self._tables, self._layers, self._take = tables, layers, take
        self._sums: list[torch.Tensor | None] = []
        self._owners: list[Request | None] = []
        self._taken: list[list[list[float]]] = []  # of each place, sums that were handed on
        self._reading = RLock()

    def own(self, place: int, request: Request) -> None:
        while len(self._owners) <= place:
            self._owners.append(None)
            self._sums.append(None)
            self._taken.append([[0.0] * COUNTS for _ in range(self._layers)])
        if self._owners[place] is not request:
            self._read(place)
            self._owners[place] = request

    def add(self, place: int, request: Request, layer: int, replaced: torch.Tensor, share: torch.Tensor) -> None:
        """Adds one layer's call for `replaced` and `share`, [rows, K]."""
        self.own(place, request)
        sums = self._sums[place]
        if sums is None:
            if self._tables.capturing():
                raise EmoeError("nothing was routed before this capture; run one step first")
            with torch.inference_mode(False):  # steps outside that mode add to it too
                sums = torch.zeros((self._layers, COUNTS), dtype=torch.float64, device=share.device)
            self._sums[place] = sums
        row = sums[layer]
        row[0] += replaced.shape[0]
        row[1] += replaced.numel()
        # Every absent pick was replaced, and no other.
        row[2:4] += replaced.sum()
        # Sums stay numbers where a router gave NaN.
        row[4] += (share * replaced).nan_to_num().sum(dtype=torch.float64)

    def read(self, request: Request | None) -> None:
        for place, owner in enumerate(self._owners):
            if request is None or owner is request:
                self._read(place)

    def _read(self, place: int) -> None:
        sums, owner = self._sums[place], self._owners[place]
        if sums is None or owner is None:
            return
        if self._tables.capturing():
            raise EmoeError("counts cannot be read while a graph is captured; begin the request before the capture")
        with self._reading:
            values = sums.tolist()
            before, self._taken[place] = self._taken[place], values
            for layer, (now, then) in enumerate(zip(values, before, strict=True)):
                rows, picks, absent, substituted, mass = (a - b for a, b in zip(now, then, strict=True))
                if now != then:
                    self._take(owner, layer, int(rows), int(picks), int(absent), int(substituted), mass)
