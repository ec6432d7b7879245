"""What stands in an experts module while its weights are in a store: parameters with a shape and no values.

They are listed and counted as parameters are, and follow `.to(dtype)`. Whoever asks for one by name or computes with it
(an adapter, a pruning method, an optimiser) gets `ExpertsElsewhereError`: an answer without the values would be wrong.
As torch's own parametrizations do, the module changes its class to one made for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from emoe.errors import ExpertsElsewhereError, SaveError
from emoe.store import StoreLayer

WAY_OUT = (
    "model.emoe.close() puts experts back; what changes them (new weights, an adapter and its merge_and_unload) is "
    "done to the plain model, which emoe.wrap then takes"
)

GIVEN_UP = (
    "the experts were given up when emoe was closed without restoring them; load the model anew with "
    "emoe.from_pretrained, or load the plain model for emoe.wrap"
)

CHECK = "_emoe_check"  # attribute of an experts module: called with (module, state dict, prefix, errors) before a load


class Placeholder(nn.Parameter):
    """A parameter on the meta device whose values are in a store.

    Attributes:
        path: its name in the model.
        trainable: whether the parameter it stands for required gradients.
        given_up: the store is gone.
    """

    path: str
    trainable: bool
    given_up: bool = False

    @staticmethod
    def make(path: str, shape: tuple[int, ...], dtype: torch.dtype, trainable: bool) -> Placeholder:
        made = torch.Tensor._make_subclass(Placeholder, torch.empty(shape, dtype=dtype, device="meta"), trainable)
        made.path, made.trainable = path, trainable
        return made

    def error(self) -> ExpertsElsewhereError:
        """Says where the values are, and what to do."""
        if self.given_up:
            return ExpertsElsewhereError(f"{self.path} has no values: {GIVEN_UP}")
        return ExpertsElsewhereError(f"{self.path} is in emoe's store, not in the model: {WAY_OUT}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _harmless():
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        raise next(_placeholders((args, kwargs))).error()

    def __deepcopy__(self, memo: Any) -> Any:
        raise self.error()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.error()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self.path}: {list(self.shape)} {self.dtype}, in emoe's store>"


class Stored(nn.Parameter):
    """Values read from the store, in a placeholder's place for a moment; forwards of other threads go on beside it."""


def _placeholders(value: Any) -> Iterator[Placeholder]:
    if isinstance(value, Placeholder):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _placeholders(each)


@functools.cache
def _harmless() -> frozenset[Any]:
    """What asks a parameter for its form, or whether it is trained, and not for its values."""
    attributes = (
        "shape", "ndim", "dtype", "device", "layout", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized",
        "is_mps", "is_xla", "is_xpu", "itemsize", "nbytes", "names", "requires_grad", "is_leaf", "grad", "grad_fn",
        "_grad", "_base", "_backward_hooks", "_version",
    )  # fmt: skip
    methods = (
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
        "is_floating_point", "is_complex", "requires_grad_", "__len__", "__hash__", "get_device", "is_inference",
        "is_pinned", "is_shared",
    )  # fmt: skip
    found: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel}
    for name in attributes:
        attribute = getattr(torch.Tensor, name, None)
        found |= {getattr(attribute, "__get__", None), getattr(attribute, "__set__", None)}
    found |= {getattr(torch.Tensor, name, None) for name in methods}
    return frozenset(found - {None})


class _Experts(nn.Module):
    """What is put in front of an experts module's own class; only parameters that are `Placeholder` are treated."""

    _emoe_names: tuple[str, ...]
    _emoe_path: str

    @contextmanager
    def _emoe_hidden(self) -> Iterator[dict[str, Placeholder]]:
        """In the block the module has none of its placeholders."""
        hidden = placeholders(self)
        self._parameters.update(dict.fromkeys(hidden))
        try:
            yield hidden
        finally:
            self._parameters.update(hidden)

    def _emoe_check_values(self) -> None:
        """Asked before each forward, which computes with what the store has.

        Raises:
            ExpertsElsewhereError: somebody put values in a placeholder's place without a call of the module:
                `torch.func.functional_call`, or who else writes into `_parameters`.
        """
        for name in self._emoe_names:
            value = self._parameters.get(name)
            if value is not None and not isinstance(value, (Placeholder, Stored)):
                raise ExpertsElsewhereError(
                    f"{self._emoe_path}.{name} was given values for this forward (functional_call does so), which "
                    f"would be ignored: the experts are in emoe's store. Leave it out; {WAY_OUT}"
                )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        with self._emoe_hidden() as hidden:
            super()._apply(fn, recurse)
        for name, each in hidden.items():  # the store stays where it is; what is read from it takes the new dtype
            dtype = fn(torch.empty(0, dtype=each.dtype)).dtype
            if dtype != each.dtype:
                changed = Placeholder.make(each.path, tuple(each.shape), dtype, each.trainable)
                changed.requires_grad, changed.given_up = each.requires_grad, each.given_up
                self._parameters[name] = changed
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._emoe_hidden():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Values for placeholders are compared with the store (guard.py), while the placeholders are still here."""
        if check := self.__dict__.get(CHECK):
            check(self, state_dict, prefix, errors)
        with self._emoe_hidden() as hidden:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        names = {f"{prefix}{name}" for name in hidden}
        unexpected[:] = [name for name in unexpected if name not in names]
        if strict:
            missing.extend(name for name in sorted(names) if name not in state_dict)

    def __deepcopy__(self, memo: Any) -> Any:
        raise _no_copy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _no_copy(self)


def _no_copy(module: nn.Module) -> SaveError:
    first = next(iter(placeholders(module).values()), None)
    if first is not None and first.given_up:
        return SaveError(f"{first.path} is neither copied nor pickled: {GIVEN_UP}")
    return SaveError(
        f"{first.path if first is not None else type(module).__name__} is in emoe's store and is neither copied nor "
        "pickled: save_pretrained(folder) writes the model whole, and emoe.from_pretrained(folder) makes another of it"
    )


def placeholders(module: nn.Module) -> dict[str, Placeholder]:
    """The parameters of an experts module whose values are in a store."""
    return {name: each for name, each in module._parameters.items() if isinstance(each, Placeholder)}


def take_out(module: nn.Module, layer: StoreLayer) -> None:
    """Puts placeholders where an experts module has its parameters, or had them; their memory is freed."""
    for param in layer.params:
        old = module._parameters.get(param.name)
        shape = (len(layer.pieces), *param.shape)
        trainable = old is None or old.requires_grad
        module._parameters[param.name] = Placeholder.make(
            f"{layer.path}.{param.name}", shape, getattr(torch, param.dtype), trainable
        )
    vars(module)["_emoe_path"] = layer.path
    if not isinstance(module, _Experts):
        names = tuple(param.name for param in layer.params)
        module.__class__ = _class_without(cast(Hashable, type(module)), names)


def put_back(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """The inverse: parameters with these values, which `as_placed` has converted."""
    for name, value in values.items():
        old = module._parameters.get(name)
        trainable = old.trainable if isinstance(old, Placeholder) else old is None or old.requires_grad
        module._parameters[name] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=trainable)
        )
    if isinstance(module, _Experts) and not placeholders(module):
        module.__class__ = type(module).__mro__[2]
        vars(module).pop("_emoe_path", None)


def as_placed(module: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the store in the dtypes that the module's parameters have by now (`model.float()`)."""
    placed = placeholders(module)
    return {name: value.to(placed[name].dtype) if name in placed else value for name, value in values.items()}


@functools.cache
def _class_without(experts: Any, names: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: property(functools.partial(_parameter, name=name)) for name in names}
    body |= {"_emoe_names": names}
    body |= {"__module__": experts.__module__, "__qualname__": experts.__qualname__, "__doc__": experts.__doc__}
    return type(experts.__name__, (_Experts, experts), body)


def _parameter(module: nn.Module, *, name: str) -> Any:
    value = module._parameters.get(name)
    if isinstance(value, Placeholder):
        raise value.error()
    if name not in module._parameters:
        raise AttributeError(name)  # torch looks further, and says what it found nowhere
    return value
