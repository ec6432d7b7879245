"""To which replica a request goes: where its predicted experts are, as long as nobody waits for it. Ids only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emoe.engine.expert_sets import overlap


@dataclass(frozen=True)
class State:
    """What a replica says of itself.

    Attributes:
        load: requests that run or wait there.
        places: requests that it runs at once.
        sets: predicted sets of those requests, as numbers of one `ExpertSets`.
        resident: experts in memory there, as such a number; None: not known.
    """

    load: int
    places: int
    sets: Sequence[int] = ()
    resident: int | None = None


Choice = Callable[[Sequence[State], int, int], int]  # states, the request's predicted set, its number -> a replica


def round_robin(states: Sequence[State], experts: int, turn: int) -> int:
    """One after the other."""
    return turn % len(states)


def least(states: Sequence[State], experts: int, turn: int) -> int:
    """The one with the fewest requests for its places; of equals the first."""
    return min(range(len(states)), key=lambda number: states[number].load / states[number].places)


def power_of_two(states: Sequence[State], experts: int, turn: int) -> int:
    """The one with fewer requests for its places, of two drawn at random; the same for the same turn."""
    count = len(states)
    if count < 2:
        return 0
    draw = random.Random(turn).randrange
    one, other = draw(count), draw(count - 1)
    pair = (one, other + (other >= one))
    return min(pair, key=lambda number: states[number].load / states[number].places)


SPREAD = 0.5  # of its places, that a replica may have more requests than the least loaded one and still be chosen


def affinity(states: Sequence[State], experts: int, turn: int) -> int:
    """Of those not much fuller than the emptiest, the one whose requests use the most alike experts.

    An empty replica counts as half alike: it is better than strangers, and worse than kin. It counts as more where
    more than half of the request's experts are in memory there.
    """
    shares = [state.load / state.places for state in states]
    bound = min(shares) + SPREAD

    def worth(number: int) -> tuple[float, float]:
        sets = states[number].sets
        if sets:
            likeness = sum(overlap(experts, other) for other in sets) / len(sets)
        else:
            likeness = max(0.5, overlap(experts, states[number].resident or 0))
        return (likeness, -shares[number])

    return max((number for number in range(len(states)) if shares[number] <= bound), key=worth)


CHOICES: dict[str, Choice] = {
    "round-robin": round_robin, "least": least, "power-of-two": power_of_two, "affinity": affinity,
}  # fmt: skip


def ranked(choose: Choice, states: Sequence[State], experts: int, turn: int) -> list[int]:
    """All replicas, the chosen one first, then the one that would be chosen without it, and so on."""
    left, order = list(range(len(states))), list[int]()
    while left:
        order.append(left.pop(choose([states[number] for number in left], experts, turn)))
    return order
