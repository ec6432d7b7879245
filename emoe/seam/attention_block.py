"""Attention blocks of a model whose decode steps are one call of a function of emoe's, in the place of thirty.

A class of blocks is known by its code, which may name no more than what a plain block needs, and each block by a trial:
decode steps with random numbers, of both sides, that have to agree bit for bit. While emoe runs the model its blocks
are of a class derived from their own, whose forward asks emoe first; parameters, hooks and names stay. Transformers'
own forward runs whenever anything is not as it was in the trial.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache

from emoe.errors import ConfigError
from emoe.model.attention_form import UNSERVED, AttentionForm, BlockNorm, BlockStep, Projection, is_mask
from emoe.model.held import Held
from emoe.model.seen import operations_are_seen
from emoe.seam.kv_room import RoomyLayer
from emoe.seam.linear import EncodedTensor
from emoe.seam.norms import __name__ as OF_NORMS
from emoe.seam.one_row import NAME
from emoe.seam.plain_linear import NARROW_ROWS, NativeWeight, as_any, ordinary

logger = logging.getLogger(__name__)

Make = Callable[[AttentionForm], BlockStep]

_KEY = "_emoe_step"
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}
# All that the code of a plain block names; `clip_qkv`, `clamp_` and `use_qk_norm` are for the trial.
_NAMES = {
    *_PROJECTIONS.values(), *_NORMS.values(), "shape", "head_dim", "view", "transpose", "reshape", "contiguous",
    "apply_rotary_pos_emb", "update", "layer_idx", "config", "_attn_implementation", "ALL_ATTENTION_FUNCTIONS",
    "get_interface", "eager_attention_forward", "training", "attention_dropout", "scaling", "getattr", "clip_qkv",
    "clamp_", "use_qk_norm", "sliding_window",
}  # fmt: skip
_TEXTS = {"sliding_window", "dropout", "scaling", "min", "max"}
_PAST = 5  # keys before those of a trial
_SIZES = (1.0, 1000.0)  # of its numbers: what is clamped shows


@functools.cache
def names_no_more(kind: Any) -> bool:
    """Whether the code of a class' forward names nothing that is not part of a plain attention block."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or code.co_freevars or not set(code.co_names) <= _NAMES:
        return False
    if any(isinstance(each, CodeType) for each in code.co_consts):  # what that names is not seen here
        return False
    return _texts(code) - {kind.forward.__doc__} <= _TEXTS


def _texts(code: CodeType) -> set[str]:
    """Names of arguments and attributes among its constants, and its docstring."""
    flat = [each for constant in code.co_consts for each in (constant if type(constant) is tuple else (constant,))]
    return {each for each in flat if isinstance(each, str)}


class _Place(NamedTuple):
    """Where the numbers of a parameter are, and how they lie."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Any) -> _Place | None:
        """None of no tensor, and of what is encoded, which nobody moves."""
        if tensor is None or isinstance(tensor, EncodedTensor):
            return None
        tensor = ordinary(tensor)
        return _Place(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


@dataclass(frozen=True)
class _Part:
    """A module of a block as it was in the trial: of the kind, with a weight and perhaps a bias in these places.

    Attributes:
        epsilon: of a norm; None of a projection.
    """

    name: str
    module: Any
    kind: Any
    weight: Any
    bias: Any
    places: tuple[_Place | None, _Place | None]
    epsilon: float | None

    @staticmethod
    def of(name: str, module: Any) -> _Part:
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        epsilon = vars(module).get("variance_epsilon")
        return _Part(name, module, type(module), weight, bias, (_Place.of(weight), _Place.of(bias)), epsilon)

    def stays(self, block: nn.Module) -> bool:
        """Whether the block still has it, nothing else is to happen when it is called, and its values are there."""
        module = block._modules.get(self.name)
        if module is not self.module or type(module) is not self.kind:
            return False
        own = vars(module)
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
        parameters = own["_parameters"]
        if parameters.get("weight") is not self.weight or parameters.get("bias") is not self.bias:
            return False
        if own.get("variance_epsilon") != self.epsilon:
            return False
        return (_Place.of(self.weight), _Place.of(self.bias)) == self.places

    @property
    def parameters(self) -> tuple[Any, ...]:
        return self.weight, self.bias


def _requires_grad(tensor: torch.Tensor) -> bool:
    return bool(as_any(torch.Tensor.requires_grad.__get__, (), (tensor,), {}))  # type: ignore[attr-defined]


# Of a block: what its code may ask for beside its parts, and is to be as in the trial.
_ATTRIBUTES = ("head_dim", "layer_idx", "use_qk_norm")


@dataclass(frozen=True)
class _Known:
    """What a trial found of one block.

    Attributes:
        dtype, heads, kv_heads, depth: as `AttentionForm` has them.
        inputs: columns of x.
        parts: its modules.
        attributes: those of _ATTRIBUTES.
        clips: whether its code asks its config for `clip_qkv`.
        rotated: how many elements of a head may be rotated.
        step: computes it.
    """

    dtype: torch.dtype
    heads: int
    kv_heads: int
    depth: int
    inputs: int
    parts: tuple[_Part, ...]
    attributes: tuple[Any, ...]
    clips: bool
    rotated: frozenset[int]
    step: BlockStep

    def run(self, block: Any, args: tuple[Any, ...], given: dict[str, Any]) -> torch.Tensor | None:
        """[B, 1, outputs] of a decode step, or None where the block's own code computes it."""
        x = given.get("hidden_states")
        if args or type(x) is not torch.Tensor or x.dim() != 3 or x.shape[1:] != (1, self.inputs):
            return None
        batch = x.shape[0]
        if x.dtype != self.dtype or not (0 < batch <= NARROW_ROWS and x.is_cpu) or block.training:
            return None
        if operations_are_seen() or torch._C._len_torch_function_stack() or torch.is_autocast_enabled("cpu"):
            return None
        config = block.config
        if config._attn_implementation != NAME or (self.clips and config.clip_qkv is not None):
            return None
        if any(given.get(each) is not None for each in UNSERVED):  # what else it is given reaches attention alone
            return None
        layer = _layer(given.get("past_key_values"), block.layer_idx)
        positions = given.get("position_embeddings")
        if layer is None or type(positions) is not tuple or len(positions) != 2:
            return None
        mask = given.get("attention_mask")
        if not self._rotates(batch, *positions) or not self._fits(batch, layer.keys, layer.values):
            return None
        if not is_mask(mask, batch, self.heads, layer.keys.shape[2] + 1):
            return None
        if not self._stays(block, (x, *positions, layer.keys, layer.values)):
            return None
        keys, values = layer.next_row()
        y = self.step(x.reshape(batch, -1).contiguous(), *positions, keys, values, mask, block.scaling)
        layer.take(keys, values)
        return y.view(batch, 1, -1)

    def _rotates(self, batch: int, cos: Any, sin: Any) -> bool:
        for each in (cos, sin):
            if type(each) is not torch.Tensor or each.dim() != 3 or each.dtype != self.dtype or not each.is_cpu:
                return False
            if each.shape[0] not in (1, batch) or each.shape[1] != 1 or each.stride(-1) != 1:
                return False
        return cos.shape == sin.shape and cos.stride() == sin.stride() and cos.shape[-1] in self.rotated

    def _fits(self, batch: int, keys: Any, values: Any) -> bool:
        """Whether a row of the block can follow these of a cache."""
        for each in (keys, values):
            if type(each) is not torch.Tensor or each.dim() != 4 or not each.shape[2]:
                return False
            if each.shape != (batch, self.kv_heads, keys.shape[2], self.depth) or each.dtype != self.dtype:
                return False
            if not each.is_cpu or each.stride(-1) != 1:
                return False
        return True

    def _stays(self, block: Any, given: tuple[torch.Tensor, ...]) -> bool:
        """Whether the block is the one of the trial, nobody sees its parts being called, and no gradients are due."""
        if _attributes(block) != self.attributes or _has_any_global_hook():
            return False
        for part in self.parts:
            if not part.stays(block):
                return False
        if not torch.is_grad_enabled():
            return True
        parameters = [each for part in self.parts for each in part.parameters if each is not None]
        return not any(_requires_grad(each) for each in (*given, *parameters))


def _attributes(block: nn.Module) -> tuple[Any, ...]:
    own = vars(block)
    return tuple(own.get(each) for each in _ATTRIBUTES)


def _layer(cache: Any, index: int) -> RoomyLayer | None:
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not RoomyLayer or not layer.is_initialized or "update" in vars(layer) or "update" in vars(cache):
        return None
    return layer


def _form(block: Any) -> tuple[AttentionForm, tuple[_Part, ...]] | None:
    """What a block looks like; None where it lacks a part, or a part is not computed by emoe."""
    parts = {}
    for name, module in {**_PROJECTIONS, **_NORMS}.items():
        found = block._modules.get(module)
        if found is None:
            continue
        if found._parameters.get("weight") is None or found._buffers or found._modules:
            return None
        parts[name] = _Part.of(module, found)
        if not parts[name].stays(block):
            return None
    if not parts.keys() >= _PROJECTIONS.keys() or len(parts) not in (len(_PROJECTIONS), len(_PROJECTIONS | _NORMS)):
        return None
    if not isinstance(getattr(block, "head_dim", None), int) or not isinstance(getattr(block, "layer_idx", None), int):
        return None
    dtype = parts["query"].weight.dtype
    if not all(_is_read(each, dtype) for part in parts.values() for each in part.parameters):
        return None
    projections: dict[str, Projection] = {}
    norms: dict[str, BlockNorm] = {}
    for name, part in parts.items():
        if name in _PROJECTIONS:
            if part.kind is not nn.Linear or not isinstance(part.weight, EncodedTensor | NativeWeight):
                return None
            if part.bias is not None and part.bias.shape != part.weight.shape[:1]:
                return None
            held = part.weight.held if isinstance(part.weight, EncodedTensor) else ordinary(part.weight)
            projections[name] = Projection(held, None if part.bias is None else ordinary(part.bias))
        else:
            if part.kind.__module__ != OF_NORMS or type(part.weight) is not nn.Parameter or part.epsilon is None:
                return None  # nor does emoe compute it alone
            norms[name] = BlockNorm(ordinary(part.weight), part.epsilon)
    depth = block.head_dim
    form = AttentionForm(
        dtype=dtype, heads=_rows(projections["query"]) // depth,
        kv_heads=_rows(projections["key"]) // depth, depth=depth, query=projections["query"], key=projections["key"],
        value=projections["value"], out=projections["out"], query_norm=norms.get("query_norm"),
        key_norm=norms.get("key_norm"),
    )  # fmt: skip
    return form, tuple(parts.values())


def _is_read(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether the kernels read a weight or a bias as it lies, or there is none."""
    if tensor is None or isinstance(tensor, EncodedTensor):
        return tensor is None or tensor.dtype == dtype
    if type(tensor) is not nn.Parameter and not isinstance(tensor, NativeWeight):
        return False
    tensor = ordinary(tensor)
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()


def _rows(projection: Projection) -> int:
    weight = projection.weight
    return weight.rows if isinstance(weight, Held) else weight.shape[0]


def _columns(projection: Projection) -> int:
    weight = projection.weight
    return weight.cols if isinstance(weight, Held) else weight.shape[1]


class _Past:
    """In the place of a cache with some keys and values."""

    def __init__(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._index, self.keys, self.values = index, keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index != self._index:
            raise ConfigError(f"layer {index} is not {self._index}")
        self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        return self.keys, self.values


def _agrees(block: Any, form: AttentionForm, step: BlockStep, rotated: int, size: float) -> bool:
    """Whether both sides give the same bits for random numbers of a size."""
    generator = torch.Generator().manual_seed(rotated)
    width = _columns(form.query)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(form.dtype)

    batch = 2
    x, cos, sin = size * random(batch, 1, width), random(batch, 1, rotated), random(batch, 1, rotated)
    keys, values = (random(batch, form.kv_heads, _PAST, form.depth) for _ in range(2))
    past = _Past(block.layer_idx, keys, values)
    own, weights = type(block).forward(
        block, hidden_states=x, position_embeddings=(cos, sin), attention_mask=None, past_key_values=past
    )
    room = [torch.cat((each, torch.zeros_like(each[:, :, -1:])), 2) for each in (keys, values)]
    found = step(x[:, 0], cos, sin, room[0], room[1], None, block.scaling)
    pairs = ((own, found.view(batch, 1, -1)), (past.keys, room[0]), (past.values, room[1]))
    return weights is None and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _known(block: Any, make: Make) -> _Known | None:
    """Of a block whose class `names_no_more`: None where it is no plain block, or the trial finds another."""
    found = _form(block)
    if found is None or block.config.sub_configs:
        return None
    form, parts = found
    try:
        step = make(form)
    except ConfigError:
        return None
    twin = _twin(block)
    # All, or the half that partial rotation leaves.
    counts = [count for count in (form.depth, form.depth // 2) if count and count % 2 == 0]
    rotated = [count for count in counts if _rotation_agrees(twin, form, step, count)]
    if not rotated:
        return None
    clips = "clip_qkv" in type(block).forward.__code__.co_names
    return _Known(
        form.dtype, form.heads, form.kv_heads, form.depth, _columns(form.query), parts, _attributes(block), clips,
        frozenset(rotated), step,
    )  # fmt: skip


def _twin(block: Any) -> Any:
    """One with the same parts whose config, its own, names emoe's attention: nothing of the model is changed."""
    twin = object.__new__(type(block))
    config = copy.copy(block.config)
    config._attn_implementation = NAME
    vars(twin).update(vars(block), config=config)
    return twin


def _rotation_agrees(block: Any, form: AttentionForm, step: BlockStep, rotated: int) -> bool:
    try:
        with torch.no_grad():
            return all(_agrees(block, form, step, rotated, size) for size in _SIZES)
    except Exception as error:  # whatever its code does with what it is given
        logger.debug("emoe: %s with %d rotated: %s", type(block).__name__, rotated, error)
        return False


@functools.cache
def _class_of(kind: Any) -> type[nn.Module]:
    @functools.wraps(kind.forward)  # others ask for its parameters
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = vars(self).get(_KEY)
        y = None if known is None else known.run(self, args, kwargs)
        return kind.forward(self, *args, **kwargs) if y is None else (y, None)

    def reduce(self: Any, protocol: Any) -> Any:
        """Copied and pickled as the block that it stands for."""
        state = {name: value for name, value in vars(self).items() if name != _KEY}
        return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__})


class AttentionBlocks:
    """Has decode steps of the plain attention blocks of a model computed by what `make` gives, until `remove`.

    Their linear layers and norms are computed by emoe already, and so is their attention (`OneRowAttention`).

    Attributes:
        modules: the blocks.
    """

    def __init__(self, model: nn.Module, make: Make) -> None:
        self.modules: list[Any] = []
        found = []
        each: Any
        kind: Any  # a type, which mypy takes for a module: its hash is another function
        for each in model.modules():
            kind = type(each)
            if names_no_more(kind) and (known := _known(each, make)) is not None:
                found.append((each, known))
        for each, known in found:
            kind = type(each)
            vars(each)[_KEY] = known
            each.__class__ = _class_of(kind)
            self.modules.append(each)

    def remove(self) -> None:
        """The blocks are of their own class again; calling it again does nothing."""
        for module in self.modules:
            if type(module).__module__ == __name__:
                module.__class__ = type(module).__bases__[0]
            vars(module).pop(_KEY, None)
