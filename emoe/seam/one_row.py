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
from threading import RLock, get_ident
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from emoe.seam.frames import Known, callers, of_stack
from emoe.seam.prefill import text_of

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
        # What a config of parts is told, it tells its parts, whatever name these have.
        self._configs = list({id(each): each for each in configs if _is_whole(each)}.values())
        # By thread, the innermost last: decode steps that run. What an interrupt leaves is told by the stack.
        self._running: dict[int, list[frozenset[Known]]] = {}
        self._lock = RLock()  # of both this and the names
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        own = callers(sys._getframe())
        running = self._running.get(get_ident(), [])
        if running:
            alive = of_stack(sys._getframe(1)) - own
            running = [each for each in running if not alive.isdisjoint(each)]
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        text = text_of(given)
        if text is not None and text.shape[1] == 1:
            with self._lock:
                self._running[get_ident()] = [*running, own]
                self._rename(STOCK, NAME)
        else:  # within a decode step it may have either name: of more rows `attend` does what "sdpa" does
            self._are(running)

    def _after(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        running = self._running.get(get_ident(), [])
        own = callers(sys._getframe())
        self._are([each for each in running if own.isdisjoint(each)])

    def _are(self, running: list[frozenset[Known]]) -> None:
        with self._lock:
            if running:
                self._running[get_ident()] = running
            else:
                self._running.pop(get_ident(), None)
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


def _is_whole(config: Any) -> bool:
    return hasattr(config, "_attn_implementation") and not config.sub_configs
