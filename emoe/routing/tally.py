"""What routing modes changed, counted: per request, per task, per layer. Plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from threading import get_ident
from typing import Any


@dataclass(slots=True)
class Tally:
    """Sums over (token, layer) pairs.

    Attributes:
        rows: (token, layer) pairs routed.
        picks: experts that routers picked for them, top_k a row.
        absent: of these, picks whose expert was not resident.
        substituted: picks that another expert took the place of.
        misses: picks used in the end whose expert was not resident and had to be loaded.
        mass: sum over rows of the substituted share of the row's router mass.
    """

    rows: int = 0
    picks: int = 0
    absent: int = 0
    substituted: int = 0
    misses: int = 0
    mass: float = 0.0

    def add(
        self, rows: int, picks: int, absent: int = 0, substituted: int = 0, misses: int = 0, mass: float = 0.0
    ) -> None:
        """Adds one call."""
        self.rows += rows
        self.picks += picks
        self.absent += absent
        self.substituted += substituted
        self.misses += misses
        self.mass += mass

    @property
    def substituted_mass(self) -> float:
        """Mean share of router mass that was substituted, in [0, 1]."""
        return self.mass / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The sums, with `substituted_mass` in the place of `mass`."""
        values = asdict(self)
        del values["mass"]
        return {**values, "substituted_mass": self.substituted_mass}


@dataclass(slots=True)
class Request:
    """One request, from its first token to its last.

    Attributes:
        task: name of its task, None where unknown.
        name: its own name, for reports.
        tally: what was counted so far.
    """

    task: str | None = None
    name: str | None = None
    tally: Tally = field(default_factory=Tally)

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "name": self.name, **self.tally.to_dict()}


class OpenRequests:
    """Tells whose a forward is: of the innermost request open in its thread, else of the one that was opened last.

    Args:
        outside: whose it is where none is open.
    """

    def __init__(self, outside: Request) -> None:
        self._outside = outside
        self._open: dict[int, tuple[int, Request]] = {}  # thread and request by id(request), in the order of opening

    @property
    def current(self) -> Request:
        """The request of a forward in this thread."""
        entries, here = list(self._open.values()), get_ident()
        for thread, request in reversed(entries):
            if thread == here:
                return request
        return entries[-1][1] if entries else self._outside

    def begin(self, request: Request) -> None:
        """Opens a request in this thread."""
        self._open[id(request)] = get_ident(), request

    def end(self, request: Request) -> None:
        """It is over."""
        del self._open[id(request)]
