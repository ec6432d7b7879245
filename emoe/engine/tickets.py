"""A request as the scheduler knows it: what was asked for, and how far it is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, cast

from emoe.engine.expert_sets import Expert
from emoe.errors import ConfigError


@dataclass(frozen=True)
class Ticket:
    """What the scheduler knows of a request.

    Attributes:
        id: its name; nobody else that waits or runs has it.
        prompt: tokens of the prompt, at least 1.
        most_new: tokens that it may give, at least 1.
        kv_bytes: what its state takes at most, from admission to its end.
        task: None where unknown.
        experts: (layer, expert) pairs that it is predicted to use; empty where nothing is known.
        ttft: target for the first token, seconds from arrival; None for none.
        tpot: target for each further token, seconds of their mean.
        ttlt: target for the last token, seconds from arrival.
        whole: the prompt runs in one step, however long it is.
    """

    id: Hashable
    prompt: int
    most_new: int
    kv_bytes: int = 0
    task: str | None = None
    experts: frozenset[Expert] = frozenset()
    ttft: float | None = None
    tpot: float | None = None
    ttlt: float | None = None
    whole: bool = False

    def check(self) -> None:
        """Raises ConfigError where a number makes no sense."""
        who = f"request {self.id!r}: "
        for name, least in (("prompt", 1), ("most_new", 1), ("kv_bytes", 0)):
            require_number(f"{who}{name}", getattr(self, name), least)
        for name in ("ttft", "tpot", "ttlt"):
            value = getattr(self, name)
            if value is not None:
                require_number(f"{who}target {name}", value, 0, whole=False)
            if value == 0:
                raise ConfigError(f"{who}target {name}={value} is not over 0 seconds")


def require_number(name: str, value: object, least: int, *, whole: bool = True) -> None:
    """Raises ConfigError where a value is no number, or one less than `least`; NumPy's are numbers too."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real) or value != value:
        raise ConfigError(f"{name}={value!r} is not a {'whole ' if whole else ''}number of at least {least}")
    if cast(Any, value) < least:
        raise ConfigError(f"{name}={value} is less than {least}")


class Live:
    """A ticket that waits or runs, and how far it is.

    Attributes:
        ticket, number, arrived: what came when; numbers count arrivals.
        experts: its predicted set as a number (`ExpertSets`).
        due: when its first token is due (`Outlook.due`).
        admitted: when it began to run; None while it waits.
        done: tokens whose state is computed; of prompt and output together.
        out: tokens it gave.
        first, last: when its first and its latest token came.
        passes: requests that arrived later and were admitted before it.
    """

    __slots__ = ("admitted", "arrived", "done", "due", "experts", "first", "last", "number", "out", "passes", "ticket")

    def __init__(self, ticket: Ticket, number: int, arrived: float, experts: int = 0) -> None:
        self.ticket, self.number, self.arrived, self.experts = ticket, number, arrived, experts
        self.due = float("inf")
        self.admitted: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.done = self.out = self.passes = 0

    @property
    def left(self) -> int:
        """Rows until its next token."""
        return self.ticket.prompt + self.out - self.done

    @property
    def decoding(self) -> bool:
        """The next row gives a token, and another was given before."""
        return self.out > 0 and self.left == 1
