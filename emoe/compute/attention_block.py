"""Decode steps of attention blocks as one native call: what lies between their parts is not Python."""

from __future__ import annotations

from typing import Any

import torch

from emoe import native
from emoe.compute.attention import mask_arguments
from emoe.compute.ops import NAMES, prepared
from emoe.model.attention_form import AttentionForm, BlockNorm, BlockStep, Projection
from emoe.model.held import Held


def make_step(form: AttentionForm) -> BlockStep:
    """A function that computes decode steps of such a block, for weights that stay where they are.

    Raises:
        ConfigError: sizes contradict each other, or a dtype is none that the kernels compute in.
    """
    block = native.load().AttentionBlock(
        dtype=NAMES.get(form.dtype, str(form.dtype)), heads=form.heads, kv_heads=form.kv_heads, depth=form.depth,
        query=_projection(form.query), key=_projection(form.key), value=_projection(form.value),
        out=_projection(form.out), query_norm=_norm(form.query_norm), key_norm=_norm(form.key_norm),
    )  # fmt: skip
    out_width = form.out.weight.rows if isinstance(form.out.weight, Held) else form.out.weight.shape[0]
    heads = form.heads

    def step(
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        batch, count = x.shape[0], keys.shape[2]
        y = torch.empty((batch, out_width), dtype=x.dtype)
        mask_ptr, mask_strides = mask_arguments(mask, batch, heads, count)
        block.step(
            batch, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0,
            count, keys.data_ptr(), keys.stride()[:3], values.data_ptr(), values.stride()[:3],
            mask_ptr, mask_strides, scale, y.data_ptr(),
        )  # fmt: skip
        return y

    return step


def _projection(given: Projection) -> tuple[Any, int, int, str]:
    bias = given.bias
    weights, address = prepared(given.weight)
    return weights, address, 0 if bias is None else bias.data_ptr(), "float32" if bias is None else NAMES[bias.dtype]


def _norm(given: BlockNorm | None) -> tuple[int, int, float] | None:
    return None if given is None else (given.weight.data_ptr(), given.weight.shape[0], given.epsilon)
