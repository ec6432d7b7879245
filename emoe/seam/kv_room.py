"""Room for the KV cache: keys and values are written into buffers that have room for more, not joined anew each time.

Transformers' `DynamicLayer` makes a longer copy of a layer's keys and values for every forward. Copies of growing size
leave holes in the allocator that none of the next fits into: a prefill in chunks then holds up to four times its cache.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are views of the first rows of a buffer; pages not written are not taken.

    A row is written once, so that views that others keep stay what they are. After what shortens or replaces `keys` and
    `values` (crop, reorder, select) the next update copies them. Copies and pickles of it are a plain `DynamicLayer`.
    """

    keys: Any
    values: Any
    _layer_type = None  # not the class of a layer type in Transformers' own table

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._tokens = tokens
        self._buffers: dict[str, tuple[torch.Tensor, int]] = {}  # and how many of its rows are written

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicLayer.update`: [B, heads, T, D] are appended; all there are, are returned."""
        plain = key_states.requires_grad or value_states.requires_grad or key_states.device.type != "cpu"
        if plain or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        have = old.shape[-2] if old.dim() == new.dim() else 0  # an empty layer has a tensor of one dimension
        total = have + new.shape[-2]
        buffer, written = self._buffers.get(name, (None, 0))
        if buffer is None or have != written or not _appendable(buffer, old, new, total):
            room = self._tokens if total <= self._tokens else total + total // 4
            buffer = new.new_empty((*new.shape[:-2], room, new.shape[-1]))
            if have:
                buffer[..., :have, :] = old
        # Before the rows are written: after an interrupt between the two they are not taken for free.
        self._buffers[name] = buffer, total
        buffer[..., have:total, :] = new
        return buffer[..., :total, :]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name not in ("_tokens", "_buffers")}
        for name in ("keys", "values"):
            if state[name] is not None:
                state[name] = state[name].clone(memory_format=torch.contiguous_format)
        return DynamicLayer, (), state


def _appendable(buffer: torch.Tensor, old: torch.Tensor, new: torch.Tensor, total: int) -> bool:
    """Whether `old` is the first rows of `buffer`, which has room for `total` and may be written to."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    if buffer.shape[:-2] != new.shape[:-2] or buffer.shape[-1] != new.shape[-1] or buffer.dtype != new.dtype:
        return False
    return buffer.shape[-2] >= total and old.data_ptr() == buffer.data_ptr() and old.stride() == buffer.stride()


def give_room(cache: Any, tokens: int) -> None:
    """Layers of a `DynamicCache` that keep every token get room for `tokens`; others stay as they are."""
    if type(cache) is DynamicCache:
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[number] = RoomyLayer(layer, tokens)
