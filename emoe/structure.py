"""What a model looks like before any weight is loaded: its skeleton on the meta device, and sizes read off it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from emoe.errors import UnsupportedModelError
from emoe.store import ParamSpec

_TOP_K_NAMES = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts", "moe_top_k")


def meta_model(path_or_id: str | Path, *, dtype: Any = "auto", config: Any = None, **kwargs: Any) -> Any:
    """The causal language model of a checkpoint on the meta device: shapes and dtypes, no memory.

    Args:
        path_or_id: folder or hub id; only its config is read.
        dtype: a torch dtype or its name; "auto" is the checkpoint's own.
        kwargs: handed to AutoConfig (revision, cache_dir, trust_remote_code).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config is None:
        config = AutoConfig.from_pretrained(path_or_id, **kwargs)
    resolved = _resolve_dtype(dtype, config, Path(path_or_id))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=resolved, trust_remote_code=kwargs.get("trust_remote_code", False)
        )


def _resolve_dtype(dtype: Any, config: Any, folder: Path) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _first_dtype(folder)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype  # type: ignore[no-any-return]


def _first_dtype(folder: Path) -> torch.dtype:
    from safetensors import safe_open

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no dict)
                found = names.get(tensors.get_slice(key).get_dtype())
                if found is not None:
                    return found
    return torch.float32


def param_specs(module: nn.Module) -> tuple[ParamSpec, ...]:
    """Name, shape of one expert and dtype of every parameter that an experts module keeps per expert."""
    return tuple(
        ParamSpec(name, tuple(parameter.shape[1:]), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.shape[0] == module.num_experts
    )


def unique_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*model.parameters(), *model.buffers())  # parameters() gives shared ones once
    )


def top_k(model: Any) -> int:
    """Experts a token is routed to.

    Raises:
        UnsupportedModelError: the config names it in a way emoe does not know.
    """
    config = model.config.get_text_config(decoder=True)
    for name in _TOP_K_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise UnsupportedModelError(
        f"{type(config).__name__} says nowhere how many experts a token uses; looked for {', '.join(_TOP_K_NAMES)}"
    )
