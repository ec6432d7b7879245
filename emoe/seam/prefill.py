"""Prefill in chunks: a forward over many tokens runs as several over few, each going on from the cache of the last.

Hooks on the model, so that `generate` and a plain forward are bounded alike. What a forward is given decides whether it
can be cut (`_whole`); what cannot be runs whole, and the log says so once for each reason.
"""

from __future__ import annotations

import inspect
import logging
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from emoe.memory import LargeBlocks
from emoe.requests import cached_tokens
from emoe.seam.frames import Known, callers, known, of_stack, stack
from emoe.seam.kv_room import give_room

logger = logging.getLogger(__name__)

# One value for each token of the cache and of the input, or of the input alone.
_OF_ALL_TOKENS = ("attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_OF_INPUT = ("input_ids", "inputs_embeds", "position_ids")
_OTHER = ("past_key_values", "use_cache", "logits_to_keep", "return_dict")
_LARGE = 512  # rows from which freed memory is given back at once: 7 to 10 % of the time of a forward of 256 rows
_PER_LAYER = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(eq=False, slots=True)
class _Forward:
    """One that runs. A hook of a user may run others within it.

    Attributes:
        frames: that call its hooks, id and code: while one of them is on the thread's stack, it runs.
        text: its input that `_after` sees; rows: logits of its earlier chunks.
        chunk: input of the chunk of it that is about to begin.
        large: it has so many rows that freed memory is given back at once.
    """

    frames: frozenset[Known]
    text: torch.Tensor | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    chunk: torch.Tensor | None = None
    large: bool = False


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
        # By thread, the innermost last: those that are cut or large, and what runs within them. An interrupt may leave
        # some, which are told by the stack.
        self._open: dict[int, list[_Forward]] = {}
        self._said: set[str] = set()
        # A hook that looks for the begin of a request has to see the first chunk, and so runs after this one.
        self._begins: RemovableHandle | None = model.register_forward_pre_hook(
            self._before, with_kwargs=True, prepend=True
        )
        self._ends: RemovableHandle = model.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def remove(self) -> None:
        """Takes the hooks away; calling it again does nothing.

        Where a forward runs in another thread, the hook that ends it goes when it has.
        """
        if self._begins is not None:
            self._begins.remove()
            self._begins = None
        self._end_left()
        self._remove_last()

    def _remove_last(self) -> None:
        alive = sys._current_frames()
        if not any(thread in alive for thread in list(self._open)):
            self._ends.remove()

    def _end_left(self, own: frozenset[Known] = frozenset()) -> list[_Forward]:
        """Forwards that run in this thread; drops what an interrupt left of others.

        Args:
            own: frames of one that begins. Those of one that was cut off are often at the same place.
        """
        running = self._open.get(get_ident(), [])
        if running:
            alive = of_stack(sys._getframe(1)) - own
            running = [each for each in running if not alive.isdisjoint(each.frames)]
        return self._are(running)

    def _are(self, running: list[_Forward]) -> list[_Forward]:
        if running:
            self._open[get_ident()] = running
        else:
            self._open.pop(get_ident(), None)
        if any(each.large for each in running):
            LargeBlocks.hold()
        else:
            LargeBlocks.release()
        return running

    def _before(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():  # what is compiled runs whole
            return None
        own = _Forward(callers(sys._getframe()))
        running = self._end_left(own.frames)
        if running:
            outer = running[-1]
            running = self._are([*running, own])
            if outer.chunk is not None and _has(kwargs, outer.chunk):
                outer.chunk = None
                return None
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        give_room(given.get("past_key_values"), self._room)
        text = text_of(given)
        if text is None:
            return None
        batch, length = text.shape[:2]
        own.text, own.large = text, batch * length >= _LARGE
        running = running or [own]
        if own.large:
            self._are(running)
        size = self._tokens
        if size is None or length <= size:
            return None
        reason = self._whole(model, given, length)
        if reason:
            if reason not in self._said:
                self._said.add(reason)
                logger.warning("emoe: a forward of %d tokens runs whole, not in chunks of %d: %s", length, size, reason)
            return None
        self._are(running)
        own.text = None
        try:
            return (), self._all_but_last(model, own, given, length, size)
        except BaseException as error:
            if not isinstance(error, Exception):  # else `_after` is called
                self._are(running[:-1])
            raise

    def _all_but_last(self, model: Any, own: _Forward, given: dict[str, Any], length: int, size: int) -> dict[str, Any]:
        """Runs all chunks but the last; returns the arguments of that."""
        keep = given.get("logits_to_keep", 0) or length
        given.setdefault("use_cache", True)
        rows: list[torch.Tensor] = []
        starts = list(range(0, length, size))
        if size > 2 and length - starts[-1] == 1:
            starts[-1] -= 1  # one row that goes on from a cache would be taken for decode
        for start, end in pairwise([*starts, length]):
            wanted = min(end - start, end - (length - keep))  # rows of this chunk that were asked for
            chunk = _cut(given, start, end, length)
            if "logits_to_keep" in self._parameters or "logits_to_keep" in given:
                chunk["logits_to_keep"] = max(1, wanted)
            if end == length:
                break
            own.chunk = text_of(chunk)
            output = model(**chunk)
            given["past_key_values"] = output.past_key_values
            give_room(output.past_key_values, self._room)
            if wanted > 0:
                rows.append(output.logits)
            del output
        own.text, own.rows = text_of(chunk), rows
        return chunk

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running = self._open.get(get_ident(), [])
        if torch.compiler.is_compiling() or not running:
            return
        which = _innermost(running, sys._getframe(1))
        # Without `_before` what runs within another forward is not among those that run.
        if which is None or (self._begins is None and not _has(kwargs, running[which].text, *args)):
            return
        rows = running[which].rows
        if rows and output is not None:  # None: the forward raised
            output.logits = torch.cat([*rows, output.logits], dim=1)
        self._are(running[:which])
        if self._begins is None:
            self._remove_last()

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
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep < 0:
            return "logits_to_keep is a tensor" if isinstance(keep, torch.Tensor) else f"logits_to_keep={keep!r}"
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


def text_of(given: dict[str, Any]) -> torch.Tensor | None:
    """A forward's input: ids [B, T] or embeddings [B, T, hidden]; None where it has none."""
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3)):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == dims:
            return value
    return None


def _has(kwargs: dict[str, Any], tensor: torch.Tensor | None, *args: Any) -> bool:
    return tensor is not None and any(value is tensor for value in (*kwargs.values(), *args))


def _innermost(running: list[_Forward], frame: FrameType) -> int | None:
    """Which of the forwards that run in this thread is the one whose hook `frame` calls."""
    for each in stack(frame):
        for number in reversed(range(len(running))):
            if known(each) in running[number].frames:
                return number
    return None


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
