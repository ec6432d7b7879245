"""Which weights outside experts are encoded where that is asked for: of linear layers that may stay so in memory.

Embeddings, routers, norms and biases keep their bytes, and what a checkpoint has encoded already does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from emoe.model import dense
from emoe.model.encoding import COMPUTED, encoding
from emoe.store.checkpoint import model_keys
from emoe.store.companions import grouped
from emoe.store.headers import TensorEntry


def linear_keys(model: Any, name: str) -> set[str]:
    """Names in the model of the weights that become `name`; gates of one row are none.

    Args:
        model: on any device.
    """
    shared = dense.tied(model)
    found = {key: model.get_submodule(key.rpartition(".")[0]) for key, why in dense.layers(model).items() if not why}
    return {
        key
        for key, module in found.items()
        if isinstance(module, nn.Linear) and module.out_features > 1 and key not in shared
        and encoding(name).planes[0].holds(*module.weight.shape)
    }  # fmt: skip


def linear_tensors(entries: Mapping[str, TensorEntry], model: Any, name: str) -> set[str]:
    """Names in the checkpoint of those that are plain there and one tensor each.

    Args:
        entries: every tensor of the checkpoint.
        model: on any device.
    """
    keys, found = linear_keys(model, name), grouped(entries)
    return {
        tensor
        for tensor, key, pattern, _ in model_keys(found, model)
        if key in keys and pattern is None and isinstance(each := found[tensor], TensorEntry) and each.dtype in COMPUTED
    }
