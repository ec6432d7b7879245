"""What will be: how long a request runs on, what a step will cost, which experts a request lacks. Seconds, bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from math import ceil

from emoe.engine.costs import Costs, Step
from emoe.engine.expert_sets import Expert, ExpertSets
from emoe.engine.lengths import Lengths
from emoe.engine.tickets import Live

NEVER = float("inf")
_FADE = 0.95  # of what decode steps loaded, a step


class Outlook:
    """Forecasts from costs, lengths and resident experts.

    Args:
        costs: gives the present costs.
        chunk_rows: rows of a step.
        expert_bytes: of one expert.
        resident: gives the experts in memory now; None where all are.
        places: requests that run at once.
    """

    def __init__(
        self,
        costs: Callable[[], Costs],
        chunk_rows: int,
        expert_bytes: int,
        resident: Callable[[], Container[Expert]] | None,
        places: int,
    ) -> None:
        self.places = places
        self._costs, self._chunk, self._expert_bytes, self._resident = costs, chunk_rows, expert_bytes, resident
        self.lengths = Lengths()
        self.sets = ExpertSets()
        self._here: int | None = None
        self._rows = self._bytes = self._experts = 0.0  # of decode steps, faded

    def lacking(self, live: Live) -> float:
        """The paper's dE: seconds to load what the request is predicted to use and is not in memory."""
        if self._resident is None or not live.experts:
            return 0.0
        if self._here is None:
            self._here = self.sets.within(self._resident())
        return (live.experts & ~self._here).bit_count() * self._expert_bytes * self._costs().byte

    def first(self, live: Live) -> float:
        """Seconds of its prompt alone, loads included."""
        costs = self._costs()
        return costs.forward * ceil(live.left / self._chunk) + costs.row * live.left + self.lacking(live)

    def step(self, rows: int) -> float:
        """Seconds of a step of so many decode rows, with the loads and experts a row took lately."""
        share = rows / self._rows if self._rows else 0.0
        return self._costs().step(rows, self._bytes * share, self._experts * share)

    def remaining(self, live: Live) -> float:
        """Tokens still to come, by what its task gave before."""
        return self.lengths.remaining(live.ticket.task, live.out, live.ticket.most_new)

    def due(self, live: Live) -> float:
        """When its first token is due; where its last one is, so early that this can be."""
        ticket = live.ticket
        last = NEVER if ticket.ttlt is None else max(0.0, ticket.ttlt - (self.remaining(live) - 1) * self.step(1))
        return live.arrived + min(NEVER if ticket.ttft is None else ticket.ttft, last)

    def saw(self, step: Step, decoding: bool) -> None:
        """A step is over; `decoding`: every row of it was a decode row."""
        self._here = None
        if decoding:
            self._rows = _FADE * self._rows + sum(step.rows.values())
            self._bytes = _FADE * self._bytes + step.loaded_bytes
            self._experts = _FADE * self._experts + (step.experts or 0)

    def late(self, live: Live, now: float, delay: float, running: int) -> bool:
        """Whether a target of a request is missed if it is delayed so long and then decodes among `running`."""
        ticket, first, remaining = live.ticket, live.first, self.remaining(live)
        token = self.step(running)
        if first is None:
            begun = now - live.arrived + delay + self.first(live)
            return (
                (ticket.ttft is not None and begun > ticket.ttft)
                or (ticket.tpot is not None and token > ticket.tpot)
                or (ticket.ttlt is not None and begun + (remaining - 1) * token > ticket.ttlt)
            )
        over = now + delay + remaining * token
        further = live.out - 1 + remaining
        return (ticket.tpot is not None and over - first > ticket.tpot * further) or (
            ticket.ttlt is not None and over - live.arrived > ticket.ttlt
        )

    def work(self, lives: Collection[Live], running: int) -> float:
        """Seconds of prompts and tokens that requests are still to run, always `running` of them beside each other."""
        token = self.step(running) / running
        return sum(self.first(live) + self.remaining(live) * token for live in lives)
