"""When a base set is chosen anew: on a beat of prompts, when routing drifts, when a task comes that it was not for."""

from __future__ import annotations

from collections.abc import Sequence

from emoe.predictor import UNKNOWN_TASK

# Drift test of period="adaptive": after each prompt, the coverage that a base set chosen just before it would have had,
# less that of the base set in use. What exceeds DRIFT_SLACK a prompt is summed; past DRIFT_LIMIT the base set is chosen
# anew. Both are shares of picks; twice as much of either loses under half a point on the public traces.
DRIFT_SLACK = 0.003
DRIFT_LIMIT = 0.005


class Refresh:
    """Every `period` prompts, or when observed routing says that another base set would have served better.

    A task that the base set was not chosen for does not wait for either: what is best for a mixture of tasks has seven
    points fewer hits than LRU on the public traces (docs/slots.md).

    Args:
        period: prompts, or "adaptive".
        offset: prompts after the first at which a fixed period begins (the first prompt always refreshes).
    """

    def __init__(self, period: int | str, offset: int = 0) -> None:
        self.period, self.offset = period, offset
        self.count = 0
        self._prompts = 0
        self._drift = 0.0
        self._tasks: frozenset[int] = frozenset()

    def due(self, tasks: Sequence[int] = ()) -> bool:
        """Asked once at the start of each prompt.

        Args:
            tasks: those that a base set would be chosen for now, the prompt's own last. None for predictors that know
                no tasks; UNKNOWN_TASK is no reason to choose anew.
        """
        number = self._prompts
        self._prompts += 1
        own = tasks[-1] if tasks else UNKNOWN_TASK
        # The first choice knows no prompt yet, so the drift test does not wait for a second bad one.
        due = number <= 1 or self._drift > DRIFT_LIMIT if self.period == "adaptive" else self._on_beat(number)
        if number == 0 or due or (own != UNKNOWN_TASK and own not in self._tasks):
            self._drift = 0.0
            self._tasks = frozenset(tasks)
            self.count += 1
            return True
        return False

    def saw(self, coverage: float, coverage_if_refreshed: float) -> None:
        """What the prompt that ended showed."""
        self._drift = max(0.0, self._drift + coverage_if_refreshed - coverage - DRIFT_SLACK)

    def _on_beat(self, number: int) -> bool:
        return (number - self.offset) % int(self.period) == 0
