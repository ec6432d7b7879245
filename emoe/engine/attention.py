"""Rows of several requests as one sequence [1, T], with attention for each request alone.

The seams are Transformers' own: `Cache`, `AttentionInterface`, `AttentionMaskInterface`. Under emoe's names a model
gets a `PackedMask` in the place of a mask, and its attention is the stock function, called for each request with the
very mask that the request would have alone. Outside steps, and in other threads, the names stand for stock functions.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from emoe.errors import UnsupportedModelError

STOCK = ("sdpa", "eager")


class WrongWayError(UnsupportedModelError):
    """A model cannot run the rows of several requests this way; the reason."""


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of a step: tokens of one request, from token `position` of it on."""

    state: DynamicCache
    start: int
    stop: int
    position: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class Batch(Cache):
    """What a model gets as `past_key_values`: it hands rows to the state of the request that they belong to.

    Args:
        spans: of the step, in row order.
        direct: layers whose attention takes keys and values as `update` returns them; learned, and kept by the caller.
        attend: computes what "sdpa" does in its place; None: that does.
        forked: modules that use a cache run once a request, with its own; nothing is updated through this object.

    Attributes:
        open: layers whose rows are in the states and that have not attended yet.
        lengths: keys that each request's mask is over, of the mask that is made now.
        shared: by id of a mapping that layers of one forward share, and request: the mapping, and the request's own.
    """

    def __init__(self, spans: Sequence[Span], direct: dict[int, bool], *, forked: bool, attend: Any = None) -> None:
        super().__init__(layers=spans[0].state.layers)  # for what models ask of layer types
        self.spans, self.total, self.forked = list(spans), spans[-1].stop, forked
        self.attends = attend
        self.open: dict[int, tuple[list[Any], torch.Tensor, torch.Tensor]] = {}
        self.lengths: list[int] = []
        self.shared: dict[tuple[int, int], tuple[Any, MutableMapping[Any, Any]]] = {}
        self._direct = direct

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        """Appends [1, heads, T, D]; gives the keys and values of all requests, one after the other.

        Where attention gets those very tensors the next step does not join them: `attend` has them by request.
        """
        if self.forked:
            raise WrongWayError(f"layer {layer_idx} updates the cache outside of modules that take one")
        parts = [
            span.state.update(key_states[..., span.rows, :], value_states[..., span.rows, :], layer_idx)
            for span in self.spans
        ]
        if len(parts) == 1:
            key_states, value_states = parts[0]
        elif not self._direct.get(layer_idx, False):
            key_states, value_states = (torch.cat(states, dim=-2) for states in zip(*parts, strict=True))
        self.open[layer_idx] = (parts, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        # Masks are made for each request (PackedMask); this is asked just before one is, and before any layer writes.
        self.lengths = [span.state.get_mask_sizes(span.count, layer_idx)[0] for span in self.spans]
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if len(self.spans) == 1:
            return self.spans[0].position
        raise WrongWayError("the model asks for one length of the cache where every request has its own")

    def attend(self, stock: Any, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        """Stock attention of a layer, one request at a time: [1, heads, T, D] -> [1, T, heads, D]."""
        layer: Any = module.layer_idx
        parts, given_key, given_value = self.open.pop(layer)
        lengths = [keys.shape[-2] for keys, _ in parts]
        if len(parts) == 1:
            return stock(module, query, key, value, mask.of(0, lengths[0]), **kwargs)
        for name, item in kwargs.items():
            if isinstance(item, torch.Tensor) and item.dim() > 1:  # of one dimension: sinks, one for each head
                raise WrongWayError(f"attention of layer {layer} takes {name!r} by row")
        if key is given_key and value is given_value:
            self._direct[layer] = True
        elif self._direct.get(layer, False):
            raise WrongWayError(f"attention of layer {layer} takes keys and values as they were, and now others")
        else:
            parts = list(zip(key.split(lengths, dim=-2), value.split(lengths, dim=-2), strict=True))
        outputs = [
            stock(module, query[..., span.rows, :], keys, values, mask.of(index, lengths[index]), **kwargs)[0]
            for index, (span, (keys, values)) in enumerate(zip(self.spans, parts, strict=True))
        ]
        return torch.cat(outputs, dim=1), None

    def check_closed(self) -> None:
        """WrongWayError where a layer wrote rows and did not attend to them itself."""
        if self.open:
            raise WrongWayError(f"layers {sorted(self.open)} do not attend through Transformers' attention interface")


class PackedMask:
    """Stands for the mask of a step; `of` is the one that the model would have made for a request alone.

    It keeps the arguments that the model called the mask interface with, the mask function (full, sliding, chunked)
    among them, and knows nothing of what they mean.

    Attributes:
        lengths: keys of each request that it is over, as the model asked.
    """

    def __init__(self, batch: Batch, stock: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_vmap"):
            raise WrongWayError("the model adds a mask function of its own")
        self._batch, self._stock, self._kwargs = batch, stock, kwargs
        self.lengths = list(batch.lengths)
        self._made: dict[tuple[int, int], Any] = {}

    def of(self, index: int, kv_length: int) -> Any:
        """The mask of request `index` over its last `kv_length` tokens."""
        if (index, kv_length) not in self._made:
            span = self._batch.spans[index]
            sizes = {"q_length": span.count, "kv_length": kv_length, "q_offset": span.position}
            sizes["kv_offset"] = span.position + span.count - kv_length
            if span.count == 1:  # without a mask sdpa asks for grouped heads, on a CPU 2 to 12 times slower
                sizes["allow_is_causal_skip"] = False
            self._made[index, kv_length] = self._stock(**{**self._kwargs, **sizes})
        return self._made[index, kv_length]


# What runs in this thread


class _Current(threading.local):
    batch: Batch | None = None


_current = _Current()


def current() -> Batch | None:
    """The batch of the step that this thread runs."""
    return _current.batch


def _mask(*args: Any, stock: str, **kwargs: Any) -> Any:
    batch, function = _current.batch, ALL_MASK_ATTENTION_FUNCTIONS[stock]
    return function(*args, **kwargs) if batch is None else PackedMask(batch, function, kwargs)


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, stock: str, **kw: Any
) -> Any:
    # A family's own eager function has what is the family's own: sinks, soft caps.
    function = ALL_ATTENTION_FUNCTIONS.get(stock) or sys.modules[type(module).__module__].eager_attention_forward
    batch = _current.batch
    if batch is not None and stock == "sdpa" and batch.attends is not None:
        function = batch.attends
    if batch is None or batch.forked or getattr(module, "layer_idx", None) not in batch.open:
        if isinstance(attention_mask, PackedMask):
            raise WrongWayError(f"{type(module).__name__} attends to keys that it did not put into the cache")
        return function(module, query, key, value, attention_mask, *args, **kw)
    if not isinstance(attention_mask, PackedMask):
        raise WrongWayError(f"{type(module).__name__} of layer {module.layer_idx} attends without the model's mask")
    kw.pop("position_ids", None)  # for flash kernels only
    return batch.attend(function, module, query, key, value, attention_mask, *args, **kw)


for _stock in STOCK:
    AttentionInterface.register(f"emoe_{_stock}", partial(_attention, stock=_stock))
    AttentionMaskInterface.register(f"emoe_{_stock}", partial(_mask, stock=_stock))


class AttentionName:
    """The name of a model's attention in the configs of its decoder: the model's own, or emoe's within a step.

    Model code compares the name with "sdpa" and "eager" (sparse attention is off under any other), so emoe's is set
    only while masks are made and packed layers run.

    Args:
        configs: that layers read the name from.

    Raises:
        WrongWayError: the model's own is neither sdpa nor eager.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        self._configs = list({id(each): each for each in configs}.values())
        self._stock = self._configs[0]._attn_implementation
        if self._stock not in STOCK:
            raise WrongWayError(f"attn_implementation={self._stock!r} is not one of: {', '.join(STOCK)}")

    def set(self, *, ours: bool) -> None:
        for config in self._configs:
            config._attn_implementation = f"emoe_{self._stock}" if ours else self._stock


@contextmanager
def running(batch: Batch, name: AttentionName) -> Iterator[None]:
    """In the block, in this thread, the model runs this batch."""
    _current.batch = batch
    try:
        name.set(ours=True)
        yield
    finally:
        rest(name)


def rest(name: AttentionName) -> None:
    """This thread runs no batch; done twice it is the same, for an end of `running` that was interrupted."""
    _current.batch = None
    name.set(ours=False)
