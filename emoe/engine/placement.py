"""To which replica a request goes: where its predicted experts are, as long as nobody waits for it. Ids only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emoe.engine.expert_sets import overlap


@dataclass(frozen=True)
class State:
    """What a replica says of itself.

    Attributes:
        load: requests that run or wait there.
        places: requests that it runs at once.
        sets: predicted sets of those requests, as numbers of one `ExpertSets`.
    """

    load: int
    places: int
    sets: Sequence[int] = ()


def round_robin(states: Sequence[State], experts: int, turn: int) -> int:
    """One after the other."""
    return turn % len(states)


def least(states: Sequence[State], experts: int, turn: int) -> int:
    """The one with the fewest requests for its places; of equals the first."""
    return min(range(len(states)), key=lambda number: states[number].load / states[number].places)


SPREAD = 0.5  # of its places, that a replica may have more requests than the least loaded one and still be chosen


def affinity(states: Sequence[State], experts: int, turn: int) -> int:
    """Of those not much fuller than the emptiest, the one whose requests use the most alike experts.

    An empty replica counts as half alike: it is better than strangers, and worse than kin.
    """
    shares = [state.load / state.places for state in states]
    bound = min(shares) + SPREAD

    def worth(number: int) -> tuple[float, float]:
        sets = states[number].sets
        likeness = sum(overlap(experts, other) for other in sets) / len(sets) if sets else 0.5
        return (likeness, -shares[number])

    return max((number for number in range(len(states)) if shares[number] <= bound), key=worth)


CHOICES = {"round-robin": round_robin, "least": least, "affinity": affinity}
