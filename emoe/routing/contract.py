"""The online contract `max_substituted_mass`: an allowance never overdrawn, and a bias that learns to need less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.requests import Request, Tally
from emoe.routing.rules import Rule
from emoe.routing.select import DECISIVE, Choice, gaps

WINDOW = 256  # rows between two changes of a task's bias
RISE = 1.1
FALL = 0.5  # at most, per window
SLACK = 0.9  # the bias rises again only below this share of the bound
FLOOR = 1e-3


class Contract:
    """Keeps substituted router mass within a bound.

    Args:
        bound: mean share of router mass that may be substituted, in [0, 1].
        adapt: whether the bias follows (mode `biased`), or stays as asked (`resident`).
    """

    def __init__(self, bound: float, *, adapt: bool) -> None:
        self.bound = bound
        self.adapt = adapt
        self._factors: dict[str | None, float] = {}
        self._windows: dict[str | None, tuple[int, float]] = {}

    def allowance(self, tally: Tally, rows: int) -> float:
        """Mass that a call over `rows` rows may substitute, so that the request's mean stays within the bound."""
        return max(0.0, self.bound * (tally.rows + rows) - tally.mass)

    def bias(self, task: str | None, asked: float) -> float:
        """The bias to use for a task now; never more than the one asked for."""
        return min(asked, self._factors.get(task, asked))

    def observe(self, task: str | None, asked: float, rows: int, wanted: float) -> None:
        """Takes note of the mass that the bias would have substituted had there been no allowance."""
        if not self.adapt or asked == 0:
            return
        seen_rows, seen_mass = self._windows.get(task, (0, 0.0))
        seen_rows, seen_mass = seen_rows + rows, seen_mass + wanted
        if seen_rows >= WINDOW:
            mean = seen_mass / seen_rows
            now = min(self.bias(task, asked), DECISIVE)
            if mean > self.bound:
                self._factors[task] = now * max(FALL, self.bound / mean)
            elif mean < SLACK * self.bound:
                raised = max(now, FLOOR) * RISE
                self._factors[task] = asked if raised >= DECISIVE else raised
            seen_rows, seen_mass = 0, 0.0
        self._windows[task] = (seen_rows, seen_mass)

    def to_read(
        self,
        rule: Rule,
        logits: torch.Tensor,
        index: torch.Tensor,
        usable: torch.Tensor,
        choice: Choice,
        spans: Sequence[tuple[Request, slice]],
    ) -> tuple[list[int], list[float]]:
        """What the allowances of the requests of a call do not pay for.

        Args:
            rule, logits, index, usable: as `select.choose` took them.
            choice: what it gave.
            spans: whose the rows are.

        Returns:
            The absent experts that have to be read, and the mass that each span would have had substituted.
        """
        S, E = len(spans), len(usable)
        rows = [span.stop - span.start for _, span in spans]
        ids, absent = index.cpu().numpy(), (~usable[index]).cpu().numpy()
        shares = choice.mass.double().cpu().numpy()
        cells = np.repeat(np.arange(S), rows)[:, None] * E + ids
        mass = np.bincount(cells.ravel(), shares.ravel(), minlength=S * E).astype(np.float64).reshape(S, E)
        wanted = mass.sum(1).tolist()
        # A request has one allowance, however many of the spans are its own.
        requests = list({id(request): request for request, _ in spans}.values())
        own = np.array([[each is request for each, _ in spans] for request in requests], dtype=np.float64)  # [R, S]
        mass = own @ mass
        harm = mass.sum(0)
        if self.adapt and len(index) > 1:
            near = gaps(rule, logits, index, usable).cpu().numpy()
            harm = np.bincount(ids.ravel(), (shares * near).ravel(), minlength=E).astype(np.float64)
        unavoidable = ids[absent & ~choice.replaced.cpu().numpy()]
        candidates = set(np.flatnonzero(mass.any(0)).tolist()).difference(unavoidable.tolist())
        allowances = [
            self.allowance(request.tally, int(count)) for request, count in zip(requests, own @ rows, strict=True)
        ]
        avoided = avoidable(mass, harm, candidates, allowances)
        return sorted(set(ids[absent].tolist()).difference(avoided)), wanted


def avoidable(
    mass: NDArray[np.float64], harm: NDArray[np.float64], candidates: Iterable[int], allowances: Sequence[float]
) -> list[int]:
    """Which experts need not be read: those whose picks all find substitutes, the least harmful first.

    An expert is read once however many picks it has, so a substitution pays only where it is the last of its expert.

    Args:
        mass: [R, E] router mass of the picks of each expert, by request.
        harm: [E] what the substitutions of an expert are ranked by.
        candidates: experts all of whose picks could be substituted.
        allowances: mass that each request may substitute in this call.

    Returns:
        Ids; for every request the sum of their masses is within its allowance.
    """
    left = np.asarray(allowances, dtype=np.float64)
    avoided = []
    for expert in sorted(candidates, key=lambda expert: (harm[expert], expert)):
        after = left - mass[:, expert]
        if (after >= 0).all():
            left = after
            avoided.append(expert)
    return avoided
