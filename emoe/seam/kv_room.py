"""Room for the KV cache: keys and values are written into buffers that have room for more, not joined anew each time.

Transformers' own layers make a longer copy of their keys and values for every forward. That costs the time of a copy a
token, and copies of growing size leave holes in the allocator that none of the next fits into: a prefill in chunks then
holds up to four times its cache.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # tokens that a window takes, at most its own length, before its rows move to the start of a buffer


class _Rows:
    """Keys or values [B, heads, T, D] that are rows of a buffer. Each row is written once: views of it stay right."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._written = 0

    def append(self, old: torch.Tensor, new: torch.Tensor, room: int) -> torch.Tensor:
        """`old` and `new` as one view. `old` are the last rows that were written, or they are copied.

        Args:
            old: what was given last or the end of it, as a rule; a tensor of one dimension is empty.
            room: rows of a buffer that has to be made, or as many as it needs.
        """
        made = self.extend(old, new.shape, new, room)
        made.narrow(-2, made.shape[-2] - new.shape[-2], new.shape[-2]).copy_(new)
        return made

    def extend(self, old: torch.Tensor, shape: torch.Size | tuple[int, ...], like: torch.Tensor, room: int) -> Any:
        """As `append` of rows of a shape, without numbers: they are there to be written, in the dtype of `like`."""
        have = old.shape[-2] if old.dim() == len(shape) else 0
        count, first = shape[-2], self._written - have
        if self._buffer is None or not _appendable(self._buffer, old, shape, like.dtype, first, have):
            self._buffer = like.new_empty((*shape[:-2], max(room, have + count), shape[-1]))
            if have:
                self._buffer[..., :have, :] = old
            first = 0
        end = first + have + count
        self._written = end  # before they are written: after an interrupt between the two they are not taken for free
        return self._buffer.narrow(-2, first, end - first)


def _appendable(
    buffer: torch.Tensor, old: torch.Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, first: int,
    have: int,
) -> bool:  # fmt: skip
    """Whether `old` is rows `first` to `first + have` of a buffer that has room for more and may be written to."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    there = buffer.shape
    if there[:-2] != shape[:-2] or there[-1] != shape[-1] or buffer.dtype != dtype:
        return False
    if first < 0 or first + have + shape[-2] > there[-2] or (have == 0 and first):
        return False
    strides = buffer.stride()
    offset = first * strides[-2] * buffer.element_size()
    return have == 0 or (old.data_ptr() == buffer.data_ptr() + offset and old.stride() == strides)


class _Roomy(CacheLayerMixin):
    """A layer whose keys and values are views of buffers; pages of these that are not written are not taken.

    After what replaces `keys` and `values` or shortens them at their end (crop, reorder, select) the next update copies
    them. Copies and pickles of it are the layer of Transformers that it was made from.
    """

    keys: Any
    values: Any
    _layer_type = None  # not the class of a layer type in Transformers' own table
    _OWN = ("_tokens", "_rows")

    def __init__(self, layer: Any, tokens: int) -> None:
        self.__dict__.update(layer.__dict__)
        self._tokens = tokens
        self._rows = _Rows(), _Rows()

    def _append(self, new: tuple[torch.Tensor, torch.Tensor], room: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(*new)
        keys, values = self._rows
        return keys.append(self.keys, new[0], room), values.append(self.values, new[1], room)

    def _state(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in self._OWN}
        for name in ("keys", "values"):
            if state[name] is not None:
                state[name] = state[name].clone(memory_format=torch.contiguous_format)
        return state


def _not_ours(key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    plain = key_states.requires_grad or value_states.requires_grad or key_states.device.type != "cpu"
    return plain or torch.compiler.is_compiling()


class RoomyLayer(_Roomy, DynamicLayer):
    """A `DynamicLayer` with room for `tokens`, and then for a quarter more than there are."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicLayer.update`: [B, heads, T, D] are appended; all there are, are returned."""
        if _not_ours(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        total = self.get_seq_length() + key_states.shape[-2]
        self.keys, self.values = self._append((key_states, value_states), self._room(total))
        return self.keys, self.values

    def _room(self, total: int) -> int:
        """Rows of a buffer for so many tokens."""
        return self._tokens if total <= self._tokens else total + total // 4

    def next_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, T + 1, D] whose last row is to be written before `take` makes them the layer's;
        there are some already.
        """
        batch, heads, tokens, depth = self.keys.shape
        room = self._room(tokens + 1)
        shape = (batch, heads, 1, depth)
        return (
            self._rows[0].extend(self.keys, shape, self.keys, room),
            self._rows[1].extend(self.values, (*shape[:3], self.values.shape[3]), self.values, room),
        )

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What `next_row` gave, with its last row."""
        self.keys, self.values = keys, values

    def __reduce_ex__(self, protocol: Any) -> Any:
        return DynamicLayer, (), self._state()


class WindowLayer(_Roomy, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose rows move to the start of a buffer once in `ROOM` tokens.

    Its buffers have `window_rows` rows; `tokens` is the most that any sequence has.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicSlidingWindowLayer.update`: [B, heads, T, D] are appended; what they may see is returned."""
        if _not_ours(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        count, window = key_states.shape[-2], self.sliding_window
        self.cumulative_length += count
        keys, values = self._append(
            (key_states, value_states), window_rows(window, max(self._tokens, self.cumulative_length), count)
        )
        self.keys, self.values = keys, values
        if self.record_past:  # `crop` shortens them
            return keys[..., -(window - 1 + count) :, :], values[..., -(window - 1 + count) :, :]
        if keys.shape[-2] >= window:
            start = keys.shape[-2] - window + 1
            self.keys, self.values = keys[..., start:, :], values[..., start:, :]
        return keys, values

    def __reduce_ex__(self, protocol: Any) -> Any:
        return DynamicSlidingWindowLayer, (self.sliding_window,), self._state()


def window_rows(window: int, tokens: int, chunk: int) -> int:
    """Rows of a `WindowLayer`'s buffer, for a sequence of so many tokens that come at most `chunk` at a time."""
    return min(tokens, window - 1 + max(chunk, min(ROOM, window)))


def with_room(layer: CacheLayerMixin, tokens: int) -> CacheLayerMixin:
    """One that appends in place to what a layer of Transformers holds; of other kinds the layer itself."""
    if type(layer) is DynamicLayer:
        return RoomyLayer(layer, tokens)
    return WindowLayer(layer, tokens) if type(layer) is DynamicSlidingWindowLayer else layer


def give_room(cache: Any, tokens: int) -> None:
    """Layers of a `DynamicCache` that keep keys and values get room for `tokens`; others stay as they are."""
    if type(cache) is DynamicCache:
        cache.layers[:] = [with_room(layer, tokens) for layer in cache.layers]
