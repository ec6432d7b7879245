"""How one expert lies in a slot, and whether the native kernels can compute it.

A family's arithmetic is recognised by behaviour: its own eager forward runs on a tiny fake expert, and the result is
compared with what each native activation would give. Whatever is not recognised runs Transformers' own code ("stock").
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import isfunction
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from emoe.model.encoding import COMPUTED, encoding
from emoe.model.spec import ExpertForm, ParamSpec, slot_bytes, slot_offsets

# A probe of few experts and channels; tokens sweep three decades, so that gates reach every clamp and both tails.
_EXPERTS, _HIDDEN, _INTERMEDIATE, _TOKENS, _TOP_K = 3, 4, 6, 48, 2
# The probe runs in float64; a family that computes its gate in float32 differs by 1e-7, another activation by 1e-3.
_TOLERANCE = 1e-5

_Pair = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_ONE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class SlotLayout:
    """One expert in a slot.

    Attributes:
        nbytes: bytes it takes, a multiple of 64; the same wherever its arrays start.
        offsets: byte at which each array starts.
        native: the arguments of `emoe._C.MlpLayout`, or None where Transformers' own code has to serve.
        reason: why `native` is None, as a sentence; else "".
    """

    nbytes: int
    offsets: dict[str, int]
    native: Mapping[str, Any] | None
    reason: str


def describe(module: nn.Module, form: ExpertForm, places: Mapping[str, int] | None = None) -> SlotLayout:
    """Lays out one expert of an experts module.

    Args:
        module: Transformers' experts module; its parameters may be on the meta device or gone.
        form: of one expert.
        places: where in a page large arrays start; without it arrays start at multiples of 64.
    """
    offsets, nbytes = slot_offsets(form.stored, places)[0], slot_bytes(form.stored)
    try:
        native = _native(module, form, offsets)
    except _NotNativeError as reason:
        return SlotLayout(nbytes, offsets, None, str(reason))
    return SlotLayout(nbytes, offsets, native, "")


class _NotNativeError(Exception):
    pass


def _native(module: Any, form: ExpertForm, offsets: dict[str, int]) -> dict[str, Any]:
    name = type(module).__name__
    params = {param.name: param for param in form.params}
    up = "gate_up_proj" if module.has_gate else "up_proj"
    expected = [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if module.has_bias else [])]
    if set(expected) != set(params):
        raise _NotNativeError(f"{name} keeps the parameters {', '.join(params)}, not {', '.join(expected)}.")
    dtypes = sorted({param.dtype for param in params.values()})
    if not form.matrices and (len(dtypes) > 1 or dtypes[0] not in COMPUTED):
        raise _NotNativeError(f"Its weights are {' and '.join(dtypes)}, not one of {', '.join(COMPUTED)}.")
    hidden, rows = _matrix(params[up], module)
    intermediate, hidden_out = _matrix(params["down_proj"], module)
    if rows != intermediate * (2 if module.has_gate else 1):
        raise _NotNativeError(f"{name}: {up} and down_proj do not fit each other.")
    sizes = {"hidden": hidden, "intermediate": intermediate, "hidden_out": hidden_out}
    found = {"has_gate": bool(module.has_gate), **_recognise(module, up)}
    if any(matrix.transposed != module.is_transposed for matrix in form.matrices):
        raise _NotNativeError("Its encoded weights have a row for each input, not output.")
    for matrix in form.matrices:
        if why := encoding(matrix.encoding).not_native:
            raise _NotNativeError(f"The native kernels do not compute on {matrix.encoding}: {why}.")
    if form.matrices:
        return {**sizes, **found, **_encoded(form, offsets, up, intermediate, hidden_out, found)}
    return {
        **sizes,
        "dtype": dtypes[0],
        "transposed": bool(module.is_transposed),
        **found,
        "gate_up_offset": offsets[up],
        "down_offset": offsets["down_proj"],
        "gate_up_bias_offset": offsets.get(f"{up}_bias", -1),
        "down_bias_offset": offsets.get("down_proj_bias", -1),
    }


def _encoded(
    form: ExpertForm, offsets: dict[str, int], up: str, intermediate: int, hidden_out: int, found: Mapping[str, Any]
) -> dict[str, Any]:
    """The three matrices of an expert whose weights are encoded, as `_C.Weights` takes them."""
    step = 2 if found["interleaved"] else 1
    weights = {"gate": _rows(form, offsets, up, 0, step, intermediate)}
    if found["has_gate"]:
        weights["up"] = _rows(form, offsets, up, 1 if found["interleaved"] else intermediate, step, intermediate)
    return {**weights, "down": _rows(form, offsets, "down_proj", 0, 1, hidden_out)}


def _rows(form: ExpertForm, offsets: dict[str, int], param: str, first: int, step: int, count: int) -> dict[str, Any]:
    """Where rows first, first + step, ... of a parameter lie, in one matrix."""
    for matrix in form.matrices:
        start, its_step = (first - matrix.start) / matrix.step, step / matrix.step
        last = start + (count - 1) * its_step
        if matrix.param == param and start >= 0 and start % 1 == its_step % 1 == 0 and last < len(matrix.taken):
            how = encoding(matrix.encoding)
            scales = how.plane("scales")
            weights = {
                "codes": how.codes,
                "rows": matrix.rows,
                "depth": matrix.cols,
                "first": matrix.first + int(start) * matrix.every,
                "step": int(its_step) * matrix.every,
                "count": count,
                "planes": {plane: offsets[name] for plane, name in matrix.planes.items()},
                "scale": how.scale,
                "scale_block": (0, 0) if scales is None else scales.block,
            }
            bias = next((each for each in form.stored if each.name == f"{param}_bias"), None)
            if bias is not None:
                weights["bias"] = (offsets[bias.name] + first * encoding(bias.dtype).nbytes((1,)), step, bias.dtype)
            return weights
    raise _NotNativeError(f"Rows {first}, {first + step}, ... of {param} lie in several matrices.")


def _matrix(param: ParamSpec, module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a weight."""
    if len(param.shape) != 2:
        raise _NotNativeError(f"{param.name} has shape {list(param.shape)}, which is no matrix.")
    first, second = param.shape
    return (first, second) if module.is_transposed else (second, first)


class _Fake:
    """The experts module with tiny weights; everything else is the module's own."""

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.__dict__.update(weights, num_experts=_EXPERTS)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _recognise(module: Any, up: str) -> dict[str, Any]:
    """Activation, alpha, limit and interleaving of the gated MLP that computes what the module computes.

    The layers of one model are alike, so a result is kept for the config they share.
    """
    act = getattr(module, "act_fn", None)
    key = (type(module), id(module.config), _numbers(module), act if isfunction(act) else type(act), _numbers(act))
    config, found = _known.get(key, (None, None))
    if config is None or config() is not module.config:
        if len(_known) > _MOST_KNOWN:
            _known.clear()
        try:
            found = _probe(module, up)
        except _NotNativeError as reason:
            found = reason
        _known[key] = (weakref.ref(module.config), found)
    if isinstance(found, _NotNativeError):
        raise found
    return dict(found)


_known: dict[Any, tuple[Any, Any]] = {}
_MOST_KNOWN = 64


def _numbers(holder: Any) -> tuple[tuple[str, float], ...]:
    """The numbers among an object's attributes."""
    return tuple(
        (name, value)
        for name, value in sorted(getattr(holder, "__dict__", {}).items())
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    )


def _probe(module: Any, up: str) -> dict[str, Any]:
    name = type(module).__name__
    if module.has_post_expert_norm:
        raise _NotNativeError(f"{name} normalises each expert's output.")
    with torch.no_grad(), torch.device("cpu"):
        weights = _tiny_weights(module, up)
        hidden, index, routing = _tiny_tokens()
        try:
            actual = type(module).forward.__wrapped__(_Fake(module, weights), hidden, index, routing)
        except Exception as error:
            raise _NotNativeError(f"The forward of {name} does not run on a probe: {error}.") from error
        probe = _Probe(module, weights, up, hidden, index, routing)
        for found, pair in _candidates(module):
            if _same(actual, probe.output(pair, found["interleaved"])):
                return found
    raise _NotNativeError(f"The gate or the sum over experts of {name} is none that the native kernels compute.")


def _tiny_weights(module: Any, up: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = _INTERMEDIATE * (2 if module.has_gate else 1)
    shapes = {up: (rows, _HIDDEN), "down_proj": (_HIDDEN, _INTERMEDIATE)}
    weights = {}
    for key, (outputs, inputs) in shapes.items():
        size = (_EXPERTS, inputs, outputs) if module.is_transposed else (_EXPERTS, outputs, inputs)
        weights[key] = torch.randn(size, generator=generator, dtype=torch.float64)
        if module.has_bias:
            weights[f"{key}_bias"] = torch.randn((_EXPERTS, outputs), generator=generator, dtype=torch.float64)
    return weights


def _tiny_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((_TOKENS, _HIDDEN), generator=generator, dtype=torch.float64)
    hidden *= torch.logspace(-1, 2, _TOKENS, dtype=torch.float64)[:, None]
    index = torch.rand((_TOKENS, _EXPERTS), generator=generator).argsort(-1)[:, :_TOP_K]
    routing = torch.rand((_TOKENS, _TOP_K), generator=generator, dtype=torch.float64) + 0.1
    return hidden, index, routing


def _candidates(module: Any) -> Iterator[tuple[dict[str, Any], _Pair]]:
    """Arguments of the native layout, and what they make of gate and up.

    Plain activations come first: a clamp that is never reached is none.
    """
    interleavings = (False, True) if module.has_gate else (False,)
    for interleaved, (activation, one) in itertools.product(interleavings, _ONE.items()):
        yield {"interleaved": interleaved, "activation": activation}, _times_up(one)
    if not module.has_gate:
        return
    numbers = sorted({float(value) for _, value in _numbers(module) if math.isfinite(value) and value > 0})
    for interleaved, limit in itertools.product(interleavings, numbers):
        own = {"interleaved": interleaved, "limit": limit}
        yield {**own, "activation": "silu_clamped"}, _silu_clamped(limit)
        for alpha in numbers:
            yield {**own, "activation": "swiglu_clamped", "alpha": alpha}, _swiglu_clamped(alpha, limit)


def _times_up(one: Callable[[torch.Tensor], torch.Tensor]) -> _Pair:
    return lambda gate, up: one(gate) * up


def _silu_clamped(limit: float) -> _Pair:
    return lambda gate, up: F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _swiglu_clamped(alpha: float, limit: float) -> _Pair:
    def pair(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)

    return pair


class _Probe:
    """What the native kernels define, on the tiny expert: sum over k of routing[t, k] * mlp of expert index[t, k].

    Expert by expert, on matrices so small that torch starts no threads.
    """

    def __init__(
        self,
        module: Any,
        weights: dict[str, torch.Tensor],
        up: str,
        hidden: torch.Tensor,
        index: torch.Tensor,
        routing: torch.Tensor,
    ) -> None:
        self._module, self._weights, self._index, self._routing = module, weights, index, routing
        self._inner = [self._linear(hidden, up, expert) for expert in range(_EXPERTS)]  # [T, 2I] each

    def _linear(self, x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = self._weights[name][expert]
        out = x @ (weight if self._module.is_transposed else weight.T)
        return out + self._weights[f"{name}_bias"][expert] if self._module.has_bias else out

    def output(self, pair: _Pair, interleaved: bool) -> torch.Tensor:
        """[T, H] with this gate."""
        total = torch.zeros((_TOKENS, _HIDDEN), dtype=torch.float64)
        for expert, inner in enumerate(self._inner):
            if not self._module.has_gate:
                inner = pair(inner, torch.ones_like(inner))
            elif interleaved:
                inner = pair(inner[:, ::2], inner[:, 1::2])
            else:
                inner = pair(*inner.chunk(2, dim=-1))
            share = (self._routing * (self._index == expert)).sum(-1, keepdim=True)
            total += self._linear(inner, "down_proj", expert) * share
        return total


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Row by row, so that the large tokens do not hide the small ones."""
    if actual.shape != expected.shape:
        return False
    scale = expected.abs().amax(-1).clamp(min=1e-9)
    return bool(((actual - expected).abs().amax(-1) <= _TOLERANCE * scale).all())
