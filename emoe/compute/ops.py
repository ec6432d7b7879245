"""The native expert kernels as functions of torch tensors: checks dtype and memory order, then passes addresses.

Nothing is copied or converted here: a tensor that does not fit is refused. docs/kernels.md describes the arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from emoe import native
from emoe.errors import ConfigError
from emoe.model.encoding import encoding
from emoe.model.held import Held, native_arguments

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _FLOATS}
_MODES = ("pairs", "accumulate", "sum")


class Slots(Protocol):
    """What a slab shows of itself: `emoe._C.Slab`, or anything with an address."""

    @property
    def address(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...


def make_layout(native_layout: Mapping[str, Any] | Any, module: Any = None) -> Any:
    """The `_C.MlpLayout` of a mapping of its arguments; one that is built already is returned as it is.

    Args:
        native_layout: what `layout.describe` gives, for plain or encoded experts.
        module: the native module, where it is not `emoe._C`.

    Raises:
        ConfigError: a size, offset or flag contradicts another.
        BackendUnavailable: the native module was not built.
    """
    module = module or native.load()
    if isinstance(native_layout, module.MlpLayout):
        return native_layout
    if "gate" not in native_layout:
        return module.MlpLayout(**native_layout)
    matrices = {name: module.Weights(**native_layout[name]) for name in ("gate", "up", "down") if name in native_layout}
    return module.MlpLayout.encoded(**{**native_layout, **matrices})


def routed(index: torch.Tensor, experts: int) -> list[int]:
    """The distinct experts of [T, K] ids, ascending; ids outside [0, experts) are none."""
    return distinct(index.flatten().tolist(), experts)


def distinct(ids: Iterable[int], experts: int) -> list[int]:
    """As `routed`, of ids that the host has."""
    return sorted({expert for expert in ids if 0 <= expert < experts})


def gather_mlp(
    layout: Any,
    slab: Slots,
    slot_of: npt.NDArray[np.int32],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    mode: str,
) -> None:
    """Adds the weighted output of every expert that has a slot to `out`, or sums them there.

    Args:
        layout: `_C.MlpLayout` of one slot.
        slab: where the slots lie.
        slot_of: [E] int32, the slot of each expert, -1: not in this call.
        hidden: [T, H] float32, float16 or bfloat16.
        index: [T, K] int64 expert ids; one outside [0, E) is skipped.
        weights: [T, K] float32, float16 or bfloat16.
        out: float32, zero before the first call. mode "pairs": [T, K, Ho], each pair written at the rank of its expert
            among the token's ids; mode "accumulate": [T, Ho], added to. Mode "sum": [T, Ho] in the dtype of `hidden`,
            what `combine` makes of the pairs of this one call.
        mode: "pairs", "accumulate" or "sum".

    Raises:
        ConfigError: a tensor is not on the CPU, not contiguous, or of another dtype or shape; or a slot does not exist.
    """
    if mode not in _MODES:
        raise ConfigError(f"mode '{mode}' is not one of: {', '.join(_MODES)}")
    if index.dim() != 2:
        raise ConfigError(f"index has shape {tuple(index.shape)}, not [T, K]")
    T, K = index.shape
    _check("hidden", hidden, _FLOATS, (T, layout.hidden))
    _check("index", index, (torch.int64,), (T, K))
    _check("weights", weights, _FLOATS, (T, K))
    floats = (hidden.dtype,) if mode == "sum" else (torch.float32,)
    _check("out", out, floats, (T, K, layout.hidden_out) if mode == "pairs" else (T, layout.hidden_out))
    if not isinstance(slot_of, np.ndarray):
        raise ConfigError(f"slot_of is a {type(slot_of).__name__}, not an int32 numpy array [E]")
    if slot_of.dtype != np.int32 or slot_of.ndim != 1:
        raise ConfigError(f"slot_of is a {slot_of.dtype} array of shape {slot_of.shape}, not int32 [E]")
    if slot_of.size and int(slot_of.max()) >= slab.slots:
        raise ConfigError(f"slot_of names slot {int(slot_of.max())}, but the slab has {slab.slots} slots")
    native.load().gather_mlp(
        layout,
        slab.address,
        slab.slot_bytes,
        slot_of,
        hidden.data_ptr(),
        _name(hidden.dtype),
        T,
        index.data_ptr(),
        weights.data_ptr(),
        _name(weights.dtype),
        K,
        out.data_ptr(),
        mode,
    )


def combine(pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums [T, K, Ho] float32 pairs over the ranks, in ascending order, and rounds once: [T, Ho] of `dtype`.

    Raises:
        ConfigError: `pairs` is not a contiguous float32 tensor of three dimensions, or `dtype`
            is not one of float32, float16, bfloat16.
    """
    if pairs.dim() != 3:
        raise ConfigError(f"pairs has shape {tuple(pairs.shape)}, not [T, K, Ho]")
    _check("pairs", pairs, (torch.float32,), tuple(pairs.shape))
    T, K, Ho = pairs.shape
    out = torch.empty((T, Ho), dtype=dtype)
    native.load().combine(pairs.data_ptr(), T, K, Ho, out.data_ptr(), _name(dtype))
    return out


def _name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def _check(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype in dtypes and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous():
        return
    if not tensor.is_cpu:
        raise ConfigError(f"{name} is on {tensor.device}, not on the CPU")
    if tensor.dtype not in dtypes:
        raise ConfigError(f"{name} is {_name(tensor.dtype)}, not one of: {', '.join(map(_name, dtypes))}")
    if tensor.shape != shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    raise ConfigError(f"{name} has strides {tensor.stride()}: it must be contiguous")


def linear(held: Held, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer whose weight is encoded.

    Args:
        held: [outputs, inputs].
        x: [T, inputs] float32, float16 or bfloat16.
        bias: [outputs] of one of these, or None.

    Returns:
        [T, outputs] in the dtype of `x`.

    Raises:
        ConfigError: a tensor is not on the CPU, or of another dtype or shape.
    """
    return _multiply(*prepared(held), (held.rows, held.cols), x, bias)


def plain_linear(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer whose weight [outputs, inputs] is plain, and contiguous on the CPU; else as `linear`."""
    rows, cols = weight.shape
    return _multiply(*prepared(weight), (rows, cols), x, bias)


def prepared(weight: Held | torch.Tensor) -> tuple[Any, int]:
    """The `_C.Weights` of a weight [outputs, inputs], encoded or plain and contiguous, and its address."""
    if isinstance(weight, torch.Tensor):
        return _plain_weights(weight.dtype, *weight.shape), weight.data_ptr()
    if weight.prepared is None:
        weight.prepared = native.load().Weights(**weight.native())
    return weight.prepared, weight.buffer.data_ptr()


@functools.cache
def _plain_weights(dtype: torch.dtype, rows: int, cols: int) -> Any:
    return native.load().Weights(**native_arguments(encoding(NAMES[dtype]), rows, cols, {"values": 0}))


def plain_dtypes(dense: str) -> tuple[frozenset[torch.dtype], frozenset[torch.dtype]]:
    """Dtypes in which the kernels compute plain linear layers, for a value of the option `dense`.

    "native": all. "auto": all for few rows, and for many those of 16 bits that torch has no product of its own for on
    this machine; nothing on the scalar unit.

    Returns:
        (for up to 8 rows, for more).
    """
    every = frozenset(_FLOATS)
    if dense == "native":
        return every, every
    if dense == "torch" or native.load().isa() == "scalar":
        return frozenset(), frozenset()
    known = torch.ops.mkldnn
    own = {torch.bfloat16: known._is_mkldnn_bf16_supported(), torch.float16: known._is_mkldnn_fp16_supported()}
    return every, frozenset(dtype for dtype, has in own.items() if not has)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of the rows of x [..., width] float32, float16 or bfloat16, with a weight [width] of the same dtype.

    Raises:
        ConfigError: a tensor is not on the CPU, or of another dtype or shape.
    """
    if not x.is_contiguous():
        x = x.contiguous()
    width = x.shape[-1]
    _check("x", x, _FLOATS, tuple(x.shape))
    _check("weight", weight, (x.dtype,), (width,))
    out = torch.empty_like(x)
    native.load().rms_norm(
        x.numel() // width, width, NAMES[x.dtype], epsilon, x.data_ptr(), weight.data_ptr(), out.data_ptr()
    )
    return out


def _multiply(
    weights: Any, address: int, shape: tuple[int, int], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows, cols = shape
    T = len(x)
    if not (x.is_contiguous() and (bias is None or bias.is_contiguous())):  # a call more than a decoded token needs
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    _check("x", x, _FLOATS, (T, cols))
    if bias is not None:
        _check("bias", bias, _FLOATS, (rows,))
    y = torch.empty((T, rows), dtype=x.dtype)
    native.load().linear(
        weights,
        address,
        x.data_ptr(),
        NAMES[x.dtype],
        T,
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        "float32" if bias is None else NAMES[bias.dtype],
    )
    return y
