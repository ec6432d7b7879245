"""A model as it was before emoe changed it, for where a change is cut off in the middle of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


class Untouched:
    """Classes, attributes, hooks and flags of a model's modules and parameters, taken when this is made.

    Parameters of the modules in `without` are not held, so that their memory can be freed; putting those back is the
    caller's part.

    Args:
        model: any.
        without: modules of it.
    """

    def __init__(self, model: nn.Module, without: Collection[nn.Module]) -> None:
        left_out = {id(module) for module in without}
        self._modules: list[tuple[nn.Module, Any, dict[str, Any]]] = []
        for module in model.modules():
            held = dict(vars(module))
            if id(module) in left_out:
                held["_parameters"] = None
            # What torch keeps in a dictionary (hooks, parameters, submodules) is known to handles by that very object.
            held = {name: (each, each.copy() if isinstance(each, dict) else None) for name, each in held.items()}
            self._modules.append((module, type(module), held))
        held_elsewhere = {id(each) for module in without for each in module.parameters()}
        self._parameters = [
            (each, type(each), each.requires_grad) for each in model.parameters() if id(each) not in held_elsewhere
        ]

    def restore(self) -> None:
        """Makes the model that again; may be called again."""
        for parameter, kind, trainable in self._parameters:
            parameter.__class__ = kind
            parameter.requires_grad_(trainable)
        for module, kind, held in self._modules:
            module.__class__ = kind
            attributes = vars(module)
            for name in [name for name in attributes if name not in held]:
                del attributes[name]
            for name, (value, items) in held.items():
                if value is None and name == "_parameters":
                    continue
                if items is not None:
                    value.clear()
                    value.update(items)
                attributes[name] = value
