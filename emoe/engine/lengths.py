"""How many tokens requests give, by task, learned from those that ended. Numbers only; bounded in memory."""

from __future__ import annotations

from collections import OrderedDict

MOST_TASKS = 256  # names come from requests, so anybody can make more; the least recently used are forgotten
_FADE = 0.98  # of what is known, at each request that ends: about the last 50 count
_BUCKETS = 24  # the last one has all from 2 ** 23 tokens
_ALL = None
_MOST_ANSWERS = 4096


class Lengths:
    """Distributions of output lengths, one a task and one over all, in buckets that double.

    Args:
        prior: tokens that a request is expected to give where nothing was learned, at most what it may give.
    """

    def __init__(self, prior: float = 128.0) -> None:
        self._prior = prior
        self._of: OrderedDict[str | None, tuple[list[float], list[float]]] = OrderedDict()
        self._answers: dict[tuple[str | None, int, int], float] = {}  # asked for each request that waits, at each step
        self._of[_ALL] = ([0.0] * _BUCKETS, [0.0] * _BUCKETS)

    def ended(self, task: str | None, tokens: int) -> None:
        """A request of this task gave so many tokens; not to be told of cancelled ones, which say nothing."""
        self._answers.clear()
        for name in {task, _ALL}:
            counts, sums = self._of.setdefault(name, ([0.0] * _BUCKETS, [0.0] * _BUCKETS))
            for bucket in range(_BUCKETS):
                counts[bucket] *= _FADE
                sums[bucket] *= _FADE
            bucket = min(tokens.bit_length(), _BUCKETS - 1)
            counts[bucket] += 1.0
            sums[bucket] += tokens
        if task is not _ALL:
            self._of.move_to_end(task)
        while len(self._of) > MOST_TASKS + 1:
            self._of.pop(next(name for name in self._of if name is not _ALL))

    def remaining(self, task: str | None, out: int, most_new: int) -> float:
        """Tokens still to be expected of a request that gave `out`: at least 1, at most what it may give."""
        known = self._answers.get((task, out, most_new))
        if known is None:
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers.clear()
            known = self._answers[task, out, most_new] = self._remaining(task, out, most_new)
        return known

    def _remaining(self, task: str | None, out: int, most_new: int) -> float:
        left = most_new - out
        if left <= 1:
            return float(max(left, 0))
        counts, sums = self._of.get(task) or self._of[_ALL]
        first = out.bit_length()
        # Requests that went on from here: all of the longer buckets, and of this one as far as its mean lies beyond.
        longer, total = sum(counts[first + 1 :]), sum(sums[first + 1 :])
        if first < _BUCKETS and counts[first] > 0 and sums[first] > out * counts[first]:
            longer += counts[first]
            total += sums[first]
        expected = total / longer - out if longer > 0.05 else max(self._prior - out, 0.5 * self._prior)
        return min(max(expected, 1.0), float(left))

    def __len__(self) -> int:
        return len(self._of) - 1

    def mean(self, task: str | None) -> float | None:
        """Mean over the requests of a task that ended; None where there was none."""
        counts, sums = self._of.get(task, ([0.0], [0.0]))
        return sum(sums) / sum(counts) if sum(counts) else None
