"""Attention of one row of each sequence over its cache by emoe's kernel; torch's own for all else.

What `sdpa` does where there is one row, and only that: whatever else is asked goes to Transformers' own function.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emoe import native
from emoe.compute.ops import NAMES
from emoe.model.attention_form import UNSERVED, is_mask
from emoe.model.seen import operations_are_seen

MOST_DEPTH = 1024  # of a head (csrc/core/attention.hpp)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A function of Transformers' `AttentionInterface`, in the place of "sdpa".

    Args:
        query: [B, heads, T, D]; key [B, kv_heads, S, D]; value [B, kv_heads, S, Dv].
        attention_mask: None, or [B or 1, heads or 1, T, S].

    Returns:
        ([B, T, heads, Dv], None).
    """
    if (
        not _is_ours(query, key, value, attention_mask)
        or dropout
        or any(kwargs.get(each) is not None for each in UNSERVED)
    ):
        given = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    B, H, _, D = query.shape
    S, Dv = value.shape[2:]
    out = torch.empty((B, 1, H, Dv), dtype=query.dtype)
    mask, mask_strides = mask_arguments(attention_mask, B, H, S)
    native.load().attend(
        batch=B, heads=H, kv_heads=key.shape[1], keys=S, depth=D, value_depth=Dv, dtype=NAMES[query.dtype],
        scale=D**-0.5 if scaling is None else scaling,
        query_ptr=query.data_ptr(), query_strides=query.stride()[:3],
        key_ptr=key.data_ptr(), key_strides=key.stride()[:3],
        value_ptr=value.data_ptr(), value_strides=value.stride()[:3],
        mask_ptr=mask, mask_strides=mask_strides, out_ptr=out.data_ptr(),
    )  # fmt: skip
    return out, None


def _is_ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernel computes attention of these: one row, in a dtype that it has, on the CPU, for no gradients."""
    if query.dim() != 4 or query.shape[2] != 1 or query.dtype not in NAMES or operations_are_seen():
        return False
    B, H, _, D = query.shape
    S, Dv = value.shape[2:]
    for each, shape in ((query, (B, H, 1, D)), (key, (B, key.shape[1], S, D)), (value, (B, key.shape[1], S, Dv))):
        if type(each) is not torch.Tensor or each.shape != shape or each.dtype != query.dtype or not each.is_cpu:
            return False
        if each.stride(-1) != 1 or (each.requires_grad and torch.is_grad_enabled()):
            return False
    if B == 0 or S == 0 or H % key.shape[1] or not (0 < D <= MOST_DEPTH and 0 < Dv <= MOST_DEPTH):
        return False
    return is_mask(mask, B, H, S)


def mask_arguments(mask: torch.Tensor | None, batch: int, heads: int, keys: int) -> tuple[int, tuple[int, int, int]]:
    """Address and strides of a mask as the kernels take them; 0 of none."""
    if mask is None:
        return 0, (0, 0, 0)
    of_batch, of_head, _, of_row = mask.expand(batch, heads, 1, keys).stride()
    return mask.data_ptr(), (of_batch, of_head, of_row)
