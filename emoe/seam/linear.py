"""Weights outside experts that stay encoded: tensors that say what they are and are decoded by whoever needs numbers.

Such a tensor stands where a linear layer or an embedding has its weight, with the shape, dtype and device that this
would have. `torch.nn.functional.linear` and `embedding` compute with it as it lies; any other operation gets its
numbers, decoded for that once, and whatever would write to it is refused. So no code that meets it computes with
anything but the right values.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from emoe.errors import ConfigError, EmoeError, ExpertsElsewhereError, SaveError
from emoe.memory import available_memory, format_bytes
from emoe.model.dense import holds, into, layers, tied
from emoe.model.encode import encode
from emoe.model.encoding import encoding
from emoe.model.held import Held, apart
from emoe.seam.elsewhere import WAY_OUT
from emoe.store.unread import Unread

logger = logging.getLogger(__name__)

# y [T, outputs] of x [T, inputs], whose dtype it has, and a bias [outputs] of any dtype, or None.
Product = Callable[[Held, torch.Tensor, torch.Tensor | None], torch.Tensor]

_aten = torch.ops.aten
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


class EncodedTensor(torch.Tensor):
    """[outputs, inputs] of numbers that are encoded.

    Attributes:
        held: what it is.
        path: name of the weight in the model.
    """

    held: Held
    path: str
    _product: Product

    @staticmethod
    def make(held: Held, dtype: torch.dtype, path: str, product: Product) -> EncodedTensor:
        """One that says that it is of `dtype`, on the CPU."""
        shape = (held.rows, held.cols)
        made = torch.Tensor._make_wrapper_subclass(EncodedTensor, shape, dtype=dtype, device=torch.device("cpu"))
        made.held, made.path, made._product = held, path, product
        return made

    def like(self, dtype: torch.dtype) -> EncodedTensor:
        """The same numbers in another dtype; nothing is copied."""
        return EncodedTensor.make(self.held, dtype, self.path, self._product)

    def numbers(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An ordinary tensor, in a dtype of its own where one is given."""
        return self.held.numbers(dtype or self.dtype)

    def error(self, why: str) -> ExpertsElsewhereError:
        """About somebody who wants what it is not."""
        return ExpertsElsewhereError(f"{self.path} stays encoded in memory ({self.held.how.name}) {why}; {WAY_OUT}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func is F.embedding:
            with torch._C.DisableTorchFunctionSubclass():  # else each attribute of the weight comes back to here
                served = (_linear if func is F.linear else _embedding)(*args, **kwargs)
            if served is not None:
                return served
        name = getattr(func, "__name__", "")
        if name in _OF_STORAGE:
            raise next(_encoded((args, kwargs))).error(f"and has no storage of numbers, which {name} wants")
        if name == "copy_" and isinstance(args[0], EncodedTensor):
            return args[0].unchanged(args[1])
        if _writes(name):  # some do it through views, which the dispatcher would not know
            for each in _encoded(args[:1]):
                raise each.error(f"and is not written to ({name})")
        if name in _LEAVING:
            args, kwargs = _decoded((args, kwargs), name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, EncodedTensor):
            if func in (_aten.detach.default, _aten.alias.default):
                return first.like(first.dtype)
            if func is _aten._to_copy.default and _only_dtype(kwargs):
                return first.like(kwargs.get("dtype") or first.dtype)
            if func is _aten.equal.default and isinstance(args[1], EncodedTensor) and first.held.same(args[1].held):
                return first.dtype == args[1].dtype or torch.equal(first.numbers(), args[1].numbers())
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                for each in _encoded(given):
                    raise each.error(f"and is not written to ({func})")
        for argument in func._schema.arguments:
            if argument.is_write and argument.name in kwargs:
                for each in _encoded(kwargs[argument.name]):
                    raise each.error(f"and is not written to ({func})")
        first = next(_encoded((args, kwargs)))
        args, kwargs = _decoded((args, kwargs), str(func))
        result = func(*args, **kwargs)
        if not any(each.alias_info is not None for each in func._schema.returns):
            return result
        return tree_map(lambda each: _Part.of(each, first) if isinstance(each, torch.Tensor) else each, result)

    def unchanged(self, value: Any) -> EncodedTensor:
        """Itself, where a value that is to be copied into it is the one that it has.

        Raises:
            ExpertsElsewhereError: it is another.
        """
        if isinstance(value, EncodedTensor) and value.held is self.held:
            return self
        numbers = self.numbers()
        given = value.numbers(self.dtype) if isinstance(value, EncodedTensor) else value.detach()
        if given.shape != numbers.shape or not torch.equal(given.to("cpu", numbers.dtype), numbers):
            raise self.error("and is not written to; other values are given for it, and nothing was changed")
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        """One that holds the same bytes, which nobody changes."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.like(self.dtype), requires_grad=self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the ordinary tensor that it stands for."""
        return nn.Parameter(self.numbers(), requires_grad=self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self.path}: {list(self.shape)} {self.dtype}, encoded as {self.held.how.name}>"


class _Part(torch.Tensor):
    """Numbers that were decoded, seen as a view sees them; writing to them would change nothing, and is refused."""

    whole: EncodedTensor

    @staticmethod
    def of(numbers: torch.Tensor, whole: EncodedTensor) -> _Part:
        part = numbers.as_subclass(_Part)
        part.whole = whole
        return part

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        for each in _all(_Part, (args[:1] if _writes(name) else (), kwargs.get("out"))):
            raise each.whole.error(f"and is not written to ({name})")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            parts = {each.untyped_storage().data_ptr(): each.whole for each in _all(_Part, (args, kwargs))}

            def as_part(value: Any) -> Any:
                if type(value) is torch.Tensor and value.layout == torch.strided:
                    whole = parts.get(value.untyped_storage().data_ptr())
                    return value if whole is None else _Part.of(value, whole)
                return value

            return tree_map(as_part, result)


_IN_PLACE = re.compile(
    r"(?!__).*[^_]_|__setitem__|__i(add|sub|mul|matmul|truediv|floordiv|div|mod|pow|and|or|xor|lshift|rshift)__"
)
_HARMLESS = {"requires_grad_", "detach_"}


def _writes(name: str) -> bool:
    """Whether a function of torch writes to its first argument, by its name."""
    return name not in _HARMLESS and _IN_PLACE.fullmatch(name) is not None


# What goes around torch's dispatcher to the memory of a tensor, of which there is none, and what hands it to others.
_OF_STORAGE = {
    "data_ptr", "const_data_ptr", "untyped_storage", "storage", "_typed_storage", "storage_type", "share_memory_",
    "set_", "apply_", "map_", "map2_", "resize_as_", "__dlpack__",
}  # fmt: skip
_LEAVING = {"numpy", "tolist", "__array__", "__complex__"}


T = TypeVar("T")


def _all(kind: type[T], value: Any) -> Iterator[T]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _all(kind, each)


def _encoded(value: Any) -> Iterator[EncodedTensor]:
    return _all(EncodedTensor, value)


_told: set[tuple[str, str]] = set()


def _decoded(value: Any, user: str) -> Any:
    for each in _encoded(value):
        if (each.path, user) not in _told:
            _told.add((each.path, user))
            logger.warning("emoe: %s is encoded, and decoded for each %s", each.path, user)
    return tree_map(lambda each: each.numbers() if isinstance(each, EncodedTensor) else each, value)


def _only_dtype(kwargs: dict[str, Any]) -> bool:
    """Whether a copy stays on the CPU, and of floating-point numbers."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    return (
        (device is None or torch.device(device).type == "cpu")
        and (dtype is None or dtype.is_floating_point)
        and kwargs.get("layout") in (None, torch.strided)
        and not kwargs.get("pin_memory")
    )


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """F.linear, or None where it is no business of an encoded weight."""
    if not isinstance(weight, EncodedTensor) or isinstance(input, EncodedTensor) or isinstance(bias, EncodedTensor):
        return None
    x, dtype = input, weight.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x = x.to(dtype)
    if dtype not in _COMPUTED or x.device.type != "cpu" or x.dim() == 0:
        return None
    if x.dtype != dtype or x.shape[-1] != weight.held.cols:
        raise ConfigError(
            f"{weight.path} is a linear layer of {dtype} for {weight.held.cols} inputs; it was given {x.dtype} "
            f"{list(x.shape)}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise EmoeError(
            f"{weight.path} stays encoded in memory and has no gradients, nor have its inputs; emoe runs inference "
            "only: use torch.no_grad()"
        )
    rows = x.reshape(-1, x.shape[-1])
    return weight._product(weight.held, rows, bias).view(*x.shape[:-1], weight.held.rows)


def _embedding(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """F.embedding, or None where it is no business of an encoded weight."""
    if not isinstance(weight, EncodedTensor) or max_norm is not None or input.device.type != "cpu":
        return None
    if not apart(weight.held.how):
        return None
    index = input.reshape(-1).long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < weight.held.rows:
        raise IndexError("index out of range in self")  # as torch says it
    return weight.held.some_rows(index, weight.dtype).view(*input.shape, weight.held.cols)


def decode_and_multiply(held: Held, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The slow reference of a `Product`: sums in float32, rounded once."""
    y = F.linear(x.float(), held.numbers(torch.float32), None if bias is None else bias.float())
    return y.to(x.dtype)


# Loading a model with such weights.


@dataclass(frozen=True)
class Dense:
    """Which weights outside experts stay encoded.

    Attributes:
        product: computes linear layers with them.
        plain: an encoding that linear layers become which the checkpoint has in a plain dtype; None leaves them so.
        decoded: encoded weights that did not stay so, by the name of the parameter, or of the tensor where a parameter
            is made of several: their encoding, and why.
    """

    product: Product
    plain: str | None = None
    decoded: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False)

    def of(self, model: nn.Module) -> Kept:
        """For a model that is on the meta device still."""
        return Kept(self, model)


class Kept:
    """What stays encoded of one model."""

    def __init__(self, dense: Dense, model: nn.Module) -> None:
        self._dense, self._model, self._layers = dense, model, layers(model)
        self._tied = tied(model)

    def keep(self, name: str, weight: Unread) -> None:
        """Decides on one weight, before it is read."""
        how = weight.encoding
        plain = bool(how) and encoding(how).plain
        if not how or (plain and self._dense.plain is None):
            return
        module = self._model.get_submodule(name.rpartition(".")[0])
        becomes = how
        if plain:  # an embedding stays as it is, and what is tied to it one with it
            becomes = "" if name in self._tied else into(module, self._dense.plain)
        why = self._layers.get(name, "it is no weight of a linear layer or an embedding") or holds(module, how)
        if why or not becomes:
            self._decode(name, how, why)
            return
        product = self._dense.product
        weight.keep = lambda held, dtype: EncodedTensor.make(_encoded_into(held, becomes, name), dtype, name, product)

    def put_together(self, weight: Unread) -> None:
        """Takes note of a tensor that a family's conversion puts together with others, or takes apart."""
        if weight.encoding:
            self._decode(weight.name, weight.encoding, "a parameter is made of it and others")

    def _decode(self, name: str, how: str, why: str) -> None:
        if not encoding(how).plain:
            self._dense.decoded[name] = how, why
            logger.info("emoe: %s (%s) is decoded: %s", name, how, why)


def _encoded_into(held: Held, name: str, path: str) -> Held:
    if held.how.name == name:
        return held
    try:
        made = encode(name, held.plane("values"))
    except ConfigError as error:
        raise ConfigError(f"{path} cannot become {name}: {error}") from error
    result = Held(encoding(name), held.rows, held.cols)
    for plane, array in made.planes.items():
        result.plane(plane).copy_(array)
    return result


# A model that has such weights.


def encoded_weights(model: nn.Module) -> dict[str, tuple[nn.Module, EncodedTensor]]:
    """Module and weight by the path of the module; tied ones are there several times."""
    return {
        path: (module, weight)
        for path, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), EncodedTensor)
    }


def held_bytes(model: nn.Module) -> int:
    """Bytes of them, tied ones once."""
    return sum({id(each.held): each.held.nbytes for _, each in encoded_weights(model).values()}.values())


def stats(model: nn.Module, dense: Dense | None) -> dict[str, Any]:
    """What stays encoded of a model that was loaded with `dense`, and what did not: see `Runtime.stats`."""
    weights = {id(each.held): each.held for _, each in encoded_weights(model).values()}.values()
    return {
        "bytes": held_bytes(model),
        "encodings": dict(Counter(each.how.name for each in weights)),
        "decoded": {} if dense is None else {name: f"{how}: {why}" for name, (how, why) in dense.decoded.items()},
    }


def decoded_bytes(model: nn.Module) -> int:
    """Bytes of what `decoded_weights` gives."""
    weights = {id(each): each for _, each in encoded_weights(model).values()}.values()
    return sum(each.numel() * each.dtype.itemsize for each in weights)


def decoded_weights(
    model: nn.Module, trainable: Iterable[nn.Parameter]
) -> list[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Ordinary parameters for them, tied ones the same, by the module that they belong to.

    Args:
        trainable: those whose successors require gradients.
    """
    train = {id(each) for each in trainable}
    made: dict[int, torch.Tensor] = {}
    for _, each in encoded_weights(model).values():
        if id(each) not in made:
            made[id(each)] = nn.Parameter(each.numbers(), requires_grad=id(each) in train)
    return [(module, {"weight": made[id(each)]}) for module, each in encoded_weights(model).values()]


class Decoder:
    """Gives ordinary tensors for encoded ones; those that are tied get the same, while anybody has it."""

    def __init__(self) -> None:
        self._given: dict[tuple[int, torch.dtype], tuple[weakref.ref[Held], weakref.ref[torch.Tensor]]] = {}

    def __call__(self, weight: EncodedTensor) -> torch.Tensor:
        held, given = self._given.get(key := (id(weight.held), weight.dtype), (_nothing, _nothing))
        numbers = given() if held() is weight.held else None
        if numbers is None:
            numbers = weight.numbers()
            self._given[key] = weakref.ref(weight.held), weakref.ref(numbers)
        return numbers


def _nothing() -> Any:
    return None


def add_state_dict_hooks(model: nn.Module) -> list[Any]:
    """Makes `state_dict` of a model, and of any part of it, give ordinary tensors; returns removable handles."""
    decode = Decoder()

    def replace(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        weight: Any = module._parameters.get("weight")
        if isinstance(weight, EncodedTensor):
            needed, free = weight.numel() * weight.dtype.itemsize, available_memory()
            if needed > free:
                raise SaveError(
                    f"state_dict() needs {format_bytes(needed)} for {weight.path}, which is encoded in memory; "
                    f"{format_bytes(free)} are free"
                )
            state[f"{prefix}weight"] = decode(weight)

    return [module.register_state_dict_post_hook(replace) for module, _ in encoded_weights(model).values()]
