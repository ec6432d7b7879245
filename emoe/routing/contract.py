"""The online contract `max_substituted_mass`: allowances never overdrawn, and a bias that learns to need less."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from emoe.requests import Request, Span, Spent
from emoe.routing.rules import Rule
from emoe.routing.select import DECISIVE, Choice, gaps

WINDOW = 256  # rows between two changes of a task's bias
RISE = 1.1
FALL = 0.5  # at most, per window
SLACK = 0.9  # the bias rises again only below this share of the bound
FLOOR = 1e-3


class Contract:
    """Keeps substituted router mass within a bound, in each request's prompt and in its answer.

    Args:
        bound: mean share of router mass that may be substituted, in [0, 1].
        adapt: whether the bias follows (mode `biased`), or stays as asked (`resident`).
        weights: [L] of a task, how bad substitution is in each layer; none is 0, and the mean of 1 / weight is 1, so
            that layers which spend in proportion to 1 / weight spend the bound. None: it is as bad in all.
    """

    def __init__(
        self, bound: float, *, adapt: bool, weights: Callable[[str | None], NDArray[np.float64]] | None = None
    ) -> None:
        self.bound = bound
        self.adapt = adapt
        self._weights = weights
        self._factors: dict[str | None, float] = {}
        self._windows: dict[str | None, tuple[int, float]] = {}

    def allowance(self, request: Request, layer: int, rows: int, *, decode: bool) -> float:
        """Mass that a call over `rows` rows of a layer may substitute.

        So that the phase's mean share stays within the bound, and its mean of shares times weights as well.
        """
        spent = request.decode if decode else request.prompt
        allowed = self.bound * (spent.rows + rows)
        return max(0.0, min(allowed - spent.mass, (allowed - spent.harm) / self._weight(request.task, layer)))

    def spend(self, request: Request, layer: int, rows: int, mass: float, *, decode: bool) -> None:
        """A call was routed, and so much of its mass substituted."""
        spent = request.decode if decode else request.prompt
        harm = mass * self._weight(request.task, layer)
        after = Spent(spent.rows + rows, spent.mass + mass, spent.harm + harm)
        if decode:
            request.decode = after
        else:
            request.prompt = after

    def _weight(self, task: str | None, layer: int) -> float:
        return 1.0 if self._weights is None else float(self._weights(task)[layer])

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
        layer: int,
        rule: Rule,
        logits: torch.Tensor,
        index: torch.Tensor,
        usable: torch.Tensor,
        choice: Choice,
        spans: Sequence[Span],
        decode: Sequence[bool],
    ) -> tuple[list[int], list[float]]:
        """What the allowances of the requests of a call do not pay for.

        Args:
            layer: its number.
            rule, logits, index, usable: as `select.choose` took them.
            choice: what it gave.
            spans: whose the rows are.
            decode: of each span, whether it is decode.

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
        # A request has one allowance a phase, however many of the spans are its own.
        purses = list(
            {(id(each), phase): (each, phase) for (each, _), phase in zip(spans, decode, strict=True)}.values()
        )
        own = np.array(
            [
                [each is request and mine == phase for (each, _), mine in zip(spans, decode, strict=True)]
                for request, phase in purses
            ],
            dtype=np.float64,
        )  # [R, S]
        mass = own @ mass
        harm = mass.sum(0)
        if self.adapt and len(index) > 1:
            near = gaps(rule, logits, index, usable).cpu().numpy()
            harm = np.bincount(ids.ravel(), (shares * near).ravel(), minlength=E).astype(np.float64)
        unavoidable = ids[absent & ~choice.replaced.cpu().numpy()]
        candidates = set(np.flatnonzero(mass.any(0)).tolist()).difference(unavoidable.tolist())
        allowances = [
            self.allowance(request, layer, int(count), decode=phase)
            for (request, phase), count in zip(purses, own @ rows, strict=True)
        ]
        avoided = avoidable(mass, harm, candidates, allowances)
        return sorted(set(ids[absent].tolist()).difference(avoided)), wanted


def avoidable(
    mass: NDArray[np.float64], harm: NDArray[np.float64], candidates: Iterable[int], allowances: Sequence[float]
) -> list[int]:
    """Which experts need not be read: those whose picks all find substitutes, the least harmful first.

    An expert is read once however many picks it has, so a substitution pays only where it is the last of its expert.

    Args:
        mass: [R, E] router mass of the picks of each expert, by request and phase.
        harm: [E] what the substitutions of an expert are ranked by.
        candidates: experts all of whose picks could be substituted.
        allowances: mass that each may substitute in this call.

    Returns:
        Ids; for each the sum of their masses is within its allowance.
    """
    left = np.asarray(allowances, dtype=np.float64)
    avoided = []
    for expert in sorted(candidates, key=lambda expert: (harm[expert], expert)):
        after = left - mass[:, expert]
        if (after >= 0).all():
            left = after
            avoided.append(expert)
    return avoided
