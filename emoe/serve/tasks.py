"""Names of tasks that requests bring: as many as were agreed, since counts are kept for each."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"  # in labels; no request's task has this name


class TaskNames:
    """Args:
    known: names that are there from the start.
    most: further ones, the first that come; the rest are unknown tasks.
    """

    def __init__(self, known: Iterable[str], most: int) -> None:
        self._names = set(known)
        self._room = most
        self._told = False

    def name(self, given: str | None) -> str | None:
        """The task of a request that gives this name; None: unknown."""
        if given is None or given == UNKNOWN:
            return None
        if given in self._names:
            return given
        if self._room:
            self._room -= 1
            self._names.add(given)
            return given
        if not self._told:
            self._told = True
            logger.warning("emoe: %d names of tasks are in use; further ones are served as unknown", len(self._names))
        return None
