"""Attention of decode steps by a function of emoe's, through Transformers' `AttentionInterface`.

While a forward over one token of each sequence runs, a model's attention has emoe's name in its configs in the place of
"sdpa"; at all other times the configs are as Transformers made them. Masks are those of "sdpa".
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

logger = logging.getLogger(__name__)

STOCK, NAME = "sdpa", "emoe_one_row"

_COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")


def compares_names(model: nn.Module) -> str:
    """The class of a module whose code does something else under another name of its attention, "" for none."""
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.startswith("torch."):
            continue
        try:
            if _COMPARED.search(inspect.getsource(sys.modules[kind.__module__])):
                return kind.__name__
        except (OSError, TypeError, KeyError):
            return kind.__name__
    return ""


class OneRowAttention:
    """Gives decode steps of a model to `attend` until `remove`.

    Args:
        attend: does what "sdpa" does; it is registered under NAME.
    """

    def __init__(self, model: Any, attend: Callable[..., Any]) -> None:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        self._configs = list({id(each): each for each in configs if hasattr(each, "_attn_implementation")}.values())
        self._running: set[int] = set()  # threads; one that was interrupted is among them until its next forward
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        text = given.get("input_ids")
        if text is None:
            text = given.get("inputs_embeds")
        if isinstance(text, torch.Tensor) and text.dim() > 1 and text.shape[1] == 1:
            self._running.add(get_ident())
            self._rename(STOCK, NAME)
        else:
            self._after()

    def _after(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._running.discard(get_ident())
        if not self._running:
            self._rename(NAME, STOCK)

    def _rename(self, old: str, new: str) -> None:
        for config in self._configs:
            if config._attn_implementation == old:
                config._attn_implementation = new

    def remove(self) -> None:
        """The model is as it was; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._rename(NAME, STOCK)
