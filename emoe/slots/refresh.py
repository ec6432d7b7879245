"""When a base set is chosen anew: on a beat of prompts, when routing drifts, when a task comes that it was not for."""

from __future__ import annotations

from collections.abc import Sequence

from emoe.predictor import UNKNOWN_TASK

# period="adaptive" goes by shares of picks: of each prompt the coverage of a base set that is kept and of one that is
# chosen anew, just before the prompt. On the public traces twice or half of any value below loses under half a point.
DRIFT_SLACK = 0.003  # what a new one may be better by, a prompt, for nothing
DRIFT_LIMIT = 0.005  # what exceeds that, summed over prompts, calls for one
DROP = 0.05  # below its usual coverage a prompt is a surprise: traffic may have changed
WORTH = 0.02  # a surprise calls for a new one while that has covered so much more after those before
PAID = 0.04  # one that covers so much more than its predecessor is followed by the next at once
BEATS = (5, 10)  # prompts after which each of its rivals chooses, whatever was seen
LEAD = 0.01  # what a rival covers more, over some prompts, before it is followed
_WORTH_RATE, _USUAL_RATE, _LEAD_RATE = 0.25, 0.3, 0.1  # weight of the newest in the means


class Refresh:
    """Every `period` prompts, or when observed routing says that another base set would have served better.

    A task that the base set was not chosen for does not wait for either: what is best for a mixture of tasks has seven
    points fewer hits than LRU on the public traces (docs/slots.md).

    "adaptive" has rivals, chosen on beats of their own: where tasks take turns, the prompts that call for a new choice
    may be those for which it is the worst. One that has covered more is followed in the place of its own choice.

    Args:
        period: prompts, or "adaptive".
        offset: prompts after the first at which a fixed period begins (the first prompt always refreshes).

    Attributes:
        count: how often the base set that serves became another choice.
        rivals_due: of each rival, whether it chooses anew at the prompt that began.
        follows: whose base set serves it; None: its own.
    """

    def __init__(self, period: int | str, offset: int = 0) -> None:
        self.period, self.offset = period, offset
        self.count = 0
        self._prompts = 0
        self._drift = 0.0
        self._surprised = self._paid = self._renewed = False
        self._usual: float | None = None
        self._worth = PAID
        self._leads = [0.0] * len(BEATS)
        self._followed: int | None = None
        self.rivals_due = [False] * len(BEATS) if period == "adaptive" else []
        self.follows: int | None = None
        self._tasks: frozenset[int] = frozenset()
        self._rivals_tasks = [self._tasks] * len(BEATS)

    def due(self, tasks: Sequence[int] = (), *, known: bool = True) -> bool:
        """Asked once at the start of each prompt.

        Args:
            tasks: those that a base set would be chosen for now, the prompt's own last. None for predictors that know
                no tasks; UNKNOWN_TASK is no reason to choose anew.
            known: whether anything was, at the last choice.
        """
        number = self._prompts
        self._prompts += 1
        own = tasks[-1] if tasks else UNKNOWN_TASK
        due = self._adapts(number) if self.period == "adaptive" else self._on_beat(number)
        self._renewed = number == 0 or due or not known or _lacks(self._tasks, own)
        if self.period == "adaptive":
            self.rivals_due = [
                number <= 1 or not known or number % beat == 0 or _lacks(its, own)
                for beat, its in zip(BEATS, self._rivals_tasks, strict=True)
            ]
            self._rivals_tasks = [
                frozenset(tasks) if now else its for now, its in zip(self.rivals_due, self._rivals_tasks, strict=True)
            ]
        if self._renewed:
            self._drift = 0.0
            self._tasks = frozenset(tasks)
        another = self._renewed if self.follows is None else self.rivals_due[self.follows]
        self.count += another or self.follows != self._followed
        self._followed = self.follows
        return self._renewed

    def saw(self, kept: float, renewed: float, *rivals: float) -> None:
        """What the prompt that ended showed: the share of its picks that each of two base sets covers.

        Args:
            kept: that of the prompt before.
            renewed: one that was chosen just before the prompt.
            rivals: those that were chosen when `rivals_due` said so.
        """
        own = renewed if self._renewed else kept
        for number, covers in enumerate(rivals):
            self._leads[number] += _LEAD_RATE * (covers - own - self._leads[number])
        if rivals:
            self.follows = self._leader()
        gain = renewed - kept
        if self._surprised:
            self._worth += _WORTH_RATE * (gain - self._worth)
        if not self._renewed:
            self._drift = max(0.0, self._drift + gain - DRIFT_SLACK)
        self._paid = self._renewed and gain > PAID
        self._surprised = self._usual is not None and own < self._usual - DROP
        best = max(kept, renewed)
        self._usual = best if self._usual is None else self._usual + _USUAL_RATE * (best - self._usual)

    def _leader(self) -> int | None:
        held = 0.0 if self.follows is None else max(0.0, self._leads[self.follows])
        best = max(range(len(BEATS)), key=self._leads.__getitem__)
        if self._leads[best] > held + LEAD:
            return best
        return self.follows if held > 0 else None

    def _adapts(self, number: int) -> bool:
        # The first choice knows no prompt yet, so the drift test does not wait for a second bad one.
        return number <= 1 or self._drift > DRIFT_LIMIT or self._paid or (self._surprised and self._worth > WORTH)

    def _on_beat(self, number: int) -> bool:
        return (number - self.offset) % int(self.period) == 0


def _lacks(tasks: frozenset[int], own: int) -> bool:
    return own != UNKNOWN_TASK and own not in tasks
