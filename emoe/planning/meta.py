"""A model on the meta device: its shapes and dtypes from the config and file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from emoe.errors import CheckpointError, ConfigError, one_line
from emoe.model import auto
from emoe.model.config import read_config, remote_code_refused, without_quantization
from emoe.store.checkpoint import first_dtype
from emoe.store.declared import said_of_encodings


def meta_model(path_or_id: str | Path, *, dtype: Any = "auto", **kwargs: Any) -> Any:
    """The model of a checkpoint on the meta device: shapes and dtypes, no memory.

    Args:
        path_or_id: folder or hub id; only its config is read.
        dtype: a torch dtype or its name; "auto" is the checkpoint's own.
        kwargs: as `emoe.model.config.read_config` takes them.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: as `read_config` and `emoe.model.auto.model_class`.
    """
    config, rest = read_config(path_or_id, kwargs)
    cls = auto.model_class(config, rest.get("auto_class"))
    resolved = _resolve_dtype(dtype, config, Path(path_or_id) / (rest.get("subfolder") or ""))
    config, _ = without_quantization(config)  # a copy: Transformers writes the dtype into it
    attention = rest.get("attn_implementation")
    given = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            return auto.from_config(cls, config, dtype=resolved, trust_remote_code=rest["trust_remote_code"], **given)
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if "trust_remote_code" in str(error):
            raise remote_code_refused(str(path_or_id)) from error
        if attention is not None and "attention" in str(error).lower():
            raise ConfigError(f"attn_implementation={attention!r}: {one_line(error)[:400]}") from error
        raise CheckpointError(
            f"{path_or_id}: Transformers makes no model of its config: {one_line(error)[:400]}", file=str(path_or_id)
        ) from error


def _resolve_dtype(dtype: Any, config: Any, folder: Path) -> torch.dtype:
    if dtype == "auto":
        quantized = said_of_encodings(without_quantization(config)[1], folder) is not None
        # What is plain in a quantized checkpoint is bfloat16, whoever makes it: for a config alone that does not say.
        dtype = getattr(config, "dtype", None) or first_dtype(folder, "bfloat16" if quantized else "float32")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return cast(torch.dtype, dtype)
