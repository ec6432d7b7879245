"""Whether bytes serve better as expert slots or as the state of one more request. Numbers only.

A slot saves the misses that it turns into hits; its bytes as state admit tokens. Both are put into tokens a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PATIENCE = 16  # steps in which nobody waits for bytes, after which they go back to slots
MARGIN = 1.02  # by which one more request has to raise the rate: experts that leave their slots are read again
_MEMORY = 0.9  # of a running mean over steps


@dataclass(frozen=True)
class Observed:
    """What a step was.

    Attributes:
        seconds: it took.
        tokens: that came out.
        routed, missed: experts of layers that it used, and those of them that were in no slot.
    """

    seconds: float
    tokens: int
    routed: int
    missed: int


class Split:
    """Args:
    experts: of all layers.
    hit_rate: share of slots among experts -> expected hit rate; only its shape counts, the level is observed.
    miss_seconds: what a miss costs.
    row_seconds: what one more row costs.
    """

    def __init__(
        self,
        experts: int,
        hit_rate: Callable[[float], float],
        miss_seconds: Callable[[], float],
        row_seconds: Callable[[], float],
    ) -> None:
        self._experts, self._hit_rate, self._miss_seconds, self._row_seconds = (
            experts, hit_rate, miss_seconds, row_seconds,
        )  # fmt: skip
        self._seconds = self._tokens = self._routed = self._missed = 0.0
        self._idle = 0

    def saw(self, step: Observed) -> None:
        """A step is over."""
        old = _MEMORY if self._seconds else 0.0
        self._seconds = old * self._seconds + (1 - old) * step.seconds
        self._tokens = old * self._tokens + (1 - old) * step.tokens
        self._routed = old * self._routed + (1 - old) * step.routed
        self._missed = old * self._missed + (1 - old) * step.missed

    def more_misses(self, slots: int, lent: int) -> float:
        """Misses a step that come on top when `lent` of `slots` are taken away."""
        now, then = (1 - self._hit_rate(count / self._experts) for count in (slots, max(0, slots - lent)))
        rate = self._missed / self._routed if self._routed else 0.0
        # Where the curve says that nothing is missed, what is missed is compulsory, and the curve alone counts.
        later = rate * then / now if now > 0 else rate + then
        return max(0.0, min(1.0, later) - rate) * self._routed

    def worth(self, slots: int, lent: int) -> bool:
        """Whether one more request, for the state of which `lent` of `slots` are taken away, raises tokens a second."""
        if not self._tokens or not self._seconds:
            return True
        seconds = self._seconds + self._row_seconds() + self.more_misses(slots, lent) * self._miss_seconds()
        return (self._tokens + 1) / seconds > MARGIN * self._tokens / self._seconds

    def idle(self, wanted: bool) -> bool:
        """Asked once a step: whether bytes beyond those in use go back to slots. `wanted`: somebody waits for them."""
        self._idle = 0 if wanted else self._idle + 1
        return self._idle >= PATIENCE
