"""Picks under a routing mode: which routed experts give way to resident ones. Tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emoe.routing.rules import OUTSIDE, Rule

# A resident expert lies at most one range below the best, and OUTSIDE more outside the router's groups: from here on a
# bonus decides alone.
DECISIVE = 1 + OUTSIDE


@dataclass(frozen=True, slots=True)
class Choice:
    """Picks of a mode beside the router's own.

    Attributes:
        index: [T, K] the mode's picks.
        replaced: [T, K] bool, which of the router's picks are not among them.
        share: [T, K] float32, shares of the row's mass that the router's picks have.
    """

    index: torch.Tensor
    replaced: torch.Tensor
    share: torch.Tensor

    @property
    def mass(self) -> torch.Tensor:
        """[T, K] shares of the picks that are replaced, 0 for the others."""
        return self.share.where(self.replaced, 0.0)


def choose(
    rule: Rule,
    logits: torch.Tensor,
    index: torch.Tensor,
    resident: torch.Tensor,
    stay: torch.Tensor,
    bias: float | torch.Tensor,
) -> Choice:
    """Top-k of the router's own picks and the resident experts, where residents have a bonus.

    Others need not be looked at: an expert neither picked nor resident is below every pick that is not resident.

    Args:
        rule: the router's.
        logits: [T, E] float32, from `rule.logits`.
        index: [T, K] the router's own picks.
        resident: [E] bool.
        stay: [T, K] bool, picks that stay whatever the bonus; those that are resident belong to them.
        bias: the bonus in ranges of the row's selection key, infinite for resident experts first; a number or [T, 1].
    """
    key, spread = rule.key(logits)
    if isinstance(bias, torch.Tensor):
        handicap = bias.clamp_max(DECISIVE) * spread + (bias >= DECISIVE)
    else:
        handicap = DECISIVE * spread + 1 if bias >= DECISIVE else bias * spread
    # Picks are lowered rather than residents raised, and only by name: the order among residents keeps every bit, and a
    # router that selects in lower precision than this never sees two absent experts exchanged.
    picked = (key.gather(1, index) - handicap).masked_fill_(stay, float("inf"))
    return _best(rule, logits, index, key.masked_fill(~resident, float("-inf")), picked, stay)


def choose_resident(rule: Rule, logits: torch.Tensor, index: torch.Tensor, resident: torch.Tensor) -> Choice:
    """`choose` with an infinite bias where residents are at least K: whatever the logits, every pick is resident.

    Args:
        rule, logits, index, resident: as for `choose`.
    """
    # Finite, so that what is not resident is below it also where a router gave infinities or NaN.
    key = rule.key(logits)[0].nan_to_num()
    absent, stay = float("-inf"), resident[index]
    picked = key.new_full(index.shape, absent).masked_fill_(stay, float("inf"))
    return _best(rule, logits, index, key.masked_fill(~resident, absent), picked, stay)


def _best(
    rule: Rule,
    logits: torch.Tensor,
    index: torch.Tensor,
    candidates: torch.Tensor,
    picked: torch.Tensor,
    stay: torch.Tensor,
) -> Choice:
    """Top-k of candidates [T, E], where the router's picks have the keys `picked` [T, K]."""
    chosen = candidates.scatter_(1, index, picked).topk(index.shape[1], dim=-1).indices
    replaced = (index.unsqueeze(2) != chosen.unsqueeze(1)).all(-1) & ~stay  # a NaN would rank above what stays
    return Choice(chosen, replaced, rule.share(logits, index))


def gaps(rule: Rule, logits: torch.Tensor, index: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """How far each pick is above its row's best substitute: [T, K] float32, in ranges of the selection key, from 0.

    Args:
        rule, logits, index: as for `choose`.
        usable: [E] bool, experts that can be substitutes. A row without one has gaps of DECISIVE.
    """
    key, spread = rule.key(logits)
    best = key.masked_fill(~usable, float("-inf")).scatter(1, index, float("-inf")).amax(-1, keepdim=True)
    return ((key.gather(1, index) - best) / spread.clamp_min(torch.finfo(key.dtype).tiny)).clamp(0, DECISIVE)


def to_fill(share: torch.Tensor, index: torch.Tensor, present: torch.Tensor, experts: int, room: int) -> torch.Tensor:
    """The absent experts that free slots go to: those with most routed mass in this call.

    Args:
        share: [T, K] shares of the routed picks.
        index: [T, K] routed picks.
        present: [T, K] bool, whether the pick is resident.
        experts: number of experts.
        room: free slots, at least 1.

    Returns:
        ids, at most `room`.
    """
    mass = torch.zeros(experts, device=share.device).scatter_add_(0, index.flatten(), (share * ~present).flatten())
    best = mass.topk(min(room, experts))
    return best.indices[best.values > 0]
