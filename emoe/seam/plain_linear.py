"""Linear layers outside experts whose weights are plain, computed by emoe's kernels.

The weight stays the parameter that it is: it is saved, copied, changed, trained and given adapters as ever. Only its
class is another while emoe runs the model, so that `torch.nn.functional.linear` asks here first; torch computes
whatever this does not (`_served`), gradients, autocast, other devices and whatever records a graph among it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from emoe.model.seen import operations_are_seen
from emoe.model.structure import experts_modules

# y [T, outputs] of a weight [outputs, inputs], x [T, inputs] of its dtype, and a bias [outputs] or None.
PlainProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

NARROW_ROWS = 8  # up to here each row has the bits that it has alone (docs/kernels.md)


@dataclass(frozen=True)
class Plain:
    """How linear layers with plain weights are computed.

    Attributes:
        product: computes them.
        few, many: dtypes in which it does so for up to NARROW_ROWS rows, and for more; torch does the others.
    """

    product: PlainProduct
    few: frozenset[torch.dtype]
    many: frozenset[torch.dtype]


class NativeWeight(nn.Parameter):
    """A parameter [outputs, inputs] that `torch.nn.functional.linear` computes as a `Plain` says."""

    _plain: Plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is F.linear:
            served = _served(cls._plain, *args, **(kwargs or {}))
            if served is not None:
                return served
        return as_any(func, types, args, kwargs or {})


# Calls a function that does not ask tensors of this kind. No line of Python is within, at which a signal handler could
# run the model and find them computed by torch.
as_any = torch._C._disabled_torch_function_impl


@functools.cache
def _class_of(plain: Plain) -> type[NativeWeight]:
    return type("NativeWeight", (NativeWeight,), {"_plain": plain})


_TENSORS = (torch.Tensor, nn.Parameter)


def _served(plain: Plain, input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """F.linear, or None where torch computes it."""
    if torch.is_autocast_enabled("cpu") or operations_are_seen():
        return None
    if type(input) not in _TENSORS or not isinstance(weight, NativeWeight):
        return None
    if bias is not None and not (type(bias) in _TENSORS or isinstance(bias, NativeWeight)):
        return None
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (input, weight, bias)):
        return None
    weight, bias = ordinary(weight), ordinary(bias)
    dtype, width = weight.dtype, weight.shape[-1]
    if input.dtype != dtype or not input.is_cpu or not weight.is_cpu or input.dim() == 0 or input.shape[-1] != width:
        return None
    rows = input.numel() // width if width else 0
    if rows == 0 or dtype not in (plain.few if rows <= NARROW_ROWS else plain.many) or not weight.is_contiguous():
        return None
    if bias is not None and (bias.dtype != dtype or not bias.is_cpu or bias.shape != weight.shape[:1]):
        return None
    y = plain.product(weight, input.reshape(rows, width), bias)
    return y.view(*input.shape[:-1], weight.shape[0])


def ordinary(tensor: Any) -> Any:
    """The same numbers, in a tensor that nobody asks how it is computed with."""
    return as_any(torch.Tensor.detach, (), (tensor,), {}) if isinstance(tensor, NativeWeight) else tensor


class PlainWeights:
    """Has linear layers of a model computed by emoe until `remove`: those of routers too, embeddings as they are.

    Attributes:
        weights: the parameters, tied ones once.
    """

    def __init__(self, model: nn.Module, plain: Plain) -> None:
        inside = tuple(f"{path}." for path, _ in experts_modules(model))
        found: dict[int, nn.Parameter] = {}
        for path, module in model.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Embedding) or f"{path}.".startswith(inside) or type(weight) is not nn.Parameter:
                continue
            if weight.dim() == 2 and weight.dtype in plain.few | plain.many and weight.device.type == "cpu":
                found[id(weight)] = weight
        self.weights = list(found.values())
        made = _class_of(plain)
        for weight in self.weights:
            weight.__class__ = made

    def remove(self) -> None:
        """The weights are ordinary parameters again; calling it again does nothing."""
        for weight in self.weights:
            if isinstance(weight, NativeWeight):
                weight.__class__ = nn.Parameter  # type: ignore[assignment]
