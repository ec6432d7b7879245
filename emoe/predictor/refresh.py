"""When a base set is chosen anew: on a beat of prompts, or when observed routing drifts away from it. Numbers only."""

from __future__ import annotations

# Drift test of period="adaptive": after each prompt, the coverage that a base set chosen just before it would have had,
# less that of the base set in use. What exceeds DRIFT_SLACK a prompt is summed; past DRIFT_LIMIT the base set is chosen
# anew. Both are shares of picks; twice as much of either loses under half a point on the public traces.
DRIFT_SLACK = 0.003
DRIFT_LIMIT = 0.005


class Refresh:
    """Every `period` prompts, or when observed routing says that another base set would have served better.

    Args:
        period: prompts, or "adaptive".
        offset: prompts after the first at which a fixed period begins (the first prompt always refreshes).
    """

    def __init__(self, period: int | str, offset: int = 0) -> None:
        self.period, self.offset = period, offset
        self.count = 0
        self._prompts = 0
        self._drift = 0.0

    def due(self) -> bool:
        """Asked once at the start of each prompt."""
        number = self._prompts
        self._prompts += 1
        # The first choice knows no prompt yet, so the drift test does not wait for a second bad one.
        due = number <= 1 or self._drift > DRIFT_LIMIT if self.period == "adaptive" else self._on_beat(number)
        if number == 0 or due:
            self._drift = 0.0
            self.count += 1
            return True
        return False

    def saw(self, coverage: float, coverage_if_refreshed: float) -> None:
        """What the prompt that ended showed."""
        self._drift = max(0.0, self._drift + coverage_if_refreshed - coverage - DRIFT_SLACK)

    def _on_beat(self, number: int) -> bool:
        return (number - self.offset) % int(self.period) == 0
