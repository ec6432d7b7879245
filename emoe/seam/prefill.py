"""Prefill in chunks: a forward over many tokens runs as several over few, each going on from the cache of the last.

Hooks on the model, so that `generate` and a plain forward are bounded alike. What a forward is given decides whether it
can be cut (`_whole`); what cannot be runs whole, and the log says so once for each reason.
"""

from __future__ import annotations

import inspect
import logging
from threading import get_ident
from typing import Any

import torch
from torch import nn

from emoe.memory import LargeBlocks
from emoe.requests import cached_tokens
from emoe.seam.kv_room import give_room

logger = logging.getLogger(__name__)

# One value for each token of the cache and of the input, or of the input alone.
_OF_ALL_TOKENS = ("attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_OF_INPUT = ("input_ids", "inputs_embeds", "position_ids")
_OTHER = ("past_key_values", "use_cache", "logits_to_keep", "return_dict")
_LARGE = 512  # rows from which freed memory is given back at once: 7 to 10 % of the time of a forward of 256 rows
_PER_LAYER = ("output_attentions", "output_hidden_states", "output_router_logits")


class ChunkedPrefill:
    """Cuts forwards of one model into chunks until `remove`.

    Logits, the cache and their order are those of one forward: each chunk sees what came before it in the cache, and
    rows that `logits_to_keep` asks for are put together from the chunks that have them. Sums are taken in other shapes,
    so that logits are close to those of one forward, not bit-equal.

    Args:
        model: a Transformers model that generates.
        tokens: of one sequence in a chunk, at least 1; shorter inputs run as they are. None: all do.
        room: tokens of one sequence that caches get room for (kv_room.py).
    """

    def __init__(self, model: Any, tokens: int | None, room: int) -> None:
        self._tokens = tokens
        self._room = room
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._inside: set[int] = set()  # threads whose chunks are running
        self._rows: dict[int, list[torch.Tensor]] = {}  # logits of a thread's earlier chunks
        self._holding: set[int] = set()  # threads that hold LargeBlocks
        self._said: set[str] = set()
        # A hook that looks for the begin of a request has to see the first chunk, and so runs after this one.
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks away; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():  # what is compiled runs whole
            return None
        thread = get_ident()
        if thread in self._inside:
            return None
        self._rows.pop(thread, None)  # of a forward that raised
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        give_room(given.get("past_key_values"), self._room)
        batch, length = _shape(given)
        if batch * length >= _LARGE and thread not in self._holding:
            self._holding.add(thread)
            LargeBlocks.hold()
        size = self._tokens
        if size is None or length <= size:
            return None
        reason = self._whole(model, given, length)
        if reason:
            if reason not in self._said:
                self._said.add(reason)
                logger.warning("emoe: a forward of %d tokens runs whole, not in chunks of %d: %s", length, size, reason)
            return None
        keep = given.get("logits_to_keep", 0) or length
        given.setdefault("use_cache", True)
        self._inside.add(thread)
        try:
            rows: list[torch.Tensor] = []
            for start in range(0, length, size):
                end = min(start + size, length)
                wanted = min(end - start, end - (length - keep))  # rows of this chunk that were asked for
                chunk = _cut(given, start, end, length)
                if "logits_to_keep" in self._parameters:
                    chunk["logits_to_keep"] = max(1, wanted)
                if end == length:
                    self._rows[thread] = rows
                    return (), chunk
                output = model(**chunk)
                given["past_key_values"] = output.past_key_values
                give_room(output.past_key_values, self._room)
                if wanted > 0:
                    rows.append(output.logits)
                del output
        finally:
            self._inside.discard(thread)
        raise AssertionError("the last chunk returns")

    def _after(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        thread = get_ident()
        if thread in self._inside:
            return
        rows = self._rows.pop(thread, None)
        if rows and output is not None:  # None: the forward raised
            output.logits = torch.cat([*rows, output.logits], dim=1)
        if thread in self._holding:
            self._holding.discard(thread)
            LargeBlocks.release()

    def _whole(self, model: nn.Module, given: dict[str, Any], length: int) -> str:
        """Why this forward cannot be cut, "" where it can."""
        from transformers import DynamicCache

        config: Any = model.config
        cache = given.get("past_key_values")
        if cache is None and not given.get("use_cache", getattr(config.get_text_config(), "use_cache", True)):
            return "it has no KV cache"
        if cache is not None and not isinstance(cache, DynamicCache):
            return f"its cache is a {type(cache).__name__}, not a DynamicCache"
        if "input_ids" in given and "inputs_embeds" in given:
            return "it has input_ids and inputs_embeds"
        for name in _PER_LAYER:
            if given.get(name, getattr(config, name, False)):
                return f"{name} asks for what each layer gives"
        if not isinstance(given.get("logits_to_keep", 0), int):
            return "logits_to_keep is a tensor"
        if given.get("return_dict", True) is False or not getattr(config, "return_dict", True):
            return "return_dict=False"
        other = sorted(set(given) - {*_OF_ALL_TOKENS, *_OF_INPUT, *_OTHER, *_PER_LAYER})
        if other:
            return f"{other[0]} cannot be cut into chunks"
        seen = length + (cached_tokens(cache) if cache is not None else 0)
        for name in _OF_ALL_TOKENS:
            value = given.get(name)
            if value is not None and (not isinstance(value, torch.Tensor) or value.dim() != 2):
                return f"{name} is not of shape [batch, tokens]"
            if value is not None and value.shape[-1] != seen:
                return f"{name} has {value.shape[-1]} columns for {seen} tokens"
        positions = given.get("position_ids")
        if positions is not None and positions.shape[-1] != length:
            return f"position_ids has {positions.shape[-1]} columns for {length} tokens"
        return ""


def _shape(given: dict[str, Any]) -> tuple[int, int]:
    """Sequences of a forward's input and tokens of each; zeros where it has none."""
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == dims:
            return value.shape[0], value.shape[1]
    return 0, 0


def _cut(given: dict[str, Any], start: int, end: int, length: int) -> dict[str, Any]:
    """The arguments of tokens `start` to `end` out of `length`."""
    chunk = dict(given)
    for name in _OF_ALL_TOKENS:
        if name in given:
            width = given[name].shape[-1]
            chunk[name] = given[name][:, : width - length + end]
    for name in ("input_ids", "inputs_embeds"):
        if name in given:
            chunk[name] = given[name][:, start:end]
    if "position_ids" in given:
        chunk["position_ids"] = given["position_ids"][..., start:end]
    return chunk
