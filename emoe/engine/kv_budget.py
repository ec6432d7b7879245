"""Bytes for the state of requests within the memory budget of a model: lent by expert slots, and given back to them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from emoe.errors import BudgetError
from emoe.memory import available_memory, format_bytes
from emoe.options import parse_budget
from emoe.runtime import Runtime


class KvBudget:
    """Args:
        runtime: of the model; None for a plain one, whose budget stays.
        given: bytes that stay, or "auto": from what the plan reserved for the KV cache up to all that slots can lend.

    Attributes:
        nbytes: for all requests that run.
        least, most: what it may become.

    Raises:
        BudgetError: slots cannot lend what was asked for.
    """

    def __init__(self, runtime: Runtime | None, given: int | str) -> None:
        self._lending = runtime.lending if runtime is not None else None
        self._slots = sum(runtime.plan.slots_per_layer) if runtime is not None else 0
        self._slot_bytes = runtime.plan.slot_bytes if runtime is not None else 1
        self.nbytes = runtime.plan.kv_bytes if runtime is not None else available_memory() // 2
        self.least = self.nbytes
        spare = self._lending.most - self._lending.lent if self._lending is not None else 0
        self.most = self.nbytes + spare * self._slot_bytes
        if given != "auto":
            wanted = parse_budget(given, "kv_budget").nbytes
            if runtime is not None and not self.grow(wanted):
                raise BudgetError(
                    f"kv_budget={format_bytes(wanted)} is more than the {format_bytes(self.most)} that the plan's KV "
                    "cache and expert slots can give; a larger memory_budget, context or batch reserves more",
                    needed=wanted,
                    budget=self.most,
                )
            self.nbytes = self.least = self.most = wanted

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

    @property
    def slots(self) -> int:
        """Expert slots in use."""
        return self._slots - (self._lending.lent if self._lending is not None else 0)

    def slots_for(self, nbytes: int) -> int:
        """Slots to be lent so that it has so many bytes."""
        return max(0, -(-(nbytes - self.nbytes) // self._slot_bytes))

    def grow(self, nbytes: int) -> bool:
        """Has so many bytes from now on, or more, by slots that are lent; False where these are too few."""
        wanted = self.slots_for(nbytes)
        if wanted and self._lending is not None and nbytes <= self.most:
            self.nbytes += self._lending.lend(wanted) * self._slot_bytes
        return self.nbytes >= nbytes

    def shrink(self, nbytes: int) -> None:
        """Gives slots back, as far as so many bytes and `least` stay."""
        spare = (self.nbytes - max(nbytes, self.least)) // self._slot_bytes
        if spare > 0 and self._lending is not None:
            self.nbytes -= self._lending.take_back(spare) * self._slot_bytes

    def close(self) -> None:
        """All slots are back."""
        if self._lending is not None and not self._lending.closed:
            self._lending.take_back(self._lending.lent)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.nbytes,
            "least": self.least,
            "most": self.most,
            "slots_lent": self._lending.lent if self._lending is not None else 0,
        }
