"""How a router turns logits into picks and weights, written down as a `Rule` that can be applied to other picks.

Tensors only; `recognise.py` finds the rule of a router, `select.py` applies it under a routing mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")

# An expert outside the router's groups counts as this many ranges worse: over 1, so that it never beats one inside.
OUTSIDE = 1.25


@dataclass(frozen=True)
class Groups:
    """Group-limited routing: only experts of the `keep` best of `count` equal groups are picked."""

    count: int
    keep: int
    by: Literal["max", "top2"]  # a group's score: that of its best expert, or the sum of its best two


@dataclass(frozen=True)
class Vector:
    """A tensor of one number per expert, read from its module at each use, so that moving the model keeps it right."""

    owner: nn.Module
    name: str

    def get(self) -> torch.Tensor:
        """[E] float32."""
        tensor = cast(torch.Tensor, getattr(self.owner, self.name)).detach()
        return tensor if tensor.dtype == torch.float32 and tensor.dim() == 1 else tensor.float().reshape(-1)


@dataclass(frozen=True)
class Rule:
    """Logits -> selection keys, shares and weights, as one family's router computes them.

    Attributes:
        score: what turns logits into scores.
        normalised: weights are divided by their sum over the picks.
        scale: factor on all weights.
        probabilities: the module gives softmax probabilities in the place of logits.
        correction: added to scores or logits (`corrects`) for selection only.
        groups: group-limited selection.
        expert_scale: factor on the weight of each expert.
        jitter: the threshold of a sparse mixer (phimoe), where each pick's softmax runs over its near rivals only.
    """

    score: Score
    normalised: bool
    scale: float = 1.0
    probabilities: bool = False
    correction: Vector | None = None
    corrects: Literal["scores", "logits"] = "scores"
    groups: Groups | None = None
    expert_scale: Vector | None = None
    jitter: float | None = None

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, E] (up to a constant per token) from the first output of the router module."""
        output = output.float()
        return output.clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else output

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """[T, E] scores of all experts."""
        if self.score == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.score == "sigmoid" else F.softplus(logits).sqrt()

    def choice(self, logits: torch.Tensor) -> torch.Tensor:
        """[T, E] what the router compares, before groups."""
        if self.correction is None:
            return self.scores(logits)
        base = logits if self.corrects == "logits" else self.scores(logits)
        return base + self.correction.get()

    def allowed(self, choice: torch.Tensor) -> torch.Tensor | None:
        """[T, E] bool, the experts in the groups that the router chose; None where there are no groups.

        Args:
            choice: [T, E], from `choice`.
        """
        if self.groups is None:
            return None
        count = self.groups.count
        T, E = choice.shape
        grouped = choice.view(T, count, E // count)
        best = grouped.amax(-1) if self.groups.by == "max" else grouped.topk(2, dim=-1).values.sum(-1)  # [T, G]
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(self.groups.keep, dim=-1).indices, True)
        return chosen.unsqueeze(-1).expand(T, count, E // count).reshape(T, E)

    def key(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What decides between experts, larger first, and how far it ranges per token: ([T, E], [T, 1]).

        Logits where the rule selects in their order (scores saturate, logits do not), otherwise scores plus
        correction. An expert outside the chosen groups is placed below all those inside.
        """
        if self.correction is None and self.groups is None:
            low, high = logits.aminmax(dim=-1, keepdim=True)
            return logits, high - low
        choice = self.choice(logits)
        key = logits if self.correction is None else choice
        low, high = key.aminmax(dim=-1, keepdim=True)
        spread = high - low
        allowed = self.allowed(choice)
        return (key if allowed is None else torch.where(allowed, key, key - OUTSIDE * spread)), spread

    @property
    def weights_are_shares(self) -> bool:
        """Whether the router's weights are in proportion to its scores."""
        return self.expert_scale is None and self.jitter is None

    def share(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[T, K] the picks' scores divided by their sum."""
        picked = logits.gather(1, index)
        if self.score == "softmax":
            return picked.softmax(-1)
        scores = self.scores(picked)
        return scores / scores.sum(-1, keepdim=True)

    def weights(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[T, K] float32 weights that the router gives to these picks."""
        if self.jitter is not None:
            weights = _sparse_mixer(logits, index, self.jitter)
        elif self.normalised:
            weights = self.share(logits, index)
        elif self.score == "softmax":
            weights = (logits.gather(1, index) - logits.logsumexp(-1, keepdim=True)).exp()
        else:
            weights = self.scores(logits.gather(1, index))
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.get()[index]
        return weights if self.scale == 1.0 else weights * self.scale

    def __str__(self) -> str:
        parts: list[str] = ["sparse mixer" if self.jitter is not None else self.score]
        if self.correction is not None:
            parts.append(f"+ {self.correction.name} on {self.corrects}")
        if self.groups is not None:
            parts.append(f"{self.groups.keep} of {self.groups.count} groups by {self.groups.by}")
        if self.normalised:
            parts.append("normalised")
        if self.expert_scale is not None:
            parts.append(f"times {self.expert_scale.name}")
        if self.scale != 1.0:
            parts.append(f"times {self.scale:g}")
        return ", ".join(parts)


def _sparse_mixer(logits: torch.Tensor, index: torch.Tensor, jitter: float) -> torch.Tensor:
    """Each pick's softmax over the rivals within the threshold, the picks before it left out (arXiv 2409.12136).

    Experts that rank above the last pick and are not picked are left out as well: they were passed over.
    """
    picked, order = logits.gather(1, index).sort(-1, descending=True)
    used = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, True)
    rivals = logits.masked_fill(~used & (logits > picked[:, -1:]), float("-inf"))
    magnitude = logits.abs()
    columns = []
    for rank in range(index.shape[1]):
        best = picked[:, rank : rank + 1]
        far = (best - rivals) / magnitude.clamp(min=best) > 2 * jitter
        columns.append((best - rivals.masked_fill(far, float("-inf")).logsumexp(-1, keepdim=True)).exp())
        rivals = rivals.scatter(1, index.gather(1, order[:, rank : rank + 1]), float("-inf"))
    return torch.empty_like(picked).scatter_(1, order, torch.cat(columns, dim=1))
