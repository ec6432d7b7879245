"""Rows of several requests as one sequence [1, T], with each token mixer run once a request on its own state.

A token mixer is an outermost module below a decoder layer that takes a cache: attention of any kind, recurrent,
convolution, with indexers and compressors in it. Forward hooks narrow its arguments to one request and join what it
gives; norms, experts, shared experts and the head run on all rows at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from emoe.engine.attention import AttentionName, Batch, PackedMask, WrongWayError, current

_CACHES = ("past_key_values", "cache_params")  # what arguments that are a cache are called
# Arguments by row, and the dimension of the rows.
_ROWS = {
    "hidden_states": 1, "position_embeddings": -2, "position_ids": -1, "dynamic_input": 1, "attention_scaling": 1,
}  # fmt: skip


class Forks:
    """The hooks on a model's mixers, inert outside steps, until `close`.

    Within a mixer the config has the model's own attention name again: sparse attention asks for it by name.
    """

    def __init__(self, model: nn.Module, name: AttentionName) -> None:
        self._name = name
        self._call: tuple[Any, Any] = ((), {})  # arguments of the mixer that runs, before they were narrowed
        self._handles: list[RemovableHandle] = []
        for module in _mixers(model):
            parameters = list(inspect.signature(module.forward).parameters)
            before, after = partial(self._before, parameters), partial(self._after, parameters)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, names: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
        batch = current()
        if batch is None or not batch.forked:
            return None
        self._call = (args, kwargs)
        self._name.set(ours=False)
        return _narrowed(names, module, args, kwargs, batch, 0)

    def _after(self, names: list[str], module: nn.Module, _args: Any, _kwargs: Any, first: Any) -> Any:
        batch = current()
        if batch is None or not batch.forked:
            return None
        outputs = [first]
        (given, named), self._call = self._call, ((), {})
        for index in range(1, len(batch.spans)):
            args, kwargs = _narrowed(names, module, given, named, batch, index)
            outputs.append(module.forward(*args, **kwargs))
        self._name.set(ours=True)
        return _joined(outputs, batch)


@dataclass
class _ByRequest:
    """What a mixer gave each request where it cannot be joined, for the next mixer (indices of chosen keys)."""

    items: list[Any]


def _narrowed(names: list[str], module: Any, args: Any, kwargs: Any, batch: Batch, index: int) -> Any:
    cut = partial(_cut, module, batch, index)
    return (
        tuple(cut(name, item) for name, item in zip(names, args, strict=False)),
        {name: cut(name, item) for name, item in kwargs.items()},
    )


def _cut(module: Any, batch: Batch, index: int, name: str, item: Any) -> Any:
    """What request `index` gets of an argument."""
    span = batch.spans[index]
    if item is batch:
        return span.state
    if isinstance(item, PackedMask):
        layer = span.state.layers[module.layer_idx]
        own = getattr(layer, "get_mask_sizes", None)  # not of a layer that uses the keys of another
        return item.of(index, item.lengths[index] if own is None else own(span.count)[0])
    if isinstance(item, _ByRequest):
        return item.items[index]
    if isinstance(item, MutableMapping) and item:  # masks or rotations by kind
        return {kind: _cut(module, batch, index, name, part) for kind, part in item.items()}
    if isinstance(item, MutableMapping):  # filled by a layer for those after it
        return batch.shared.setdefault((id(item), index), (item, type(item)()))[1]
    if isinstance(item, tuple):
        return tuple(_cut(module, batch, index, name, part) for part in item)
    if not isinstance(item, torch.Tensor) or len(batch.spans) == 1:
        return item
    if name in _ROWS:
        return item.narrow(_ROWS[name], span.start, span.count)
    if batch.total in item.shape:
        raise WrongWayError(f"{type(module).__name__} takes {name!r} by row, in a dimension that is not known")
    return item


def _joined(outputs: list[Any], batch: Batch) -> Any:
    first = outputs[0]
    if len(outputs) == 1 or first is None:
        return first
    if isinstance(first, tuple):
        return tuple(_joined(list(parts), batch) for parts in zip(*outputs, strict=True))
    rows = isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() == 3
    if rows and [part.shape[1] for part in outputs] == [span.count for span in batch.spans]:
        return torch.cat(outputs, dim=1)
    return _ByRequest(outputs)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of layers of a model's text decoder.

    Raises:
        WrongWayError: there is none whose modules take a cache.
    """
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and any(map(_takes_cache, module.modules())):
            return module
    raise WrongWayError(f"{type(model).__name__} has no list of decoder layers")


def _mixers(model: nn.Module) -> Iterator[nn.Module]:
    stack = [child for layer in decoder_layers(model) for child in layer.children()]
    while stack:
        module = stack.pop()
        if _takes_cache(module):
            yield module
        else:
            stack.extend(module.children())


def _takes_cache(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return False
    return any(name in _CACHES for name in inspect.signature(module.forward).parameters)
