"""Bytes for the state of requests, within the memory budget of the model. Numbers only."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from emoe.errors import BudgetError
from emoe.memory import available_memory, format_bytes
from emoe.options import parse_budget
from emoe.runtime import Runtime


class KvBudget:
    """Args:
        runtime: of the model; None for a plain one.
        given: bytes, or "auto".

    Attributes:
        nbytes: for all requests that run.
        least, most: what it may become.
    """

    def __init__(self, runtime: Runtime | None, given: int | str) -> None:
        if given != "auto":
            self.nbytes = parse_budget(given, "kv_budget").nbytes
        elif runtime is not None:
            self.nbytes = runtime.plan.kv_bytes
        else:
            self.nbytes = available_memory() // 2
        self.least = self.most = self.nbytes

    def require(self, nbytes: int, id: Hashable, tokens: int) -> None:
        """BudgetError where a request can never fit."""
        if nbytes > self.most:
            raise BudgetError(
                f"request {id!r} of {tokens} tokens needs {format_bytes(nbytes)} for its state, of "
                f"{format_bytes(self.most)} that all requests may have; fewer tokens, or a larger kv_budget or "
                "memory_budget, will do",
                needed=nbytes,
                budget=self.most,
            )

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.nbytes, "least": self.least, "most": self.most}
