"""Answers what Transformers and torch let anybody ask of a model, while its experts are in a store.

Which experts implementation runs, what a state dict would change, and what a gradient would be. Through hooks of torch
and attributes of this one model, all taken away by `remove()`; classes and configs that others share stay as they are.
"""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any

import torch
from torch import nn

from emoe.errors import CheckpointError, ClosedError, ConfigError, EmoeError, ExpertsElsewhereError
from emoe.seam.elsewhere import CHECK, GIVEN_UP, WAY_OUT, Placeholder, as_placed, placeholders
from emoe.seam.linear import encoded_weights, held_bytes
from emoe.store import ExpertStore, read_layer

NO_GRADIENTS = (
    "emoe runs inference only and computes no gradients; train the plain model (model.emoe.close() gives it back), "
    "then emoe.wrap it"
)


class ModelGuard:
    """Makes a model run `implementation` for its experts, and answer for them.

    Args:
        model: its experts' parameters are placeholders (elsewhere.py).
        store: where they are.
        implementation: name that was registered with Transformers' experts interface.
    """

    def __init__(self, model: Any, store: ExpertStore, implementation: str) -> None:
        self._model, self._store, self._implementation = model, store, implementation
        self._modules = [model.get_submodule(layer.path) for layer in store.layers]
        self._configs = [module.config for module in self._modules]
        self._given_up = False
        # What the outermost module of a load has compared, on which inner modules rely; a load has a list of errors.
        self._compared: dict[tuple[int | str, str], weakref.ref[Any]] = {}
        self._load: list[str] | None = None
        self._hooks: list[Any] = []
        self._shadowed: list[nn.Module] = []
        self._choose_implementation()
        self._watch_state_dicts()
        self._hooks.append(model.register_forward_hook(_refuse_gradients))
        if hasattr(model, "get_memory_footprint"):
            vars(model)["get_memory_footprint"] = partial(self._footprint, model.get_memory_footprint)

    def remove(self) -> None:
        """Undoes everything; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        for module in self._shadowed:
            for name in ("get_experts_implementation", "set_experts_implementation"):
                module.__dict__.pop(name, None)
        for module, config in zip(self._modules, self._configs, strict=True):
            module.config = config
            vars(module).pop(CHECK, None)
        vars(self._model).pop("get_memory_footprint", None)
        self._hooks, self._shadowed = [], []

    def give_up(self) -> None:
        """The experts will not come back: answers say so from now on."""
        self._given_up = True
        for module in self._modules:
            for each in placeholders(module).values():
                each.given_up = True

    def _footprint(self, original: Any, *args: Any, **kwargs: Any) -> int:
        """Bytes of the parameters and buffers that are in the model, as Transformers' own counts them."""
        elsewhere = [each for module in self._modules for each in placeholders(module).values()]
        encoded = {id(each): each for _, each in encoded_weights(self._model).values()}.values()
        not_here = sum(each.numel() * each.dtype.itemsize for each in (*elsewhere, *encoded))
        return int(original(*args, **kwargs)) - not_here + held_bytes(self._model)

    def _choose_implementation(self) -> None:
        """Only experts modules see the name, in configs of their own: the model's is shared, saved and handed on."""
        own: dict[int, Any] = {}
        for module, config in zip(self._modules, self._configs, strict=True):
            if id(config) not in own:
                own[id(config)] = copy.deepcopy(config)
                own[id(config)]._experts_implementation = self._implementation
            module.config = own[id(config)]
        ancestors = _ancestors(self._store)
        for path, module in self._model.named_modules():
            if path in ancestors and hasattr(module, "set_experts_implementation"):
                current = dict.fromkeys(module.get_experts_implementation(), self._implementation)
                vars(module)["get_experts_implementation"] = partial(dict, current)
                vars(module)["set_experts_implementation"] = self._refuse_implementation
                self._shadowed.append(module)

    def _refuse_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Stands in for Transformers' `set_experts_implementation`.

        Raises:
            ConfigError: anything but emoe's own: the other implementations need the weights in the model.
        """
        asked = experts_implementation if isinstance(experts_implementation, dict) else {"": experts_implementation}
        if any(name != self._implementation for name in asked.values()):
            if self._given_up:
                raise ConfigError(f"experts_implementation={experts_implementation!r} cannot run: {GIVEN_UP}")
            raise ConfigError(
                f"experts_implementation={experts_implementation!r} cannot run: the experts are in emoe's store. "
                "kernels='stock' runs Transformers' own loop under emoe; model.emoe.close() gives the plain model back"
            )

    def _watch_state_dicts(self) -> None:
        """At the outermost module that takes a state dict, so that nothing has been loaded where it is refused."""
        for path in sorted(_ancestors(self._store)):
            module = self._model.get_submodule(path)
            self._hooks.append(module.register_load_state_dict_pre_hook(partial(self._check_state, path)))
        for number, module in enumerate(self._modules):
            vars(module)[CHECK] = partial(self._check_state, self._store.layers[number].path)

    def _check_state(self, path: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """`rest` ends with the list in which torch gathers what is wrong with this load."""
        if self._load is not rest[-1]:
            self._load, self._compared = rest[-1], {}
        start = f"{path}." if path else ""
        for number, layer in enumerate(self._store.layers):
            if layer.path == path or layer.path.startswith(start):
                below = prefix + (f"{layer.path[len(start) :]}." if layer.path != path else "")
                given = {name: state[f"{below}{name}"] for name in placeholders(self._modules[number])
                         if f"{below}{name}" in state}  # fmt: skip
                self._check_layer(number, given)
        for its_path, (_, weight) in encoded_weights(module).items():
            key = f"{prefix}{its_path}.weight" if its_path else f"{prefix}weight"
            if key in state and self._compared.get((key, weight.path), _nothing)() is not state[key]:
                weight.unchanged(state[key])
                self._compared[key, weight.path] = weakref.ref(state[key])

    def _check_layer(self, number: int, given: dict[str, Any]) -> None:
        new = {
            name: value
            for name, value in given.items()
            if not isinstance(value, Placeholder) and self._compared.get((number, name), _nothing)() is not value
        }
        if not new:
            return
        path = self._store.layers[number].path
        try:
            stored = as_placed(self._modules[number], read_layer(self._store, number))
        except (CheckpointError, ClosedError) as error:
            if self._given_up:
                raise ExpertsElsewhereError(f"{path} takes no values: {GIVEN_UP}") from error
            raise ExpertsElsewhereError(f"{path} is in a store that cannot be read: {error}") from error
        for name, value in new.items():
            if not _equal(value, stored[name]):
                raise ExpertsElsewhereError(
                    f"the state dict has other values for {path}.{name} than emoe's store, which is not written to; "
                    f"nothing was loaded. {WAY_OUT}"
                )
            self._compared[number, name] = weakref.ref(value)


def _nothing() -> None:
    return None


def _ancestors(store: ExpertStore) -> set[str]:
    """Paths of all modules around the experts; "" is the model."""
    found = {""}
    for layer in store.layers:
        parts = layer.path.split(".")
        found |= {".".join(parts[:count]) for count in range(1, len(parts))}
    return found


def _equal(value: Any, stored: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.shape != stored.shape:
        return False
    given = value.detach().to("cpu", stored.dtype).contiguous()
    return torch.equal(given.view(torch.uint8), stored.contiguous().view(torch.uint8))  # NaN is equal to itself


class _NoGradients(torch.autograd.Function):
    """Hands a result on, without a copy; going back through it is refused."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise EmoeError(NO_GRADIENTS)


def _refuse_gradients(module: nn.Module, args: Any, output: Any) -> None:
    """A loss that says why it has no gradient, in place of torch's "does not require grad"."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for name in ("loss", "logits"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
            leaf = torch.empty(0, requires_grad=True)
            output[name] = _NoGradients.apply(value, leaf)
