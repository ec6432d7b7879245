"""In which order requests are admitted, and which of them not yet. docs/serving.md has the rules in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from heapq import nsmallest
from itertools import islice
from typing import Protocol

from emoe.engine.expert_sets import overlap
from emoe.engine.outlook import NEVER, Outlook
from emoe.engine.tickets import Live
from emoe.errors import ConfigError

LOOK = 256  # waiting requests that are looked at, those that are due first
TRIES = 16  # of these, that are weighed against everybody's targets before the running ones go on alone

Fits = Callable[[Live], bool]  # whether there are bytes for it now


class Policy(Protocol):
    """One order of admission.

    Attributes:
        sheds: it knows targets, and refuses what cannot be served in time.
    """

    sheds: bool

    def candidates(
        self, waiting: Collection[Live], running: Collection[Live], now: float, fits: Fits
    ) -> Iterator[Live]:
        """Who may be admitted now, the best first. Those left out wait on; waiting ones come in order of arrival."""


class Fcfs:
    """Who came first."""

    sheds = False

    def __init__(self, outlook: Outlook) -> None:
        pass

    def candidates(
        self, waiting: Collection[Live], running: Collection[Live], now: float, fits: Fits
    ) -> Iterator[Live]:
        return filter(fits, waiting)


class Sjf:
    """The shortest job first: rows of the prompt and tokens to be expected."""

    sheds = False

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook

    def candidates(
        self, waiting: Collection[Live], running: Collection[Live], now: float, fits: Fits
    ) -> Iterator[Live]:
        return iter(sorted(filter(fits, waiting), key=lambda live: live.left + self._outlook.remaining(live)))


class Slo:
    """The paper's admission: the tightest first-token deadline first, as long as nobody misses a target by it."""

    sheds = True

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook

    def candidates(
        self, waiting: Collection[Live], running: Collection[Live], now: float, fits: Fits
    ) -> Iterator[Live]:
        outlook = self._outlook
        # Who is past its deadline comes after those that can still be on time, or one late request makes a hundred.
        look = nsmallest(LOOK, waiting, key=lambda live: (live.due < now, live.due, live.number))
        latest = {live.number: live.due - outlook.first(live) for live in look}
        look.sort(key=lambda live: latest[live.number] < now)
        ordered = filter(fits, self._preferred(look, latest, now))
        if not running:
            yield from ordered
            return
        backlog = sum(outlook.first(live) for live in running if not live.out)
        # Prompts run in order of admission, so a newcomer's delays those who give tokens, not those who are before it.
        on_time = [
            (live, backlog if live.out else 0.0)
            for live in running
            if not outlook.late(live, now, backlog if live.out else 0.0, len(running))
        ]
        slack = [(each - now, number) for number, each in latest.items() if each - now >= backlog]
        for live in islice(ordered, TRIES):
            delay = outlook.first(live)
            alone = outlook.late(live, now, 0.0, 1)  # then nothing is lost by waiting, nor by running
            if not alone and outlook.late(live, now, backlog, len(running) + 1):
                continue
            if any(each < backlog + delay and number != live.number for each, number in slack):
                continue
            if any(
                outlook.late(other, now, ahead + (delay if other.out else 0.0), len(running) + 1)
                for other, ahead in on_time
            ):
                continue
            yield live

    def _preferred(self, look: list[Live], latest: dict[int, float], now: float) -> Iterable[Live]:
        """`look`, which is in order of deadlines, in the order of this policy."""
        return look


class SloAffinity(Slo):
    """As `slo`; but as long as nobody's deadline is near, those come first that use the experts in use."""

    URGENT = 0.8  # of the time from its arrival until it must begin: from then on a stranger comes first
    CLOSE = 0.6  # overlap with the lead from which a request is no stranger

    def __init__(self, outlook: Outlook) -> None:
        super().__init__(outlook)
        self._lead = 0  # the set whose kin is admitted as long as there is any
        self._running = 0

    def candidates(
        self, waiting: Collection[Live], running: Collection[Live], now: float, fits: Fits
    ) -> Iterator[Live]:
        self._running = len(running)
        return super().candidates(waiting, running, now, fits)

    def _preferred(self, look: list[Live], latest: dict[int, float], now: float) -> Iterable[Live]:
        kin = [live for live in look if self._is_kin(live)]
        # With as many waiting as can run somebody waits whatever is done, and rows that use alike experts give more
        # tokens: who has no target waits until those that run are over, and then comes with its own kin.
        held = {live.number for live in look if latest[live.number] == NEVER} if self._is_full(look) else set()
        if not kin and len(look) > len(held):
            self._lead = self._next_lead(look)
            kin = [live for live in look if self._is_kin(live)]
        ours = {live.number for live in kin}
        strangers = [live for live in look if live.number not in ours]
        urgent = {live.number for live in strangers if self._is_urgent(live, latest[live.number], now)}
        first = [live for live in strangers if live.number in urgent]
        return [*first, *kin, *(live for live in strangers if live.number not in urgent | held)]

    def _is_full(self, look: list[Live]) -> bool:
        return self._running > 0 and len(look) >= self._outlook.places

    def _is_kin(self, live: Live) -> bool:
        """Of a request without a prediction nothing speaks against it."""
        return not live.experts or overlap(live.experts, self._lead) >= self.CLOSE

    def _is_urgent(self, live: Live, latest: float, now: float) -> bool:
        return now <= latest < NEVER and now >= live.arrived + self.URGENT * (latest - live.arrived)

    def _next_lead(self, look: list[Live]) -> int:
        """The set that those who wait have most in common with."""
        sets: dict[int, int] = {}
        for live in look[:TRIES]:  # pairs of sets are looked at
            sets[live.experts] = sets.get(live.experts, 0) + 1
        return max(sets, key=lambda one: sum(count * overlap(one, other) for other, count in sets.items()))


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
