"""Bytes of the cache that generation keeps per token, measured on the meta device with the model's own cache class."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_PROBE = 8  # tokens
SHAPE_ONLY = "emoe_shape_only"  # an experts implementation that lets a model run on the meta device


def measure(model: Any, *, context: int, batch: int) -> tuple[int, str]:
    """Bytes of the cache for `batch` sequences of `context` tokens.

    Runs the model's structure on the meta device, or that of its text decoder where the whole does not run on text
    alone. Sliding windows are run at the full length; elsewhere two short lengths give the line, which recurrent
    states, that do not grow, enter once (their reference code loops over every token). Where a family's forward cannot
    run on the meta device, attention heads of the config are counted.

    Returns:
        (bytes, a note where the figure is an estimate, else "").
    """
    for part in decoders(model):
        try:
            if (measured := _measured(part, context, batch)) > 0:
                return measured, ""
        except Exception as error:
            logger.debug("KV cache of %s not measured: %s", type(part).__name__, error)
    try:
        return _from_config(model, context, batch), "KV cache estimated from the config"
    except Exception as error:
        logger.debug("KV cache of %s not estimated: %s", type(model).__name__, error)
    return 0, "KV cache unknown for this family: leave room for it beside the budget"


def decoders(model: Any) -> list[Any]:
    """The model, and the part of it that reads text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return [model] if decoder is None or decoder is model or not hasattr(decoder, "config") else [model, decoder]


def _measured(model: Any, context: int, batch: int) -> int:
    if getattr(model.config.get_text_config(decoder=True), "sliding_window", None):
        return _cache_bytes(model, batch, context)
    short, long = (_cache_bytes(model, batch, length) for length in (_PROBE, 2 * _PROBE))
    per_token = (long - short) // _PROBE
    return short - per_token * _PROBE + per_token * context


def _shape_only(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def register_shape_only() -> None:
    """Makes SHAPE_ONLY a choice of `set_experts_implementation`; harmless to call again."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(SHAPE_ONLY, _shape_only)


def _cache_bytes(model: Any, batch: int, length: int) -> int:
    config = copy.deepcopy(model.config)
    register_shape_only()
    with torch.device("meta"), torch.no_grad():
        clone = type(model)._from_config(config, dtype=model.dtype, attn_implementation="eager").eval()
        clone.set_experts_implementation(dict.fromkeys(clone.get_experts_implementation(), SHAPE_ONLY))
        ids = torch.zeros((batch, length), dtype=torch.long)
        cache = clone(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(cache))


def tensors_of(cache: Any) -> list[torch.Tensor]:
    """Every tensor that a cache of Transformers, or a layer of one, holds."""
    found: dict[int, torch.Tensor] = {}
    stack = [cache]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[id(item)] = item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif type(item).__module__.startswith("transformers") and "config" not in type(item).__name__.lower():
            stack.extend(getattr(item, "__dict__", {}).values())
    return list(found.values())


def _from_config(model: Any, context: int, batch: int) -> int:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * context * batch)
