"""In which order requests are admitted, and which of them not yet. docs/scheduler.md has the rules in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Protocol

from emoe.engine.expert_sets import overlap
from emoe.engine.outlook import Outlook
from emoe.engine.tickets import Live
from emoe.errors import ConfigError

LOOK = 256  # waiting requests that are looked at, in the policy's order; the rest waits for their turn
NEVER = float("inf")


class Policy(Protocol):
    """One order of admission."""

    def candidates(self, waiting: Collection[Live], running: Collection[Live], now: float) -> Iterator[Live]:
        """Who may be admitted now, the best first. Those left out wait on; waiting ones come in order of arrival."""


class Fcfs:
    """Who came first."""

    def __init__(self, outlook: Outlook) -> None:
        pass

    def candidates(self, waiting: Collection[Live], running: Collection[Live], now: float) -> Iterator[Live]:
        return iter(waiting)


class Sjf:
    """The shortest job first: rows of the prompt and tokens to be expected."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook

    def candidates(self, waiting: Collection[Live], running: Collection[Live], now: float) -> Iterator[Live]:
        return iter(sorted(waiting, key=lambda live: live.left + self._outlook.remaining(live)))


class Slo:
    """The paper's admission: the tightest first-token deadline first, as long as nobody misses a target by it."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook

    def candidates(self, waiting: Collection[Live], running: Collection[Live], now: float) -> Iterator[Live]:
        look = self._in_order(waiting, now)
        for live in self._preferred(look, running, now):
            if not running or not self._harms(live, look, running, now):
                yield live

    def _in_order(self, waiting: Collection[Live], now: float) -> list[Live]:
        """Those that can meet their first target by deadline, then those without one and those that cannot."""
        keyed = sorted((self._deadline(live, now), live.number, live) for live in waiting)
        return [live for _, _, live in islice(keyed, LOOK)]

    def _deadline(self, live: Live, now: float) -> float:
        """The latest moment to begin; NEVER where there is no target, or it cannot be met any more."""
        ticket = live.ticket
        ends = [] if ticket.ttft is None else [live.arrived + ticket.ttft]
        if ticket.ttlt is not None:
            ends.append(live.arrived + ticket.ttlt - self._outlook.remaining(live) * self._outlook.step(1))
        if not ends:
            return NEVER
        latest = min(ends) - self._outlook.first(live)
        return latest if latest >= now else NEVER

    def _preferred(self, look: list[Live], running: Collection[Live], now: float) -> list[Live]:
        return look

    def _harms(self, live: Live, look: Collection[Live], running: Collection[Live], now: float) -> bool:
        """Whether its loads and rows make anybody late who would not be late without it, itself included."""
        outlook, count = self._outlook, len(running)
        begun = [other for other in running if other.out]
        backlog = sum(outlook.first(other) for other in running if not other.out)
        delay = outlook.first(live)
        if outlook.late(live, now, backlog, count + 1) and not outlook.late(live, now, 0.0, 1):
            return True
        for other in begun:
            if outlook.late(other, now, backlog + delay, count + 1) and not outlook.late(other, now, backlog, count):
                return True
        for other in look:
            if other is not live and outlook.late(other, now, backlog + delay, count + 2):
                if not outlook.late(other, now, backlog, count + 1):
                    return True
        return False


class SloAffinity(Slo):
    """As `slo`; of those that have time, whose experts the running ones use comes first, and strangers wait a while."""

    HOLD = 0.8  # of the time that a stranger has until it must begin
    CLOSE = 0.6  # overlap with the lead from which one is no stranger

    def __init__(self, outlook: Outlook) -> None:
        super().__init__(outlook)
        self._lead = 0  # the set that those who run have most in common with

    def _preferred(self, look: list[Live], running: Collection[Live], now: float) -> list[Live]:
        if not running or not self._lead:
            self._lead = self._next_lead(look)
        urgent, close, strange = [], [], []
        for live in look:
            latest = self._deadline(live, now)
            likeness = overlap(live.experts, self._lead)
            if likeness >= self.CLOSE:
                close.append((-likeness, live))
            elif latest < NEVER and now >= live.arrived + self.HOLD * (latest - live.arrived):
                urgent.append(live)
            else:
                strange.append(live)
        if not close and strange and len(running) <= self.FEW:
            self._lead = self._next_lead(urgent + strange)
            strange.sort(key=lambda live: -overlap(live.experts, self._lead))
            return urgent + strange
        return urgent + [live for _, live in sorted(close, key=lambda each: each[0])]

    FEW = 15

    def _next_lead(self, look: list[Live]) -> int:
        """The set that those who wait have most in common with."""
        sets: dict[int, int] = {}
        for live in look:
            sets[live.experts] = sets.get(live.experts, 0) + 1
        return max(sets, key=lambda one: sum(count * overlap(one, other) for other, count in sets.items()), default=0)


MAKERS: dict[str, Callable[[Outlook], Policy]] = {"fcfs": Fcfs, "sjf": Sjf, "slo": Slo, "slo+affinity": SloAffinity}
POLICIES = tuple(MAKERS)


def make(name: str, outlook: Outlook) -> Policy:
    """A policy by name.

    Raises:
        ConfigError: it is not one of POLICIES.
    """
    if name not in MAKERS:
        raise ConfigError(f"policy={name!r} is not one of: {', '.join(POLICIES)}")
    return MAKERS[name](outlook)
