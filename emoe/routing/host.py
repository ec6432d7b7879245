"""`select.choose` and the contract for one row on a CPU: decoding. Numbers in place of tensors take half the time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from emoe.routing.rules import Rule
from emoe.routing.select import DECISIVE


class Exchange(NamedTuple):
    """What changes in one row.

    Attributes:
        positions: where in the top-k, those with the least share first.
        substitutes: candidates for these positions, best first; as many.
        shares: the row's mass that each position had.
    """

    positions: list[int]
    substitutes: list[int]
    shares: list[float]

    def affordable(self, allowance: float) -> Exchange:
        """The cheapest exchanges, as many as the allowance pays for."""
        total, count = 0.0, 0
        for share in self.shares:
            total += share
            if not total <= allowance:  # so that NaN is not affordable
                break
            count += 1
        return Exchange(self.positions[:count], self.substitutes[:count], self.shares[:count])


def shares_of(rule: Rule, logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> list[float]:
    """[K] the shares of a row's mass that its picks have; arguments as `exchange` takes them."""
    if rule.weights_are_shares and weights.dtype == torch.float32:
        own: list[float] = weights[0].tolist()
        total = sum(own)
        return [weight / total for weight in own]
    shares: list[float] = rule.share(logits, index)[0].tolist()
    return shares


def exchange(
    rule: Rule,
    logits: torch.Tensor,
    weights: torch.Tensor,
    index: torch.Tensor,
    resident: torch.Tensor,
    present: list[bool],
    bias: float,
) -> Exchange:
    """Which picks of a row give way to which resident experts; the choice of `select.choose`.

    Args:
        rule: the router's.
        logits: [1, E] float32.
        weights: [1, K] the router's own.
        index: [1, K] the router's own picks.
        resident: [E] bool.
        present: whether each pick is resident.
        bias: over 0.
    """
    key, spread = rule.key(logits)
    keys = key.detach().numpy()[0]
    handicap = DECISIVE * spread.item() + 1 if bias >= DECISIVE else bias * spread.item()
    picks = index[0].tolist()
    absent = sorted(
        ((keys[pick] - handicap, where) for where, pick in enumerate(picks) if not present[where]), reverse=True
    )
    pool = np.where(resident.numpy(), keys, -np.inf)
    pool[picks] = -np.inf
    substitutes: list[int] = []
    kept = 0
    best = int(pool.argmax())
    while kept + len(substitutes) < len(absent):
        if absent[kept][0] >= pool[best]:
            kept += 1
        else:
            substitutes.append(best)
            pool[best] = -np.inf
            best = int(pool.argmax())
    if not substitutes:
        return Exchange([], [], [])
    shares = shares_of(rule, logits, weights, index)
    replaced = sorted((shares[where], where) for _, where in absent[kept:])
    return Exchange([where for _, where in replaced], substitutes, [share for share, _ in replaced])
