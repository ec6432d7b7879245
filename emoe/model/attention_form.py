"""What an attention block is made of, as far as a kernel has to know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from emoe.model.held import Held

# What "sdpa" looks at beside the tensors, and no kernel of emoe's.
UNSERVED = ("softcap", "position_bias", "cache")


class Projection(NamedTuple):
    """A linear layer: its weight [outputs, inputs], encoded or plain, and its bias [outputs] or None."""

    weight: Held | torch.Tensor
    bias: torch.Tensor | None


class BlockNorm(NamedTuple):
    """An RMSNorm over a head, or over all heads together, by the width of its weight."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class AttentionForm:
    """Projections of the rows x to queries, keys and values; norms of queries and keys; rotary positions, an element
    with the one half of the rotated ones behind it; attention; the projection of its output.

    Attributes:
        dtype: of x, y and the cache.
        heads, kv_heads: of queries; of keys and values.
        depth: of a head.
        query_norm, key_norm: both or none.
    """

    dtype: torch.dtype
    heads: int
    kv_heads: int
    depth: int
    query: Projection
    key: Projection
    value: Projection
    out: Projection
    query_norm: BlockNorm | None = None
    key_norm: BlockNorm | None = None


# y [B, inputs of the model] of x [B, inputs], cos and sin [B or 1, rotated], keys and values [B, kv_heads, S, D] whose
# last row it writes, a mask [B or 1, heads or 1, 1, S] of bool or None, and the scale of scores.
BlockStep = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor
]


def is_mask(mask: Any, batch: int, heads: int, keys: int) -> bool:
    """Whether the kernels read it as a mask of one row of each sequence: None, or bool [B or 1, heads or 1, 1, S]."""
    if mask is None:
        return True
    if type(mask) is not torch.Tensor or mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu:
        return False
    return mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (1, keys)
