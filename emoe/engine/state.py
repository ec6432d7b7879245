"""The state of one request: a standard Transformers cache whose key/value layers append in place. Knows no batch.

Every way of running a step works on it, so a request may change between them at any step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import DynamicCache

from emoe.planning.kv_cache import tensors_of
from emoe.seam.kv_room import RoomyLayer, WindowLayer, give_room, window_rows


class OwnCache:
    """For the few families whose model makes a cache of a class of its own in the first forward."""

    value: Any = None


State = Any  # a DynamicCache or an OwnCache


def new_state(model: Any, tokens: int) -> State:
    """An empty state with room for `tokens`; layers other than plain keys and values stay Transformers' own."""
    if not model._supports_default_dynamic_cache():
        return OwnCache()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    give_room(cache, tokens)
    return cache


def is_plain(state: State) -> bool:
    """Whether every layer keeps keys and values and nothing else."""
    return isinstance(state, DynamicCache) and all(type(each) in (RoomyLayer, WindowLayer) for each in state.layers)


def keeps_all(state: State) -> bool:
    """Whether every layer keeps every row, so that a prefix can be copied."""
    return isinstance(state, DynamicCache) and all(type(layer) is RoomyLayer for layer in state.layers)


def rows_of(state: State) -> int | None:
    """How many tokens its layers hold; None where none counts them."""
    layers = state.layers if isinstance(state, DynamicCache) else []
    counts = {int(layer.get_seq_length()) for layer in layers if type(layer) in (RoomyLayer, WindowLayer)}
    assert len(counts) <= 1, f"layers of one state hold {sorted(counts)} tokens"
    return next(iter(counts), None)


def copy_prefix(source: DynamicCache, target: DynamicCache, rows: int) -> None:
    """Gives an empty state the first rows of another; both keep all."""
    for ours, theirs in zip(target.layers, source.layers, strict=True):
        ours.update(theirs.keys[..., :rows, :], theirs.values[..., :rows, :])


@dataclass(frozen=True)
class Footprint:
    """Bytes of a request's state: exact for keys and values, an estimate for other states that grow.

    Attributes:
        row: of a token, in layers that keep each.
        fixed: of states that do not grow.
        windows: (window, bytes of a row) of layers that keep the last rows.
    """

    row: int = 0
    fixed: int = 0
    windows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, short: tuple[State, int], long: tuple[State, int]) -> Footprint:
        """From the states of two requests and how many tokens each has run."""
        (small, few), (large, many) = short, long
        row, windows, others = 0, [], []
        for state in (small, large):
            layers = state.layers if isinstance(state, DynamicCache) else [state.value]
            others.append(sum(_nbytes(each) for each in layers if type(each) not in (RoomyLayer, WindowLayer)))
        for layer in large.layers if isinstance(large, DynamicCache) else ():
            if type(layer) in (RoomyLayer, WindowLayer) and layer.keys is not None and layer.keys.shape[-2]:
                each = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
                if type(layer) is WindowLayer:
                    windows.append((layer.sliding_window, each))
                else:
                    row += each
        growth = max(0, -(-(others[1] - others[0]) // (many - few)))
        return cls(row + growth, max(0, others[1] - growth * many), tuple(windows))

    def more(self, nbytes: int) -> Footprint:
        """By so many bytes more, as a request took them."""
        return replace(self, fixed=self.fixed + nbytes)

    def nbytes(self, tokens: int, chunk: int) -> int:
        """Of a request of so many tokens that come at most `chunk` at a time."""
        windows = sum(window_rows(window, tokens, chunk) * each for window, each in self.windows)
        return self.row * tokens + self.fixed + windows


def _nbytes(layer: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(layer))


def held_bytes(state: State, *, all_layers: bool = True) -> int:
    """Bytes of the buffers that a state has now; without `all_layers` those of plain keys and values."""
    found = {}
    for layer in state.layers if isinstance(state, DynamicCache) else [state.value]:
        plain = type(layer) in (RoomyLayer, WindowLayer)
        if not (plain or all_layers):
            continue
        for tensor in (layer.keys, layer.values) if plain else tensors_of(layer):
            if tensor is not None:
                storage = tensor.untyped_storage()  # of the whole buffer that keys are a view of
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
